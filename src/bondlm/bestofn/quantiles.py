"""Quantiles of rewards among reference rewards. Only comparisons are used: an increasing map of rewards changes no bit.

Shape suffixes: P prompts, M reference samples of a prompt, m scored samples of a prompt (lower case in the text).
"""

import math
from typing import Literal

import torch

from bondlm.bestofn._arrays import Array, back, check_no_nan, check_order, to_float64
from bondlm.bestofn.distribution import log_collisions

LogQuantileMethod = Literal["jbond", "clamped", "harmonic"]

# 2^k is a finite float64 up to k = 1023.
_MAX_TWO_LEVEL_SAMPLES = 1023


def quantile(rewards: Array, ref_rewards: Array | None, strict: bool = False) -> Array:
    """Return the share of reference rewards that each reward reaches (p_≤), or exceeds (p_<).

    Source: Sessa et al. 2024, arXiv 2407.14622, Eq. 2, 3 and 10. Unbiased as long as the scored sample is not itself
    among the reference samples.

    Args:
        rewards: (P, m) rewards, or (m,) for one prompt.
        ref_rewards: (P, M) rewards of the reference (or anchor) samples of the same prompts, or (M,). None: each reward
            is compared with the others in its row, which then serve as reference samples.
        strict: count reference rewards strictly below (p_<) instead of at most (p_≤).

    Returns:
        (P, m) or (m,) values in [0, 1], multiples of 1/M.

    Raises:
        ValueError: on NaN, empty input or shapes that do not fit.
    """
    lower, at_most, num_ref = count_below(rewards, ref_rewards)
    return back((lower if strict else at_most) / num_ref, rewards, ref_rewards)


def log_quantile(rewards: Array, ref_rewards: Array | None, method: LogQuantileMethod = "jbond") -> Array:
    """Estimate log p_≤ of each reward from M reference samples.

    Methods, with p the true p_≤ and L the number of reference rewards strictly better:

    - `"jbond"`: `2^M · log ½` if the reward is strictly below all M, else 0 (Sessa et al. 2024, arXiv 2407.14622,
      Eq. 17; −log 16 at M = 2). Its mean is `2^M · log ½ · (1−p)^M`, which meets log p at p = ½. Exact Eq. 17 at
      M = 2; the factor grows so fast that a large M is useless.
    - `"clamped"`: `log max(p̂_≤, 1/(2M))`. The clamp replaces p̂ = 0, where the log is −∞. At M = 16 and p = 0.25 the
      mean is −1.500 (true: −1.386).
    - `"harmonic"`: `−(H_M − H_{M−L})`, H the harmonic numbers: the unbiased estimate of the first M terms of
      log p = −Σ_j (1−p)^j / j. Never −∞, and its only bias is the tail of that series.

    Args:
        rewards: (P, m) rewards, or (m,) for one prompt.
        ref_rewards: (P, M) rewards of the reference (or anchor) samples, or (M,); None as in `quantile`.
        method: see above.

    Returns:
        (P, m) or (m,) values <= 0, in nats.

    Raises:
        ValueError: on NaN, empty input, shapes that do not fit, an unknown method, or "jbond" with M > 1023.
    """
    _, at_most, num_ref = count_below(rewards, ref_rewards)
    if method == "jbond":
        penalty = two_level_penalty(num_ref)
        result = torch.where(at_most == 0, torch.full_like(at_most, penalty), torch.zeros_like(at_most))
    elif method == "clamped":
        result = (at_most / num_ref).clamp(min=0.5 / num_ref).log()
    elif method == "harmonic":
        # Row j holds H_M − H_j, j = M − L = reference rewards that are at most this one.
        inverse = 1.0 / torch.arange(num_ref, 0, -1, dtype=torch.float64, device=at_most.device)
        tails = torch.cat([torch.zeros_like(inverse[:1]), inverse.cumsum(0)]).flip(0)
        result = -tails[at_most.long()]
    else:
        raise ValueError(f"log_quantile: unknown method {method!r}; use 'jbond', 'clamped' or 'harmonic'")
    return back(result, rewards, ref_rewards)


