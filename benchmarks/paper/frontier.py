"""Win rate against KL, at a scale that decides: a queue of runs that goes on from one machine to the next.

    python benchmarks/paper/frontier.py --workers 9 --until 600 --seeds 0 1 2     # the whole map (frontier_map.py)
    python benchmarks/paper/frontier.py rloo-0.3 own-n4-fall --workers 2          # some of it
    python benchmarks/paper/frontier.py --list

The T5 task (examples/summarization: package descriptions, entailment reward, MiniLM and ROUGE-L as judges). First the
reference is made: 500 SFT steps of 32, then its samples of the held-out prompts, once for all runs. Then worker
processes take runs off the queue, the next one as soon as one has ended; a run that fails leaves its log and a worker
that dies is replaced. `--until` seconds after the start, or when a file `stop` lies in the run folder, no run goes on.
Rows are appended to the results file as they are measured; a run whose last row is there is done, on whichever machine,
and skipped.

A row: run, seed, step, win_rate, kl, entropy, effective_n, kl_ratio, judges, length, distinct_2, with `..._low` and
`..._high` (95%, over prompts), learning seconds, settings, command, commit, device, attempt (rows of a run that was cut
and made again have another) and is_last. While a file `pause` lies in the run folder, and is no older than 90 s, all
runs wait between two steps, for what wants the machine for itself.
"""

import argparse
import contextlib
import gc
import json
import os
import shlex
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

from frontier_map import COMPLETIONS, RUNS, STEPS, queue

