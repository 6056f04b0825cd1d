"""Rows of the run folder's logs: if one process cannot write, all raise the error, after the run is saved."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bondlm.errors import ResourceError
from bondlm.runs.folder import append_jsonl
from bondlm.training.processes import World


def append(path: Path, rows: Sequence[Mapping[str, Any]], *, makes_folder: bool = False) -> str | None:
    """Append rows, with one retry; returns what is wrong if both tries fail."""
    failure = None
    for _ in range(2):
        try:
            if makes_folder:
                path.parent.mkdir(parents=True, exist_ok=True)
            append_jsonl(path, rows)
            return None
        except OSError as error:
            failure = f"{error.filename or path} cannot be written ({error.strerror}), twice"
    return failure


def append_by_each(path: Path, rows: Sequence[Mapping[str, Any]], world: World) -> str | None:
    """Each process appends its rows, if any, on its own machine; returns the first failure, on all processes."""
    return first_failure(append(path, rows, makes_folder=True) if rows else None, world)


def first_failure(failure: str | None, world: World) -> str | None:
    """The failure of the first process that has one; every process must call this."""
    return next(iter(world.gather_objects([] if failure is None else [failure])), None)


def unwritable(failure: str, step: int, max_steps: int | None = None) -> ResourceError:
    """The error that all processes raise after the run is saved."""
    then = "" if step == max_steps else ", then the same command continues"
    error = ResourceError(
        f"step {step}: {failure}. What was learned is saved: make the file writable or free some space{then}"
    )
    error.known_to_all = True
    return error
