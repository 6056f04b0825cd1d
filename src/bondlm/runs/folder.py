"""The run folder's logs and its lock."""

import errno
import json
import math
import os
import re
import socket
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from bondlm.errors import CheckpointError, ConfigError

LOCK_FILE, OWNER_FILE = ".lock", ".lock-owner"
CONFIG_FILE = "config.yaml"
START = "start"  # of a run: the adapter that it started with, if no other folder has it
BY_PYTHON = "# written by BONDTrainer\n"  # its first line, where no command wrote it
ENVIRONMENT_FILE = "env.json"
METRICS_FILE = "metrics.jsonl"
SAMPLES_FILE = "samples.jsonl"
SKIPPED_FILE = "skipped.jsonl"
DROPPED_FILE = "dropped.jsonl"
EVAL_FILE, EVAL_SAMPLES_FILE = "eval.json", "eval_samples.jsonl"
CHECKPOINT = re.compile(r"checkpoint-\d+")


def is_main_process() -> bool:
    """Whether this process writes the run folder; known before the processes are connected."""
    return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK", "0") == "0"


@contextmanager
def locked(folder: Path, setting: str = "output_dir") -> Iterator[None]:
    """Lock the folder that `setting` names for this run; with several processes the main one holds the lock for all.

    The lock belongs to the operating system and ends with its process in any case, so there are no stale locks. The
    file next to it is only for the message.

    Raises:
        ConfigError: the folder cannot be written.
        CheckpointError: another live process holds it.
    """
    if not is_main_process():
        yield
        return
    if folder.is_symlink():
        raise ConfigError(f"{setting}={str(folder)!r} is a link: name the folder that it points to")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.resolve() / LOCK_FILE, blocking=False, is_singleton=True)
        is_ours = lock.is_locked  # held by the command that started this run
        if not is_ours:
            _take(lock, folder, _owner(folder), setting)
            (folder / OWNER_FILE).write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
    except FileExistsError as error:
        raise ConfigError(f"{setting}={str(folder)!r} is a file: choose a folder") from error
    except OSError as error:
        raise ConfigError(f"{setting}={str(folder)!r} cannot be written: {error.strerror}") from error
    if is_ours:
        yield
        return
    try:
        yield
    finally:
        (folder / OWNER_FILE).unlink(missing_ok=True)
        with suppress(PermissionError):  # on Windows, filelock removes it as soon as possible
            (folder / LOCK_FILE).unlink(missing_ok=True)  # while held: whatever opens this file sees that it is gone
        lock.release()


@contextmanager
def locked_file(path: Path, setting: str) -> Iterator[None]:
    """The same for a single file, which `setting` names; the lock is a file next to it.

    Raises:
        CheckpointError: another live process writes it.
        OSError: the lock cannot be written.
    """
    file = path.with_name(path.name + LOCK_FILE)
    file.touch()  # filelock would take some files that cannot be written for held ones
    lock = FileLock(file, blocking=False)
    _take(lock, path, "another process", setting)
    try:
        yield
    finally:
        with suppress(PermissionError):
            file.unlink(missing_ok=True)  # while held, as above
        lock.release()


def _take(lock: FileLock, path: Path, owner: str, setting: str) -> None:
    try:
        lock.acquire()
    except Timeout as error:
        raise CheckpointError(f"{path} is in use by {owner}: wait for it, or choose another {setting}") from error
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):
            raise
        warnings.warn(
            f"bondlm: {path} lies on a disk without locks ({error.strerror}): make sure that no two runs write into it",
            stacklevel=4,
        )


def _owner(folder: Path) -> str:
    try:
        return (folder / OWNER_FILE).read_text(encoding="utf-8", errors="replace")[:1000] or "another process"
    except OSError:
        return "another process"


def append_jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Append rows, one JSON object per line; numbers that JSON cannot represent (infinity, NaN) become null."""
    text = "".join(json.dumps(plain(row), ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    with path.open("a", encoding="utf-8") as file:
        file.write(text)


def plain(value: Any) -> Any:
    """`value` with every non-finite number replaced by None, and tuples by lists."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def drop_after(path: Path, step: int) -> None:
    """Remove logged rows beyond `step` (and a torn last line), which a resumed run writes again."""
    if not path.exists():
        return
    kept = [line + b"\n" for line, logged in _logged(path) if logged <= step]
    with whole(path) as partial:
        partial.write_bytes(b"".join(kept))


def has_steps(path: Path, *, up_to: int) -> bool:
    """Whether a log has rows of steps up to `up_to`."""
    return path.is_file() and any(step <= up_to for _, step in _logged(path))


def _logged(path: Path) -> Iterator[tuple[bytes, int]]:
    """Each complete line of a log, with its step."""
    # Read as bytes, because text may have separators that only `str.splitlines` treats as line ends, and a torn line
    # may end inside a character.
    for line in path.read_bytes().split(b"\n"):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            yield line, row.get("step", 0)


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yield a path to write to; when the block ends, `path` appears complete and synced to disk, or not at all."""
    partial = path.with_name(path.name + ".tmp")
    partial.unlink(missing_ok=True)
    try:
        yield partial
        with partial.open("r+b") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def write_whole(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


def weights_file(folder: Path) -> str | None:
    """The name of the file with a model's weights in a folder, if there is one."""
    names = ("model.safetensors", "adapter_model.safetensors", "model.safetensors.index.json")
    return next((name for name in names if (folder / name).exists()), None)


def run_of(folder: Path) -> Path:
    """The folder with the settings of the model in `folder`: for a run's checkpoint, the run folder."""
    around = folder.resolve().parent
    is_checkpoint = CHECKPOINT.fullmatch(folder.resolve().name) and not (folder / CONFIG_FILE).is_file()
    return around if is_checkpoint and (around / METRICS_FILE).is_file() else folder


def refuse_unfinished(folder: Path) -> None:
    """Refuse a run folder that has no model yet.

    Raises:
        ConfigError: the folder has logs but no weights.
    """
    if (folder / METRICS_FILE).is_file() and weights_file(folder) is None:
        found = [path for path in folder.glob("checkpoint-*") if CHECKPOINT.fullmatch(path.name)]
        newest = max(found, key=lambda path: int(path.name.partition("-")[2]), default=None)
        todo = "trainer.save_model() saves it"
        if newest is not None:
            todo = f"the command that began it continues it, and {newest} is a model of its steps so far"
        raise ConfigError(
            f"{str(folder)!r} holds no trained model: its run was stopped, is still running, or has not saved it; "
            f"{todo}"
        )


def run_config(folder: Path) -> dict[str, Any]:
    """The settings of a run folder; empty if it has none or is not a run folder.

    Raises:
        CheckpointError: they exist but cannot be read.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        return {}
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        reason = f"it holds {type(config).__name__}, not settings"
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        config, reason = None, " ".join(str(error).split())
    if not isinstance(config, dict) or not config:
        raise CheckpointError(
            f"{path} cannot be read ({reason}), so the run's settings are unknown: restore it, or remove "
            "it to continue with the settings that you give now"
        )
    if Path(str(config.get("model"))).name == START and (folder / START).is_dir():
        config["model"] = str(folder.absolute() / START)  # where the folder is now
    return config


def run_environment(folder: Path) -> dict[str, Any]:
    """The environment of a run (other than its settings); empty if the folder does not have it."""
    try:
        content = json.loads((folder / ENVIRONMENT_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
