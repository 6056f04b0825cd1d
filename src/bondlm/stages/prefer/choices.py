"""The file of a person's choices: one row each, synced to disk before the next pair is shown."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, get_args

from filelock import FileLock, Timeout

from bondlm.data.files import json_lines
from bondlm.errors import CheckpointError, ConfigError, DataError
from bondlm.stages.prefer.pairs import Pair, key_of, prompt_of

Verdict = Literal["left", "right", "tie", "skip"]
VERDICTS = get_args(Verdict)
_BEGINNING = b'{"prompt": '


class Choices:
    """The choices in a file; new ones are appended."""

    def __init__(self, path: Path) -> None:
        """Read the existing choices; an incomplete last line is removed.

        Raises:
            DataError: a row is not a choice.
        """
        self.path = path
        lines = list(json_lines(str(path))) if path.exists() else []
        whole = lines[:-1] if lines and _is_torn(path) else lines
        self._keys = {_key(line.row, line.place, line.problem) for line in whole}
        _mend(path)

    def left_of(self, pairs: Iterable[Pair]) -> list[Pair]:
        """The pairs that are not decided yet."""
        return [pair for pair in pairs if pair.key not in self._keys]

    def add(self, pair: Pair, verdict: Verdict) -> None:
        """Store a choice; it is synced to disk when this returns.

        A row is `{"prompt", "chosen", "rejected", "verdict"}`, with `left` and `right` instead of the middle two if
        nothing was chosen; `verdict` says on which side the chosen answer was.

        Raises:
            OSError: it could not be written, and no part of it is in the file.
        """
        names = {"left": ("chosen", "rejected"), "right": ("rejected", "chosen")}.get(verdict, ("left", "right"))
        row = prompt_of(pair.row) | dict(zip(names, (pair.left, pair.right), strict=True)) | {"verdict": verdict}
        line = (json.dumps(row, ensure_ascii=False) + "\n").encode()
        with self.path.open("ab") as file:
            begin = file.tell()
            try:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
            except OSError:
                with suppress(OSError):
                    os.truncate(self.path, begin)
                raise
        self._keys.add(pair.key)


def _key(row: Any, place: str, problem: str | None) -> str:
    names = ("left", "right") if isinstance(row, Mapping) and "left" in row else ("chosen", "rejected")
    if problem or not isinstance(row, Mapping) or not {"prompt", *names} <= set(row):
        raise DataError(f"{place}: this is not a choice ({problem or 'it needs prompt, chosen and rejected'}): fix it")
    return key_of(row, row[names[0]], row[names[1]])


def _last_line(path: Path) -> bytes:
    """What stands behind the last line end."""
    return path.read_bytes().rpartition(b"\n")[2] if path.exists() else b""


def _is_torn(path: Path) -> bool:
    """Whether the last line is the beginning of a choice, as `Choices.add` writes them, or zeros after a power cut.

    Nothing else is removed.
    """
    tail = _last_line(path)
    if tail and not tail.strip(b"\0"):
        return True
    if not tail.strip() or tail[: len(_BEGINNING)] != _BEGINNING[: len(tail)]:
        return False
    try:
        json.loads(tail)
    except ValueError:
        return True
    return False


def _mend(path: Path) -> None:
    """Remove an incomplete last line, which was never confirmed; add the line end to a complete one that lacks it."""
    tail = _last_line(path)
    if _is_torn(path):
        os.truncate(path, path.stat().st_size - len(tail))
    elif tail.strip():
        with path.open("ab") as file:
            file.write(b"\n")


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Lock the file of choices: two pages that write to it would ask everything twice.

    Raises:
        ConfigError: its folder does not exist or cannot be written.
        CheckpointError: another process holds it.
    """
    if path.is_dir() or not path.parent.is_dir():
        raise ConfigError(f"output={str(path)!r} is not a file in a folder that exists: name the file to write")
    lock = FileLock(path.with_name(f"{path.name}.lock"), blocking=False)
    try:
        lock.acquire()
    except Timeout as error:
        raise CheckpointError(f"{path} is in use by another bondlm prefer: end it first") from error
    except OSError as error:
        raise ConfigError(f"output={str(path)!r} cannot be written: {error.strerror}") from error
    try:
        yield
    finally:
        with suppress(OSError):
            Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()
