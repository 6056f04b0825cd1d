"""Percentile intervals from resampled prompts. Prompts are the independent unit; the samples of one prompt are not.

Shape suffixes: P prompts, J columns, R resamples.
"""

import math
from typing import NamedTuple

import numpy as np
import torch

from bondlm.bestofn._arrays import check_finite, to_float64

# Cells (resample x prompt) drawn at once: keeps memory near 100 MB for any P.
_CELLS_PER_CHUNK = 1 << 22


class Estimate(NamedTuple):
    """A mean over prompts with its bootstrap interval."""

    value: float
    low: float
    high: float


def bootstrap_mean(values: object, *, confidence: float = 0.95, num_bootstrap: int = 2000, seed: int = 0) -> Estimate:
    """Return the mean of one value per prompt with a percentile bootstrap interval over prompts.

    Args:
        values: (P,) finite values, one per prompt (average over a prompt's samples first).
        confidence: coverage of the interval, in (0, 1).
        num_bootstrap: number of resamples.
        seed: of the resampling.

    Returns:
        The mean, and the interval's ends. With fewer than 2 prompts the ends are −inf and inf.

    Raises:
        ValueError: on empty, non-finite or not 1-D values, or settings out of range.
    """
    values_P = to_float64(values, "values").detach().cpu()
    if values_P.ndim != 1 or values_P.shape[0] == 0:
        raise ValueError(f"values must be (P,) with at least one prompt; got shape {tuple(values_P.shape)}")
    check_finite(values_P, "values")
    check_settings(confidence, num_bootstrap)
    value = float(values_P.mean())
    if values_P.shape[0] < 2:
        return Estimate(value, -math.inf, math.inf)
    means_R = resample_means(values_P[:, None], num_bootstrap, seed)[:, 0]
    return Estimate(value, *percentile_interval(means_R, confidence))


def bootstrap_win_rate(win_rates: object, *, confidence: float = 0.95, num_bootstrap: int = 2000) -> Estimate:
    """Return the mean of one win rate, or other share in [0, 1], per prompt with its interval.

    It is that of `bootstrap_mean`, but with the ends of `share_ends` where all prompts have the same value.

    Raises:
        ValueError: as `bootstrap_mean`.
    """
    found = bootstrap_mean(win_rates, confidence=confidence, num_bootstrap=num_bootstrap)
    return with_share_ends(found, to_float64(win_rates, "win_rates").detach().cpu(), confidence)


def with_share_ends(found: Estimate, shares_P: torch.Tensor, confidence: float) -> Estimate:
    """Return the interval of the mean of these shares, with the ends of `share_ends` where all are the same."""
    if len(shares_P) < 2 or not bool((shares_P == shares_P[0]).all()):
        return found
    return Estimate(found.value, *share_ends(float(shares_P[0]), len(shares_P), confidence))


def share_ends(share: float, num_prompts: int, confidence: float) -> tuple[float, float]:
    """Return the interval of a mean in [0, 1] to which all prompts contribute alike.

    Resampling would give it no width. After P prompts without an exception, up to `1 - (alpha/2)^(1/P)` of all prompts
    may be exceptions (Clopper and Pearson), which have 0 or 1.
    """
    alike = ((1.0 - confidence) / 2.0) ** (1.0 / num_prompts)
    return share * alike, min(1.0, share * alike + (1.0 - alike))


def resample_means(values_PJ: torch.Tensor, num_bootstrap: int, seed: int) -> torch.Tensor:
    """Return the (R, J) column means of `num_bootstrap` resamples of the rows.

    Each resample is a row of counts, so a chunk of resamples is one matrix product; no (R, P, J) array exists.
    """
    num_prompts = values_PJ.shape[0]
    rng = np.random.default_rng(seed)
    step = max(1, _CELLS_PER_CHUNK // num_prompts)
    chunks = []
    for start in range(0, num_bootstrap, step):
        rows = min(step, num_bootstrap - start)
        cells = rng.integers(0, num_prompts, size=(rows, num_prompts))
        cells += np.arange(rows)[:, None] * num_prompts
        counts = np.bincount(cells.ravel(), minlength=rows * num_prompts).reshape(rows, num_prompts)
        chunks.append(torch.from_numpy(counts).double() @ values_PJ)
    return torch.cat(chunks) / num_prompts


def percentile_interval(draws_R: torch.Tensor, confidence: float) -> tuple[float, float]:
    """Return the central interval of the draws, from order statistics (draws may be infinite), rounded outwards."""
    ordered = draws_R.sort().values
    tail = (1.0 - confidence) / 2.0 * (len(ordered) - 1)
    return float(ordered[math.floor(tail)]), float(ordered[len(ordered) - 1 - math.floor(tail)])


def check_settings(confidence: float, num_bootstrap: int) -> None:
    """Raise ValueError unless the bootstrap settings are usable."""
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence must be between 0 and 1, for example 0.95; got {confidence!r}")
    if num_bootstrap < 1:
        raise ValueError(f"num_bootstrap must be at least 1, better 1000 or more; got {num_bootstrap!r}")
