"""The study of the paper's claims, one experiment at a time. Finished runs are skipped: interrupt and repeat at will.

    python benchmarks/paper/run.py x9 --seeds 0 1 2 --threads 2     # x1 x2 x3 x4 x5 x6 x7 x9 fast over
    python benchmarks/paper/run.py x1 --only n4-beta0.5 --steps 4   # a quick try
    python benchmarks/paper/run.py --list
    python benchmarks/paper/write_up.py                               # tables, figures, claims.md, verdicts.md

A run's folder is runs/paper/EXPERIMENT/NAME-sSEED: config.json, curve.jsonl (one row per measurement), metrics.jsonl,
done.json. An interrupted run starts over. Runs in benchmarks/paper/results count as done, so a study can continue on
another machine. Use separate folders for other budgets (--out, --results).
"""

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

from plans import EXPERIMENTS, Experiment, Run, runs
from tasks import TASKS, Task, missing

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/paper/results/runs.jsonl"
DONE_FILE, CONFIG_FILE = "done.json", "config.json"


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", nargs="*", help=" ".join(EXPERIMENTS))
    parser.add_argument("--out", type=Path, default=Path("runs/paper"))
    parser.add_argument("--only", nargs="*", help="names of runs; default: all runs of the experiment")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="default: the task's (40 or 24)")
    parser.add_argument("--completions", type=int, help="per step; default: the task's (96 or 24)")
    parser.add_argument("--prompts", type=int, default=64, help="number of held-out prompts")
    parser.add_argument("--samples", type=int, default=4, help="policy samples per prompt and measurement")
    parser.add_argument("--reference-samples", type=int, default=32)
    parser.add_argument("--points", type=int, default=4, help="measurements per run, the last one at its end")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS, help="runs in this file count as done")
    parser.add_argument("--list", action="store_true", help="list all runs and which are done")
    args = parser.parse_args(argv)
    unknown = [name for name in args.experiments if name not in EXPERIMENTS]
    if unknown or not (args.experiments or args.list):
        parser.error(f"name experiments, of {', '.join(EXPERIMENTS)}" + (f" (not {unknown[0]})" if unknown else ""))
    return args


def plan_total(settings: dict[str, Any]) -> int:
    """Completions drawn per prompt under these settings."""
    from bondlm.config import BONDConfig, objective_of

    drawing = {name: value for name, value in settings.items() if name not in ("target_n", "kl_budget")}
    return objective_of(BONDConfig(output_dir="unused", **drawing)).plan.total


def config_of(task: Task, run: Run, seed: int, folder: Path, args: Any) -> dict[str, Any]:
    """All settings for a run's `BONDConfig`."""
    import torch

    from bondlm.models.load import fast_dtype

    steps = max(1, round((args.steps or task.steps) * run.times_steps))
    prompts = max(2, round((args.completions or task.completions) / plan_total(run.settings)))
    settings = task.settings | {
        "output_dir": str(folder),
        "max_steps": steps,
        "per_device_train_batch_size": prompts,
        "reward_weights": task.reward_weights,
        "logging_steps": 1,
        "save_strategy": "no",
        "eval_strategy": "no",
        "eval_num_samples": args.samples,
        "eval_num_reference_samples": args.reference_samples,
        "num_logged_samples": 2,
        "seed": seed,
        "disable_tqdm": True,
        "report_to": "none",
    }
    if settings.get("bf16") and fast_dtype(torch.device("cpu")) is torch.float32:
        settings["bf16"] = False  # emulated on this processor, several times slower than fp32
    if run.own_evaluation:
        # Five times as often as the study measures: a run can stop only at an evaluation.
        settings |= {"eval_strategy": "steps", "eval_steps": every(steps, 5 * args.points)}
    return settings | run.settings


