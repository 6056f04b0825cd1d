"""Check rows of prompts one by one: what is wrong with each, and its place."""

import ast
import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Number
from typing import Any, NamedTuple

from bondlm.data.chat_templates import joined_text
from bondlm.data.columns import LOGGED_IDS, LOGGED_REWARDS, PROMPT_IDS, PROMPT_ROW
from bondlm.data.rendering import is_token_ids
from bondlm.errors import DataError, listed

_log = logging.getLogger(__name__)

_MEDIA = ("image", "images", "audio", "video", "videos")
_ROLES = ("system", "developer", "user", "assistant", "tool")
# Arguments that reward functions get in addition to the columns of the data set, and bondlm's own columns.
RESERVED = (
    *("prompts", "completions", "completion_ids", "truncated", "trainer_state", "log_extra", "log_metric"),
    *(PROMPT_IDS, PROMPT_ROW, LOGGED_IDS, LOGGED_REWARDS),
)
# Rows with one of these columns (samples, and pairs of them) may share an `id`, which is then that of their prompt.
ANSWERS = ("completion", "chosen")
_SURROGATE = re.compile("[\ud800-\udfff]")
# Messages as written by `json.dumps` or `str`.
_WRITTEN_MESSAGES = re.compile(r"""\s*\[\s*\{\s*["'](role|content)["']\s*:\s*["']""")
_INT64, _TOO_LARGE = range(-(2**63), 2**63), "an integer beyond 64 bits"

Row = Mapping[str, Any]


class Line(NamedTuple):
    """A row as read from its source; `problem` says why there is none."""

    place: str  # `path:line`, or `row i`
    row: Any = None
    problem: str | None = None


@dataclass
class RowCheck:
    """Finds what is wrong with a row, by itself and in comparison with earlier rows."""

    token_ids: bool = False  # whether prompts may be lists of token ids
    typed: bool = False  # whether the columns already have types, so that rows cannot differ in them
    _first: tuple[type, str] | None = field(default=None, init=False)
    _ids: dict[tuple[str, str], str] = field(default_factory=dict, init=False)
    _kinds: dict[str, tuple[str, str]] = field(default_factory=dict, init=False)

    def problem(self, line: Line) -> str | None:
        """The first fault of a row, or None."""
        reason = line.problem or _prompt_problem(line.row, token_ids=self.token_ids)
        reason = reason or self._other_kind(line) or self._known_id(line)
        if reason is None and not self.typed:
            reason = self._other_type(line)
        return reason

    def _other_kind(self, line: Line) -> str | None:
        kind: type = str if isinstance(line.row["prompt"], str) else list
        if self._first is None:
            self._first = kind, line.place
        first, place = self._first
        if kind is first:
            return None
        return (
            f"the prompt is {kind_of(kind())}, but at {place} it is {kind_of(first())}; use plain text or lists of "
            "messages, not both"
        )

    def _known_id(self, line: Line) -> str | None:
        own = line.row.get("id")
        if own is None or any(name in line.row for name in ANSWERS):
            return None
        place = self._ids.setdefault((type(own).__name__, str(own)), line.place)
        return None if place == line.place else f"duplicate id {own!r} (first at {place})"

    def _other_type(self, line: Line) -> str | None:
        """A fault if a column has values of different types, which tables and rewards do not support."""
        kinds = {str(name): column_kind(value) for name, value in line.row.items() if value is not None}
        for name, kind in kinds.items():
            known, place = self._kinds.get(name, (kind, ""))
            if kind == _TOO_LARGE:
                return f"column {name!r} is {kind}"
            if kind != known:
                return f"column {name!r} is {kind}, but at {place} {known}: a column must hold values of one type"
        self._kinds = {name: (kind, line.place) for name, kind in kinds.items()} | self._kinds
        return None


def good_rows(lines: Iterable[Line], check: RowCheck, name: str, skipped: list[str] | None) -> list[int]:
    """The numbers of the good rows; bad ones are noted in `skipped`, or refused together.

    Raises:
        DataError: bad rows (the first 10 are named), or no good one.
    """
    good, problems, count, hint = [], [], 0, ""
    for i, line in enumerate(lines):
        count += 1
        if (reason := check.problem(line)) is None:
            good.append(i)
        else:
            problems.append(f"{line.place}: {reason}")
            hint = hint or _other_form(line.row)
    if hint and skipped is None:
        raise DataError(f"{listed(problems, 'bad rows')}\n{hint}")
    raise_or_note(problems, skipped)
    if not good:
        why = f"none of its {count} rows can be used:\n{listed(problems, 'rows')}" if count else "it has no rows"
        raise DataError(f"{name}: {why}. Give at least one prompt.")
    return good


def raise_or_note(problems: Sequence[str], skipped: list[str] | None) -> None:
    """Note bad rows in `skipped`, or raise one DataError that names the first of them and counts the rest."""
    if skipped is not None:
        skipped += problems
    elif problems:
        raise DataError(listed(problems, "bad rows"))


def check_columns(columns: Iterable[str], name: str, *, typed: bool = True) -> None:
    """Refuse columns that could be confused with bondlm's own; a table (`typed`) also needs a prompt.

    Raises:
        DataError: see above.
    """
    names = list(columns)
    if typed and names and "prompt" not in names:
        todo = _other_form(names) or "Rename the column with the prompts."
        if any(";" in column or "\t" in column for column in names):
            todo = "Separate the values by commas, in a .tsv file by tabs."
        raise DataError(f"{name}: no column `prompt`, it has {', '.join(names)}. {todo}")
    reserved = [column for column in names if column in RESERVED]
    if reserved:
        raise DataError(
            f"{name}: reserved column name: {', '.join(reserved)}. bondlm has a column, or an argument of reward "
            "functions, of that name. Rename the column."
        )


