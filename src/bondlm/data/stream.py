"""Prompts that are read during a run: each is checked and encoded when it is needed.

The order is the stream's own, repeated endlessly, so a position in it is a number of prompts, and a resumed run skips
those that it has learned from.
"""

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from itertools import count, islice
from pathlib import Path
from typing import Any

import pyarrow.parquet
import torch
from datasets import Dataset, IterableDataset, IterableDatasetDict

from bondlm.data.columns import PROMPT_IDS, PROMPT_ROW, TEMPLATE_VARIABLES, TOOLS
from bondlm.data.files import LINES, files_of, json_lines, suffix_of
from bondlm.data.fingerprints import rows_text
from bondlm.data.paths import expanded
from bondlm.data.prompt_encoder import PromptEncoder
from bondlm.data.rows import Line, RowCheck, check_columns, warn_of_media, with_text
from bondlm.data.sources import cause_of, choose_split, open_name
from bondlm.data.table import is_flat
from bondlm.errors import BondError, ConfigError, DataError

CHUNK = 32  # rows that are encoded together; the first chunk determines the columns
_KEPT = 1 << 16  # number of positions whose digest is kept


def is_stream(source: Any) -> bool:
    """Whether the source is a streaming data set."""
    return isinstance(source, IterableDataset | IterableDatasetDict)


