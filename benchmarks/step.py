"""A J-BOND step beside TRL's RLOO or GRPO on the same work: 16 prompts, 48 completions, LoRA, MiniLM reward.

    python benchmarks/step.py --model models/smollm2-135m-instruct --encoder models/all-minilm-l6-v2 --threads 2

Each trainer runs in its own process. Wall clock is what a user waits for; CPU seconds are comparable on a busy machine.
The figure for a step is the median after one warm-up step. Needs `pip install trl==1.16.0`.
"""

import argparse
import functools
import json
import resource
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest.mock import patch

from facts import add_out, append

PROMPTS, COMPLETIONS = 16, 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--encoder", required=True)
    parser.add_argument("--prompts", default="examples/everyday/train.jsonl")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=32, help="maximum tokens per completion")
    parser.add_argument("--against", nargs="+", default=["rloo"], choices=["rloo", "grpo"])
    parser.add_argument("--one", choices=["bondlm", "rloo", "grpo"], help=argparse.SUPPRESS)
    add_out(parser, "step")
    args = parser.parse_args()
    if args.one:
        print("RESULT " + json.dumps(measure(build(args), args.threads)))
        return
    results = {"bondlm": (ours := in_a_process("bondlm"))}
    for name in args.against:
        theirs = results[name] = in_a_process(name)
        wall, cpu = ours["wall"] / theirs["wall"], ours["cpu"] / theirs["cpu"]
        print(f"bondlm / {name}: wall {wall:.2f}  cpu {cpu:.2f}  ({args.threads} threads)", flush=True)
    names = ("model", "encoder", "prompts", "threads", "steps", "tokens")
    append(args.out, {name: getattr(args, name) for name in names} | {"results": results})


def forget_this_folder() -> None:
    """Take this folder off the import path: TRL looks for a package called vllm and would find our vllm.py."""
    here = Path(__file__).resolve().parent
    sys.path[:] = [path for path in sys.path if Path(path).resolve() != here]


