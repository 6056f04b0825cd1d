"""What a token limit per micro-batch does to a J-BOND step with long prompts: time and memory of learning.

    python benchmarks/cut.py                       # two prompts of 4,096 tokens, one of 1,000 and one of 500; minutes
    python benchmarks/cut.py --hidden 2048 --layers 16 --limits 0 20000 5200          # with a GPU

A Llama with random weights, trained on two completions per prompt. Each limit runs in its own process; 0 is no limit.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import torch
from facts import add_out, append
from tiny import tiny_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from bondlm import BONDConfig, BONDTrainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, nargs="+", default=[500, 1000, 4096, 4096], help="tokens of each prompt")
    parser.add_argument("--new", type=int, default=1024, help="tokens per completion")
    parser.add_argument("--limits", type=int, nargs="+", default=[0, 5200])
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    add_out(parser, "cut")
    args = parser.parse_args()
    if args.one is not None:
        print("RESULT " + json.dumps(measure(args, args.one or None)))
        return
    print(f"{'limit':>7} {'s to learn':>11} {'GiB to learn':>13} {'gradient norm':>14}")
    for limit in args.limits:
        command = [sys.executable, *sys.argv, "--one", str(limit)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        found = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        if not found:
            sys.exit(done.stdout + done.stderr)
        row = json.loads(found[0][7:])
        print(f"{limit:7} {row['seconds']:11.1f} {row['gib']:13.2f} {row['grad_norm']:14.4f}", flush=True)
        sizes = {name: getattr(args, name) for name in ("prompts", "new", "hidden", "layers", "threads")}
        append(args.out, {"limit": limit, **sizes, **row})


def measure(args: argparse.Namespace, limit: int | None) -> dict[str, float]:
    """One step; the memory is what learning took beyond sampling and scoring."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        made = build(args, folder, limit)
        plain, seen = made._smaller.learn, {}

        def learn(*inputs):
            before, began = peak_gib(), clock()
            loss = plain(*inputs)
            seen.update(seconds=clock() - began, gib=peak_gib() - before)
            return loss

        made._smaller.learn = learn
        made.train()
        return seen | {"grad_norm": made.state.log_history[0]["grad_norm"]}


def build(args: argparse.Namespace, folder: str, limit: int | None) -> BONDTrainer:
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden,
        intermediate_size=4 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 32,
        num_key_value_heads=args.hidden // 64,
        max_position_embeddings=max(args.prompts) + args.new + 100,
        eos_token_id=None,
        bos_token_id=None,
    )
    settings = {"max_steps": 1, "optim": "sgd", "logging_steps": 1, "save_strategy": "no", "warmup_steps": 0}
    settings |= {"prompt_format": "plain", "disable_tqdm": True, "use_cpu": not torch.cuda.is_available()}
    settings |= {"per_device_train_batch_size": len(args.prompts), "max_completion_length": args.new}
    word = len(tokenizer.encode("rain " * 100)) / 100
    rows = [{"prompt": "rain " * round(tokens / word)} for tokens in args.prompts]
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):  # a billion random numbers: slow on a CPU
        model = LlamaForCausalLM(config)
    return BONDTrainer(
        model,
        lambda completion_ids: [float(sum(ids)) for ids in completion_ids],
        BONDConfig(output_dir=folder, max_tokens_per_micro_batch=limit, **settings),
        train_dataset=rows,
        processing_class=tokenizer,
    )


def clock() -> float:
    """Seconds, when the GPU has done what was launched."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_gib() -> float:
    """Peak memory of this process, or of its part of a GPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    main()
