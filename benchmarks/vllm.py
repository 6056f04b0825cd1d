"""The vLLM engine beside the transformers engine on a J-BOND rollout, with both adapters in one batch or in two.

    python benchmarks/vllm.py --model models/smollm2-135m-instruct --vllm-python .venv-vllm/bin/python
    python benchmarks/vllm.py --model runs/peers/500m --dtype bfloat16 --num-prompts 64 --vllm-python PYTHON  # on a GPU

The server runs on this machine, on the same cores. Engines take turns; ratios are of medians within the run. With
--whole, policy and anchor are whole models: an update's time is that of one role's weights, and drawing from both roles
includes two updates. A model without a chat template (those of peers.py) gets random prompts of 64 tokens.

The share of the roofline is the time that roofline.py computes for prefill and decoding with the model's own weights,
divided by the time taken; the machine's rates are measured on an idle card, before the server starts. On a GPU the
memory is recorded too: the trainer's peak, and what the server takes of the card while awake and while asleep. With
--sleep auto the server sleeps while the transformers engine draws, and no rate has sleeping or waking in it.
"""

import argparse
import json
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from facts import add_out, append
from roofline import costs, matrix_rate, prompts_of, read_bandwidth

ROLES = ("policy", "anchor")
COUNTS = {"policy": 1, "anchor": 2}  # completions per prompt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--vllm-python", required=True)
    parser.add_argument("--prompts", default="examples/everyday/train.jsonl")
    parser.add_argument("--num-prompts", type=int, nargs="+", default=[8], help="measured in turn, with one server")
    parser.add_argument("--tokens", type=int, default=32, help="maximum tokens per completion")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--server-args", type=str.split, default=["--max-model-len=1024"], help="each as --name=value")
    parser.add_argument("--pause", type=Path, help="file to create while rates are measured")
    parser.add_argument("--sleep", choices=("auto", "never"), default="never", help="server between rollouts, on a GPU")
    parser.add_argument("--whole", action="store_true", help="full fine-tuning instead of LoRA")
    add_out(parser, "vllm")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("out of time"))  # so that the log is kept
    with tempfile.TemporaryDirectory() as folder:
        try:
            for result in measure(args, Path(folder)):
                report(result)
                names = ("model", "tokens", "threads", "dtype", "rounds", "whole", "sleep", "server_args")
                append(args.out, {name: getattr(args, name) for name in names} | result)
        finally:  # what it says of a failure goes with the machine otherwise
            if (log := Path(folder) / "vllm" / "server.log").is_file():
                shutil.copy(log, Path(args.out).with_suffix(".server.log"))


def measure(args: argparse.Namespace, folder: Path) -> Iterator[dict]:
    import torch
    from peft import LoraConfig
    from transformers import AutoTokenizer

    from bondlm import BONDConfig
    from bondlm.data.prompt_encoder import PromptEncoder
    from bondlm.engines.choose import make_engine
    from bondlm.engines.local.engine import TransformersEngine
    from bondlm.models.adapters import wrap_adapter
    from bondlm.models.load import load_model
    from bondlm.models.roles import Roles
    from bondlm.training.processes import World

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_model(args.model, dtype=getattr(torch, args.dtype)).to(device)
    roles = Roles(model if args.whole else wrap_adapter(model, LoraConfig(r=16, target_modules="all-linear")))
    everything = encoded(args, tokenizer, model)
    roof = (matrix_rate(model.dtype), read_bandwidth())
    forget_peak()  # measuring the card has taken memory
    encoder = PromptEncoder.of_model(roles.core, tokenizer)
    ends = {"eos_ids": encoder.eos_ids, "pad_id": encoder.pad_id}
    settings = {"engine": "vllm", "vllm_server": "auto", "vllm_python": args.vllm_python}
    settings |= {"vllm_server_args": args.server_args, "max_completion_length": args.tokens}
    settings["vllm_sleep"] = args.sleep
    config = BONDConfig(output_dir=str(folder), use_cpu=not torch.cuda.is_available(), **settings)
    others, begin = card_of_others(), time.perf_counter()
    server = make_engine(config, roles.model, roles, encoder, World.of(config))
    start_seconds = time.perf_counter() - begin
    memory = {"asleep": card_of_others() - others} if args.sleep == "auto" else {}
    server._wake()
    memory["awake"] = card_of_others() - others
    here = TransformersEngine(roles.use, **ends)
    server._sleeps = False  # no draw sends it to sleep: `settle` does, outside what is timed

    def one_by_one(engine, prompts, seeds):
        law = {"max_new_tokens": args.tokens, "seeds": seeds}
        return {role: engine.generate(prompts, COUNTS[role], role=role, **law) for role in ROLES}

    def together(prompts, seeds):
        wanted = {role: (COUNTS[role], seeds) for role in ROLES}
        return server.generate_roles(prompts, wanted, max_new_tokens=args.tokens)

    ways = {  # how to draw, and which roles share a batch
        "transformers": (lambda *what: one_by_one(here, *what), [("policy",), ("anchor",)]),
        "vllm, one role after the other": (lambda *what: one_by_one(server, *what), [("policy",), ("anchor",)]),
        "vllm, both adapters in one batch": (together, [ROLES]),
    }

    def least(prompts, drawn, batches):
        return sum(roof_seconds(roles.model, prompts, [drawn[r] for r in batch], *roof) for batch in batches)

    if args.whole:
        ways.popitem()

    change, settled = partial(update, server, roles, whole=args.whole), partial(settle, server, args.sleep)
    try:
        with measuring_alone(args.pause):
            for size in args.num_prompts:
                result = compare(everything[:size], args.rounds, ways, change, least, settled)
                result |= {"start_seconds": start_seconds, "probe_gap": server.probe_gap}
                if torch.cuda.is_available():
                    most = {"trainer": torch.cuda.max_memory_allocated()}
                    result["memory_gib"] = {name: size / 2**30 for name, size in (most | memory).items()}
                yield result
    finally:
        server.close()


