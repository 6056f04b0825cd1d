"""Order statistics: what Best-of-n would score, from samples at hand.

Shape suffixes: P prompts, M samples of a prompt.
"""

import torch

from bondlm.bestofn._arrays import Array, back, check_finite, check_order, to_float64


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
    # Rank n−1 has ratio 0: from there down no sample can be the maximum of n, and the product stays 0.
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
