"""Prompt datasets: read from anywhere, checked row by row before anything is trained.

A row is `{"prompt": str, ...}` (standard) or `{"prompt": [{"role", "content"}, ...], ...}` (conversational). All other
columns travel to the reward functions. Bad rows are refused together, each with its place.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bondlm.data.chat_templates import joined_text
from bondlm.data.paths import expanded
from bondlm.data.rendering import is_token_ids
from bondlm.errors import DataError, listed

if TYPE_CHECKING:
    from datasets import Dataset

_JSONL = (".jsonl", ".jsonlines", ".json-lines", ".ndjson")
_ROLES = ("system", "developer", "user", "assistant", "tool")
# Reward functions get these as arguments of their own, beside the columns of the data set.
_RESERVED = ("prompts", "completions", "completion_ids", "truncated")
# A hub name: `name` or `owner/name`. Everything else that is text is a path.
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_SURROGATE = re.compile("[\ud800-\udfff]")

_Row = Mapping[str, Any]
_log = logging.getLogger(__name__)


def load_prompts(
    source: str | Path | Dataset | Sequence[_Row],
    *,
    split: str = "train",
    skipped: list[str] | None = None,
    token_ids: bool = False,
) -> Dataset:
    """Read a prompt data set and check every row.

    Args:
        source: A JSONL or Parquet file, a folder written by `Dataset.save_to_disk`, the name of a data set on the
            hub, a `datasets.Dataset` (or a dictionary of splits), or a list of rows.
        split: Which split of a hub data set, or of a folder or dictionary with several.
        skipped: A list that takes the reason of each bad row, which is then left out; None refuses bad rows.
        token_ids: Whether prompts may be lists of token ids.

    Returns:
        The data set with its columns as they are, but for messages whose content is a list of parts: their text is
        joined. Columns that some rows lack are None there.

    Raises:
        DataError: If the source cannot be read, has no rows, has bad rows (the first 10 are named as `path:line` or
            `row i`, counted from 0), mixes standard and conversational prompts, or has a reserved column.
    """
    from datasets import Dataset, DatasetDict

    if isinstance(source, str | Path):
        source = expanded(str(source))
        if Path(source).suffix.lower() in _JSONL:
            return _to_dataset(read_jsonl(source, prompts=True, skipped=skipped, token_ids=token_ids), str(source))
        dataset = _open_source(str(source), split)
    elif isinstance(source, Dataset | DatasetDict):
        dataset = source
    elif isinstance(source, Sequence):
        rows: list[Any] = list(source)
        places = [f"row {i}" for i in range(len(rows))]
        good = _check_rows(rows, places, "the list of rows", skipped, token_ids=token_ids)
        return _to_dataset([rows[i] for i in good], "the list of rows")
    else:
        raise DataError(
            f"cannot read prompts from a {type(source).__name__}. Give a path, the name of a hub data set, a "
            "`datasets.Dataset` (not a streaming one) or a list of rows."
        )
    dataset = _pick_split(dataset, split)
    name = str(source) if isinstance(source, str | Path) else "the data set"
    _check_columns(dataset.column_names, name)
    # The other columns may hold images or long answers, and no check looks at them.
    checked = dataset.select_columns([column for column in ("prompt", "id") if column in dataset.column_names])
    good = _check_rows(checked, [f"row {i}" for i in range(len(checked))], name, skipped, token_ids=token_ids)
    return _with_text_contents(dataset if len(good) == len(checked) else dataset.select(good))


def read_jsonl(
    path: str | Path, *, prompts: bool = False, skipped: list[str] | None = None, token_ids: bool = False
) -> list[dict[str, Any]]:
    """Read a file with one JSON object a line, strictly.

    The file is UTF-8; a byte-order mark may stand at its start and nowhere else. Lines end with LF or CRLF; blank
    lines are ignored. Not accepted: NaN and infinities, numbers beyond float64, a key twice in one object, and lone
    surrogates, which no UTF-8 file can hold.

    Args:
        path: The file.
        prompts: Whether the rows are prompts, and so are checked as `load_prompts` does.
        skipped: As in `load_prompts`.
        token_ids: As in `load_prompts`.

    Returns:
        The objects, in order.

    Raises:
        DataError: If the file cannot be read or has no rows, or for all bad rows together, each as `path:line: reason`
            (the first 10 are named; lines count from 1).
    """
    rows: list[dict[str, Any]] = []
    places: list[str] = []
    problems: list[tuple[int, str]] = []
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                if not line.strip(b" \t\r\n"):
                    continue
                try:
                    rows.append(_parse_line(line.rstrip(b"\r\n")))
                    places.append(f"{path}:{number}")
                except ValueError as error:
                    problems.append((number, f"{path}:{number}: {error}"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}. Check the path.") from error
    if prompts:
        numbers = [int(place.rpartition(":")[2]) for place in places]
        bad = dict(_row_problems(rows, places, token_ids=token_ids))
        problems += [(numbers[i], text) for i, text in bad.items()]
        rows = [row for i, row in enumerate(rows) if i not in bad]
    _raise_or_note([text for _, text in sorted(problems)], skipped)
    if not rows:
        raise DataError(f"{path}: the file has no rows. Write one JSON object a line.")
    if prompts:
        _check_columns(_union_columns(rows), str(path))
    return rows


def overlap(train: Iterable[_Row], evaluation: Iterable[_Row]) -> int:
    """Count the rows of `evaluation` whose prompt is also a prompt of `train`."""
    return len(_common_rows(train, evaluation))


def check_overlap(
    train: Dataset | None, evaluation: Dataset | Mapping[str, Dataset] | None, *, strict: bool = False
) -> None:
    """Log how many held-out prompts are also training prompts: on those an evaluation says little.

    Raises:
        DataError: there are some, and `strict` forbids it; the first 10 are named.
    """
    parts = evaluation if isinstance(evaluation, Mapping) else {"eval_dataset": evaluation}
    for name, part in parts.items():
        if train is None or part is None:
            continue
        common = _common_rows(train.select_columns("prompt"), part.select_columns("prompt"))
        if common and strict:
            rows = [f"row {i} of {name}: {_prompt_key(part[i]['prompt'])[:80]}" for i in common]
            raise DataError(
                f"{len(common)} of {len(part)} evaluation prompts are training prompts too, and strict=True forbids "
                f"it. Remove them from one of the two:\n{listed(rows, 'rows')}"
            )
        if common:
            _log.warning("%d of %d evaluation prompts are training prompts too", len(common), len(part))


def _common_rows(train: Iterable[_Row], evaluation: Iterable[_Row]) -> list[int]:
    seen = {_prompt_key(row["prompt"]) for row in train}
    return [i for i, row in enumerate(evaluation) if _prompt_key(row["prompt"]) in seen]


def _prompt_key(prompt: Any) -> str:
    """One text for each prompt; keys that are None are as good as absent."""
    if isinstance(prompt, str):
        return json.dumps(prompt)
    return json.dumps([{k: v for k, v in message.items() if v is not None} for message in prompt], sort_keys=True)


def _parse_line(line: bytes) -> dict[str, Any]:
    """Parse one line to an object, or raise ValueError with the reason."""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte 0x{line[error.start]:02x} at column {error.start + 1})") from error
    try:
        row = json.loads(
            text, parse_constant=_refuse_constant, parse_float=_finite_float, object_pairs_hook=_unique_keys
        )
    except json.JSONDecodeError as error:
        raise ValueError(f"invalid JSON: {error.msg.removesuffix(' at')} (column {error.colno})") from error
    except RecursionError as error:
        raise ValueError("invalid JSON: nested too deeply") from error
    if not isinstance(row, dict):
        raise ValueError(f'a row must be an object such as {{"prompt": ...}}, not {_kind(row)}')
    # Escapes are the only way for a surrogate to pass the UTF-8 decoder.
    if "\\u" in text and _has_surrogate(row):
        raise ValueError("lone surrogate: half of a character, which UTF-8 cannot hold")
    return row


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number; use null for a missing value")


def _finite_float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"number {text} is too large for float64")
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [key for key, _ in pairs]
        twice = next(key for key in names if names.count(key) > 1)
        raise ValueError(f"the key {twice!r} appears twice")
    return row


def _has_surrogate(value: Any) -> bool:
    """Whether any text in a JSON value, keys too, has a surrogate that is not half of a pair."""
    if isinstance(value, str):
        return _SURROGATE.search(value) is not None
    if isinstance(value, Mapping):
        return any(_has_surrogate(key) or _has_surrogate(item) for key, item in value.items())
    return isinstance(value, list | tuple) and any(map(_has_surrogate, value))


def _kind(value: Any) -> str:
    """Name a value's type in JSON's words."""
    if value is None:
        return "null"
    names = {dict: "an object", list: "a list", str: "text", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), f"a {type(value).__name__}")


def _row_problems(rows: Iterable[Any], places: Sequence[str], *, token_ids: bool = False) -> list[tuple[int, str]]:
    """Find the first fault of each bad row, as (index, `place: reason`)."""
    problems = []
    first_kind: type | None = None
    first_place = ""
    seen_ids: dict[tuple[str, str], str] = {}
    for i, (row, place) in enumerate(zip(rows, places, strict=True)):
        reason = _prompt_problem(row, token_ids=token_ids)
        if reason is None:
            kind = str if isinstance(row["prompt"], str) else list
            if first_kind is None:
                first_kind, first_place = kind, place
            elif kind is not first_kind:
                reason = (
                    f"the prompt is {_kind(kind())}, but at {first_place} it is {_kind(first_kind())}; "
                    "use plain text or lists of messages, not both"
                )
        if reason is None and row.get("id") is not None:
            key = (type(row["id"]).__name__, str(row["id"]))
            if key in seen_ids:
                reason = f"duplicate id {row['id']!r} (first at {seen_ids[key]})"
            seen_ids.setdefault(key, place)
        if reason is not None:
            problems.append((i, f"{place}: {reason}"))
    return problems


def _prompt_problem(row: Any, *, token_ids: bool = False) -> str | None:
    """Say what is wrong with the prompt of one row, or None."""
    if not isinstance(row, Mapping):
        return f'a row must be an object such as {{"prompt": ...}}, not {_kind(row)}'
    if "prompt" not in row:
        return f"no `prompt` (keys: {', '.join(map(str, row)) or 'none'})"
    prompt = row["prompt"]
    if _has_surrogate(row):
        return "lone surrogate: half of a character, which UTF-8 cannot hold"
    if isinstance(prompt, str):
        return None if prompt.strip() else "empty prompt"
    if not isinstance(prompt, list | tuple):
        return f"`prompt` must be text or a list of messages, not {_kind(prompt)}"
    if not prompt:
        return "empty prompt (no messages)"
    if is_token_ids(prompt):
        return None if token_ids else "`prompt` is a list of token ids: set prompt_format='rendered' to take them so"
    for i, message in enumerate(prompt):
        problem = _message_problem(message)
        if problem is not None:
            return f"message {i}: {problem}"
    return None if _text_of(prompt[-1]).strip() else "empty prompt (the last message has no text)"


def _message_problem(message: Any) -> str | None:
    if not isinstance(message, Mapping):
        return f"must be an object with `role` and `content`, not {_kind(message)}"
    role, content = message.get("role"), message.get("content")
    if role not in _ROLES:
        return f"`role` must be one of {', '.join(_ROLES)}, not {role!r}"
    if content is None and role == "assistant" and message.get("tool_calls"):
        return None
    if isinstance(content, list | tuple) and content:
        return next((problem for part in content if (problem := _part_problem(part)) is not None), None)
    return None if isinstance(content, str) else f"`content` must be text, not {_kind(content)}"


def _part_problem(part: Any) -> str | None:
    if isinstance(part, str) or (isinstance(part, Mapping) and isinstance(part.get("text"), str)):
        return None
    kind = part.get("type") if isinstance(part, Mapping) else _kind(part)
    return f"`content` has a part that is {kind!r}: bondlm reads text alone"


def _text_of(message: _Row) -> str:
    content = message.get("content") or ""
    return content if isinstance(content, str) else joined_text(content)


def _with_text_contents(dataset: Dataset) -> Dataset:
    """Content that is a list of parts becomes its text: what rewards and reports expect."""
    if _is_flat(dataset[0]["prompt"]):
        return dataset
    prompts = dataset["prompt"][:]
    if not any(isinstance(message.get("content"), list) for prompt in prompts for message in prompt):
        return dataset
    return with_prompts(dataset, [with_text(prompt) for prompt in prompts])


def with_prompts(dataset: Dataset, prompts: Sequence[Any]) -> Dataset:
    """The data set with other prompts."""
    renamed = dataset.rename_column("prompt", "other_prompt")  # a table without any column would have no rows
    return renamed.add_column("prompt", list(prompts)).remove_columns("other_prompt")


def _is_flat(prompt: Any) -> bool:
    return isinstance(prompt, str) or is_token_ids(prompt)


def with_text(prompt: Sequence[_Row]) -> list[dict[str, Any]]:
    """The messages; content that is a list of parts becomes their text."""
    return [
        {**message, "content": _text_of(message)} if isinstance(message.get("content"), list | tuple) else dict(message)
        for message in prompt
    ]


def _check_rows(
    rows: Iterable[Any], places: Sequence[str], name: str, skipped: list[str] | None, *, token_ids: bool
) -> list[int]:
    """The numbers of the good rows; without any the source is refused."""
    bad = dict(_row_problems(rows, places, token_ids=token_ids))
    _raise_or_note(list(bad.values()), skipped)
    good = [i for i in range(len(places)) if i not in bad]
    if not good:
        raise DataError(f"{name} has no rows. Give at least one prompt.")
    return good


def _check_columns(columns: Iterable[str], name: str) -> None:
    reserved = [column for column in columns if column in _RESERVED]
    if reserved:
        raise DataError(
            f"{name}: reserved column name: {', '.join(reserved)}. Reward functions get an argument of that name from "
            "bondlm. Rename the column."
        )


def _raise_or_note(problems: Sequence[str], skipped: list[str] | None) -> None:
    """Note bad rows in `skipped`, or raise one DataError that names the first of them and counts the rest."""
    if skipped is not None:
        skipped += problems
    elif problems:
        raise DataError(listed(problems, "bad rows"))


def _union_columns(rows: Iterable[_Row]) -> list[str]:
    return list(dict.fromkeys(key for row in rows for key in row))


def _to_dataset(rows: Sequence[_Row], name: str) -> Dataset:
    """Make checked rows into a table, with None where a row lacks a column."""
    import pyarrow
    from datasets import Dataset

    columns = _union_columns(rows)
    _check_columns(columns, name)
    rows = [row if _is_flat(row["prompt"]) else {**row, "prompt": with_text(row["prompt"])} for row in rows]
    try:
        return Dataset.from_dict({column: [row.get(column) for row in rows] for column in columns})
    except (pyarrow.ArrowException, OverflowError, UnicodeError) as error:
        raise DataError(f"{name}: a column must hold values of one type in all rows: {error}") from error


def _open_source(source: str, split: str) -> Any:
    """Open a Parquet file, a saved folder or a hub data set."""
    import datasets
    import pyarrow
    import pyarrow.parquet

    path = Path(source)
    try:
        if path.is_dir() and ((path / "state.json").exists() or (path / "dataset_dict.json").exists()):
            return datasets.load_from_disk(source)
        if path.suffix.lower() == ".parquet":
            # Read directly: `datasets` would first copy the file into its cache in the home folder.
            return datasets.Dataset(pyarrow.parquet.read_table(source))
        if path.is_file():
            raise DataError(f"{source}: unknown kind of file. Give .jsonl or .parquet.")
        if path.is_dir() or _HUB_NAME.fullmatch(source):
            return datasets.load_dataset(source, split=split)
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{source}: cannot be read: {error}") from error
    raise DataError(f"{source}: no such file, and not the name of a hub data set.")


def _pick_split(dataset: Any, split: str) -> Dataset:
    from datasets import Dataset, DatasetDict

    if isinstance(dataset, DatasetDict):
        if split not in dataset:
            raise DataError(f"no split {split!r} in the data set. It has: {', '.join(dataset)}.")
        dataset = dataset[split]
    if not isinstance(dataset, Dataset):
        raise DataError(f"prompts must be a `datasets.Dataset`, not a {type(dataset).__name__}.")
    return dataset


def keep_rows(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch is its rows: tokens become tensors only when the completions are known."""
    return {"rows": rows}
