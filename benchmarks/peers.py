"""J-BOND beside TRL's RLOO, GRPO and OnlineDPO on the same work: a Llama of 6 M to 1.3 B parameters.

    python benchmarks/peers.py --size 6m --threads 1
    python benchmarks/peers.py --size 6m --threads 1 --lengths full
    python benchmarks/peers.py --size 6m --threads 1 --settings default
    python benchmarks/peers.py --size 100m --lora --threads 2
    python benchmarks/peers.py --size 500m --lora --dtype bfloat16 --tokens 128      # with a GPU
    python benchmarks/peers.py --size 500m --lora --completions 192 --lengths full --against rloo --vllm-python PYTHON

Only cost is compared: the models have random weights (written to runs/peers). Per step, every trainer draws 48
completions (`--completions`, three per prompt) of at most 64 tokens for prompts of 16 to 96 tokens, and scores them
with the same reward model. `--lengths vary` gives them 48 lengths that are drawn once (mean about 24 of 64 tokens);
with `full` none ends early. Lengths are the same in every trainer and step, whatever the sampler draws, since the
end-of-sequence token is forced. `--settings default` keeps TRL's defaults (bf16 autocast, gradient checkpointing).
`--dtype bfloat16` applies to all: bf16 base weights under an adapter, else autocast over fp32 weights. `sft` is one
plain forward, backward and update on as many prompts and completions as J-BOND learns on. It draws and scores nothing,
and its memory is what ours is measured against.

With `--vllm-python` both sides draw with vLLM: bondlm from its own server (`vllm_server: auto`), RLOO and GRPO in their
own process, as TRL does by default (`vllm_mode="colocate"`). They run with that interpreter, so it needs TRL too. With
`--sleep auto` both put vLLM to sleep while they learn. Lengths cannot be forced there: a random model ends a completion
about once in as many tokens as its vocabulary has. CPU seconds are the trainer's, without the server's.
Needs `pip install trl==1.16.0`.
"""

import argparse
import itertools
import json
import math
import random
import signal
import sys
from pathlib import Path

from facts import add_out, append
from step import forget_this_folder, in_a_process, measure

SAMPLES = 3  # per prompt: one of the policy, two of the anchor
MEAN_LENGTH = 3 / 8  # of the budget, before it truncates
EOS = 0  # the first token, drawn by the uniform number 0
EARLY_ENDS = 0.02  # share of tokens that may be missing when lengths are not forced
FOLDER = Path("runs/peers")
SIZES = {  # vocabulary, hidden size, layers, heads
    "6m": (4096, 256, 6, 4),
    "100m": (16384, 640, 16, 10),
    "500m": (32768, 1280, 24, 20),
    "1.3b": (32768, 2048, 24, 16),
    "7b": (32768, 4096, 32, 32),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="6m")
    parser.add_argument("--lora", action="store_true", help="train an adapter instead of all weights")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--tokens", type=int, default=64, help="maximum tokens per completion")
    parser.add_argument("--completions", type=int, default=48, help="completions per step, a multiple of 3")
    parser.add_argument("--lengths", choices=["vary", "full"], default="vary")
    parser.add_argument("--settings", choices=["sensible", "default"], default="sensible", help="settings of TRL")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--against", nargs="*", default=["rloo", "grpo", "online_dpo", "sft"])
    parser.add_argument("--vllm-python", help="draw with vLLM, from this interpreter")
    parser.add_argument("--sleep", choices=["auto", "never"], default="never", help="vLLM while a trainer learns")
    parser.add_argument("--server-args", type=str.split, default=["--max-model-len=1024"], help="for bondlm's server")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    add_out(parser, "peers")
    args = parser.parse_args()
    if args.completions % SAMPLES:
        parser.error(f"--completions {args.completions}: not a multiple of {SAMPLES}")
    if args.vllm_python and (args.lengths != "full" or "online_dpo" in args.against):
        parser.error("--vllm-python: only with --lengths full, and --against rloo, grpo or sft")
    if args.one:
        import torch

        torch.set_num_threads(args.threads)
        print("RESULT " + json.dumps(measure(build(args), args.threads, args.completions)), flush=True)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("out of time"))
    prepare(args)
    with_vllm = {name: args.vllm_python for name in ("rloo", "grpo") if args.vllm_python}
    names = ("size", "lora", "dtype", "completions", "lengths", "settings", "threads", "steps")
    setting = {name: getattr(args, name) for name in names} | {"vllm": bool(args.vllm_python), "sleep": args.sleep}
    tokens = sum(min(args.tokens, length) for length in lengths(args))
    setting |= {"most_tokens": args.tokens, "tokens": tokens}
    results = {}
    for name in ["bondlm", *args.against]:
        try:
            results[name] = in_a_process(name, python=with_vllm.get(name, sys.executable))
        except SystemExit:  # out of memory, or of time (SIGTERM): what the others took is a result, too
            append(args.out, setting | {"results": results, "failed": name})
            raise
    for name, result in results.items():
        if name != "sft":
            result["cpu_ms_per_token"] = 1000 * result["cpu"] / tokens
    append(args.out, setting | {"results": results})
    report(args, results, tokens)


