"""A run's claim on its folder: only one run at a time, no second run over a first, and its settings stored there."""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from peft import PeftConfig

from bondlm.errors import CheckpointError, ConfigError
from bondlm.models.deepspeed import require_same_sharding
from bondlm.runs.folder import METRICS_FILE, locked, weights_file
from bondlm.runs.foreign import foreign_file
from bondlm.runs.manifest import has_settings, newest_checkpoint, remove_unfinished
from bondlm.training.processes import World, decided_by_main
from bondlm.training.settings import INPUTS, as_on_file, compare_settings, fingerprints, write_settings

_log = logging.getLogger(__name__)


def refuse_other_files(folder: Path) -> None:
    """Check that a run overwrites nothing that does not belong to a run.

    Raises:
        ConfigError: it is a file.
        CheckpointError: the folder has a model of another command but no log or checkpoint of a run; or it has
            checkpoints or a file with a name that a run writes, but no sign of an earlier run.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output_dir={str(folder)!r} is a file: name a folder (it is created if it does not exist)")
    name = weights_file(folder)
    if name is not None and not (folder / METRICS_FILE).exists() and newest_checkpoint(folder)[0] is None:
        raise CheckpointError(
            f"{folder} already holds a model ({name}) that no run trained there: choose another output_dir or remove it"
        )
    if not has_settings(folder):
        newest_checkpoint(folder)  # refuses another trainer's, before PROMPTING_FILE makes the folder that of a run
    if (name := foreign_file(folder)) is not None:
        raise CheckpointError(
            f"{folder / name} already exists, and nothing shows that a run wrote it; a run would overwrite it: choose "
            "another output_dir, or move the file away"
        )


@contextmanager
def held(
    folder: Path,
    args: Any,
    checkpoint: str | None,
    settings: Mapping[str, Any] | None,
    adapter: PeftConfig | None,
    reward_funcs: Any,
    *,
    allowed: bool,
) -> Iterator[Callable[[], None]]:
    """Hold the folder for a run; without a `checkpoint` the folder must not hold another run.

    A continued run must have the `settings`, the `adapter` and the code or weights of `reward_funcs` that it started
    with. With `settings` None, a command has compared its own. Yields a function that writes the settings, to be called
    when nothing else refuses the run.

    Raises:
        CheckpointError: the folder is in use, or holds a run.
        ConfigError: it cannot be written, or settings differ from the run's and this is not `allowed`.
    """
    now = None if settings is None else as_on_file({**settings, "use_peft": adapter is not None})
    sources = cache(lambda: fingerprints(reward_funcs))  # may read gigabytes: on the main process, and once

    def begin() -> list[str]:
        stack.enter_context(locked(folder))
        for line in remove_unfinished(folder):
            _log.warning("%s", line)
        if checkpoint is None:
            _refuse_a_run(folder)
            return []
        require_same_sharding(Path(checkpoint), args)
        return compare_settings(Path(checkpoint), now, adapter, sources, allowed=allowed)

    with ExitStack() as stack:
        changes = decided_by_main(begin, World.of(args), wait_s=args.ddp_timeout)
        yield lambda: write_settings(folder, now or {}, sources, changes, goes_on=checkpoint is not None)


def _refuse_a_run(folder: Path) -> None:
    path, _ = newest_checkpoint(folder)
    if path is not None:
        raise CheckpointError(
            f"{folder} already holds a run, up to {path.name}: train(resume_from_checkpoint=True) continues it, or "
            "choose another output_dir"
        )


def named(*inputs: Any) -> dict[str, Any]:
    """Those of a trainer's `INPUTS` that a settings file can name."""
    return {name: value for name, value in zip(INPUTS, inputs, strict=True) if _is_name(value) and value}


def _is_name(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(part, str) for part in value))
