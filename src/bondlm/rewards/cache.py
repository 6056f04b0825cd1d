"""What a judge has answered, on disk."""

import os
import sqlite3
from contextlib import closing
from pathlib import Path

from bondlm.errors import ConfigError

CACHE_FILE = "judges.sqlite"


def default_cache() -> Path:
    """Where answers are kept if nothing is said."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bondlm"


class Cache:
    """Answers by the hash of what was asked, in a file that processes may share. It holds ids, and no texts."""

    def __init__(self, folder: str | None = None) -> None:
        """Open it in a folder, by default the user's cache folder.

        Raises:
            ConfigError: no file can be kept there.
        """
        self._path = (Path(folder).expanduser() if folder else default_cache()) / CACHE_FILE
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with closing(self._connect()) as connection, connection:
                connection.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, said TEXT NOT NULL)")
        except (OSError, sqlite3.Error) as error:
            raise ConfigError(
                f"the judge's answers cannot be kept in {self._path} ({error}): give another folder (cache=FOLDER) or "
                "cache=off"
            ) from error

    def get(self, key: str) -> str | None:
        """What was said, if anything."""
        with closing(self._connect()) as connection:
            found = connection.execute("SELECT said FROM answers WHERE key = ?", (key,)).fetchone()
        return None if found is None else str(found[0])

    def put(self, key: str, said: str) -> None:
        """Keep it."""
        with closing(self._connect()) as connection, connection:
            connection.execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", (key, said))

    def _connect(self) -> sqlite3.Connection:
        """A connection of its own for each use: it belongs to a thread, and the file to several processes."""
        return sqlite3.connect(self._path, timeout=60.0)