class PromptStream(torch.utils.data.IterableDataset[dict[str, Any]]):
    """Encoded prompts without end: after the last row it starts again with the first."""

    def __init__(
        self, source: Any, encoder: PromptEncoder, note: Callable[[list[str], int], None], *, skips_rows: bool
    ) -> None:
        """`note` gets all bad rows so far and the number of good ones; bad rows are refused unless `skips_rows`.

        Raises:
            ConfigError: the source cannot be streamed.
            DataError: it cannot be read, or has bad rows at its beginning.
        """
        self._read, self._typed = _reader(source)
        self._encoder, self._note, self._skips = encoder, note, skips_rows
        self._digests: deque[tuple[int, dict[str, Any]]] = deque(maxlen=_KEPT)
        self._checks: dict[int, Callable[[Mapping[str, Any]], None]] = {}
        self.columns: list[str] = []
        self.first = next(iter(self))  # a fault in all rows is found before a run begins

    def digest_at(self, position: int) -> dict[str, Any]:
        """Number and hashes of the prompts before this position, which has just been passed."""
        return next(digest for place, digest in self._digests if place == position)

    def check_at(self, position: int, check: Callable[[Mapping[str, Any]], None]) -> None:
        """Call `check` with the digest of this position when it is reached again."""
        self._checks[position] = check

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Iterate over the prompts from the first one on.

        Raises:
            DataError: there are bad rows, or no rows at all.
        """
        text, tokens = hashlib.sha256(), hashlib.sha256()
        skipped: list[str] = []
        position = 0
        self._digests.clear()
        for number in count():
            before = position
            lines, check = _readable(self._read(number)), RowCheck(token_ids=self._takes_ids, typed=self._typed)
            while chunk := list(islice(lines, CHUNK)):
                rows = self._encoded(chunk, check, skipped)
                self._note(skipped, position + len(rows))
                for row in rows:
                    tokens.update(json.dumps(row[PROMPT_IDS]).encode())
                    text.update(rows_text(row).encode())
                    yield row | {PROMPT_ROW: position}
                    position += 1
                    self._reached(position, {"rows": position, "text": text.hexdigest(), "tokens": tokens.hexdigest()})
            if position == before:
                raise DataError("train_dataset: the stream has no row that can be used. Give at least one prompt.")

    @property
    def _takes_ids(self) -> bool:
        return self._encoder.rendering.prompt_format == "rendered"

    def _reached(self, position: int, digest: dict[str, Any]) -> None:
        self._digests.append((position, digest))
        if (check := self._checks.pop(position, None)) is not None:
            check(digest)

    def _encoded(self, chunk: list[Line], check: RowCheck, skipped: list[str]) -> list[dict[str, Any]]:
        """The good rows of a chunk with their ids; bad ones are noted or refused."""
        problems = [self._problem(line, check) for line in chunk]
        good = [line for line, problem in zip(chunk, problems, strict=True) if problem is None]
        if not self.columns and good:
            self.columns = list(dict.fromkeys(name for line in good for name in line.row))
            check_columns(self.columns, "train_dataset")
            warn_of_media(self.columns, "train_dataset")
        bad = [f"{line.place}: {problem}" for line, problem in zip(chunk, problems, strict=True) if problem is not None]
        found: dict[int, str] = {}
        prompts = [line.row["prompt"] for line in good]
        columns = [{name: line.row.get(name) for name in (TOOLS, TEMPLATE_VARIABLES)} for line in good]
        if bad and not self._skips:
            raise DataError("\n".join(bad))
        ids = self._encoder.encode(prompts, columns, found if self._skips else None, lambda i: good[i].place)
        skipped += [*bad, *(f"{good[i].place}: {reason}" for i, reason in sorted(found.items()))]
        return [self._row(good[i].row, ids[i]) for i in range(len(good)) if i not in found]

    def _problem(self, line: Line, check: RowCheck) -> str | None:
        problem = check.problem(line)
        if problem is None and self.columns and (new := [name for name in line.row if name not in self.columns]):
            return f"column {new[0]!r} is in none of the first {CHUNK} rows, which say what columns a stream has"
        return problem

    def _row(self, row: Mapping[str, Any], ids: list[int]) -> dict[str, Any]:
        prompt = row["prompt"]
        if not is_flat(prompt):
            prompt = with_text(prompt)
        elif not isinstance(prompt, str):
            prompt = self._encoder.tokenizer.decode(ids)
        return {name: row.get(name) for name in self.columns} | {"prompt": prompt, PROMPT_IDS: ids}


def _reader(source: Any) -> tuple[Callable[[int], Iterator[Line]], bool]:
    """A function that starts a pass over the source, and whether the columns have types."""
    source = expanded(str(source)) if isinstance(source, str | Path) else source
    files = None if isinstance(source, Dataset) else files_of(source)
    if files is None and not isinstance(source, str | IterableDataset | IterableDatasetDict):
        raise ConfigError(
            f"streaming=True: train_dataset is a {type(source).__name__}, which is in memory already. Remove the "
            "setting, or give files, the name of a data set or an IterableDataset"
        )
    if files is not None:
        if any(suffix_of(path) not in (*LINES, ".parquet") for path in files):
            raise ConfigError(f"streaming=True: {files[0]} is read whole; JSON lines and Parquet can be streamed")
        return (lambda number: (line for path in files for line in _lines(path))), suffix_of(files[0]) == ".parquet"
    opened = open_name(source, held_out=False, streaming=True) if isinstance(source, str) else source
    if isinstance(opened, IterableDatasetDict):
        opened = opened[choose_split(opened, "the data set", held_out=False)]
    if isinstance(opened, Dataset):
        opened = opened.to_iterable_dataset()
    plain = opened.with_format(None)

    def read(number: int) -> Iterator[Line]:
        plain.set_epoch(number)  # a shuffled source is shuffled again
        return (Line(f"row {i}", row) for i, row in enumerate(plain))

    return read, True


def _readable(lines: Iterator[Line]) -> Iterator[Line]:
    """The lines, with any failure to read them turned into a DataError, for which the run pauses and saves.

    Raises:
        DataError: they cannot be read to the end.
    """
    place = None
    try:
        for line in lines:
            yield line
            place = line.place
    except BondError:
        raise
    except Exception as error:
        where, cause = "at its beginning" if place is None else f"behind {place}", cause_of(error)
        raise DataError(
            f"train_dataset: the stream cannot be read {where} ({type(cause).__name__}: {cause}). Correct the data or "
            "the connection; a run has saved what it learned"
        ) from error


def _lines(path: str) -> Iterator[Line]:
    if suffix_of(path) != ".parquet":
        return json_lines(path)
    try:
        batches = pyarrow.parquet.ParquetFile(path).iter_batches(1024)
        rows = (row for batch in batches for row in batch.to_pylist())
        return (Line(f"{path}: row {i}", row) for i, row in enumerate(rows))
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