def in_a_process(name: str, *options: str, python: str = sys.executable) -> dict:
    """Measure one trainer in a fresh process and print the result."""
    command = [python, *sys.argv, "--one", name, *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        sys.exit(done.stdout + done.stderr)
    r = json.loads(lines[0][7:])
    card = f", of the whole card {r['card_gib']:.2f}" if r["card_gib"] else ""
    print(
        f"{name:8} wall {r['wall']:6.2f} s  cpu {r['cpu']:6.2f} s  of it generation {r['generate']:6.2f} s  "
        f"peak {r['peak_gib']:.2f} GiB{card}  mean completion {r['length']:.1f} tokens  {r['phases']}",
        flush=True,
    )
    return r


def measure(trainer, threads: int, completions: int = PROMPTS * COMPLETIONS) -> dict:
    """Median wall clock and CPU seconds per step after the first, of it generation's, and the trainer's phases."""
    import torch
    from transformers import GenerationMixin, TrainerCallback

    torch.set_num_threads(threads)
    on_gpu = torch.cuda.is_available()
    steps: list[tuple[float, float, float]] = []
    generating = [0.0]

    def clock() -> float:
        if on_gpu:  # wait for what was launched
            torch.cuda.synchronize()
        return time.perf_counter()

    def busy() -> float:  # CPU seconds, since the machine may be busy; wall clock on a GPU
        return clock() if on_gpu else time.process_time()

    class Timer(TrainerCallback):
        def now(self):
            return clock(), time.process_time(), generating[0]

        def on_train_begin(self, *a, **k):
            self.last = self.now()

        def on_step_end(self, *a, **k):
            now = self.now()
            steps.append(tuple(b - a for a, b in zip(self.last, now, strict=True)))
            self.last = now

    def timed(work):
        @functools.wraps(work)
        def timed_work(*a, **k):
            began = busy()
            result = work(*a, **k)
            generating[0] += busy() - began
            return result

        return timed_work

    trainer.add_callback(Timer())
    card = [0]  # peak bytes in use by any process, a vLLM server's too
    with ExitStack() as stack:
        for owner, name in samplers(trainer, GenerationMixin):
            stack.enter_context(patch.object(owner, name, timed(getattr(owner, name))))
        stack.enter_context(watching(card))
        trainer.train()
    logs = [row for row in trainer.state.log_history if "loss" in row][1:]
    names = [name for name in logs[0] if name.startswith("time/")]
    phases = {name[5:]: round(statistics.median(row[name] for row in logs), 2) for name in names}
    wall, cpu, generation = (statistics.median(column) for column in zip(*steps[1:], strict=True))
    main_memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 2**10
    return {
        "wall": wall,
        "cpu": cpu,
        "generate": generation,
        "peak_gib": (torch.cuda.max_memory_allocated() if on_gpu else main_memory) / 2**30,  # the GPU's, if any
        "card_gib": card[0] / 2**30,
        "length": statistics.mean(mean_length(row, completions) for row in logs),
        "phases": phases,
    }


def samplers(trainer, mixin) -> list[tuple[type, str]]:
    """Class and method that this trainer draws with: our engine, or TRL's with transformers or vLLM."""
    engine = getattr(trainer, "engine", None)
    theirs = getattr(trainer, "vllm_generation", None)
    if engine is not None:
        names = ("_draw",) if hasattr(engine, "_draw") else ("sync", "generate_roles")
        return [(type(engine), name) for name in names]
    return [(mixin, "generate")] if theirs is None else [(type(theirs), "generate"), (type(theirs), "sync_weights")]


@contextmanager
def watching(most: list[int]) -> Iterator[None]:
    """Keep the peak bytes in use on the card in `most[0]`, sampled every 20 ms; 0 without a card."""
    import torch

    if not torch.cuda.is_available():
        yield
        return
    done = threading.Event()

    def look() -> None:
        while not done.wait(0.02):
            free, total = torch.cuda.mem_get_info()
            most[0] = max(most[0], total - free)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def mean_length(row: dict, completions: int) -> float:
    """Mean length of all completions of a step; our completions/mean_length covers the policy's, num_tokens all."""
    if "num_tokens/learned" in row:
        return row["num_tokens"] / completions
    return row.get("completions/mean_length", float("nan"))


def build(args: argparse.Namespace):
    from datasets import load_dataset
    from peft import LoraConfig

    forget_this_folder()
    from bondlm.rewards import load_rewards

    reward = load_rewards(f"similarity:{args.encoder}")[0].function
    rows = load_dataset("json", data_files=args.prompts, split="train")
    common = dict(
        output_dir="runs/benchmark",
        max_steps=args.steps,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        learning_rate=1e-4,
        max_completion_length=args.tokens,
        disable_tqdm=True,
        use_cpu=True,
    )
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    if args.one == "bondlm":
        from bondlm import BONDConfig, BONDTrainer

        # Eight prompts at a time, twice: 16 prompts per step.
        config = BONDConfig(per_device_train_batch_size=PROMPTS // 2, gradient_accumulation_steps=2, **common)
        return BONDTrainer(args.model, reward, config, train_dataset=rows, peft_config=lora)
    import torch
    from transformers import AutoModelForCausalLM
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

    def similarity(prompts, completions, **columns):
        return reward(prompts=prompts, completions=completions)

    make_config, make_trainer = (RLOOConfig, RLOOTrainer) if args.one == "rloo" else (GRPOConfig, GRPOTrainer)
    config = make_config(
        per_device_train_batch_size=PROMPTS * COMPLETIONS // 2,
        gradient_accumulation_steps=2,
        num_generations=COMPLETIONS,
        beta=0.05,
        bf16=False,
        gradient_checkpointing=False,
        **common,
    )
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    return make_trainer(model, [similarity], config, train_dataset=rows, peft_config=lora)


if __name__ == "__main__":
    Path("runs").mkdir(exist_ok=True)
    main()
