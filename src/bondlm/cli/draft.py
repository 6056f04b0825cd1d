"""A file of answers in progress: `FILE.part`, which the same command continues after an interruption."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from bondlm.cli.console import say
from bondlm.errors import ConfigError


@contextmanager
def drafted(name: str, rows_per_prompt: int, console: Console) -> Iterator["Draft"]:
    """The draft of the file `name`, which no other process writes while the block runs.

    Raises:
        ConfigError: the file already exists, its folder does not, or it cannot be written.
        CheckpointError: another process writes it.
    """
    from bondlm.runs.folder import locked_file

    path = Path(name)
    if not path.parent.is_dir():
        raise ConfigError(f"output={name!r}: the folder {str(path.parent)!r} does not exist")
    with ExitStack() as stack:
        try:
            stack.enter_context(locked_file(path, "output"))
        except OSError as error:
            raise ConfigError(f"output={name!r} cannot be written: {error.strerror}") from error
        yield Draft(name, rows_per_prompt, console)


class Draft:
    """`FILE.part`, and next to it `FILE.part.json` with the inputs of its rows.

    The answers to a prompt depend only on its place and the seed, so a continued file equals one written in one go.
    """

    def __init__(self, name: str, rows_per_prompt: int, console: Console) -> None:
        """Prepare the draft; nothing is written yet.

        Raises:
            ConfigError: the file already exists, or cannot be written, or the draft was written by something else.
        """
        self.path = Path(name)
        if self.path.exists():
            raise ConfigError(f"output={name!r} exists already: choose another name or remove it")
        self._partial, self._notes = (self.path.with_name(self.path.name + end) for end in (".part", ".part.json"))
        self._rows_per_prompt, self._console = rows_per_prompt, console
        self._then = self._noted() if self._partial.exists() else {}
        try:
            self._partial.touch()
        except OSError as error:
            raise ConfigError(f"output={name!r} cannot be written: {error.strerror}") from error
        if not self._partial.stat().st_size:
            self._partial.unlink()  # no draft must seem to exist before it has begun
        elif not self._then:
            raise ConfigError(
                f"{str(self._partial)!r}, where the answers are collected, exists without a readable "
                f"{self._notes.name}, so it is unknown what is in it: remove it, or choose another output"
            )

    @property
    def now(self) -> datetime | None:
        """The time that templates got when the draft was begun, if there is one: its prompts have that date."""
        text = self._then.get("prompting", {}).get("now")
        return None if text is None else datetime.fromisoformat(text)

    def begin(self, made_from: Mapping[str, Any], num_prompts: int, chunk: int) -> int:
        """Begin or continue; returns the number of prompts that a draft with the same inputs has, in whole chunks.

        Raises:
            ConfigError: the draft has answers that were made from other inputs.
        """
        from bondlm.runs.folder import write_whole

        made_from = json.loads(json.dumps(made_from))
        whole = self._whole_rows()
        if whole and (other := [name for name in made_from if made_from[name] != self._then.get(name)]):
            changes = ", ".join(f"{name} ({self._then.get(name)!r} -> {made_from[name]!r})" for name in other)
            raise ConfigError(
                f"{str(self._partial)!r} holds {len(whole)} answers that were made with another {changes}: give the "
                "same options to continue, remove it, or choose another output"
            )
        prompts = len(whole) // self._rows_per_prompt
        prompts -= 0 if prompts == num_prompts else prompts % chunk
        self._partial.write_bytes(b"".join(whole[: prompts * self._rows_per_prompt]))
        write_whole(self._notes, json.dumps(made_from, indent=2) + "\n")
        if prompts:
            self._say(f"{self._partial} is continued: {prompts} of {num_prompts} prompts are answered")
        return prompts

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write more rows."""
        from bondlm.runs.folder import append_jsonl

        append_jsonl(self._partial, rows)

    def finish(self, notes: Path | None = None) -> None:
        """Give the complete file its name; the inputs of its rows are stored in the file `notes`.

        Raises:
            ConfigError: there is such a file by now.
        """
        from bondlm.runs.folder import write_whole

        if self.path.exists():
            raise ConfigError(
                f"output={str(self.path)!r} has been written by something else meanwhile: the answers are all in "
                f"{str(self._partial)!r}; give one of the two another name"
            )
        if notes is not None:
            write_whole(notes, self._notes.read_text(encoding="utf-8"))
        self._partial.replace(self.path)
        self._notes.unlink(missing_ok=True)

    def _noted(self) -> dict[str, Any]:
        try:
            return dict(json.loads(self._notes.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return {}

    def _whole_rows(self) -> list[bytes]:
        """The lines of the draft before the first incomplete one."""
        lines = self._partial.read_bytes().splitlines(keepends=True) if self._partial.exists() else []
        for i, line in enumerate(lines):
            if not (line.endswith(b"\n") and _is_json(line)):
                return lines[:i]
        return lines

    def _say(self, text: str) -> None:
        say(self._console, text)


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True
