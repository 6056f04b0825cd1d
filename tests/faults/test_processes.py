"""Several processes of one run (rows M1 to M5, S5 and N3 of the fault matrix): two with gloo on the CPU."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from cli.helpers import write_job
from distributed.launch import ROOT, check, free_port, launch_tiny, outcome, run_tiny, taken_port
from safetensors.torch import load_file

from bondlm.cli import main as bondlm
from bondlm.errors import DataDesyncError, WeightDesyncError
from bondlm.runs.manifest import fault
from bondlm.runs.prompting import write_prompting
from faults.children import as_rank, fork, wait

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
TIMEOUT_S = 8  # what the runs are told
PATIENCE_S = 180  # until a process must have ended on a busy machine
LAST_WORDS = """
import atexit, os
atexit.register(os.write, 2, b"the tracker has ended")
class Last:
    def __del__(self, write=os.write):
        write(2, b"the interpreter has ended")
last = Last()
"""


class Rank:
    """One process of `bondlm train`, forked, with what the tests use of `subprocess.Popen`."""

    def __init__(self, config: Path, rank: int, port: int, options: Sequence[str] = (), without: str = "") -> None:
        self._files = [config.parent / f"rank-{rank}.{name}" for name in ("out", "err")]
        self.returncode: int | None = None

        def work() -> int:
            as_rank(rank, 2, port)
            os.environ.pop(without, None)
            return bondlm(["train", "--config", str(config), *options])

        self.pid = fork(work, *self._files)

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = wait(self.pid, 0.01)
        return self.returncode

    def communicate(self, timeout: float) -> list[str]:
        """Standard output and error of the ended process."""
        end = time.monotonic() + timeout
        while self.poll() is None and time.monotonic() < end:
            pass
        assert self.returncode is not None, f"still running after {timeout} s"
        return [path.read_text() for path in self._files]

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        if self.poll() is None:
            self.send_signal(signal.SIGKILL)
            self.communicate(timeout=10)


def ranks(config: Path, *options: str, late: float = 0) -> list[Rank]:
    """`bondlm train`, once a rank and without a launcher that would end the others when one ends.

    The main one comes `late` (seconds).
    """
    port = free_port()
    second = Rank(config, 1, port, options)
    time.sleep(late)
    return [Rank(config, 0, port, options), second]


def interpreters(config: Path) -> list[subprocess.Popen[str]]:
    """The same as interpreters of their own."""
    port, processes = str(free_port()), []
    for rank in ("0", "1"):
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = os.environ | places | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
        command = [sys.executable, "-m", "bondlm", "train", "--config", str(config)]
        processes.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    return processes


def wait_for_step(folder: Path, step: int, processes: list[Rank]) -> None:
    log = folder / "run" / "metrics.jsonl"
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end and all(process.poll() is None for process in processes):
        if log.exists() and any(json.loads(line)["step"] >= step for line in log.read_text().split("\n")[:-1]):
            return
        time.sleep(0.02)
    raise AssertionError([process.communicate(timeout=5) for process in processes if process.poll() is not None])


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["dead", "stalled"])
def test_m1_a_rank_that_is_gone_does_not_hang_the_other(tmp_path: Path, how: signal.Signals) -> None:
    config = write_job(tmp_path, max_steps=100_000, save_strategy="no", eval_dataset=None, ddp_timeout=TIMEOUT_S)
    first, second = processes = ranks(config)
    try:
        wait_for_step(tmp_path, 2, processes)
        second.send_signal(how)
        began = time.monotonic()
        _, error = first.communicate(timeout=TIMEOUT_S + 20)
        assert time.monotonic() - began < TIMEOUT_S + 20
        assert first.returncode == 6
        assert "rank 0" in error
        assert "ddp_timeout" in error
    finally:
        for process in processes:
            process.kill()


def test_m1_the_launcher_ends_the_others(tmp_path: Path) -> None:
    done = launch_tiny(tmp_path / "run", 2, kind="causal", per_device_train_batch_size=2, kill_rank=1, max_steps=50)
    assert done.returncode != 0
    assert "SIGKILL" in done.stderr


@pytest.mark.parametrize("what", ["rows", "settings"])
def test_m2_ranks_with_other_data_or_settings_are_told_apart(tmp_path: Path, what: str) -> None:
    done = run_tiny(tmp_path / "run", 2, kind="causal", per_device_train_batch_size=2, desync=what)
    assert done.returncode != 0
    assert DataDesyncError.__name__ in done.stderr
    assert re.search(f"{DataDesyncError.__name__}.*step 1: ", done.stderr)


def test_m3_weights_that_drift_apart_are_found_when_they_are_saved(tmp_path: Path) -> None:
    job: dict[str, Any] = {
        "kind": "causal",
        "per_device_train_batch_size": 2,
        "save_strategy": "steps",
        "save_steps": 1,
    }
    done = run_tiny(tmp_path / "run", 2, **job, desync="weights", desync_after=2)
    assert done.returncode != 0
    assert WeightDesyncError.__name__ in done.stderr
    assert re.search(f"{WeightDesyncError.__name__}.*policy of rank 1 .*rank 0", done.stderr)
    assert fault(tmp_path / "run" / "checkpoint-2") is None
    assert fault(tmp_path / "run" / "checkpoint-3") is not None  # never sealed


def test_d8_one_process_decides_where_to_resume(tmp_path: Path) -> None:
    """A first save that was cut short: the main process, which comes late, removes what others see before it."""
    config = write_job(tmp_path, max_steps=1, save_strategy="no", eval_dataset=None, ddp_timeout=60)
    unfinished = tmp_path / "run" / "checkpoint-1"
    unfinished.mkdir(parents=True)
    (unfinished / "optimizer.pt").write_bytes(b"half")
    (tmp_path / "run" / "config.yaml").write_text("{}")  # with prompting.json: a run was begun here
    write_prompting(tmp_path / "run", "auto", {}, datetime.now())
    processes = ranks(config, late=4)
    ends = [process.communicate(timeout=PATIENCE_S) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], ends
    assert f"removed {unfinished}" in ends[0][0]


def test_d10_what_the_main_process_refuses_ends_all(tmp_path: Path) -> None:
    config = write_job(tmp_path, max_steps=1, save_strategy="no", eval_dataset=None, ddp_timeout=60)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".sealed").touch()
    processes = ranks(config)
    ends = [process.communicate(timeout=PATIENCE_S) for process in processes]
    assert [process.returncode for process in processes] == [6, 6], ends
    assert all(".sealed" in error for _, error in ends)


def test_d11_another_number_of_processes(tmp_path: Path) -> None:
    job: dict[str, Any] = {"kind": "causal", "save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch"}
    check(run_tiny(tmp_path / "one", 1, **job, per_device_train_batch_size=4, max_steps=4))
    check(run_tiny(tmp_path / "two", 1, **job, per_device_train_batch_size=4, max_steps=2))
    refused = run_tiny(tmp_path / "two", 2, **job, per_device_train_batch_size=4, max_steps=4, resume=True)
    assert refused.returncode != 0
    assert "now it would be 8 (2 processes x per_device_train_batch_size=4" in refused.stderr
    check(run_tiny(tmp_path / "two", 2, **job, per_device_train_batch_size=2, max_steps=4, resume=True))
    one, two = (load_file(tmp_path / name / "policy.safetensors") for name in ("one", "two"))
    assert max(float((two[name] - one[name]).abs().max()) for name in one) < 2e-6


def test_m4_the_uneven_last_batch_of_an_epoch(tmp_path: Path) -> None:
    job: dict[str, Any] = {"kind": "causal", "rows": 5, "max_steps": 4}  # 4 + 1 prompts an epoch
    check(run_tiny(tmp_path / "one", 1, **job, per_device_train_batch_size=4))
    check(run_tiny(tmp_path / "two", 2, **job, per_device_train_batch_size=2))
    one, two = (load_file(tmp_path / name / "policy.safetensors") for name in ("one", "two"))
    residuals = torch.cat([(two[name] - one[name]).flatten() for name in one])
    assert float(residuals.abs().max()) < 2e-6


def test_m5_a_missing_variable_is_named(tmp_path: Path) -> None:
    config = write_job(tmp_path, eval_dataset=None)
    process = Rank(config, 0, free_port(), without="MASTER_ADDR")
    _, error = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 2
    assert "MASTER_ADDR" in error
    assert "Traceback" not in error


def test_m5_a_taken_port_is_named(tmp_path: Path) -> None:
    config = write_job(tmp_path, eval_dataset=None)
    with taken_port() as port:
        process = Rank(config, 0, port)
        _, error = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 2
    assert f"MASTER_PORT={port}" in error
    assert "Traceback" not in error


def test_s5_ranks_end_before_the_interpreter_does(tmp_path: Path) -> None:
    """Its finalization is where a thread of the group aborts now and then; a tracker ends its run before it."""
    config = write_job(tmp_path, max_steps=1, save_strategy="no", eval_dataset=None)
    with (tmp_path / "reward.py").open("a") as reward:
        reward.write(LAST_WORDS)
    processes = interpreters(config)
    ends = [process.communicate(timeout=PATIENCE_S) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], ends
    for _, error in ends:
        assert "the tracker has ended" in error
        assert "the interpreter has ended" not in error


@pytest.mark.parametrize("rank", [0, 1])
def test_s5_a_signal_to_one_rank_stops_all_at_the_same_step(tmp_path: Path, rank: int) -> None:
    config = write_job(tmp_path, max_steps=100_000, save_steps=100_000, eval_dataset=None, ddp_timeout=30)
    processes = ranks(config)
    try:
        wait_for_step(tmp_path, 2, processes)
        processes[rank].send_signal(signal.SIGTERM)
        ends = [process.communicate(timeout=PATIENCE_S) for process in processes]
        assert [process.returncode for process in processes] == [75, 75], ends
    finally:
        for process in processes:
            process.kill()
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    assert fault(checkpoint) is None
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= {path.name for path in checkpoint.iterdir()}
    assert "stopped by SIGTERM" in ends[0][0]
    assert ends[1][0] == ""  # one process speaks


def test_n3_a_gradient_that_is_not_finite_on_one_rank_is_skipped_by_all(tmp_path: Path) -> None:
    job: dict[str, Any] = {"kind": "causal", "per_device_train_batch_size": 2}
    check(run_tiny(tmp_path / "run", 2, **job, nan_rank=1, nan_step=2))
    skipped = [row["skipped_steps"] for row in outcome(tmp_path / "run") if "loss" in row]
    assert skipped == [0, 1, 0]
    policy = load_file(tmp_path / "run" / "policy.safetensors")
    assert all(torch.isfinite(weights).all() for weights in policy.values())


def test_r6_the_failure_of_one_rank_ends_all(tmp_path: Path) -> None:
    done = run_tiny(tmp_path / "run", 2, kind="causal", per_device_train_batch_size=2, fail_on_rank=1)
    assert done.returncode != 0
    assert "one rank's reward is down" in done.stderr


OUTAGE = """
from bondlm.errors import RewardOutageError
import os

