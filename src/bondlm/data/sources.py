"""Sources of rows: data sets on the hub, saved folders, and objects of `datasets`, each with its split.

A name is `NAME`, `NAME:CONFIG`, `NAME:CONFIG:SPLIT` or, without a config, `NAME::SPLIT`.
"""

import logging
import re
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from datasets.exceptions import DatasetGenerationError, DatasetsError
from datasets.table import CastError

from bondlm.data.paths import why_not_loaded
from bondlm.data.table import unformatted
from bondlm.errors import DataError

# A hub name: `name` or `owner/name`. All other text is a path.
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")

MOST_STREAMED = 10_000  # held-out prompts of a stream, which may be endless

_log = logging.getLogger(__name__)


def named_sets(source: Any) -> dict[str, Any] | None:
    """The held-out data sets of a dictionary, by name; None if the source is one data set.

    In a `DatasetDict` these are the splits that are not for training, unless there is only one.
    """
    if not isinstance(source, Mapping):
        return None
    sets = {str(name): part for name, part in source.items()}
    if isinstance(source, DatasetDict | IterableDatasetDict):
        sets = {name: sets[name] for name in _held_out(sets)}
        return sets if len(sets) > 1 else None
    return sets


def read_whole(source: Any) -> Any:
    """The rows of a stream of held-out prompts, which are needed several times; other sources are unchanged.

    Raises:
        DataError: it does not end, or has no matching split.
    """
    if isinstance(source, IterableDatasetDict):
        source = source[choose_split(source, "the data set", held_out=True)]
    if not isinstance(source, IterableDataset):
        return source
    rows = list(islice(source.with_format(None), MOST_STREAMED + 1))
    if len(rows) > MOST_STREAMED:
        raise DataError(
            f"the held-out prompts are a stream (IterableDataset) of more than {MOST_STREAMED} rows, but an evaluation "
            "answers each of them several times: pass a part of it, such as dataset.take(500)"
        )
    return rows


def open_source(source: Any, *, held_out: bool) -> Dataset:
    """The rows of a data set that is not a file; with `held_out`, not those of the training split.

    Raises:
        DataError: it cannot be read, or has no matching split.
    """
    if isinstance(source, str):
        source = open_name(source, held_out=held_out)
    if isinstance(source, DatasetDict):
        source = source[choose_split(source, "the data set", held_out=held_out)]
    if isinstance(source, IterableDataset | IterableDatasetDict):
        raise DataError("a streaming data set (IterableDataset) has no number of rows: give one that is in memory")
    if not isinstance(source, Dataset):
        raise DataError(
            f"cannot read prompts from a {type(source).__name__}. Give a path, the name of a hub data set, a "
            "`datasets.Dataset` (of a pandas.DataFrame: Dataset.from_pandas(frame)) or a list of rows."
        )
    return unformatted(source)


def choose_split(splits: Iterable[str], name: str, *, held_out: bool) -> str:
    """The training split, or the one split that is not for training.

    Raises:
        DataError: there is none, or more than one.
    """
    names = [str(split) for split in splits]
    found = _held_out(names) if held_out else names
    if not held_out and "train" in names:
        return "train"
    if held_out and len(found) == 1:
        _log.warning("held-out prompts are the split %r of %s", found[0], name)
        return found[0]
    raise DataError(
        f"{name}: {'several splits, or none, hold prompts that are not for training' if held_out else 'no split train'}"
        f" (it has {', '.join(names)}). Name one: NAME:CONFIG:SPLIT or NAME::SPLIT, in Python dataset['SPLIT']"
    )


def _held_out(splits: Iterable[str]) -> list[str]:
    return [split for split in splits if not split.startswith("train")]


def open_name(source: str, *, held_out: bool, streaming: bool = False) -> Any:
    """The data set of a name, on the hub or in a folder; with `streaming` it is read on demand.

    Raises:
        DataError: there is none, or it has no matching split.
    """
    name, config, split = _parts(source)
    path = Path(name)
    if path.is_file():
        raise DataError(f"{source}: a file has no configs and splits, write only {name}")
    try:
        if path.is_dir() and ((path / "state.json").exists() or (path / "dataset_dict.json").exists()):
            return _split_of(datasets.load_from_disk(name), source, config, split)
        if path.is_dir() or _HUB_NAME.fullmatch(name):
            if split is None and held_out:
                split = choose_split(datasets.get_dataset_split_names(name, config), source, held_out=True)
            more = {"streaming": True} if streaming else {}
            return datasets.load_dataset(name, config, split=split or "train", **more)
    except (OSError, ValueError, pyarrow.ArrowException, DatasetsError) as error:
        if isinstance(error, DataError):
            raise
        if isinstance(cause := cause_of(error), CastError):  # its message is a list of all columns
            why = "its files have different columns. Name the file that holds the prompts"
        else:
            why = why_not_loaded(name, cause)
        raise DataError(f"{source}: cannot be read: {why}") from error
    raise DataError(f"{source}: no such file, and not the name of a hub data set.")


def cause_of(error: Exception) -> Exception:
    """The actual fault in the data, from which `datasets` raises a generic error."""
    while isinstance(error, DatasetGenerationError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return error


def _split_of(saved: Any, source: str, config: str | None, split: str | None) -> Any:
    """The requested split of a saved folder."""
    if config is not None:
        raise DataError(f"{source}: a folder of `save_to_disk` has no configs. Write FOLDER::SPLIT")
    if split is None:
        return saved
    if not isinstance(saved, DatasetDict) or split not in saved:
        known = ", ".join(saved) if isinstance(saved, DatasetDict) else "none"
        raise DataError(f"{source}: no split {split!r}, it has {known}")
    return saved[split]


def _parts(source: str) -> tuple[str, str | None, str | None]:
    """Name, config and split; a folder may have a colon in its name."""
    if Path(source).is_dir():
        return source, None, None
    name, _, rest = source.partition(":")
    config, _, split = rest.partition(":")
    return name, config or None, split or None
