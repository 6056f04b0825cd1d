"""One run of the frontier's queue (train, measure, write rows), and the reference that all runs share."""

import json
import os
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from frontier_map import RUNS
from frontier_results import append, size_of
from frontier_signals import MODEL, READY, is_over, wait_for, wait_while_paused, write
from frontier_speed import all_prompts

NLI = "nli:{models}/flan-t5-small-title?template=flan&premise_prefix=summarize: &batch_size=512&batch_tokens=65536"
SHARPENED = (0.8, 0.7, 0.6)


def make_reference(args: Any) -> None:
    """Make the SFT model, unless it exists, and its samples for the held-out prompts."""
    folder = policy(args)
    began = time.perf_counter()
    if not folder.exists():
        from sft_start import finetune

        loss = finetune(args.models / "flan-t5-small-title", args.data, folder, args.sft_steps, args.sft_batch)
        print(f"SFT: {time.perf_counter() - began:.0f} s, held-out loss per token {loss}", flush=True)
    (args.out / MODEL).touch()
    began = time.perf_counter()
    trainer = trainer_of(args, next(iter(RUNS)), 0, Path(args.out) / "preparing")
    bench = bench_of(args, trainer)
    length = sum(len(c.ids) for row in bench.reference.completions for c in row)
    count = len(bench.rows) * args.reference_samples
    facts = {"samples": count, "length": length / count, "reward": float(bench.reference.rewards_PM.mean())}
    facts["entropy"] = -sum(c.logprob for row in bench.reference.completions for c in row) / length
    write(args.out / READY, json.dumps(facts))
    print(f"reference: {facts}, {time.perf_counter() - began:.0f} s", flush=True)
    from sharpened import point

    for temperature in SHARPENED:
        found = point(trainer, bench, temperature, args.samples)
        row = {"run": f"reference-t{temperature}", "seed": 0, "step": 0, "is_last": True} | found
        append(args, row | common(args))


def policy(args: Any) -> Path:
    return Path(args.models) / f"t5-debian-sft{args.sft_steps}x{args.sft_batch}"


def trainer_of(args: Any, name: str, seed: int, folder: Path) -> Any:
    """A run's trainer."""
    from transformers import PrinterCallback

    from bondlm import BONDConfig, BONDTrainer
    from bondlm.data.prompts import load_prompts

    held_out = load_prompts(str(args.data / "heldout.jsonl"))
    trainer = BONDTrainer(
        model=str(policy(args)),
        reward_funcs=[NLI.format(models=args.models)],
        args=BONDConfig(**settings_of(args, name, seed, folder)),
        train_dataset=str(all_prompts(args)),
        eval_dataset=held_out.select(range(min(args.held_out, len(held_out)))),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def bench_of(args: Any, trainer: Any) -> Any:
    """The bench that measures a trainer's policy; it draws the reference's samples if they do not exist."""
    from measure import Bench, load_judges

    specs = [f"similarity:{args.models}/all-minilm-l6-v2?batch_size=512&batch_tokens=65536"]
    judges = load_judges(specs, trainer.eval_dataset.to_list(), "reference", trainer.args.device)
    key = json.dumps([policy(args).name, args.length, NLI])
    return Bench(trainer, judges, Path(args.out) / "reference", key, args.reference_samples)


def settings_of(args: Any, name: str, seed: int, folder: Path) -> dict[str, Any]:
    """All settings for a run's `BONDConfig`."""
    import torch
    from run import plan_total

    run = RUNS[name]
    on_gpu = torch.cuda.is_available()
    shared = {
        "output_dir": str(folder),
        "max_steps": args.steps,
        "per_device_train_batch_size": max(2, args.completions // plan_total(run.settings)),
        "max_completion_length": args.length,
        "warmup_steps": 2,
        "logging_steps": 10,
        "save_strategy": "no",
        "eval_strategy": "no",
        "eval_num_samples": args.samples,
        "eval_num_reference_samples": args.reference_samples,
        "num_logged_samples": 2,
        "max_rows": 1600,
        "bf16": on_gpu,
        "use_cpu": not on_gpu,
        "seed": seed,
        "disable_tqdm": True,
        "report_to": "none",
    }
    return shared | run.as_settings(args.steps)


def train(args: Any, name: str, seed: int, folder: Path) -> None:
    """One run: train, measuring every `--every` steps and at the end."""
    import torch

    trainer = trainer_of(args, name, seed, folder)
    row = {"run": name, "seed": seed, "attempt": folder.name} | common(args)
    row |= {"settings": RUNS[name].as_settings(args.steps), "average_weights": trainer.args.average_weights}
    row |= size_of(args)
    trainer.add_callback(watch(args, trainer, row))
    trainer.train()
    if torch.cuda.is_available():
        print(f"most memory: {torch.cuda.max_memory_reserved() / 2**30:.1f} GiB", flush=True)


def watch(args: Any, trainer: Any, row: dict[str, Any]) -> Any:
    """A callback that measures, waits while paused, and ends the run when time is up."""
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        spent = began = 0.0
        bench = None  # made on first use: the reference's samples may not be ready yet

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            wait_while_paused(args)
            self.began = time.perf_counter()

        def on_step_end(self, _: Any, state: Any, control: Any, **__: Any) -> None:
            self.spent += time.perf_counter() - self.began
            if is_over(args, args.ends_at):
                control.should_training_stop = True
            elif state.global_step % args.every == 0 or state.global_step == args.steps:
                if self.bench is None:
                    wait_for(args.out / READY, args)
                    self.bench = bench_of(args, trainer)
                began = time.perf_counter()
                found = flat(self.bench.measure(args.samples, both_kls=False))
                last = state.global_step == args.steps
                where = {"step": state.global_step, "is_last": last, "seconds": round(self.spent, 2)}
                append(args, row | where | found | {"measuring_seconds": round(time.perf_counter() - began, 2)})

    return Watch()


def flat(measured: dict[str, Any]) -> dict[str, Any]:
    """The numbers of a measurement, each with the bounds of its interval."""
    names = {"completions/mean_length": "length", "completions/clipped_ratio": "clipped"}
    row: dict[str, Any] = {}
    for name, value in ({names.get(k, k): v for k, v in measured.items()}).items():
        if name in ("matched", "against_best_of"):
            continue
        row |= dict(_ends(name, value) if isinstance(value, dict) and "value" in value else [(name, value)])
    return row | {"judges": {name: dict(_judged(judge)) for name, judge in measured["judges"].items()}}


def _judged(judge: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in judge.items():
        yield from _ends(name, value)


def _ends(name: str, interval: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for suffix, end in (("", "value"), ("_low", "low"), ("_high", "high")):
        yield name + suffix, interval[end]


def common(args: Any) -> dict[str, Any]:
    """Recorded with every result: command, commit, device, versions."""
    import torch
    from facts import commit, versions

    words = sys.argv[1 : sys.argv.index("--worker")] if "--worker" in sys.argv else sys.argv[1:]
    words = [Path(word).name if Path(word).is_absolute() else word for word in words]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {
        "command": shlex.join(["python", "benchmarks/paper/frontier.py", *words]),
        "commit": os.environ.get("BONDLM_COMMIT") or commit(),
        "device": f"{device}, {args.workers} runs side by side{os.environ.get('BONDLM_DEVICE_NOTE', '')}",
        "versions": versions(),
    }