def down(prompts, completions, **columns):
    down.calls += 1
    if down.calls == 2 and os.environ["RANK"] == "1":
        raise RewardOutageError("the server is down")
    return [float(len(str(c))) for c in completions]
down.calls = 0
"""


def test_r8_an_outage_on_one_rank_saves_the_run_on_all(tmp_path: Path) -> None:
    (tmp_path / "down.py").write_text(OUTAGE)
    config = write_job(tmp_path, save_steps=100, eval_dataset=None, reward_funcs=f"{tmp_path}/down.py:down")
    processes = ranks(config)
    ends = [process.communicate(timeout=PATIENCE_S) for process in processes]
    assert [process.returncode for process in processes] == [4, 4], ends
    assert all("process 1: " in error and "the server is down" in error for _, error in ends)
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    assert checkpoint.name == "checkpoint-1"
    assert fault(checkpoint) is None


BLOCKED = """
import os
from pathlib import Path

def blocks(prompts, completions, **columns):
    blocks.calls += 1
    path = Path(__file__).parent / "run" / os.environ["BLOCKED"]
    if blocks.calls == 2 and os.environ["RANK"] == "0":
        path.unlink(missing_ok=True)
        path.mkdir()
    drops = blocks.calls == 2 and os.environ["BLOCKED"] == "dropped.jsonl"
    values = [float(len(str(c))) for c in completions]
    return [None, *values[1:]] if drops else values
blocks.calls = 0
"""


@pytest.mark.parametrize(("name", "step"), [("metrics.jsonl", 2), ("samples.jsonl", 2), ("dropped.jsonl", 1)])
def test_s10_a_log_that_the_main_process_cannot_write_saves_the_run_on_all(
    name: str, step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second step drops a prompt, and its row is logged."""
    (tmp_path / "blocks.py").write_text(BLOCKED)
    monkeypatch.setenv("BLOCKED", name)
    settings: dict[str, Any] = {"save_steps": 100, "eval_dataset": None, "max_skipped_frac": 0.5, "logging_steps": 1}
    config = write_job(tmp_path, reward_funcs=f"{tmp_path}/blocks.py:blocks", max_steps=4, **settings)
    processes = ranks(config)
    ends = [process.communicate(timeout=PATIENCE_S) for process in processes]
    assert [process.returncode for process in processes] == [7, 7], ends
    assert all(name in error and "Is a directory" in error for _, error in ends)
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    assert checkpoint.name == f"checkpoint-{step}"
    assert fault(checkpoint) is None
