"""Consoles and progress displays of the commands."""

import json
import sys
import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from bondlm.cli import write_out
from bondlm.runs.folder import is_main_process, plain

PIPE_WIDTH = 120  # without a terminal, rich assumes 80 columns, which breaks tables and lines in log files


def make_console(*, stderr: bool = False) -> Console:
    """A console on stdout or stderr; no colours, bars or control characters when piped. Brackets are text.

    With several processes only the main one prints, but all print errors on stderr.
    """
    stream = sys.stderr if stderr else sys.stdout
    width, quiet = None if stream.isatty() else PIPE_WIDTH, not stderr and not is_main_process()
    return Console(stderr=stderr, width=width, quiet=quiet, markup=False, highlight=False)


def say(console: Console, text: str | Text) -> None:
    """Print a line that is never wrapped, so that a path or a command in it can be copied."""
    console.print(text, soft_wrap=True)


def say_json(value: Mapping[str, Any]) -> None:
    """Print one JSON object on stdout for programs; numbers that are not finite become null."""
    if is_main_process():
        write_out(json.dumps(plain(value), allow_nan=False) + "\n")


LINE_SECONDS = 2.0  # between two lines of progress if there is no terminal for a bar


class _Bars(Progress):
    def stop(self) -> None:
        """End the bars; rich before 14.3 prints an empty line even if there are none."""
        if not self.disable:
            super().stop()


def make_progress(console: Console) -> Progress:
    """Bars with elapsed time and ETA, which disappear when done; none without a terminal."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    hidden = not console.is_terminal
    return _Bars(*columns, TextColumn("ETA"), TimeRemainingColumn(), console=console, transient=True, disable=hidden)


def clock_text(seconds: float) -> str:
    """Write a duration as "1:02:03" or "2:03"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def elapsed_and_eta(seconds: float, done: float, total: float) -> str:
    """The elapsed time, and the remaining time at this pace."""
    eta = clock_text(seconds * (total - done) / done) if done else "?"
    return f"elapsed {clock_text(seconds)}, ETA {eta}"


class Counter:
    """A bar on a terminal; otherwise a line at most every two seconds, and one at the end."""

    def __init__(self, progress: Progress, name: str, total: int) -> None:
        """Count up to `total` prompts."""
        self._progress, self._name, self._total, self._done = progress, name, total, 0
        self._task = progress.add_task(name, total=total)
        self._began = self._said = time.monotonic()
        self._known = 0  # existed before, so they do not count for the pace

    def __call__(self, more: int) -> None:
        """Note that `more` of them are done."""
        console, now = self._progress.console, time.monotonic()
        if not self._done and now - self._began < 0.05:  # already in the file before anything was drawn
            self._known = more
        self._done += more
        self._progress.update(self._task, completed=self._done)
        is_last = self._done >= self._total
        if more and (is_last or (not console.is_terminal and now - self._said >= LINE_SECONDS)):
            self._said = now
            pace = elapsed_and_eta(now - self._began, self._done - self._known, self._total - self._known)
            pace = f"{now - self._began:.0f} s" if is_last else pace
            line = f"{self._name}: {self._done}/{self._total} prompts, {pace}"
            say(console, line)

    def close(self) -> None:
        """Remove the bar."""
        self._progress.remove_task(self._task)
