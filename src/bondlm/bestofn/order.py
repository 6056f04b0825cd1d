"""Order statistics: the reward that Best-of-n would reach, and its KL, from given samples.

Shape suffixes: P prompts, M samples of a prompt, K levels: sets of equal rewards of a prompt.
"""

from collections.abc import Sequence

import torch

from bondlm.bestofn._arrays import Array, back, check_finite, check_order, to_float64
from bondlm.bestofn.quantiles import count_below


def expected_best_of_n(rewards: Array, n: int) -> Array:
    """Estimate E[max reward of n samples] of each prompt from its M >= n samples, without bias.

    `Σ_{i=n..M} C(i−1, n−1) / C(M, n) · r_(i)` over the rewards in increasing order: the mean of the maximum over all
    subsets of n samples. Source: Nakano et al. 2021, arXiv 2112.09332, Appendix I. Intervals: bootstrap the returned
    values over prompts (`bootstrap_mean`), never over samples.

    Args:
        rewards: (P, M) finite rewards of M independent reference samples of each prompt. Any leading shape works.
        n: number of samples that Best-of-n would draw, an integer with 1 <= n <= M.

    Returns:
        (P,) estimates in reward units. `n = 1` gives the mean, `n = M` the maximum.

    Raises:
        ValueError: if n is not an integer in 1..M, or rewards are not finite.
    """
    rewards_PM = to_float64(rewards, "rewards")
    num_samples = rewards_PM.shape[-1] if rewards_PM.ndim else 0
    if check_order(n) != int(n) or n > num_samples:
        raise ValueError(f"n must be an integer between 1 and M = {num_samples} samples per prompt; got {n!r}")
    check_finite(rewards_PM, "rewards")
    weights_M = _weights(num_samples, int(n)).to(rewards_PM.device)
    return back(rewards_PM.sort(-1).values @ weights_M, rewards)


def _weights(num_samples: int, n: int) -> torch.Tensor:
    """Return the (M,) weights of the sorted rewards.

    Built from the top by the ratio w_i / w_(i+1) = (i+1−n) / i. No factorial appears, so nothing overflows.
    """
    ranks = torch.arange(num_samples - 1, 0, -1, dtype=torch.float64)
    # Rank n−1 has ratio 0: from there on down no sample can be the maximum of n, and the product stays 0.
    ratios = (ranks + 1 - n) / ranks
    from_top = torch.cat([torch.tensor([n / num_samples], dtype=torch.float64), ratios]).cumprod(0)
    return from_top.flip(0)


def best_of_n_curve(rewards: Array) -> Array:
    """Estimate E[max reward of n samples] for every n = 1..M: `expected_best_of_n` at all orders, in one product.

    Args:
        rewards: (P, M) finite rewards of M independent reference samples of each prompt. Any leading shape works.

    Returns:
        (P, M) estimates in reward units, column n−1 for Best-of-n; never decreasing along a row.

    Raises:
        ValueError: if rewards are empty or not finite.
    """
    rewards_PM = to_float64(rewards, "rewards")
    num_samples = rewards_PM.shape[-1] if rewards_PM.ndim else 0
    if num_samples == 0:
        raise ValueError(f"rewards must have at least one sample per prompt; got shape {tuple(rewards_PM.shape)}")
    check_finite(rewards_PM, "rewards")
    weights = torch.stack([_weights(num_samples, n) for n in range(1, num_samples + 1)], dim=1)
    return back(rewards_PM.sort(-1).values @ weights.to(rewards_PM.device), rewards)


def best_of_n_kls(rewards: Array, orders: Sequence[float]) -> list[float]:
    """Estimate the mean over prompts of KL(Best-of-n ‖ reference), in nats, with the ties among the samples.

    Σ_l (F_l^n − F_<^n) log[(F_l^n − F_<^n) / m_l] over the levels of two or more equal rewards, F_l and F_< the shares
    of rewards at most, and below, and m_l = F_l − F_<. A reward that occurs once is taken as continuous; its part is ∫
    n u^(n−1) log(n u^(n−1)) du from F_< to F_l. Without ties the sum is exactly `kl_bound(n)`; all tied: 0.

    The estimate is biased both ways. Atoms that are too rare to occur twice count as continuous, which makes it too
    high. With 0/1 rewards it is mostly too low, since prompts whose M samples all tie count as 0: at a pass rate of
    0.1 and n = 8 by 16% for M = 16, 8% for M = 32, 4% for M = 64.

    Args:
        rewards: (P, M) rewards of M independent reference samples of each prompt, or (M,) for one prompt.
        orders: real numbers n >= 1.

    Returns:
        One KL for each order.

    Raises:
        ValueError: on NaN, empty input, or an order out of range.
    """
    lower, at_most, num_samples = count_below(rewards, rewards)
    num_prompts = max(1, lower[..., 0].numel())
    # A level is determined by its two counts, and few pairs of counts occur: the contribution of each is computed once.
    keys, samples_K = torch.unique(lower * (num_samples + 1) + at_most, return_counts=True)
    low_K, high_K = (keys // (num_samples + 1)) / num_samples, (keys % (num_samples + 1)) / num_samples
    size_K = (high_K - low_K) * num_samples
    levels_K = samples_K / size_K.round() / num_prompts  # mean number of a prompt's levels with these counts
    found = []
    for n in orders:
        order = check_order(n)
        mass_K = high_K**order - low_K**order
        tied_K = torch.xlogy(mass_K, mass_K / (high_K - low_K))
        smooth_K = _smooth_kl(high_K, order) - _smooth_kl(low_K, order)
        found.append(max(0.0, float((levels_K * torch.where(size_K > 1.5, tied_K, smooth_K)).sum())))
    return found


def _smooth_kl(u: torch.Tensor, n: float) -> torch.Tensor:
    """The integral of n v^(n−1) log(n v^(n−1)) for v from 0 to u."""
    power = u**n
    return power * torch.log(torch.tensor(n, dtype=torch.float64)) + (n - 1.0) * (torch.xlogy(power, u) - power / n)
