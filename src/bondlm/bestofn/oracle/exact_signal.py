"""The exact mean of the reward part of BOND's return over the k anchor samples that estimate it.

A mean over samples is a finite sum here. The formulas use the distributions of the counts, not the code of the
estimators in `quantiles`, so each checks the other.

Shape suffixes: K outcomes, J counts 0..k.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from bondlm.bestofn._arrays import Array, back, check_finite, check_order, check_probs, check_same_shape, to_float64
from bondlm.bestofn.distribution import log_collisions
from bondlm.bestofn.quantiles import two_level_penalty

Estimate = Literal["exact", "jbond", "clamped", "harmonic", "smoothed"]


def mean_signal(
    anchor_probs: Array,
    rewards: Array,
    n: float,
    *,
    estimate: Estimate = "exact",
    k: int | None = None,
    correction: bool = False,
) -> Array:
    """Return (n−1)·E[log p̂_≤] + E[log B̂] of each outcome, the mean over k anchor samples of the reward part.

    Sessa et al. 2024, arXiv 2407.14622, Eq. 8 times n−1, with the collision term B only if `correction`.

    Args:
        anchor_probs: (..., K) probabilities.
        rewards: (..., K) finite rewards; equal rewards are ties.
        n: order of Best-of-n, a real number >= 1.
        estimate: how log p is estimated. "exact": known. "jbond", "clamped", "harmonic": as `log_quantile`.
            "smoothed": log of (samples strictly below + 1) / (k + 1), as in vBoN.
        k: number of anchor samples; None only with "exact".
        correction: add the collision term, exact or as `log_collision_correction` estimates it.

    Returns:
        (..., K) means in nats. With "exact" and `correction` it is log(Best-of-n / anchor).

    Raises:
        ValueError: if the shapes differ, an input is not valid, or k and estimate do not fit.
    """
    if (estimate == "exact") != (k is None):
        raise ValueError(f"estimate={estimate!r} with k={k!r}: give k >= 1 anchor samples unless the estimate is exact")
    p_lt_K, p_le_K = exact_quantiles(anchor_probs, rewards)
    signal_K = (check_order(n) - 1.0) * _mean_log_quantile(p_lt_K, p_le_K, estimate, k)
    if correction:
        signal_K = signal_K + _mean_log_collisions(p_lt_K, p_le_K, check_order(n), k)
    return back(signal_K, anchor_probs, rewards)


def _mean_log_quantile(p_lt_K: Tensor, p_le_K: Tensor, estimate: Estimate, k: int | None) -> Tensor:
    if k is None:
        return p_le_K.log()
    if k < 1:
        raise ValueError(f"k must be at least 1 anchor sample; got {k!r}")
    counts_J = torch.arange(k + 1, dtype=torch.float64, device=p_le_K.device)
    if estimate == "jbond":
        return two_level_penalty(k) * (1.0 - p_le_K) ** k
    if estimate == "harmonic":
        powers_KJ = (1.0 - p_le_K).unsqueeze(-1) ** counts_J[1:]
        return -(powers_KJ / counts_J[1:]).sum(-1)
    if estimate == "clamped":
        return (_binomial(p_le_K, k) * torch.log(torch.clamp(counts_J / k, min=0.5 / k))).sum(-1)
    if estimate == "smoothed":
        return (_binomial(p_lt_K, k) * torch.log((counts_J + 1) / (k + 1))).sum(-1)
    raise ValueError(f"unknown estimate {estimate!r}; use exact, jbond, clamped, harmonic or smoothed")


def _mean_log_collisions(p_lt_K: Tensor, p_le_K: Tensor, n: float, k: int | None) -> Tensor:
    """Return log B, or its mean over the counts of k samples at most y (binomial), and of those below it (again)."""
    below_K = p_lt_K / p_le_K
    if k is None:
        return log_collisions(1.0 - below_K, n)
    at_most_KJ = _binomial(p_le_K, k)
    mean_K = at_most_KJ[..., 0] * log_collisions(torch.zeros((), dtype=torch.float64), n)
    for count in range(1, k + 1):
        lower_J = torch.arange(count + 1, dtype=torch.float64, device=p_le_K.device)
        given_K = (_binomial(below_K, count) * log_collisions(1.0 - lower_J / count, n)).sum(-1)
        mean_K = mean_K + at_most_KJ[..., count] * given_K
    return mean_K


def _binomial(p_K: Tensor, k: int) -> Tensor:
    """Return the probabilities (..., K, k+1) of 0..k successes."""
    counts_J = torch.arange(k + 1, dtype=torch.float64, device=p_K.device)
    p = p_K.clamp(0.0, 1.0).unsqueeze(-1)  # a cumulative sum may pass 1 by rounding
    log_ways_J = math.lgamma(k + 1.0) - torch.lgamma(counts_J + 1) - torch.lgamma(k - counts_J + 1)
    return torch.exp(log_ways_J + torch.xlogy(counts_J, p) + torch.xlogy(k - counts_J, 1.0 - p))


def exact_quantiles(anchor_probs: object, rewards: object) -> tuple[Tensor, Tensor]:
    """Return the exact p_< and p_≤ of each outcome, (..., K)."""
    probs_K = check_probs(to_float64(anchor_probs, "anchor_probs"), "anchor_probs")
    rewards_K = to_float64(rewards, "rewards").contiguous()
    check_same_shape(probs_K, "anchor_probs", rewards_K, "rewards")
    check_finite(rewards_K, "rewards")
    ordered_K, order_K = rewards_K.sort(-1)
    total_K = torch.nn.functional.pad(probs_K.gather(-1, order_K).cumsum(-1), (1, 0))
    p_lt_K = total_K.gather(-1, torch.searchsorted(ordered_K, rewards_K))
    return p_lt_K, total_K.gather(-1, torch.searchsorted(ordered_K, rewards_K, right=True))
