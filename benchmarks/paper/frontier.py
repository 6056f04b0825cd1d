"""Win rate against KL at a larger scale: a queue of runs that can continue on another machine.

    python benchmarks/paper/frontier.py --workers 9 --until 600 --seeds 0 1 2     # the whole map (frontier_map.py)
    python benchmarks/paper/frontier.py rloo-0.3 own-n4-fall --workers 2          # some of it
    python benchmarks/paper/frontier.py --list

The T5 task (examples/summarization: package descriptions, entailment reward, MiniLM and ROUGE-L as judges). First the
reference is made, once for all runs: 500 SFT steps of 32, then samples for the held-out prompts. Then worker processes
take runs off the queue one after another. A run that fails leaves its log, and a worker that dies is replaced. All runs
end `--until` seconds after the start, or when the run folder has a file `stop`. Rows are appended to the results file
as they are measured; a run whose last row is there, at the same size (steps, completions per step, length, SFT steps,
held-out documents), counts as done, on any machine, and is skipped.

A row: run, seed, size, step, win_rate, kl, entropy, effective_n, kl_ratio, judges, length, distinct_2, with `..._low`
and `..._high` (95%, over prompts), learning seconds, settings, average_weights (if not 0, the averaged weights were
measured; rows without the field are of the last step's weights), command, commit, device, attempt (differs if a run was
cut and repeated) and is_last. All runs wait between two steps while the run folder has a file `pause` no older than
90 s, so that another measurement can have the machine to itself.
"""

import argparse
import contextlib
import gc
import subprocess
import sys
import time
import traceback
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from frontier_map import COMPLETIONS, RUNS, STEPS, queue
from frontier_results import done_runs
from frontier_signals import MODEL, READY, STOP, is_over, wait_for

