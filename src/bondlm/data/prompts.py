"""Prompt data sets: read from any source, and checked row by row before training.

A row is `{"prompt": str, ...}` (standard) or `{"prompt": [{"role", "content"}, ...], ...}` (conversational). All other
columns go to the reward functions. Bad rows are refused together, each with its place.
"""

import json
import logging
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from datasets import Dataset, concatenate_datasets

from bondlm.data.files import JSON, files_of, json_rows, read_table, suffix_of
from bondlm.data.paths import expanded
from bondlm.data.rows import ANSWERS, Line, Row, RowCheck, check_columns, good_rows, warn_of_media
from bondlm.data.sources import open_source, read_whole
from bondlm.data.table import to_dataset, with_text_contents
from bondlm.errors import DataError, listed

_log = logging.getLogger(__name__)


def load_prompts(
    source: Any,
    *,
    held_out: bool = False,
    skipped: list[str] | None = None,
    token_ids: bool = False,
    places: list[str] | None = None,
) -> Dataset:
    """Read a prompt data set and check every row.

    Args:
        source: a file (JSON lines, JSON, CSV, Parquet), a pattern or a list of files, a folder written by
            `Dataset.save_to_disk`, the name of a data set on the hub (`NAME:CONFIG:SPLIT`), a `datasets.Dataset` (or a
            dictionary of splits), or a list of rows. Held-out prompts may also be an `IterableDataset`.
        held_out: whether the prompts are for an evaluation; then, of several splits, the one that is not `train` is
            used.
        skipped: a list that takes the reason for each bad row, which is then left out; None refuses bad rows.
        token_ids: whether prompts may be lists of token ids.
        places: a list that takes the place of each row that is returned.

    Returns:
        The data set with its columns unchanged, except that messages whose content is a list of parts get their joined
        text. Columns that some rows lack are None there.

    Raises:
        DataError: if the source cannot be read, has no rows, has bad rows (the first 10 are named as `path:line`,
            `path: row i` or `row i`, counted from 0), mixes standard and conversational prompts, or has a reserved
            column or no column `prompt`.
    """
    kept: list[str] = [] if places is None else places
    check = RowCheck(token_ids=token_ids)
    source = read_whole(source) if held_out else source
    files = files_of(source)
    if files is not None and suffix_of(files[0]) not in JSON:
        return _load_tables(files, skipped, check, kept)
    if files is not None or (isinstance(source, Sequence) and not isinstance(source, str)):
        name = "the list of rows" if files is None else ", ".join(files)
        rows = json_rows(files) if files else (Line(f"row {i}", row) for i, row in enumerate(source))
        lines = list(rows)
        good = good_rows(lines, check, name, skipped)
        kept += [lines[i].place for i in good]
        warn_of_media((key for i in good for key in lines[i].row), name)
        return to_dataset([lines[i].row for i in good], name)
    if isinstance(source, str | Path):
        source = expanded(str(source))
    dataset = open_source(source, held_out=held_out)
    name = source if isinstance(source, str) else "the data set"
    kept += (f"row {i}" for i in range(len(dataset)))
    return _checked(dataset, name, kept, skipped, check)


def _load_tables(files: Sequence[str], skipped: list[str] | None, check: RowCheck, places: list[str]) -> Dataset:
    parts, odd = [], list[Line]()
    for path in files:
        table, own_places, own_odd = read_table(path)
        parts.append(Dataset(table))
        places += own_places
        odd += own_odd
    try:
        dataset = parts[0] if len(parts) == 1 else concatenate_datasets(parts)
    except ValueError as error:
        raise DataError(f"{', '.join(files)}: columns of one name must have one type in all files: {error}") from error
    return _checked(dataset, ", ".join(files), places, skipped, check, odd)


def _checked(
    dataset: Dataset,
    name: str,
    places: list[str],
    skipped: list[str] | None,
    check: RowCheck,
    odd: Sequence[Line] = (),
) -> Dataset:
    """The good rows of a table; `places` is reduced to them, and `odd` are lines that did not get into the table."""
    check_columns(dataset.column_names, name)
    warn_of_media(dataset.column_names, name)
    check.typed = True
    # Other columns may hold images or long answers, and no check uses them.
    names = ("prompt",) if set(ANSWERS) & set(dataset.column_names) else ("prompt", "id")
    looked_at = dataset.select_columns([column for column in names if column in dataset.column_names])
    good = good_rows(chain(map(Line, places, looked_at), odd), check, name, skipped)
    places[:] = [places[i] for i in good]
    return with_text_contents(dataset if len(good) == len(dataset) else dataset.select(good))


def overlap(train: Iterable[Row], evaluation: Iterable[Row]) -> int:
    """Count the rows of `evaluation` whose prompt is also a prompt of `train`."""
    return len(_common_rows(train, evaluation))


def check_overlap(train: Any, evaluation: Dataset | dict[str, Dataset] | None, *, strict: bool = False) -> None:
    """Log how many held-out prompts are also training prompts, on which an evaluation means little.

    Raises:
        DataError: there are some, and `strict` forbids it; the first 10 are named.
    """
    parts = evaluation if isinstance(evaluation, dict) else {"eval_dataset": evaluation}
    for name, part in parts.items():
        if not isinstance(train, Dataset) or part is None:  # a stream is not searched
            continue
        where = f" of {name}" if isinstance(evaluation, dict) else ""
        common = _common_rows(train.select_columns("prompt"), part.select_columns("prompt"))
        if common and strict:
            rows = [f"row {i} of {name}: {_prompt_key(part[i]['prompt'])[:80]}" for i in common]
            raise DataError(
                f"{len(common)} of {len(part)} evaluation prompts are training prompts too, and strict=True forbids "
                f"it. Remove them from one of the two:\n{listed(rows, 'rows')}"
            )
        if common:
            _log.warning("%d of %d evaluation prompts%s are training prompts too", len(common), len(part), where)


def _common_rows(train: Iterable[Row], evaluation: Iterable[Row]) -> list[int]:
    seen = {_prompt_key(row["prompt"]) for row in train}
    return [i for i, row in enumerate(evaluation) if _prompt_key(row["prompt"]) in seen]


def _prompt_key(prompt: Any) -> str:
    """A text that identifies a prompt; keys that are None count as absent."""
    if isinstance(prompt, str):
        return json.dumps(prompt)
    return json.dumps([{k: v for k, v in message.items() if v is not None} for message in prompt], sort_keys=True)


def keep_rows(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch is a list of rows: tokens become tensors only when the completions are known."""
    return {"rows": rows}