def every(steps: int, points: int) -> int:
    return max(1, steps // points)


def prepare(task: Task, config: dict[str, Any], lora_r: int | None, args: Any) -> tuple[Any, Any]:
    """The trainer of a run, and the bench that measures its policy."""
    import torch
    from measure import Bench, load_judges
    from peft import LoraConfig
    from transformers import PrinterCallback
    from transformers.utils import logging as transformers_logging

    from bondlm import BONDConfig, BONDTrainer
    from bondlm.data.fingerprints import model_fingerprint, reward_fingerprint
    from bondlm.data.prompts import load_prompts

    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    torch.set_num_threads(args.threads)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    rank = lora_r or task.lora_r
    held_out = load_prompts(task.held_out)
    trainer = BONDTrainer(
        model=task.model,
        reward_funcs=task.reward_funcs,
        args=BONDConfig(**config),
        train_dataset=task.train,
        eval_dataset=held_out.select(range(min(args.prompts, len(held_out)))),
        peft_config=LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear") if rank else None,
    )
    trainer.remove_callback(PrinterCallback)
    rows = trainer.eval_dataset.to_list()
    judges = load_judges(task.judges, rows, task.reference_column, trainer.args.device)
    specs = [reward_fingerprint(spec) for spec in task.reward_funcs + task.judges]
    made_from = [model_fingerprint(task.model, None), specs, task.reward_weights, config["max_completion_length"]]
    key = json.dumps(made_from, default=str)
    # The reference's samples are the same for all training seeds; the first run draws them.
    return trainer, Bench(trainer, judges, Path(args.out) / "reference", key, args.reference_samples)


def train(task: Task, experiment: Experiment, run: Run, seed: int, folder: Path, args: Any) -> dict[str, Any]:
    """One run: train, measure along the way, write the curve; returns facts for `done.json`."""
    from measure import CURVE_FILE, Curve

    config = config_of(task, run, seed, folder, args)
    trainer, bench = prepare(task, config, run.lora_r, args)
    steps = config["max_steps"]
    at = {step for step in range(1, steps + 1) if step % every(steps, args.points) == 0} | {steps}
    curve = Curve(bench, folder / CURVE_FILE, at, args.samples, both_kls=experiment.both_kls)
    trainer.add_callback(curve)
    began = time.perf_counter()
    trainer.train()
    curve.take(trainer.state.global_step)  # for a run that stopped early: its last step
    return {"seconds_all": time.perf_counter() - began, "steps": trainer.state.global_step}


def facts(args: Any) -> dict[str, Any]:
    """Command, versions and machine, recorded with every result."""
    names = ("bondlm", "torch", "transformers", "peft")
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return {
        "command": "python " + " ".join(["benchmarks/paper/run.py", *sys.argv[1:]]),
        "versions": {name: importlib.metadata.version(name) for name in names},
        "commit": commit.stdout.strip(),
        "machine": f"{platform.machine()}, {args.threads} thread(s) of {os.cpu_count()}",
    }


def is_done(name: str, run: Run, seed: int, args: Any) -> bool:
    """Whether a run has finished, here or according to the results file."""
    if (Path(args.out) / name / f"{run.name}-s{seed}" / DONE_FILE).exists():
        return True
    rows = args.results.read_text(encoding="utf-8").splitlines() if args.results.exists() else []
    keys = ("experiment", "run", "seed")
    return (name, run.name, seed) in {tuple(json.loads(row)[key] for key in keys) for row in rows}


def equal_run(config: dict[str, Any], experiment: Experiment, run: Run, seed: int, args: Any) -> Path | None:
    """The folder of a finished run of another experiment with the same settings, measured at least as fully."""
    for done in sorted(Path(args.out).glob(f"*/*-s{seed}/{DONE_FILE}")):
        known = json.loads((done.parent / CONFIG_FILE).read_text(encoding="utf-8"))
        facts_of_run = json.loads(done.read_text(encoding="utf-8"))
        measured = facts_of_run["both_kls"] or not experiment.both_kls
        if (
            measured
            and EXPERIMENTS[done.parent.parent.name].task == experiment.task
            and facts_of_run["lora_r"] == run.lora_r
            and known | {"output_dir": ""} == config | {"output_dir": ""}
        ):
            return done.parent
    return None


def do(name: str, experiment: Experiment, run: Run, seed: int, args: Any) -> None:
    """One run in its folder, unless it is done."""
    task, folder = TASKS[experiment.task], Path(args.out) / name / f"{run.name}-s{seed}"
    if is_done(name, run, seed, args):
        print(f"{folder}: done")
        return
    shutil.rmtree(folder, ignore_errors=True)
    config = config_of(task, run, seed, folder, args)
    same = equal_run(config, experiment, run, seed, args)
    if same is not None:
        shutil.copytree(same, folder)
        done = json.loads((folder / DONE_FILE).read_text(encoding="utf-8"))
        (folder / DONE_FILE).write_text(json.dumps(done | {"run": run.name, "same_as": str(same)}, indent=2) + "\n")
        print(f"{folder}: the same run as {same}", flush=True)
        return
    folder.mkdir(parents=True)
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
    print(f"{folder}: {config['max_steps']} steps of {config['per_device_train_batch_size']} prompts", flush=True)
    result = train(task, experiment, run, seed, folder, args) | facts(args)
    result |= {"run": run.name, "seed": seed, "lora_r": run.lora_r, "both_kls": experiment.both_kls}
    partial = folder / f"{DONE_FILE}.tmp"
    partial.write_text(json.dumps(result, indent=2) + "\n")
    partial.replace(folder / DONE_FILE)
    print(f"{folder}: {result['seconds_all'] / 60:.1f} min", flush=True)


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    jobs = [
        (name, experiment, run, seed)
        for seed in args.seeds  # seed by seed, so that an interrupted study has each run once
        for name, experiment, run in runs(args.experiments or list(EXPERIMENTS))
        if not args.only or run.name in args.only
    ]
    if args.list:
        for name, _, run, seed in jobs:
            done = is_done(name, run, seed, args)
            print(f"{name:6}{run.name:28}seed {seed}  {'done' if done else ''}")
        return
    for name in args.experiments:
        task = TASKS[EXPERIMENTS[name].task]
        absent = missing(task, Path())
        if absent:
            sys.exit(
                f"{name} needs {', '.join(absent)}, which is not here. Make it with:\n  " + "\n  ".join(task.prepare)
            )
    for job in jobs:
        do(*job, args)


if __name__ == "__main__":
    main()
