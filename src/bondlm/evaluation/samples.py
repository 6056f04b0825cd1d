"""Scored samples read from a file, and metrics of their texts.

Shapes: P prompts, M samples of each.
"""

import math
import re
from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from bondlm.bestofn.comparison import within_prompt_correlation
from bondlm.errors import DataError
from bondlm.rollout.samples import Samples

KEPT_TEXTS = 8  # per prompt, to show and to measure; the others stay only in the file


def from_rows(rows: Iterable[Mapping[str, Any]], num_samples: int, *, num_texts: int | None = KEPT_TEXTS) -> Samples:
    """Rows of a sample file (`bondlm.evaluation.files`), `num_samples` consecutive ones per prompt, read one by one.

    The first `num_texts` texts of each prompt are kept, or all with None.

    Raises:
        DataError: a row lacks a number.
    """
    prompts: list[Any] = []
    texts: list[list[str]] = []
    numbers: dict[str, array[float]] = {}
    for i, row in enumerate(rows):
        if i % num_samples == 0:
            prompts.append(row["prompt"])
            texts.append([])
        if num_texts is None or len(texts[-1]) < num_texts:
            texts[-1].append(row["completion"])
        for name, value in _numbers(row).items():
            numbers.setdefault(name, array("d")).append(value)
    short = {name for name, values in numbers.items() if len(values) != len(prompts) * num_samples}
    if short or not numbers:
        raise DataError(f"some samples have no {', '.join(sorted(short)) or 'rows'}: the file was changed, remove it")
    columns = {
        name: torch.tensor(values, dtype=torch.float64).view(-1, num_samples) for name, values in numbers.items()
    }
    fields: dict[str, Any] = {field: columns[name] for name, field in _COLUMNS.items()}
    return Samples(
        prompts=prompts,
        texts=texts,
        **fields,
        log_ratio_PM=columns.get("log_ratio"),
        by_name={name.removeprefix("rewards/"): v for name, v in columns.items() if name.startswith("rewards/")},
        judges={name.removeprefix("judges/"): v for name, v in columns.items() if name.startswith("judges/")},
    )


_COLUMNS = {"reward": "rewards_PM", "tokens": "lengths_PM", "finished": "finished_PM", "logprob": "logprobs_PM"}


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    names = (*_COLUMNS, "log_ratio")
    own = {name: float(row[name]) for name in names if isinstance(row.get(name), bool | int | float)}
    for kind in ("rewards", "judges"):  # null if the reward does not apply
        own |= {f"{kind}/{name}": math.nan if v is None else float(v) for name, v in row.get(kind, {}).items()}
    return own


def distinct(texts: Sequence[Sequence[str]], n: int) -> float:
    """Distinct n-grams of words over all n-grams, in the first sample of each prompt; NaN if there are none.

    Source: Li et al. 2016, arXiv 1510.03055. One sample per prompt, so that all sets are measured on the same amount of
    text.
    """
    grams = [gram for row in texts for gram in _grams(words(row[0]), n)]
    return len(set(grams)) / len(grams) if grams else float("nan")


def words(text: str) -> list[str]:
    """Lower-case words and numbers; punctuation is left out."""
    return re.findall(r"\w+", text.lower())


def _grams(tokens: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def text_metrics(samples: Samples) -> dict[str, float]:
    """Length, truncation, entropy and diversity, which reveal verbosity, sharpening and collapse."""
    return {
        "completions/mean_length": float(samples.lengths_PM.mean()),
        "completions/min_length": float(samples.lengths_PM.min()),
        "completions/max_length": float(samples.lengths_PM.max()),
        "completions/clipped_ratio": float(1.0 - samples.finished_PM.mean()),
        # -log p of a sample is an unbiased estimate of the entropy of its distribution; the mean is over tokens.
        "entropy": float(-samples.logprobs_PM.sum() / samples.lengths_PM.sum()),
        "reward_length_correlation": within_prompt_correlation(samples.rewards_PM, samples.lengths_PM),
        "distinct_1": distinct(samples.texts, 1),
        "distinct_2": distinct(samples.texts, 2),
    }
