"""Rows that people have written or judged: answers to imitate, and pairs of a preferred and a rejected answer.

They are read from files and all checked before any model is loaded; every bad row is named as `path:line`.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bondlm.data.columns import TEMPLATE_VARIABLES, TOOLS
from bondlm.data.files import rows_of_files
from bondlm.data.rows import Line, kind_of, with_text
from bondlm.errors import ConfigError, DataError, listed

Row = dict[str, Any]
PLACE = "place"  # of a row in its file, for messages
MARGIN = "margin"  # by which the rewards of a pair should differ, as in TRL's RewardTrainer


def read_answers(source: Any, column: str = "completion") -> list[Row]:
    """Rows `{"prompt", "completion"}` for supervised fine-tuning, from one or several files; `column` names the answer.

    Raises:
        DataError: the file cannot be read, or has rows without a prompt or with an empty answer.
    """
    rows = _checked(source, lambda row: _text_problem(row, column), column)
    return [{"completion": text_of(line.row[column]), **_prompt_of(line)} for line in rows]


def read_preferences(source: Any) -> list[Row]:
    """Rows `{"prompt", "chosen", "rejected"}`: two answers, of which a person preferred the first.

    A row may have a `margin`, by which its rewards should differ. Rows of `bondlm prefer` in which nothing was
    preferred (ties, skipped pairs) are left out.

    Raises:
        DataError: the file cannot be read, or has rows without a prompt, with an empty answer, with two equal answers,
            or with a margin that is not a finite number; or no row has a preference.
    """
    all_rows = _checked(source, _preference_problem)
    rows = [line for line in all_rows if not _is_undecided(line.row)]
    if not rows:
        raise DataError(
            f"{source}: {len(all_rows)} rows, all ties or skipped pairs: give a file with preferred answers"
        )
    return [_pair_of(line) for line in rows]


def places_of(rows: Sequence[Mapping[str, Any]]) -> Callable[[int], str]:
    """The place in its file of each of these rows, for messages; the number of a row that is from no file."""
    return lambda i: str(rows[i].get(PLACE, f"row {i}"))


def _prompt_of(line: Line) -> Row:
    """The prompt, with the content of messages as text, other columns that the chat template uses, and the place."""
    row = line.row
    columns = {name: row[name] for name in (TOOLS, TEMPLATE_VARIABLES) if row.get(name) is not None}
    columns[PLACE] = line.place
    return {"prompt": row["prompt"] if isinstance(row["prompt"], str) else with_text(row["prompt"])} | columns


def _pair_of(line: Line) -> Row:
    """The prompt, both answers, and the margin if the row has one."""
    row = line.row
    margin = {} if row.get(MARGIN) is None else {MARGIN: float(row[MARGIN])}
    return _prompt_of(line) | {name: text_of(row[name]) for name in ("chosen", "rejected")} | margin


def text_of(answer: Any) -> str:
    """The text of an answer, given as text or as a list of one assistant message."""
    return answer if isinstance(answer, str) else str(answer[0]["content"])


def _checked(
    source: Any, problem: Callable[[Mapping[str, Any]], str | None], text_column: str = "completion"
) -> list[Line]:
    lines = rows_of_files(source, text_column)
    found = [f"{line.place}: {reason}" for line in lines if (reason := problem(line.row)) is not None]
    if found:
        raise DataError(listed(found, "bad rows"))
    return lines


def _text_problem(row: Mapping[str, Any], name: str) -> str | None:
    if name not in row:
        return f"no `{name}` (keys: {', '.join(row)})"
    answer = row[name]
    if isinstance(answer, list):
        if len(answer) != 1 or not isinstance(answer[0], Mapping) or answer[0].get("role") != "assistant":
            return f"`{name}` must be text or a list of one assistant message"
        answer = answer[0].get("content")
    if not isinstance(answer, str):
        return f"`{name}` must be text or a list of one assistant message, not {type(answer).__name__}"
    return None if answer.strip() else f"`{name}` is empty: remove the row"


def _is_undecided(row: Mapping[str, Any]) -> bool:
    return row.get("verdict") in ("tie", "skip")


def _preference_problem(row: Mapping[str, Any]) -> str | None:
    if _is_undecided(row):
        return None
    for name in ("chosen", "rejected"):
        if (problem := _text_problem(row, name)) is not None:
            return problem
    if text_of(row["chosen"]).strip() == text_of(row["rejected"]).strip():
        return "`chosen` and `rejected` are equal: nothing was preferred, remove the row"
    return _margin_problem(row.get(MARGIN))


def _margin_problem(margin: Any) -> str | None:
    if margin is None:
        return None
    is_number = isinstance(margin, (int, float)) and not isinstance(margin, bool)
    if is_number and abs(margin) < 1e38:  # about fp32's largest; False for NaN
        return None
    shown = f"{margin:g}" if isinstance(margin, float) else kind_of(margin)
    return f"`margin` must be a finite number, not {shown}"


def hold_out(rows: Sequence[Row], every: int = 10) -> tuple[list[Row], list[Row]]:
    """Split by prompt, so that no prompt is in both parts: each `every`-th distinct prompt is held out.

    Raises:
        DataError: there are fewer distinct prompts than `every`.
    """
    number: dict[str, int] = {}
    for row in rows:
        number.setdefault(repr(row["prompt"]), len(number))
    if len(number) < every:
        raise DataError(
            f"only {len(number)} distinct prompts: hold some out of {every} or more, or give an eval_dataset"
        )
    kept: list[Row] = []
    held: list[Row] = []
    for row in rows:
        (held if number[repr(row["prompt"])] % every == every - 1 else kept).append(row)
    return kept, held


def flip_labels(rows: Sequence[Row], share: float, seed: int) -> tuple[list[Row], int]:
    """The rows, with `chosen` and `rejected` swapped in a random share of them, and the number of swapped rows.

    Raises:
        ConfigError: the share is outside [0, 0.5), or too small to flip any row.
    """
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share < 0.5:
        raise ConfigError(f"flip_labels={share!r}: must be at least 0 and below 0.5, a share of the training pairs")
    count = round(share * len(rows))
    if share and not count:
        raise ConfigError(f"flip_labels={share} flips none of {len(rows)} training pairs: raise it, or leave it out")
    flipped = set(random.Random(seed).sample(range(len(rows)), count))  # noqa: S311 (no secret)
    return [
        dict(row) | ({"chosen": row["rejected"], "rejected": row["chosen"]} if i in flipped else {})
        for i, row in enumerate(rows)
    ], count
