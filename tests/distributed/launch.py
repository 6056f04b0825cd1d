"""Starting `run_tiny.py` in one process or in several."""

import copy
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from faults.children import as_rank, fork, wait

from distributed.run_tiny import main

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("run_tiny.py")


def run_tiny(out: Path, processes: int, *, timeout: float = 300, **job: Any) -> subprocess.CompletedProcess[str]:
    """Fork the processes, which saves the imports that a launcher's each make; see `run_tiny.py` for `job`."""
    out.mkdir(exist_ok=True)
    log, port, end = out.with_name(f"{out.name}.txt"), free_port(), time.monotonic() + timeout
    log.unlink(missing_ok=True)

    def work(rank: int) -> None:
        as_rank(rank, processes, port)
        main(out, copy.deepcopy(job))

    running = {rank: fork(partial(work, rank), log) for rank in range(processes)}
    codes: dict[int, int] = {}
    while running and time.monotonic() < end:
        for rank, child in list(running.items()):
            code = wait(child, 0.02)
            if code is not None:
                codes[rank] = code
                del running[rank]
        if any(codes.values()):
            break
    for child in running.values():  # the others of one that failed, as a launcher does
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    late = dict.fromkeys(running, -signal.SIGKILL)
    code = next((code for code in [*codes.values(), *late.values()] if code), 0)
    said = log.read_text()
    return subprocess.CompletedProcess([str(SCRIPT)], code, said, said)


def launch_tiny(
    out: Path, processes: int, *, timeout: float = 300, config: str | None = None, precision: str = "no", **job: Any
) -> subprocess.CompletedProcess[str]:
    """The same by `torchrun`, or by `accelerate launch` with a shipped `config`."""
    out.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    command += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    if config is not None:
        command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(processes)]
        command += ["--main_process_port", "0", "--config_file", str(ROOT / "examples/accelerate" / config)]
        command += ["--mixed_precision", precision]
    command += [str(SCRIPT), str(out), json.dumps(job)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, check=False)


def check(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def outcome(out: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_bytes().splitlines()]


def free_port() -> int:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        return int(holder.getsockname()[1])


@contextmanager
def taken_port() -> Iterator[int]:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        yield int(holder.getsockname()[1])
