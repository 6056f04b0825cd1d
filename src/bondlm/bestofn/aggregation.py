"""Combine rewards of different scales by the order that each gives to a prompt's samples.

`quantile` and `worst` use only comparisons, so an increasing map of any one reward changes no bit of the result. All
counts are whole numbers: results that are equal in theory are equal to the last bit.

Shape suffixes: J rewards, P prompts, M samples of a prompt, K samples among which ranks are counted.
"""

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bondlm.bestofn._arrays import check_no_nan
from bondlm.bestofn.quantiles import count_below

# Relative. Differences of decimal fractions miss the tolerance by rounding: 0.9 - 0.8 < 0.1 < 0.8 - 0.7.
_ROUNDING = 1e-6
_LARGEST_WHOLE = 2**32  # times a whole reward up to 2^20: exact in float64


def mid_ranks(values_PM: Tensor, among_PK: Tensor) -> Tensor:
    """Share of the K samples that each value exceeds, with ties counting half: (P, M) in [0, 1].

    A sample that is itself among the K counts itself as equal: M different values among themselves have the ranks
    1/(2M), 3/(2M), .., (2M-1)/(2M), and a single sample has 1/2. The mean is 1/2, with or without ties.

    Raises:
        ValueError: on NaN, or shapes that do not fit.
    """
    return _twice_ranks(values_PM, among_PK) / (2.0 * among_PK.shape[1])