def encoded(args: argparse.Namespace, tokenizer, model) -> list[list[int]]:
    """Token ids of as many prompts as the largest size needs."""
    count = max(args.num_prompts)
    if tokenizer.chat_template is None:
        return prompts_of(model, count)
    lines = Path(args.prompts).read_text(encoding="utf-8").splitlines()[:count]
    return [
        tokenizer.apply_chat_template(json.loads(line)["prompt"], add_generation_prompt=True, return_dict=False)
        for line in lines
    ]


def update(server, roles, *, whole: bool) -> float:
    """Seconds until the server holds changed weights: those of both adapters, or of one role (mean over roles)."""
    import torch

    seconds = []
    with torch.no_grad():
        for parameter in filter(lambda p: p.requires_grad, roles.model.parameters()):
            parameter.mul_(1 + 1e-3 * torch.randn(1, device=parameter.device))
    server._wake()
    for role in ROLES if whole else (None,):
        begin = time.perf_counter()
        server._hold(role) if whole else server.sync()
        seconds.append(time.perf_counter() - begin)
    return statistics.mean(seconds)


def settle(server, sleep: str, name: str) -> float:
    """Before a way to draw: the transformers engine has the card that it has in a run. Returns seconds."""
    begin = time.perf_counter()
    if name != "transformers":
        server._wake()
    elif sleep == "auto":
        server._sleeps = True
        server._sleep()
        server._sleeps = False
    return time.perf_counter() - begin


def forget_peak() -> None:
    """Begin anew to look for the most memory in use."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def card_of_others() -> int:
    """Bytes in use on the card outside this process's tensors; 0 without a card."""
    import torch

    if not torch.cuda.is_available():
        return 0
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()


def roof_seconds(model, prompts: list, drawn: list, rate: float, bandwidth: float) -> float:
    """Least seconds for one batch of these roles' completions: each role's prompts, then one token per row and step."""
    lengths = [len(c.ids) for completions in drawn for row in completions for c in row]
    prompt, steps = statistics.mean(map(len, prompts)), max(lengths)
    prefill = costs(model, len(prompts) * len(drawn), prompt, 0)["prefill"]
    decode = costs(model, sum(lengths) / steps, prompt, steps)["decode"]
    return sum(max(flops / rate, data / bandwidth) for flops, data in (prefill, decode))


@contextmanager
def measuring_alone(pause: Path | None) -> Iterator[None]:
    """Keep the file `pause` in place meanwhile; benchmarks/paper/frontier.py waits while it is there."""
    if pause is not None:
        pause.touch()
        time.sleep(2)
    try:
        yield
    finally:
        if pause is not None:
            pause.unlink(missing_ok=True)


def compare(
    prompts: list,
    rounds: int,
    ways: dict,
    update: Callable[[], float],
    least: Callable[..., float],
    settle: Callable[[str], float],
) -> dict:
    """Tokens per second of every way to draw, and its share of the roofline; ways take turns."""
    rates: dict[str, list[float]] = {name: [] for name in ways}
    shares: dict[str, list[float]] = {name: [] for name in ways}
    syncs, settling = [], []
    for number in range(rounds + 1):  # the first is warm-up
        syncs.append(update())
        for name, (draw, batches) in ways.items():
            settling.append(settle(name))
            begin = time.perf_counter()
            drawn = draw(prompts, [1000 * number + i for i in range(len(prompts))])
            seconds = time.perf_counter() - begin
            rates[name].append(sum(len(c.ids) for role in ROLES for row in drawn[role] for c in row) / seconds)
            shares[name].append(least(prompts, drawn, batches) / seconds)
    return {
        "num_prompts": len(prompts),
        "tokens_per_second": {name: statistics.median(values[1:]) for name, values in rates.items()},
        "share_of_roofline": {name: statistics.median(values[1:]) for name, values in shares.items()},
        "all_rounds": {name: values[1:] for name, values in rates.items()},
        "sync_seconds": statistics.median(syncs[1:]),
        "sleep_and_wake_seconds": sum(settling[len(ways) :]) / rounds,  # per round: once each, if the server sleeps
    }


def report(result: dict) -> None:
    rates = result["tokens_per_second"]
    print(f"{result['num_prompts']} prompts, {sum(COUNTS.values())} completions of each")
    for name, rate in rates.items():
        ratio, share = rate / rates["transformers"], result["share_of_roofline"][name]
        print(f"{name:34} {rate:7.1f} completion tokens/s  {ratio:.2f}x  {share:.0%} of the roofline")
    print(
        f"update of the server, checked      {result['sync_seconds']:7.2f} s"
        f"   server start {result['start_seconds']:.0f} s"
    )
    print(f"probe gap (nats a token)           {result['probe_gap']}")
    if "memory_gib" in result:
        sizes = "  ".join(f"{name} {size:.2f}" for name, size in result["memory_gib"].items())
        print(f"GiB of the card                    {sizes}")


if __name__ == "__main__":
    main()
