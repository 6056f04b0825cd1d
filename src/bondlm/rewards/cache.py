"""What a judge has answered, on disk."""

import os
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from bondlm.errors import ConfigError

CACHE_FILE = "judges.sqlite"
COLUMNS = "key TEXT PRIMARY KEY, said TEXT NOT NULL, prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL"
CREATE = f"CREATE TABLE IF NOT EXISTS answers ({COLUMNS})"
SELECT = "SELECT said, prompt_tokens, completion_tokens FROM answers WHERE key = ?"


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
                connection.execute(CREATE)
        except (OSError, sqlite3.Error) as error:
            raise ConfigError(
                f"the judge's answers cannot be kept in {self._path} ({error}): give another folder (cache=FOLDER) or "
                "cache=off"
            ) from error

    def get(self, key: str) -> tuple[str, int, int] | None:
        """What was said, and the tokens that it cost, in and out; if anything was."""
        with closing(self._connect()) as connection:
            found: tuple[str, int, int] | None = connection.execute(SELECT, (key,)).fetchone()
        return found

    def put(self, key: str, said: str, tokens: Sequence[int]) -> None:
        """Keep it."""
        with closing(self._connect()) as connection, connection:
            connection.execute("INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?)", (key, said, *tokens))

    def _connect(self) -> sqlite3.Connection:
        """A connection of its own for each use: it belongs to a thread, and the file to several processes."""
        return sqlite3.connect(self._path, timeout=60.0)
