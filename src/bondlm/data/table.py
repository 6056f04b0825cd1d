"""Rows as a table (`datasets.Dataset`) that returns each of them unchanged."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow
from datasets import Dataset, Features, Json, concatenate_datasets

from bondlm.data.rendering import is_token_ids
from bondlm.data.rows import Row, check_columns, column_kind, with_text
from bondlm.errors import DataError


def to_dataset(rows: Sequence[Row], name: str) -> Dataset:
    """Turn checked rows into a table, with None where a row lacks a column.

    Objects in a column keep their own keys; Arrow would give each of them the keys of all others.

    Raises:
        DataError: a table cannot hold a column.
    """
    columns = list(dict.fromkeys(key for row in rows for key in row))
    check_columns(columns, name, typed=False)
    rows = [row if is_flat(row["prompt"]) else {**row, "prompt": with_text(row["prompt"])} for row in rows]
    parts = [_column(column, [row.get(column) for row in rows], name) for column in columns]
    return parts[0] if len(parts) == 1 else concatenate_datasets(parts, axis=1)


def _column(column: str, values: list[Any], name: str) -> Dataset:
    try:
        if _is_even(values):
            return Dataset.from_dict({column: values})
        texts = [None if value is None else json.dumps(value, allow_nan=False) for value in values]
        made = Dataset.from_dict({column: pyarrow.array(texts, pyarrow.json_())}, features=Features({column: Json()}))
        if [*map(column_kind, made[column][:])] != [*map(column_kind, values)]:
            raise ValueError("an integer beyond 64 bits")  # the decoder then gives up on the whole column
        return made
    except (pyarrow.ArrowException, OverflowError, UnicodeError, TypeError, ValueError) as error:
        raise DataError(f"{name}: no table can hold the column {column!r}: {error}") from error


def _is_even(values: Iterable[Any]) -> bool:
    """Whether Arrow returns the values of a column unchanged: one type, and the same keys in all objects."""
    known = [value for value in values if value is not None]
    if len({column_kind(value) for value in known}) > 1:
        return False
    if known and isinstance(known[0], Mapping):
        keys = known[0].keys()
        return all(each.keys() == keys for each in known) and all(_is_even([v[key] for v in known]) for key in keys)
    if known and isinstance(known[0], list | tuple):
        return _is_even([item for each in known for item in each])
    return True


def with_text_contents(dataset: Dataset) -> Dataset:
    """Replace content given as a list of parts by its text, which rewards and reports expect."""
    if is_flat(dataset[0]["prompt"]):
        return dataset
    prompts = dataset["prompt"][:]
    if not any(isinstance(message.get("content"), list) for prompt in prompts for message in prompt):
        return dataset
    return with_prompts(dataset, [with_text(prompt) for prompt in prompts])


def with_prompts(dataset: Dataset, prompts: Sequence[Any]) -> Dataset:
    """The data set with other prompts."""
    spare = "_" * (1 + max(map(len, dataset.column_names)))  # no column has this name
    renamed = dataset.rename_column("prompt", spare)  # a table without any column would have no rows
    return renamed.add_column("prompt", list(prompts)).remove_columns(spare)


def is_flat(prompt: Any) -> bool:
    """Whether a prompt is text or token ids instead of messages."""
    return isinstance(prompt, str) or is_token_ids(prompt)


def unformatted(dataset: Dataset) -> Dataset:
    """The rows as plain Python values, without any format set by `with_format`.

    Raises:
        DataError: a transform generates the rows while they are read.
    """
    if dataset.format["type"] == "custom":
        raise DataError("a data set with set_transform or with_transform has no fixed rows: use `map` instead")
    return dataset.with_format(None)