def weighted_sum(values: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """`Σ_j w_j r_j`, shaped like each of the J rewards.

    Weights are read as the decimal fractions that they are written as, and summed as whole multiples of their common
    unit: for rewards that are whole numbers, sums that are equal in theory are equal to the last bit, as 0.6 and 0.2 +
    0.4 are not in floating point.

    Args:
        values: the J rewards, float64, all of one shape.
        weights: one finite number per reward.
    """
    whole_J, unit = _whole_numbers(weights)
    total = _sum(values, weights)
    if max(*map(abs, whole_J), unit) > _LARGEST_WHOLE:  # products would be rounded all the same
        return total
    exact = _sum(values, whole_J) / unit
    return exact.where(exact.isfinite(), total)


def _sum(values: Sequence[Tensor], factors: Sequence[float]) -> Tensor:
    terms = (factor * value for value, factor in zip(values, factors, strict=True))
    return sum(terms, torch.zeros_like(values[0]))


def mean_ranks(values_JPM: Tensor, among_JPK: Tensor, weights: Sequence[float]) -> Tensor:
    """Weighted mean of each sample's mid-ranks under J rewards: (P, M) in [0, 1].

    `Σ_j |w_j| u_j / Σ_j |w_j|`, u_j the mid-rank under reward j, or 1 − u_j if its weight is negative (less is better).
    Weights are read as the decimal fractions that they are written as, so 0.1 and 0.2 add up to exactly 0.3, and
    samples with equal means tie exactly.

    Args:
        values_JPM: rewards of the samples. If all of a prompt's are NaN, the reward does not apply there and is left
            out.
        among_JPK: rewards of the samples among which ranks are counted; pass `values_JPM` to rank the samples among
            themselves.
        weights: one finite number per reward; at least one that is not 0 must apply to each prompt.

    Raises:
        ValueError: NaN for only some of a prompt's samples.
    """
    whole_J, _ = _whole_numbers(weights)
    total: Any = 0  # arrays of whole numbers of any size
    norm_P1: Any = 0
    for values_PM, among_PK, weight in zip(values_JPM, among_JPK, whole_J, strict=True):
        twice_PM, applies_P1 = _directed(values_PM, among_PK, weight)
        total = total + twice_PM.long().numpy().astype(object) * (applies_P1.numpy().astype(object) * abs(weight))
        norm_P1 = norm_P1 + applies_P1.numpy().astype(object) * (abs(weight) * 2 * among_PK.shape[1])
    return torch.from_numpy((total / norm_P1).astype(np.float64))


def worst_ranks(values_JPM: Tensor, among_JPK: Tensor | None, weights: Sequence[float]) -> Tensor:
    """The lowest of each sample's mid-ranks under J rewards: (P, M) in [0, 1]. Samples with equal lowest ranks tie.

    Args:
        values_JPM: as in `mean_ranks`.
        among_JPK: other samples: each value gets a place among these as they are ranked among themselves, see
            `_place_among`. None: the samples themselves.
        weights: 1, −1 (less is better) or 0 (left out) per reward.

    Raises:
        ValueError: NaN for only some of a prompt's samples.
    """
    if among_JPK is not None:
        return _place_among(lambda pool_JPK: worst_ranks(pool_JPK, None, weights), values_JPM, among_JPK)
    lowest_PM = torch.full(values_JPM.shape[1:], math.inf, dtype=torch.float64)
    for values_PM, weight in zip(values_JPM, weights, strict=True):
        if weight:
            twice_PM, applies_P1 = _directed(values_PM, values_PM, weight)
            ranks_PM = twice_PM / (2.0 * values_PM.shape[1])
            lowest_PM = torch.where(applies_P1, torch.minimum(lowest_PM, ranks_PM), lowest_PM)
    return lowest_PM


def lexicographic_ranks(
    values_JPM: Tensor, among_JPK: Tensor | None, weights: Sequence[float], tolerances: Sequence[float]
) -> Tensor:
    """Mid-ranks in the order of the first reward, its ties broken by the second, and so on: (P, M).

    Under reward j, the best sample and all samples at most `tolerances[j]` below it count as equal; then the best of
    the rest and those within its tolerance, and so on. (Calling any two samples equal that are this close would not
    give an order: a may equal b, and b equal c, while a is better than c.) Samples that are in the same class under all
    rewards tie.

    Args:
        values_JPM: as in `mean_ranks`.
        among_JPK: as in `worst_ranks`. A rank is then a win rate against the K samples.
        weights: 1, −1 (less is better) or 0 (left out) per reward.
        tolerances: one number >= 0 per reward, in units of the reward. A difference that exceeds one by a millionth of
            it counts as within it, so that 0.8 and 0.7 are equal for 0.1, as 0.9 and 0.8 are.

    Raises:
        ValueError: NaN for only some of a prompt's samples.
    """
    if among_JPK is not None:
        return _place_among(lambda pool: lexicographic_ranks(pool, None, weights, tolerances), values_JPM, among_JPK)
    check_no_nan(values_JPM[~values_JPM.isnan().all(dim=2)], "values_JPM")
    levels = [(w * values_PM, t) for values_PM, w, t in zip(values_JPM, weights, tolerances, strict=True) if w]
    places = [
        _places([(values_PM[p].tolist(), tolerance) for values_PM, tolerance in levels])
        for p in range(values_JPM.shape[1])
    ]
    places_PM = torch.tensor(places, dtype=torch.float64)
    return mid_ranks(places_PM, places_PM)


def _place_among(rank: Callable[[Tensor], Tensor], values_JPM: Tensor, among_JPK: Tensor) -> Tensor:
    """Where each value would stand among K samples, on the scale of the K samples' own ranks: (P, M) in [0, 1].

    Each value is ranked together with the K samples, so that one more sample from the same distribution beats half of
    them on average. (Ranked among K samples that do not include it, it could fall below all of them under any of the
    J rewards, as none of them can: it would lose too often.) Its share of wins may lie between two places in the order
    that the K samples have among themselves, if some of these tie there. It then takes the lower or the upper place,
    with chances that preserve the mean share. Equal values of a prompt take the same place.

    Args:
        rank: the ranks of samples among themselves, (J, P, M) -> (P, M) in (0, 1).
        values_JPM: as in `mean_ranks`.
        among_JPK: the K samples. A reward that does not apply to the values is left out for these as well.
    """
    among_JPK = among_JPK.where(~values_JPM.isnan().all(dim=2, keepdim=True), math.nan)
    pools = [torch.cat([value_JP1, among_JPK], dim=2) for value_JP1 in torch.split(values_JPM, 1, dim=2)]
    ranked = [rank(pool_JPK) for pool_JPK in pools]
    twice_PM = torch.cat([_twice_ranks(ranks_PK[:, :1], ranks_PK[:, 1:]) for ranks_PK in ranked], dim=1).numpy()
    draws_PM = np.stack([_draws(pool_JPK) for pool_JPK in pools], axis=1)
    own_PK = rank(among_JPK).numpy()
    placed = [_rounded(*of_prompt) for of_prompt in zip(twice_PM, own_PK, draws_PM, strict=True)]
    return torch.from_numpy(np.stack(placed))


def _draws(pool_JPK: Tensor) -> np.ndarray[Any, Any]:
    """A number in [0, 1) per prompt (P,), as if random, from the order of its samples under the rewards that apply."""
    twice_PJK = torch.stack([_twice_ranks(pool_PK, pool_PK).long() for pool_PK in pool_JPK.nan_to_num()], dim=1)
    applies_PJ = ~pool_JPK.isnan().all(dim=2).T
    orders = [twice_JK[applies_J].flatten() for twice_JK, applies_J in zip(twice_PJK, applies_PJ, strict=True)]
    return np.array([np.random.default_rng(order.numpy()).random() for order in orders])


def _rounded(
    twice_M: np.ndarray[Any, Any], own_K: np.ndarray[Any, Any], draw_M: np.ndarray[Any, Any]
) -> np.ndarray[Any, Any]:
    """Values, equal to or between the ranks `own_K` or beyond them, that win `twice_M / (2K)` against these on average.

    A value that is above the ranks of L of the K samples and ties with E can only win L, L + E/2 or L + E times.
    """
    scale = 2 * len(own_K)  # ranks and wins are whole numbers in units of 1/(2K)
    whole_K = (own_K * scale).round().astype(np.int64)
    levels, counts = np.unique(whole_K, return_counts=True)
    above = 2 * counts.cumsum()  # wins of a value above each level
    places = np.sort(np.concatenate([[0], above, above - counts]))
    upper = np.searchsorted(places, twice_M)
    lower = np.maximum(upper - 1, 0)
    share = (twice_M - places[lower]) / np.maximum(places[upper] - places[lower], 1)
    chosen = np.where(share > draw_M, places[upper], places[lower])
    ends = max(levels[0] - counts[0], 0), min(levels[-1] + counts[-1], scale)
    return np.asarray(np.interp(chosen, [0, *(above - counts), scale], [ends[0], *levels, ends[1]]) / scale)


def _places(levels: Sequence[tuple[list[float], float]]) -> list[int]:
    """A number for each sample of a prompt, higher is better, equal for ties."""
    classes = [list(range(len(levels[0][0])))]
    for values_M, tolerance in levels:
        if not all(math.isnan(value) for value in values_M):
            classes = [part for members in classes for part in _cut(members, values_M, tolerance)]
    place = {i: -number for number, members in enumerate(classes) for i in members}
    return [place[i] for i in range(len(place))]


def _cut(members: Sequence[int], values_M: Sequence[float], tolerance: float) -> list[list[int]]:
    """Cut samples into classes, the best first."""
    tolerance *= 1 + _ROUNDING
    parts: list[list[int]] = []
    for i in sorted(members, key=lambda i: -values_M[i]):
        if parts and values_M[parts[-1][0]] - values_M[i] <= tolerance:
            parts[-1].append(i)
        else:
            parts.append([i])
    return parts


def _directed(values_PM: Tensor, among_PK: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """Twice the mid-rank counts (P, M), reversed for a negative weight; and whether the reward applies (P, 1)."""
    applies_P1 = ~values_PM.isnan().all(dim=1, keepdim=True)
    found = _twice_ranks(values_PM.where(applies_P1, 0.0), among_PK.where(applies_P1, 0.0))
    return (2.0 * among_PK.shape[1] - found if weight < 0 else found), applies_P1


def _twice_ranks(values_PM: Tensor, among_PK: Tensor) -> Tensor:
    """Number of samples below each value plus number of samples at most that value."""
    lower_PM, at_most_PM, _ = count_below(values_PM, among_PK)
    return lower_PM + at_most_PM


def _whole_numbers(weights: Sequence[float]) -> tuple[list[int], int]:
    """The weights as whole multiples of 1 / (a whole number), and that number."""
    fractions = [Fraction(repr(float(weight))) for weight in weights]
    scale = math.lcm(*(fraction.denominator for fraction in fractions))
    return [int(fraction * scale) for fraction in fractions], scale