HERE = Path(__file__).parent
RESULTS = HERE / "results/frontier.jsonl"
NLI = "nli:{models}/flan-t5-small-title?template=flan&premise_prefix=summarize: &batch_size=512&batch_tokens=65536"
PREPARE = "prepare"  # the worker that makes the reference
READY = "reference.json"  # written last: the reference and its samples are there
PAUSE, PAUSE_AT_MOST_S = "pause", 90
STOP = "stop"
WAIT_S = 300  # for the reference
SHARPENED = (0.8, 0.7, 0.6)
GRACE_S = 10


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", help=f"default: all of {', '.join(RUNS)}")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--workers", type=int, default=1, help="runs side by side")
    parser.add_argument("--until", type=float, default=float("inf"), help="seconds from the start when all ends")
    parser.add_argument("--out", type=Path, default=Path("runs/frontier"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--models", type=Path, default=Path("models"))
    parser.add_argument("--data", type=Path, default=Path("data/debian"))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--every", type=int, default=30, help="steps between measurements")
    parser.add_argument("--completions", type=int, default=COMPLETIONS, help="drawn in a step")
    parser.add_argument("--length", type=int, default=20, help="most tokens of a completion")
    parser.add_argument("--held-out", type=int, default=200, help="documents")
    parser.add_argument("--samples", type=int, default=4, help="of the policy, of each document")
    parser.add_argument("--reference-samples", type=int, default=64)
    parser.add_argument("--sft-steps", type=int, default=500)
    parser.add_argument("--sft-batch", type=int, default=32)
    parser.add_argument("--plain", action="store_true", help="bondlm's own decoding and sizes of batches")
    parser.add_argument("--list", action="store_true", help="say which runs there are and which are done")
    parser.add_argument("--worker", help=argparse.SUPPRESS)  # its name
    parser.add_argument("--ends-at", type=float, help=argparse.SUPPRESS)  # seconds since the epoch
    args = parser.parse_args(argv)
    unknown = [name for name in args.runs if name not in RUNS]
    if unknown:
        parser.error(f"{unknown[0]} is none of {', '.join(RUNS)}")
    return args


# -- the queue


def is_done(args: Any) -> set[tuple[str, int]]:
    """Runs whose last row is in the results."""
    lines = args.results.read_text(encoding="utf-8").splitlines() if args.results.exists() else []
    rows = [json.loads(line) for line in lines]
    return {(row["run"], row["seed"]) for row in rows if row["is_last"]}


def num_done(args: Any) -> int:
    return len(is_done(args) & set(queue(args.runs, args.seeds)))


def claims(args: Any) -> Path:
    return Path(args.out) / "claims"


def claim(args: Any) -> tuple[str, int] | None:
    """Take the next run that nobody has, if there is one."""
    done = is_done(args)
    for name, seed in queue(args.runs, args.seeds):
        if (name, seed) in done:
            continue
        with contextlib.suppress(FileExistsError):
            (claims(args) / f"{name}-s{seed}").touch(exist_ok=False)
            return name, seed
    return None


def left(args: Any) -> int:
    """Runs that nobody has taken."""
    done = is_done(args)
    jobs = [job for job in queue(args.runs, args.seeds) if job not in done]
    return sum(not (claims(args) / f"{name}-s{seed}").exists() for name, seed in jobs)


def is_over(args: Any, at: float) -> bool:
    """Whether time is up, or somebody says so."""
    return time.time() > at or (Path(args.out) / STOP).exists()


def start(args: Any, name: str, ends_at: float) -> subprocess.Popen[bytes]:
    """A worker of this name, its output in a file of its own."""
    command = [sys.executable, __file__, *sys.argv[1:], "--worker", name, "--ends-at", str(ends_at)]
    with (Path(args.out) / f"worker-{name}.log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=False)


def run_queue(args: Any) -> None:
    """Start workers and replace those that die, until all is done or time is up."""
    began = time.time()
    ends_at = began + args.until
    claims(args).mkdir(parents=True, exist_ok=True)
    for old in claims(args).iterdir():  # of a queue that was cut
        old.unlink()
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
            if (
                code
                and name != PREPARE
                and started < 3 * args.workers
                and not is_over(args, ends_at - 30)
                and left(args)
            ):
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
    """Take runs until there are none, or time is up; 1 if this process had better be replaced."""
    import torch
    from transformers.utils import logging as transformers_logging

    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    import bondlm.trainer  # noqa: F401  imported while the reference is being made

    if not args.plain:
        few_launches()
    if args.worker == PREPARE:
        make_reference(args)
        return 0
    encode_once(args)
    wait_for(args.out / "model.done", args)
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
            if "CUDA" in str(error):  # no other run has a chance in this process
                return 1
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return 0


def few_launches() -> None:
    """Fewer, larger kernels: what decides on a GPU that several runs share. The numbers are the same to rounding."""
    from weakref import WeakKeyDictionary

    import t5_decoding
    import torch

    from bondlm.models import head, logprobs
    from bondlm.training import step

    torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for every shape, and here all batches differ
    t5_decoding.install()
    head.LOGITS_BUDGET = 2**30
    step.score_groups = partial(logprobs.score_groups, batch_rows=1024)
    known: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
    asked = logprobs.exact_head

    def exact_head(model: Any, device: Any) -> Any:
        if model not in known:  # a forward pass each time
            known[model] = asked(model, device)
        return known[model]

    logprobs.exact_head = exact_head


def encode_once(args: Any) -> None:
    """Read and encode the prompts once for all runs of this process: half as long as a run learns, on a GPU."""
    from transformers import AutoConfig, AutoTokenizer

    from bondlm.data.prompt_encoder import PromptEncoder
    from bondlm.training import dropped

    base = args.models / "flan-t5-small-title"
    config, encode, load = AutoConfig.from_pretrained(base), PromptEncoder.encoded, dropped.load_prompts
    known: dict[Any, Any] = {}

    def encoded(self: Any, source: Any) -> Any:
        key = len(source), source[0]["prompt"]
        if key not in known:
            known[key] = encode(self, source)
        return known[key]

    def load_prompts(source: Any, **how: Any) -> Any:
        if source not in known:
            known[source] = load(source, **how)
        return known[source]

    PromptEncoder.encoded, dropped.load_prompts = encoded, load_prompts
    ids = {"eos_ids": [config.eos_token_id], "pad_id": config.pad_token_id, "start_id": config.decoder_start_token_id}
    tokenizer = AutoTokenizer.from_pretrained(base)
    encoder = PromptEncoder(tokenizer=tokenizer, config=config, **ids, max_completion_length=args.length)
    encoder.encoded(load_prompts(str(all_prompts(args))))


def wait_for(path: Path, args: Any) -> None:
    until = min(time.time() + WAIT_S, args.ends_at)
    while not path.exists():
        if time.time() > until:
            raise TimeoutError(f"{path} did not come")
        time.sleep(0.2)


def make_reference(args: Any) -> None:
    """The supervised start, unless it is there, and its samples of the held-out prompts."""
    folder = policy(args)
    began = time.perf_counter()
    if not folder.exists():
        from sft_start import finetune

        loss = finetune(args.models / "flan-t5-small-title", args.data, folder, args.sft_steps, args.sft_batch)
        print(f"SFT: {time.perf_counter() - began:.0f} s, held-out loss per token {loss}", flush=True)
    (args.out / "model.done").touch()
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
    """What measures a trainer's policy; it draws the reference's samples if nobody has."""
    from measure import Bench, load_judges

    specs = [f"similarity:{args.models}/all-minilm-l6-v2?batch_size=512&batch_tokens=65536"]
    judges = load_judges(specs, trainer.eval_dataset.to_list(), "reference", trainer.args.device)
    key = json.dumps([policy(args).name, args.length, NLI])
    return Bench(trainer, judges, Path(args.out) / "reference", key, args.reference_samples)


def all_prompts(args: Any) -> Path:
    """The prompts of both training splits, in one file."""
    path = args.data / "prompts.jsonl"
    if not path.exists():
        parts = [(args.data / f"{name}.jsonl").read_text(encoding="utf-8") for name in ("train", "sft")]
        write(path, "".join(parts))
    return path


def write(path: Path, text: str) -> None:
    """A file that appears whole."""
    partial_file = path.with_name(f"{path.name}.{os.getpid()}")
    partial_file.write_text(text, encoding="utf-8")
    partial_file.replace(path)


def settings_of(args: Any, name: str, seed: int, folder: Path) -> dict[str, Any]:
    """All that `BONDConfig` gets for a run."""
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
    """One run: train, and measure every so many steps and at the end."""
    import torch

    trainer = trainer_of(args, name, seed, folder)
    row = {"run": name, "seed": seed, "attempt": folder.name} | common(args)
    row |= {"settings": RUNS[name].as_settings(args.steps), "completions_a_step": args.completions}
    trainer.add_callback(watch(args, trainer, row))
    trainer.train()
    if torch.cuda.is_available():
        print(f"most memory: {torch.cuda.max_memory_reserved() / 2**30:.1f} GiB", flush=True)


def watch(args: Any, trainer: Any, row: dict[str, Any]) -> Any:
    """The callback that measures, waits while there is a pause, and ends the run when time is up."""
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        spent = began = 0.0
        bench = None  # made when it is needed: the reference's samples may still be on their way

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            pause = Path(args.out) / PAUSE
            with contextlib.suppress(FileNotFoundError):
                while time.time() - pause.stat().st_mtime < PAUSE_AT_MOST_S:
                    time.sleep(0.1)
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
    """The numbers of a measurement, each with the ends of its interval."""
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
    """What is beside every result: command, commit, device, versions."""
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


def append(args: Any, row: dict[str, Any]) -> None:
    """One line, written at once: several processes append to the file."""
    from bondlm.runs.folder import plain

    args.results.parent.mkdir(parents=True, exist_ok=True)
    with args.results.open("ab", buffering=0) as file:
        file.write((json.dumps(plain(row)) + "\n").encode())


def main() -> None:
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.list:
        done = is_done(args)
        for name, seed in queue(args.runs, args.seeds):
            print(f"{name:24}seed {seed}  {'done' if (name, seed) in done else ''}")
    elif args.worker:
        sys.path.insert(0, str(HERE.parent))  # facts
        sys.exit(work(args))
    else:
        run_queue(args)


if __name__ == "__main__":
    main()
