"""Tokens per second of prefill, decoding, scoring and learning, against the roofline of this machine and model.

    python benchmarks/roofline.py --model runs/peers/100m --threads 2
    python benchmarks/roofline.py --model models/smollm2-135m-instruct --threads 2 --lora --dtype bfloat16
    python benchmarks/roofline.py --model runs/peers/500m --dtype bfloat16 --batch 64 256      # with a GPU

The roofline has two measured numbers: the rate of a large matrix product in the model's dtype, and the bandwidth of
reading a tensor much larger than the caches. A phase needs at least the time of its multiplications at that rate, or of
its weights and key-value cache at that bandwidth, whichever is longer. `--profile` shows where a decoding step spends
the rest. Runs on a GPU if there is one.
"""

import argparse
import time
from contextlib import contextmanager

import torch
from facts import add_out, append
from torch.profiler import ProfilerActivity, profile

PROMPT, NEW = 64, 64
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, nargs="+", default=[64])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of weights and products")
    parser.add_argument("--profile", action="store_true", help="print the operations of the decoding steps")
    add_out(parser, "roofline")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    policy = load(args)
    rate, bandwidth = matrix_rate(policy.dtype), read_bandwidth()
    print(f"{rate / 1e9:.0f} GFLOP/s in a matrix product, {bandwidth / 1e9:.1f} GB/s read")
    for batch in args.batch:
        against_the_roof(args, policy, batch, rate, bandwidth)


def against_the_roof(args: argparse.Namespace, policy, batch: int, rate: float, bandwidth: float) -> None:
    """Measure one batch size, print it and append it to the results."""
    engine, prompts = engine_of(policy), prompts_of(policy, batch)
    rows = {}
    for phase, (seconds, tokens, flops, data) in measure(policy, engine, prompts, lora=args.lora).items():
        least = max(flops / rate, data / bandwidth)
        rows[phase] = {"tokens_per_s": tokens / seconds, "roof": tokens / least, "share": least / seconds}
        bound = "products" if flops / rate > data / bandwidth else "bandwidth"
        print(
            f"{batch:4} rows {phase:8} {tokens / seconds:8.0f} tokens/s of {tokens / least:8.0f} "
            f"({least / seconds:.0%}; by {bound})",
            flush=True,
        )
    if args.profile:
        on_gpu = DEVICE.type == "cuda"
        with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as seen:
            draw(engine, prompts, NEW)
        order = f"self_{DEVICE.type}_time_total"
        print(seen.key_averages().table(sort_by=order, row_limit=20 if on_gpu else 12, max_name_column_width=60))
    setting = {name: getattr(args, name) for name in ("model", "lora", "threads", "dtype")}
    speeds = {"gflops": rate / 1e9, "gb_per_s": bandwidth / 1e9}
    append(args.out, {**setting, "batch": batch, **speeds, "phases": rows})


def load(args: argparse.Namespace):
    """The model, with an fp32 adapter if asked for."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype)).eval()
    if args.lora:
        model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    return model.to(DEVICE)


def matrix_rate(dtype: torch.dtype, size: int = 2048 if DEVICE.type == "cpu" else 8192) -> float:
    """Floating-point operations per second of a square product, the best of ten."""
    a, b = torch.rand(2, size, size, device=DEVICE).to(dtype)
    return max(2 * size**3 / timed(lambda: a @ b) for _ in range(10))


def read_bandwidth(size: int = 2**28 if DEVICE.type == "cpu" else 2**31) -> float:
    """Bytes per second of summing 1 GiB (8 on a GPU), the best of ten."""
    x = torch.ones(size, device=DEVICE)
    return max(4 * size / timed(x.sum) for _ in range(10))


def timed(work) -> float:
    """Seconds that `work()` takes."""
    wait()
    began = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - began


def wait() -> None:
    """Wait until everything that was launched has run."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def engine_of(model):
    """Our engine, where no completion ends before the budget."""
    from bondlm.engines.local.engine import TransformersEngine

    @contextmanager
    def use(role):
        yield model

    return TransformersEngine(use, eos_ids=[model.config.vocab_size], pad_id=0)