HERE = Path(__file__).parent
RESULTS = HERE / "results/frontier.jsonl"
PREPARE = "prepare"  # the worker that makes the reference
GRACE_S = 10


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", help=f"default: all of {', '.join(RUNS)}")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--workers", type=int, default=1, help="number of runs side by side")
    parser.add_argument("--until", type=float, default=float("inf"), help="end after this many seconds")
    parser.add_argument("--out", type=Path, default=Path("runs/frontier"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--models", type=Path, default=Path("models"))
    parser.add_argument("--data", type=Path, default=Path("data/debian"))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--every", type=int, default=60, help="steps between measurements")
    parser.add_argument("--completions", type=int, default=COMPLETIONS, help="completions per step")
    parser.add_argument("--length", type=int, default=20, help="maximum tokens per completion")
    parser.add_argument("--held-out", type=int, default=200, help="number of held-out documents")
    parser.add_argument("--samples", type=int, default=4, help="policy samples per document")
    parser.add_argument("--reference-samples", type=int, default=64)
    parser.add_argument("--sft-steps", type=int, default=500)
    parser.add_argument("--sft-batch", type=int, default=32)
    parser.add_argument("--plain", action="store_true", help="use bondlm's own decoding and batch sizes")
    parser.add_argument("--list", action="store_true", help="list all runs and which are done")
    parser.add_argument("--worker", help=argparse.SUPPRESS)  # the worker's name
    parser.add_argument("--ends-at", type=float, help=argparse.SUPPRESS)  # seconds since the epoch
    args = parser.parse_args(argv)
    unknown = [name for name in args.runs if name not in RUNS]
    if unknown:
        parser.error(f"{unknown[0]} is none of {', '.join(RUNS)}")
    return args


# -- the queue


def num_done(args: Any) -> int:
    return len(done_runs(args) & set(queue(args.runs, args.seeds)))


def claims(args: Any) -> Path:
    return Path(args.out) / "claims"


def claim(args: Any) -> tuple[str, int] | None:
    """Take the next run that no worker has taken, if there is one."""
    done = done_runs(args)
    for name, seed in queue(args.runs, args.seeds):
        if (name, seed) in done:
            continue
        with contextlib.suppress(FileExistsError):
            (claims(args) / f"{name}-s{seed}").touch(exist_ok=False)
            return name, seed
    return None


def left(args: Any) -> int:
    """Number of runs that no worker has taken."""
    done = done_runs(args)
    jobs = [job for job in queue(args.runs, args.seeds) if job not in done]
    return sum(not (claims(args) / f"{name}-s{seed}").exists() for name, seed in jobs)


def start(args: Any, name: str, ends_at: float) -> subprocess.Popen[bytes]:
    """Start a worker of this name, with its own log file."""
    command = [sys.executable, __file__, *sys.argv[1:], "--worker", name, "--ends-at", str(ends_at)]
    with (Path(args.out) / f"worker-{name}.log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=False)


def run_queue(args: Any) -> None:
    """Start workers and replace those that die, until all runs are done or time is up."""
    began = time.time()
    ends_at = began + args.until
    claims(args).mkdir(parents=True, exist_ok=True)
    for old in (*claims(args).iterdir(), args.out / STOP):  # left by a queue that was cut
        old.unlink(missing_ok=True)
    workers = {PREPARE: start(args, PREPARE, ends_at)} if not (args.out / READY).exists() else {}
    workers |= {str(i): start(args, str(i), ends_at) for i in range(args.workers)}
    started, told = args.workers, 0.0
    while workers and not is_over(args, ends_at + GRACE_S):
        time.sleep(1)
        for name, process in list(workers.items()):
            code = process.poll()
            if code is None:
                continue
            del workers[name]
            print(f"{time.time() - began:.0f} s: worker {name} ended with {code}", flush=True)
            died = code != 0 and name != PREPARE and started < 3 * args.workers
            if died and left(args) and not is_over(args, ends_at - 30):
                workers[str(started)] = start(args, str(started), ends_at)
                started += 1
        if time.time() - told > 20:
            told = time.time()
            print(f"{told - began:.0f} s: {num_done(args)} done, {left(args)} not begun", flush=True)
    for process in workers.values():
        process.terminate()
    print(f"{time.time() - began:.0f} s: the end, {num_done(args)} done", flush=True)


# -- a worker


def work(args: Any) -> int:
    """Take runs until there are none or time is up; returns 1 if this process should be replaced."""
    import torch
    from transformers.utils import logging as transformers_logging

    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    from frontier_run import make_reference, train
    from frontier_speed import encode_once, few_launches

    import bondlm.trainer  # noqa: F401  imported while the reference is being made

    if not args.plain:
        few_launches()
    if args.worker == PREPARE:
        make_reference(args)
        return 0
    encode_once(args)
    wait_for(args.out / MODEL, args)
    took = 0.0
    while not is_over(args, args.ends_at - took / 2):
        job = claim(args)
        if job is None:
            break
        began = time.time()
        folder = Path(args.out) / f"{job[0]}-s{job[1]}-{int(began)}"
        folder.mkdir(parents=True)
        try:
            with (folder / "log.txt").open("w") as log, redirect_stdout(log), redirect_stderr(log):
                train(args, *job, folder)
            took = time.time() - began
            print(f"{folder.name}: {took:.0f} s", flush=True)
        except Exception as error:  # noqa: BLE001  the queue goes on
            (folder / "failed.txt").write_text(traceback.format_exc())
            print(f"{folder.name}: failed: {type(error).__name__}: {error}", flush=True)
            if "CUDA" in str(error):  # no later run can succeed in this process
                return 1
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return 0


def main() -> None:
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.list:
        done = done_runs(args)
        for name, seed in queue(args.runs, args.seeds):
            print(f"{name:26}seed {seed}  {'done' if (name, seed) in done else ''}")
    elif args.worker:
        sys.path.insert(0, str(HERE.parent))  # facts
        sys.exit(work(args))
    else:
        run_queue(args)


if __name__ == "__main__":
    main()
