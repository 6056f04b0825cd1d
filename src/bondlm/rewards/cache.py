"""A cache on disk for the answers of a judge."""

import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

from bondlm.errors import ConfigError, ResourceError

CACHE_FILE = "judges.sqlite"
COLUMNS = "key TEXT PRIMARY KEY, said TEXT NOT NULL, prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL"
CREATE = f"CREATE TABLE IF NOT EXISTS answers ({COLUMNS})"
SELECT = "SELECT said, prompt_tokens, completion_tokens FROM answers WHERE key = ?"


def default_cache() -> Path:
    """The default folder for answers.

    Raises:
        RuntimeError: there is no home folder.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bondlm"


class Cache:
    """Answers by the hash of the question, in a file that processes may share. It holds ids, but no texts."""

    def __init__(self, folder: str | None = None) -> None:
        """Open the cache in a folder, by default the user's cache folder.

        Raises:
            ConfigError: no file can be written there.
        """
        try:
            self._path = (Path(folder).expanduser() if folder else default_cache()) / CACHE_FILE
        except RuntimeError as error:
            raise ConfigError(f"the judge's cache: {error} Give another folder (cache=FOLDER) or cache=off") from error
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with closing(self._connect()) as connection, connection:
                connection.execute(CREATE)
        except (OSError, sqlite3.Error) as error:
            raise ConfigError(
                f"the judge's answers cannot be kept in {self._path} ({error}): give another folder (cache=FOLDER) or "
                "cache=off"
            ) from error

    def get(self, key: str) -> tuple[str, int, int] | None:
        """The answer and its tokens, in and out; None if there is none.

        Raises:
            ResourceError: the file cannot be read.
        """
        with self._open() as connection:
            found: tuple[str, int, int] | None = connection.execute(SELECT, (key,)).fetchone()
        return found

    def put(self, key: str, said: str, tokens: Sequence[int]) -> None:
        """Store an answer.

        Raises:
            ResourceError: the file cannot be written.
        """
        with self._open() as connection:
            connection.execute("INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?)", (key, said, *tokens))

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """Turn temporary faults (full disk, missing folder) into a ResourceError: the run is saved and can continue."""
        try:
            with closing(self._connect()) as connection, connection:
                yield connection
        except sqlite3.Error as error:
            raise ResourceError(
                f"the judge's answers in {self._path} cannot be read or kept any more ({error}): make room or bring "
                "the folder back, and the same command continues the run; cache=off does without (allow_config_change)"
            ) from error

    def _connect(self) -> sqlite3.Connection:
        """A new connection for each use, since a connection belongs to one thread and the file to several processes."""
        return sqlite3.connect(self._path, timeout=60.0)
