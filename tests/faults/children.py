"""Tiny runs of `bondlm train` in forked children, with something prepared to go wrong in them."""

import gc
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from cli.helpers import write_job

from bondlm.cli import main

WEIGHTS = ("adapter_model.safetensors", "anchor.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth")


def job(folder: Path, **options: object) -> Path:
    """A job of three steps with a checkpoint each; returns its config."""
    folder.mkdir(parents=True)
    small = {"max_steps": 3, "save_steps": 1, "num_logged_samples": 4, "eval_dataset": None, "max_completion_length": 4}
    return write_job(folder, **small | options)


def start(config: Path, prepare: Callable[[], object] = lambda: None, *arguments: str) -> int:
    """`bondlm train` in a child, once it is prepared; its output goes to `<folder>/out.txt`."""

    def train() -> int:
        prepare()
        return main(["train", "--config", str(config), *arguments])

    return fork(train, config.parent / "out.txt")


def fork(work: Callable[[], int | None], output: Path, errors: Path | None = None) -> int:
    """Fork after the imports, so that a kill falls into the work, and seconds of each process are saved."""
    pid = os.fork()
    if pid:
        return pid
    gc.freeze()  # the parent's objects need no collection here
    torch.set_num_threads(1)
    for number, path in ((1, output), (2, errors or output)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    code = 1
    try:
        code = work() or 0
    except SystemExit as stop:
        code = int(str(stop.code))
    except Exception:  # noqa: BLE001 (the child's own end: it must not go on as a second pytest)
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def wait(pid: int, seconds: float = 120) -> int | None:
    """The exit code, or None if the process still runs after so many seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    return None


def train(config: Path, prepare: Callable[[], object] = lambda: None, *arguments: str) -> int | None:
    return wait(start(config, prepare, *arguments))


def as_rank(rank: int, world: int, port: int) -> None:
    """What a launcher says to one of its processes; nothing of the parent's own is left."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._shared_state.clear()
    places = {"WORLD_SIZE": world, "RANK": rank, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    places |= {"OMP_NUM_THREADS": 1}  # accelerate gives each process all cores otherwise
    os.environ.update({name: str(value) for name, value in places.items()})


def said(config: Path) -> str:
    return (config.parent / "out.txt").read_text()


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def wrap(owner: Any, name: str, at: int, do: Callable[[], object], *, after: bool = True) -> None:
    """Do something at the `at`-th call of `owner.name` (from 1), before or after the call itself."""
    plain, calls = getattr(owner, name), 0

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at and not after:
            do()
        result = plain(*args, **kwargs)
        if calls == at and after:
            do()
        return result

    setattr(owner, name, wrapped)


def outcome(config: Path) -> dict[str, Any]:
    """All that two equal runs have in common, bytes as bytes; seconds left out."""
    run = config.parent / "run"
    newest = max(run.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_bytes().splitlines()]
    timed = ("time/", "step_time", "train_runtime", "train_samples_", "train_steps_")
    steps = [{k: v for k, v in row.items() if not k.startswith(timed)} for row in rows if "loss" in row]
    files = {name: (newest / name).read_bytes() for name in WEIGHTS if (newest / name).is_file()}
    return {"newest": newest.name, "steps": steps, "samples": (run / "samples.jsonl").read_text(), **files}