def _other_form(columns: Any) -> str:
    """What to do where the prompt is inside another column, as in TRL's other forms of data; these are its names."""
    names = columns if isinstance(columns, list | Mapping) else ()
    if "prompt" not in names and "messages" in names:
        return "Split `messages`: the last one is the answer, `completion`, and those before it are the `prompt`."
    if "prompt" not in names and "chosen" in names:
        return "Split `chosen` and `rejected`: what both begin with is the `prompt`, and the rest of each its answer."
    return ""


def warn_of_media(columns: Iterable[str], name: str) -> None:
    """Say that images and the like are not given to a model, for which TRL and others take such columns."""
    if found := sorted({*columns} & {*_MEDIA}):
        _log.warning(
            "%s: bondlm gives models only text; the column %s reaches only the reward functions",
            name,
            ", ".join(found),
        )


def kind_of(value: Any) -> str:
    """The JSON name of a value's type."""
    if value is None:
        return "null"
    names = {dict: "an object", list: "a list", str: "text", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), f"a {type(value).__name__}")


def has_surrogate(value: Any) -> bool:
    """Whether any text in a JSON value, including keys, has an unpaired surrogate."""
    if isinstance(value, str):
        return _SURROGATE.search(value) is not None
    if isinstance(value, Mapping):
        return any(has_surrogate(key) or has_surrogate(item) for key, item in value.items())
    return isinstance(value, list | tuple) and any(map(has_surrogate, value))


def text_of(message: Row) -> str:
    """The text of a message, whose content may be a list of parts."""
    content = message.get("content") or ""
    return content if isinstance(content, str) else joined_text(content)


def with_text(prompt: Sequence[Row]) -> list[dict[str, Any]]:
    """The messages, with content given as a list of parts replaced by its text."""
    return [
        {**message, "content": text_of(message)} if isinstance(message.get("content"), list | tuple) else dict(message)
        for message in prompt
    ]


def conversation_text(prompt: str | Sequence[Row]) -> str:
    """A prompt in readable form: the text, or the turns before the answer."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1 and prompt[0].get("role") == "user":
        return text_of(prompt[0])
    return "\n\n".join(f"[{message.get('role')}]\n{_said(message)}" for message in prompt)


def _said(message: Row) -> str:
    """The text of a message, and its tool calls."""
    calls = message.get("tool_calls")
    return text_of(message) + (json.dumps(calls, ensure_ascii=False) if calls else "")


def column_kind(value: Any) -> str:
    """The type that a column of such values has."""
    if isinstance(value, int) and not isinstance(value, bool) and value not in _INT64:
        return _TOO_LARGE
    if isinstance(value, Number) and not isinstance(value, bool):
        return "a number"
    return "a list" if isinstance(value, tuple) else kind_of(value)


def _prompt_problem(row: Any, *, token_ids: bool = False) -> str | None:
    """Say what is wrong with the prompt of one row, or None."""
    if not isinstance(row, Mapping):
        return f'a row must be an object such as {{"prompt": ...}}, not {kind_of(row)}'
    if "prompt" not in row:
        return f"no `prompt` (keys: {', '.join(map(str, row)) or 'none'})"
    prompt = row["prompt"]
    if has_surrogate(row):
        return "lone surrogate: half of a character, which UTF-8 cannot hold"
    if isinstance(prompt, str):
        return _text_problem(prompt)
    if not isinstance(prompt, list | tuple):
        return f"`prompt` must be text or a list of messages, not {kind_of(prompt)}"
    if not prompt:
        return "empty prompt (no messages)"
    if is_token_ids(prompt):
        return None if token_ids else "`prompt` is a list of token ids: set prompt_format='rendered' to take them so"
    for i, message in enumerate(prompt):
        problem = _message_problem(message)
        if problem is not None:
            return f"message {i}: {problem}"
    return None if text_of(prompt[-1]).strip() else "empty prompt (the last message has no text)"


def _text_problem(prompt: str) -> str | None:
    if _WRITTEN_MESSAGES.match(prompt) and _spells_messages(prompt):
        return (
            "`prompt` is text that spells a list of messages, as in a CSV: the model would read the brackets. Write "
            "the rows as JSON lines, with the list itself"
        )
    return None if prompt.strip() else "empty prompt"


def _spells_messages(text: str) -> bool:
    for parse in (json.loads, ast.literal_eval):
        try:
            value = parse(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        return isinstance(value, list) and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in value)
    return False


def _message_problem(message: Any) -> str | None:
    if not isinstance(message, Mapping):
        return f"must be an object with `role` and `content`, not {kind_of(message)}"
    role, content = message.get("role"), message.get("content")
    if role not in _ROLES:
        return f"`role` must be one of {', '.join(_ROLES)}, not {role!r}"
    if content is None and role == "assistant" and message.get("tool_calls"):
        return None
    if isinstance(content, list | tuple) and content:
        return next((problem for part in content if (problem := _part_problem(part)) is not None), None)
    return None if isinstance(content, str) else f"`content` must be text, not {kind_of(content)}"


def _part_problem(part: Any) -> str | None:
    if isinstance(part, str) or (isinstance(part, Mapping) and isinstance(part.get("text"), str)):
        return None
    kind = part.get("type") if isinstance(part, Mapping) else kind_of(part)
    return f"`content` has a part that is {kind!r}: bondlm reads only text"
