"""Where whole weights lie between trainer and server: in shared memory, if both are on one machine and it has room."""

import atexit
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

SHARED = Path("/dev/shm")  # noqa: S108  a folder of our own in it, for us alone
START, LOCK = "bondlm-weights-", "lock"
_held: list[FileLock] = []  # as long as this process lives


def shared_folder(needed: int, shared: Path = SHARED) -> Path | None:
    """A new folder in shared memory with room for `needed` bytes, gone with this process; None if there is none.

    What processes that were killed have left there is removed.
    """
    try:
        for left in _left(shared):
            shutil.rmtree(left, ignore_errors=True)
        if shutil.disk_usage(shared).free < needed:
            return None
        folder = Path(tempfile.mkdtemp(prefix=START, dir=shared))
        lock = FileLock(folder / LOCK, blocking=False)
        lock.acquire()
    except (OSError, Timeout):  # no such memory here, or none for us
        return None
    _held.append(lock)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _left(shared: Path) -> Iterator[Path]:
    """Folders whose process has ended; one that has no lock yet is just being made."""
    for folder in shared.glob(f"{START}*"):
        if (folder / LOCK).exists():
            with suppress(OSError, Timeout), FileLock(folder / LOCK, blocking=False):  # another user's, or in use
                yield folder
