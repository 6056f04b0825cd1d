"""Files in the run folder through which the processes of the frontier's queue communicate."""

import os
import time
from pathlib import Path
from typing import Any

MODEL = "model.done"  # the reference exists
READY = "reference.json"  # and so do its samples
PAUSE, PAUSE_AT_MOST_S = "pause", 90
STOP = "stop"
WAIT_S = 300  # for the reference


def is_over(args: Any, at: float) -> bool:
    """Whether time is up or the file `stop` exists."""
    return time.time() > at or (Path(args.out) / STOP).exists()


def wait_for(path: Path, args: Any) -> None:
    until = min(time.time() + WAIT_S, args.ends_at)
    while not path.exists():
        if time.time() > until:
            raise TimeoutError(f"{path} did not come")
        time.sleep(0.2)


def wait_while_paused(args: Any) -> None:
    """Wait while another process asks for the machine, up to a limit."""
    pause = Path(args.out) / PAUSE
    try:
        while time.time() - pause.stat().st_mtime < PAUSE_AT_MOST_S:
            time.sleep(0.1)
    except FileNotFoundError:
        return


def write(path: Path, text: str) -> None:
    """Write a file that appears only when complete."""
    partial_file = path.with_name(f"{path.name}.{os.getpid()}")
    partial_file.write_text(text, encoding="utf-8")
    partial_file.replace(path)
