"""A run's hold on its folder, whoever starts it: no two at a time, no second one over a first, its settings on file."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from enum import Enum
from pathlib import Path
from typing import Any

import yaml

from bondlm.errors import CheckpointError
from bondlm.runs.folder import CONFIG_FILE, METRICS_FILE, locked, weights_file, write_whole
from bondlm.runs.foreign import foreign_file
from bondlm.runs.manifest import newest_checkpoint, remove_unfinished
from bondlm.runs.redact import redacted
from bondlm.training.processes import World, decided_by_main

_log = logging.getLogger(__name__)

BY_PYTHON = "# written by BONDTrainer\n"


def refuse_other_files(folder: Path) -> None:
    """See that a run writes over nothing that is not a run's.

    Raises:
        CheckpointError: another command has left a model there, and no run a log or a checkpoint; or there is a file of
            a name that a run writes, and nothing says that a run was there.
    """
    name = weights_file(folder)
    if name is not None and not (folder / METRICS_FILE).exists() and newest_checkpoint(folder)[0] is None:
        raise CheckpointError(
            f"{folder} already holds a model ({name}) that no run trained there: choose another output_dir or remove it"
        )
    if (name := foreign_file(folder)) is not None:
        raise CheckpointError(
            f"{folder / name} is there already, and nothing says that a run wrote it. A run writes its own {name}: "
            "choose another output_dir, or move the file away"
        )


@contextmanager
def held(folder: Path, args: Any, *, is_fresh: bool, settings: Mapping[str, Any]) -> Iterator[None]:
    """Hold the folder for a run; one that `is_fresh` must not find another run's checkpoints.

    `settings` are written where no command has written its own.

    Raises:
        CheckpointError: the folder is in use, or holds a run.
        ConfigError: it cannot be written.
    """

    def begin() -> None:
        stack.enter_context(locked(folder))
        if is_fresh:
            _refuse_a_run(folder)
        _write_settings(folder / CONFIG_FILE, settings)

    with ExitStack() as stack:
        decided_by_main(begin, World.of(args), wait_s=args.ddp_timeout)
        yield


def _refuse_a_run(folder: Path) -> None:
    for line in remove_unfinished(folder):
        _log.warning("%s", line)
    path, _ = newest_checkpoint(folder)
    if path is not None:
        raise CheckpointError(
            f"{folder} already holds a run, up to {path.name}: train(resume_from_checkpoint=True) continues it, or "
            "choose another output_dir"
        )


def _write_settings(path: Path, settings: Mapping[str, Any]) -> None:
    if path.is_file() and not path.read_text(encoding="utf-8", errors="replace").startswith(BY_PYTHON):
        return
    content = redacted({name: _plain(value) for name, value in settings.items() if name != "hub_token"})
    write_whole(path, BY_PYTHON + yaml.safe_dump(content, sort_keys=False))


def _plain(value: Any) -> Any:
    """As YAML has it; objects by their names."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)


def named(**inputs: Any) -> dict[str, Any]:
    """Of a trainer's inputs those that a file of settings can name."""
    return {name: value for name, value in inputs.items() if _is_name(value) and value}


def _is_name(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(part, str) for part in value))