def prompts_of(model, batch: int) -> list[list[int]]:
    """Random prompts of one length, without common prefixes."""
    ids = torch.randint(3, model.config.vocab_size, (batch, PROMPT), generator=torch.Generator().manual_seed(0))
    return ids.tolist()


def draw(engine, prompts, new: int):
    """One completion of each prompt."""
    return engine.generate(prompts, 1, role="policy", max_new_tokens=new, seeds=list(range(len(prompts))))


def costs(model, rows: float, prompt: float, new: float) -> dict[str, tuple[float, float]]:
    """Floating-point operations and bytes of each phase, for `rows` rows of `prompt` and `new` tokens.

    `learn` is one pass over all tokens, `decode` covers those after the prompt.
    """
    head = model.get_output_embeddings().weight.numel()
    inputs = model.get_input_embeddings().weight
    tied = inputs is model.get_output_embeddings().weight
    body = sum(p.numel() for p in model.parameters()) - head - (0 if tied else inputs.numel())
    config = model.config
    heads, size = config.num_attention_heads, config.hidden_size // config.num_attention_heads

    def attention(queries: float, keys: float) -> float:  # operations per row
        return 4 * config.num_hidden_layers * heads * size * queries * keys

    width = model.dtype.itemsize
    cached = 2 * width * config.num_hidden_layers * config.num_key_value_heads * size  # bytes per token
    weights, length = float(width * (body + head)), prompt + new
    forward = rows * (2 * body * length + 2 * head * new + attention(length, length / 2))
    return {
        "prefill": (rows * (2 * body * prompt + 2 * head + attention(prompt, prompt / 2)), weights),
        "decode": (
            rows * new * (2 * (body + head) + attention(1, prompt + new / 2)),
            new * (weights + rows * cached * (prompt + new / 2)),
        ),
        "score": (forward, weights),
        "learn": (forward, weights),
    }


def measure(model, engine, prompts, *, lora: bool) -> dict[str, tuple[float, float, float, float]]:
    """Seconds, tokens, floating-point operations and bytes of each phase; the best of three."""
    from bondlm.models.head import exact_head
    from bondlm.models.logprobs import collate, row_logprobs, sequence_logprobs

    batch = len(prompts)
    cost = costs(model, batch, PROMPT, NEW)
    rows = [(p, c.ids) for p, (c,) in zip(prompts, draw(engine, prompts, NEW), strict=True)]
    prefill = min(timed(lambda: draw(engine, prompts, 1)) for _ in range(3))
    whole = min(timed(lambda: draw(engine, prompts, NEW + 1)) for _ in range(3))
    score = min(timed(lambda: row_logprobs(model, rows, 0, start_id=None, device=DEVICE)) for _ in range(3))
    micro = {name: tensor.to(DEVICE) for name, tensor in collate([(p, [c]) for p, c in rows[:16]], 0).items()}
    exact = exact_head(model, DEVICE)

    def learn() -> None:
        sequence_logprobs(model, micro, head=exact).sum().backward()

    model.train()
    model.requires_grad_(not lora)
    if lora:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name)
    learning = min(timed(learn) for _ in range(3))
    model.eval()
    passes = 2 if lora else 3  # forward, backward through activations, and through weights
    length = PROMPT + NEW
    flops, weights = cost["learn"]
    return {
        "prefill": (prefill, batch * PROMPT, *cost["prefill"]),
        "decode": (whole - prefill, batch * NEW, *cost["decode"]),
        "score": (score, batch * length, *cost["score"]),
        "learn": (learning, 16 * length, passes * flops * 16 / batch, weights),
    }


if __name__ == "__main__":
    main()
