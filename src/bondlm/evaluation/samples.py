"""Scored samples of one law, as an evaluation needs them: in memory after a run, or read back from a file.

Shapes: P prompts, M samples of each.
"""

import re
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bondlm.bestofn.comparison import within_prompt_correlation
from bondlm.errors import DataError
from bondlm.rollout.samples import Samples


@dataclass(frozen=True, kw_only=True)
class Scored:
    """M scored completions of each of P prompts; all numbers are (P, M) float64."""

    prompts: list[Any]  # text or messages
    texts: list[list[str]]  # of each prompt all M, or the first few
    rewards: Tensor
    lengths: Tensor  # tokens, end-of-sequence included
    finished: Tensor  # 0 where a completion was cut at its budget
    logprobs: Tensor  # under the law that it was drawn from
    log_ratio: Tensor | None = None  # log pi(y) - log pi_ref(y), whoever drew y
    judges: dict[str, Tensor] = field(default_factory=dict)  # rewards that were not optimised
    seconds: float = 0.0  # to draw all of them


def from_samples(
    samples: Samples,
    rows: Sequence[Mapping[str, Any]],
    *,
    log_ratio: Tensor | None = None,
    judges: Mapping[str, Tensor] | None = None,
) -> Scored:
    """Samples that a trainer has drawn of `rows`."""

    def numbers(values: Iterable[Iterable[float]]) -> Tensor:
        return torch.tensor([list(row) for row in values], dtype=torch.float64)

    return Scored(
        prompts=[row["prompt"] for row in rows],
        texts=samples.texts,
        rewards=samples.rewards_PM,
        lengths=numbers((len(c.ids) for c in row) for row in samples.completions),
        finished=numbers((float(c.finished) for c in row) for row in samples.completions),
        logprobs=numbers((c.logprob for c in row) for row in samples.completions),
        log_ratio=None if log_ratio is None else log_ratio.double().cpu(),
        judges=dict(judges or {}),
        seconds=samples.seconds,
    )


def from_rows(rows: Iterable[Mapping[str, Any]], num_samples: int) -> Scored:
    """Rows of a sample file (`bondlm.evaluation.files`), `num_samples` in a row for each prompt; one is held at a time.

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
        if len(texts[-1]) < KEPT_TEXTS:
            texts[-1].append(row["completion"])
        for name, value in _numbers(row).items():
            numbers.setdefault(name, array("d")).append(value)
    short = {name for name, values in numbers.items() if len(values) != len(prompts) * num_samples}
    if short or not numbers:
        raise DataError(f"some samples have no {', '.join(sorted(short)) or 'rows'}: the file was changed, remove it")
    columns = {
        name: torch.tensor(values, dtype=torch.float64).view(-1, num_samples) for name, values in numbers.items()
    }
    return Scored(
        prompts=prompts,
        texts=texts,
        **{field: columns[name] for name, field in _COLUMNS.items()},
        log_ratio=columns.get("log_ratio"),
        judges={name.removeprefix("judges/"): v for name, v in columns.items() if name.startswith("judges/")},
        seconds=float(columns["seconds"].sum()),
    )


KEPT_TEXTS = 8  # of a prompt: what is shown and counted; the others stay on file
_COLUMNS = {"reward": "rewards", "tokens": "lengths", "finished": "finished", "logprob": "logprobs"}


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    names = (*_COLUMNS, "seconds", "log_ratio")
    own = {name: float(row[name]) for name in names if isinstance(row.get(name), bool | int | float)}
    return own | {f"judges/{name}": float(value) for name, value in row.get("judges", {}).items()}


def distinct(texts: Sequence[Sequence[str]], n: int) -> float:
    """Different n-grams of words over all n-grams, in the first sample of each prompt; NaN if there is none.

    Source: Li et al. 2016, arXiv 1510.03055. One sample a prompt, so that every law is measured on as much text.
    """
    grams = [gram for row in texts for gram in _grams(words(row[0]), n)]
    return len(set(grams)) / len(grams) if grams else float("nan")


def words(text: str) -> list[str]:
    """Lower-case words and numbers; punctuation is left out."""
    return re.findall(r"\w+", text.lower())


def _grams(tokens: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def text_metrics(samples: Scored) -> dict[str, float]:
    """Length, truncation, entropy and variety: where verbosity, sharpening and collapse show."""
    return {
        "completions/mean_length": float(samples.lengths.mean()),
        "completions/min_length": float(samples.lengths.min()),
        "completions/max_length": float(samples.lengths.max()),
        "completions/clipped_ratio": float(1.0 - samples.finished.mean()),
        # -log p of a sample is an unbiased estimate of the entropy of its law; the mean is over tokens.
        "entropy": float(-samples.logprobs.sum() / samples.lengths.sum()),
        "reward_length_correlation": within_prompt_correlation(samples.rewards, samples.lengths),
        "distinct_1": distinct(samples.texts, 1),
        "distinct_2": distinct(samples.texts, 2),
    }