def log_collision_correction(rewards: Array, ref_rewards: Array | None, n: float) -> Array:
    """Estimate the logarithm of term (B) of Best-of-n, log Σ_{i=1..n} (p_</p_≤)^(i−1), from M reference samples.

    Source: Sessa et al. 2024, arXiv 2407.14622, Eq. 4 and 8; the paper drops it. Together with (n−1)·log p_≤ it is
    log(π_BoN / π_ref), ties included. A reward that ties with no reference sample gets log n, the value for continuous
    rewards; this includes a reward below all of them, where p̂_</p̂_≤ would be 0/0. So rewards without ties get a
    constant, which any baseline cancels.

    Args:
        rewards: (P, m) rewards, or (m,) for one prompt.
        ref_rewards: (P, M) rewards of the reference (or anchor) samples, or (M,); None as in `quantile`.
        n: order, a real number >= 1.

    Returns:
        (P, m) or (m,) values in [0, log n]; 0 if reference samples tie with the reward and none is worse.

    Raises:
        ValueError: on NaN, empty input, shapes that do not fit, or n < 1.
    """
    order = check_order(n)
    lower, at_most, _ = count_below(rewards, ref_rewards)
    tied_share = torch.where(at_most > 0, 1.0 - lower / at_most, torch.zeros_like(at_most))
    return back(log_collisions(tied_share, order), rewards, ref_rewards)


def two_level_penalty(num_ref: int) -> float:
    """Return `2^k · log ½`, the penalty of J-BOND's two-level reward with k reference samples; −log 16 at k = 2.

    With it, the mean penalty at the median, `2^k log ½ · ½^k`, equals log ½ (Sessa et al. 2024, Appendix A.4, for
    k = 2).

    Raises:
        ValueError: unless k is between 1 and 1023.
    """
    if not 1 <= num_ref <= _MAX_TWO_LEVEL_SAMPLES:
        raise ValueError(
            f"the two-level reward needs between 1 and {_MAX_TWO_LEVEL_SAMPLES} reference samples; got {num_ref}; "
            "use method='harmonic' for many"
        )
    return -math.ldexp(math.log(2.0), num_ref)


def count_below(rewards: object, ref_rewards: object) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Count the reference rewards below, and at most, each reward: one sort and two binary searches.

    Returns:
        The counts strictly below and at most, both shaped as `rewards`, float64; and M. With `ref_rewards` None, each
        reward is left out of its own counts and of M.

    Raises:
        ValueError: on NaN, empty input, shapes that do not fit, or None with fewer than 2 rewards in a row.
    """
    values = to_float64(rewards, "rewards")
    refs = values if ref_rewards is None else to_float64(ref_rewards, "ref_rewards")
    if values.ndim not in (1, 2) or values.ndim != refs.ndim or values.shape[:-1] != refs.shape[:-1]:
        raise ValueError(
            "rewards and ref_rewards must be (P, m) and (P, M), or (m,) and (M,); got "
            f"{tuple(values.shape)} and {tuple(refs.shape)}"
        )
    if 0 in values.shape or 0 in refs.shape:
        raise ValueError(
            f"rewards and ref_rewards must not be empty; got shapes {tuple(values.shape)} and {tuple(refs.shape)}"
        )
    check_no_nan(values, "rewards")
    check_no_nan(refs, "ref_rewards")
    ordered, values = refs.sort(-1).values, values.contiguous()
    lower = torch.searchsorted(ordered, values).double()
    at_most = torch.searchsorted(ordered, values, right=True).double()
    if ref_rewards is not None:
        return lower, at_most, refs.shape[-1]
    if refs.shape[-1] < 2:
        raise ValueError("rewards has one sample per row: it has no others to compare with; pass ref_rewards")
    return lower, at_most - 1.0, refs.shape[-1] - 1


def tied_share(rewards: torch.Tensor) -> torch.Tensor:
    """The share of the pairs of each prompt's M samples whose rewards (P, M) are equal: (P,) float64, 0 for M = 1.

    Its mean does not depend on M, unlike the share of prompts with any tie.

    Raises:
        ValueError: as `count_below`.
    """
    if rewards.shape[-1] < 2:
        return rewards.new_zeros(rewards.shape[:-1], dtype=torch.float64)
    below, at_most, others = count_below(rewards, None)
    return (at_most - below).mean(dim=-1) / others
