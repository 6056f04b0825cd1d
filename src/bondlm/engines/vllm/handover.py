"""Hand whole weights from trainer to server through shared memory, if both are on one machine and it has room."""

import atexit
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

SHARED = Path("/dev/shm")  # noqa: S108  we make a private folder in it
START, LOCK = "bondlm-weights-", "lock"
_held: list[FileLock] = []  # held as long as this process lives


def shared_folder(needed: int, shared: Path = SHARED) -> Path | None:
    """A new folder in shared memory with room for `needed` bytes, removed when this process ends; else None.

    Leftovers of processes that were killed are removed.
    """
    try:
        for left in _left(shared):
            shutil.rmtree(left, ignore_errors=True)
        if shutil.disk_usage(shared).free < needed:
            return None
        folder = Path(tempfile.mkdtemp(prefix=START, dir=shared))
        lock = FileLock(folder / LOCK, blocking=False)
        lock.acquire()
    except (OSError, Timeout):  # no shared memory here, or not accessible
        return None
    _held.append(lock)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _left(shared: Path) -> Iterator[Path]:
    """Folders whose process has ended; a folder without a lock is just being created."""
    for folder in shared.glob(f"{START}*"):
        if (folder / LOCK).exists():
            with suppress(OSError, Timeout), FileLock(folder / LOCK, blocking=False):  # another user's, or in use
                yield folder