def report(args: argparse.Namespace, results: dict, tokens: int) -> None:
    """Print the ratios, and see that all have drawn as many tokens."""
    ours = results["bondlm"]
    for name in args.against:
        sizes = () if args.vllm_python else ("peak_gib",)  # vLLM fills what it is given, in TRL's process
        ratios = {key: ours[key] / results[name][key] for key in ("wall", "cpu", *sizes)}
        if results[name]["generate"]:
            ratios["generate"] = ours["generate"] / results[name]["generate"]
        print(f"bondlm / {name}: " + "  ".join(f"{key} {value:.2f}" for key, value in ratios.items()), flush=True)
    for name, result in results.items():
        if name != "sft":
            seen = result["length"] * args.completions  # NaN for OnlineDPO, which does not log it
            allowed = EARLY_ENDS * tokens if args.vllm_python else 1
            assert math.isnan(seen) or abs(seen - tokens) < allowed, f"{name} drew {seen} tokens, not {tokens}"
            print(f"{name:10} {result['cpu_ms_per_token']:.2f} CPU ms per completion token", flush=True)


def lengths(args: argparse.Namespace) -> list[int]:
    """Lengths of the completions of a step; one longer than the budget does not end."""
    if args.lengths == "full":
        return [args.tokens + 1] * args.completions
    numbers, mean = random.Random(0), MEAN_LENGTH * args.tokens
    return [max(1, round(numbers.expovariate(1 / mean))) for _ in range(args.completions)]


def force_lengths(args: argparse.Namespace) -> None:
    """Make our sampler and transformers' end their rows where `lengths` says."""
    import numpy as np
    import torch
    from transformers import GenerationMixin, LogitsProcessorList

    from bondlm.engines.local import engine

    uniforms, mine = engine.row_uniforms, itertools.cycle(lengths(args))

    def forced_uniforms(seed: int, sample: int, count: int) -> np.ndarray:
        numbers = 0.5 + uniforms(seed, sample, count) / 2  # never draws the first token
        numbers[next(mine) - 1 :] = 0.0  # always draws it
        return numbers

    generate = GenerationMixin.generate

    wanted = lengths(args)

    def forced_generate(self, *a, **kwargs):
        begin = kwargs["input_ids"].shape[1]
        ends = torch.tensor(wanted, device=kwargs["input_ids"].device)

        def force(ids, scores):
            scores = scores.clone()
            end = ids.shape[1] - begin == ends[: len(ids)] - 1
            scores[:, EOS] = -torch.inf
            scores[end] = -torch.inf
            scores[end, EOS] = 0.0
            return scores

        return generate(self, *a, logits_processor=LogitsProcessorList([force]), **kwargs)

    engine.row_uniforms, GenerationMixin.generate = forced_uniforms, forced_generate


def prepare(args: argparse.Namespace) -> None:
    """Write policy and reward model as model folders."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    vocab, hidden, layers, heads = SIZES[args.size]
    tokenizer = word_tokenizer(vocab)

    def config(hidden: int, layers: int, heads: int, **extra) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=vocab,
            hidden_size=hidden,
            intermediate_size=int(hidden * 2.7) // 8 * 8,  # bf16 products need a multiple of 8
            num_hidden_layers=layers,
            num_attention_heads=heads,
            max_position_embeddings=1024,
            eos_token_id=EOS,
            pad_token_id=1,
            bos_token_id=None,
            **extra,
        )

    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):  # a billion random numbers: slow on a CPU
        policy = LlamaForCausalLM(config(hidden, layers, heads))
    policy.generation_config.bos_token_id = None
    base = torch.bfloat16 if args.lora and args.dtype == "bfloat16" else torch.float32  # TRL's vLLM uses the file's
    for model, name, dtype in (
        (policy, args.size, base),
        (LlamaForSequenceClassification(config(128, 2, 2, num_labels=1)), f"reward-{args.size}", torch.float32),
    ):
        model.to("cpu", dtype).save_pretrained(FOLDER / name)
        tokenizer.save_pretrained(FOLDER / name)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # leave the card to the trainers


def word_tokenizer(vocab: int):
    """A tokenizer whose words are w3, w4 and so on."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"[EOS]": EOS, "[PAD]": 1, "[UNK]": 2} | {f"w{i}": i for i in range(3, vocab)}
    inner = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", eos_token="[EOS]", unk_token="[UNK]", padding_side="left"
    )


