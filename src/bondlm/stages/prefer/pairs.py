"""Select the two answers to a prompt that are shown next to each other.

A pair, and which of its answers is on the left, depend only on the seed, the prompt and its answers.
"""

import hashlib
import itertools
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bondlm.data.columns import TEMPLATE_VARIABLES, TOOLS
from bondlm.data.files import rows_of_files
from bondlm.errors import ConfigError, DataError
from bondlm.runs.folder import SAMPLES_FILE

BESIDE = (TOOLS, TEMPLATE_VARIABLES)  # columns other than the prompt that the chat template uses


@dataclass(frozen=True)
class Pair:
    """Two answers to a prompt; `row` has the prompt and the other columns that the chat template uses."""

    row: Mapping[str, Any]
    left: str
    right: str

    @property
    def key(self) -> str:
        """A key for the two answers to the prompt, whichever is on the left."""
        return key_of(self.row, self.left, self.right)


def key_of(row: Mapping[str, Any], one: str, other: str) -> str:
    """The key of a pair."""
    return json.dumps([prompt_of(row), sorted((one, other))], sort_keys=True)


def prompt_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """The prompt, and the other columns that the chat template uses."""
    return {"prompt": row["prompt"]} | {name: row[name] for name in BESIDE if row.get(name) is not None}


def samples_file(source: Path) -> Path:
    """The file of samples: `source` itself, or the samples that a training run has logged.

    Raises:
        ConfigError: there is no such file, or the run folder has no samples.
    """
    path = source / SAMPLES_FILE if source.is_dir() else source
    if not path.is_file():
        raise ConfigError(
            f"{str(source)!r} has no {SAMPLES_FILE}: bondlm score draws several samples of each prompt into a file, "
            "give that"
            if source.is_dir()
            else f"there is no file {str(source)!r}: give a run folder, or a file that bondlm score has written"
        )
    return path


def read_pairs(path: Path, pairs_per_prompt: int, seed: int) -> list[Pair]:
    """The pairs in a file of samples: one for every prompt, then a second for every prompt, and so on.

    Args:
        path: rows `{"prompt", "completion"}`, several of a prompt, or the `samples.jsonl` of a run.
        pairs_per_prompt: maximum pairs per prompt.
        seed: determines the pairs, the sides, and the order of prompts.

    Raises:
        DataError: the file cannot be read, a row is not a sample, or no prompt has two different answers.
    """
    texts: dict[str, list[str]] = {}
    rows: dict[str, Mapping[str, Any]] = {}
    for line in rows_of_files(str(path)):
        key = json.dumps(prompt_of(line.row), sort_keys=True)
        rows.setdefault(key, prompt_of(line.row))
        known = texts.setdefault(key, [])
        known += [text for text in _answers(line.row, line.place) if text.strip() and text not in known]
    by_prompt = [
        _pairs(rows[key], texts[key], pairs_per_prompt, f"{seed} {key}")
        for key in sorted(rows, key=lambda key: hashlib.sha256(f"{seed} {key}".encode()).digest())
    ]
    found = [pair for turn in itertools.zip_longest(*by_prompt) for pair in turn if pair is not None]
    if not found:
        raise DataError(f"{path}: no prompt has two different answers to choose from: draw more samples of each")
    return found


def _answers(row: Mapping[str, Any], place: str) -> Iterator[str]:
    if "completion" in row:
        answer = row["completion"]
        yield answer if isinstance(answer, str) else _message(answer, place)
        return
    samples = [row[name] for name in ("policy", "anchor") if isinstance(row.get(name), list)]
    if not samples:
        raise DataError(f"{place}: no `completion` (keys: {', '.join(row)}): a sample is {{prompt, completion}}")
    for sample in itertools.chain(*samples):
        yield str(sample["text"])


def _message(answer: Any, place: str) -> str:
    if isinstance(answer, list) and len(answer) == 1 and isinstance(answer[0], Mapping):
        content = answer[0].get("content")
        if isinstance(content, str):
            return content
    raise DataError(f"{place}: `completion` must be text or a list of one assistant message")


def _pairs(row: Mapping[str, Any], texts: Sequence[str], most: int, seed: str) -> list[Pair]:
    dice = random.Random(seed)  # noqa: S311 (no secret)
    combinations = list(itertools.combinations(texts, 2))
    chosen = dice.sample(combinations, min(most, len(combinations)))
    return [Pair(row, *dice.sample(pair, 2)) for pair in chosen]