def prompts(vocab: int) -> list[dict[str, str]]:
    """Prompts of 16 to 96 tokens."""
    random.seed(0)
    lengths = [random.randint(16, 96) for _ in range(512)]
    return [{"prompt": " ".join(f"w{random.randrange(3, vocab)}" for _ in range(n))} for n in lengths]


def build(args: argparse.Namespace):
    """The trainer named `args.one`."""
    forget_this_folder()
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not args.vllm_python:
        force_lengths(args)
    mixed = args.dtype == "bfloat16"
    policy, reward = str(FOLDER / args.size), str(FOLDER / f"reward-{args.size}")
    rows = Dataset.from_list(prompts(SIZES[args.size][0]))
    common = dict(
        output_dir=str(FOLDER / "out"),
        max_steps=args.steps,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        learning_rate=1e-5,
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM") if args.lora else None
    if args.one == "bondlm":
        from bondlm import BONDConfig, BONDTrainer

        # An adapter on bf16 weights needs no autocast; trained weights stay fp32.
        precision = {"dtype": args.dtype} if args.lora else {"dtype": "float32", "bf16": mixed}
        engine = {}
        if args.vllm_python:
            engine = {"engine": "vllm", "vllm_server": "auto", "vllm_python": args.vllm_python}
            engine |= {"vllm_sleep": args.sleep, "vllm_server_args": args.server_args}
        config = BONDConfig(
            per_device_train_batch_size=args.completions // SAMPLES,
            max_completion_length=args.tokens,
            **precision,
            **engine,
            **common,
        )
        return BONDTrainer(policy, reward, config, train_dataset=rows, peft_config=lora)
    if args.settings == "sensible":
        common |= {"bf16": mixed, "gradient_checkpointing": False}
    model = AutoModelForCausalLM.from_pretrained(policy, dtype=args.dtype if args.lora else "float32")
    if args.one == "sft":
        return sft(model, rows, common, lora, AutoTokenizer.from_pretrained(policy), args)
    if args.one == "online_dpo":
        from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

        config = OnlineDPOConfig(
            per_device_train_batch_size=args.completions // 2,
            max_new_tokens=args.tokens,
            max_length=args.tokens + 128,
            beta=0.05,
            **common,
        )
        return OnlineDPOTrainer(
            model,
            reward_funcs=reward,
            args=config,
            train_dataset=rows,
            processing_class=AutoTokenizer.from_pretrained(policy, padding_side="left"),
            reward_processing_classes=AutoTokenizer.from_pretrained(reward),
            peft_config=lora,
        )
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

    make_config, make_trainer = (RLOOConfig, RLOOTrainer) if args.one == "rloo" else (GRPOConfig, GRPOTrainer)
    if args.vllm_python:
        common |= {"use_vllm": True, "vllm_mode": "colocate", "vllm_enable_sleep_mode": args.sleep == "auto"}
        common |= {"vllm_max_model_length": 1024}
    config = make_config(
        per_device_train_batch_size=args.completions,
        num_generations=SAMPLES,
        max_completion_length=args.tokens,
        beta=0.05,
        **common,
    )
    return make_trainer(model, reward, config, train_dataset=rows, peft_config=lora)


def sft(model, rows, common, lora, tokenizer, args):
    """Plain supervised steps on two of three rows, since J-BOND learns on two completions per prompt."""
    from peft import get_peft_model
    from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

    random.seed(1)
    vocab = model.config.vocab_size

    ends = itertools.cycle(lengths(args)[: 2 * args.completions // 3])

    def encode(row):
        length = min(args.tokens, next(ends))
        completion = [random.randrange(3, vocab) for _ in range(length)]
        return {"input_ids": tokenizer(row["prompt"])["input_ids"] + completion}

    data = rows.map(encode, remove_columns=["prompt"])
    config = TrainingArguments(per_device_train_batch_size=2 * args.completions // 3, **common)
    model = model if lora is None else get_peft_model(model, lora)
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    return Trainer(model, config, data_collator=collator, train_dataset=data)


if __name__ == "__main__":
    Path("runs").mkdir(exist_ok=True)
    main()
