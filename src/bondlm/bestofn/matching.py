"""A policy compared with Best-of-n of the reference: win rates, log-quantiles, and the N at which two curves meet.

All estimates are U-statistics over the M available reference samples: exact averages over all ways to choose n of them
(and others to compare with), so they are unbiased at every integer n, ties included.

Shape suffixes: P prompts, M reference samples of a prompt, m policy samples of a prompt (lower case in the text), N
orders of Best-of-n, R bootstrap resamples, J = M+1 counts 0..M.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from bondlm.bestofn._arrays import Array, back, check_order
from bondlm.bestofn.effective import open_ended
from bondlm.bestofn.quantiles import count_below

# A curve this close (relative) counts as reached: rounding must not decide where a curve ends flat.
_TOLERANCE = 1e-12


def best_of_n_opponents(rewards: Array, ref_rewards: Array, orders: Sequence[int]) -> Array:
    """Return each prompt's win rate of the policy against Best-of-n of the reference, for each order n.

    A sample with L of the M reference rewards below it and A at most equal beats the best of n with probability
    `C(L, n) / C(M, n)` and does not lose with `C(A, n) / C(M, n)`; their mean counts ties half. Best-of-N against
    Best-of-n wins N / (N + n) when rewards are continuous.

    Args:
        rewards: (P, m) rewards of policy samples.
        ref_rewards: (P, M) rewards of reference samples of the same prompts.
        orders: integers between 1 and M.

    Returns:
        (P, O) win rates in [0, 1].

    Raises:
        ValueError: on NaN, empty input, shapes that do not fit, or an order out of range.
    """
    lower, at_most, num_ref = count_below(rewards, ref_rewards)
    for n in orders:
        if check_order(n) != int(n) or n > num_ref:
            raise ValueError(f"orders must be integers between 1 and M = {num_ref}; got {n!r}")
    shares_JM = choose_table(num_ref)
    columns = [int(n) - 1 for n in orders]
    counts_PJ = _count_table(lower, num_ref) + _count_table(at_most, num_ref)
    return back(counts_PJ @ shares_JM[:, columns].to(lower.device) / (2.0 * lower.shape[-1]), rewards, ref_rewards)


def truncated_log_quantiles(rewards: Array, ref_rewards: Array) -> Array:
    """Return each prompt's mean log-quantile of the policy, cut after M−n terms, for n = 1..M−1.

    The series is log p_≤ = −Σ_k (1−p_≤)^k / k; `C(G, k) / C(M, k)` estimates (1−p_≤)^k without bias from G of M
    reference rewards that are better. Compare column n−1 with that of `best_of_n_log_quantiles`, which has only M−n
    terms.

    Args:
        rewards: (P, m) rewards of policy samples.
        ref_rewards: (P, M) rewards of M >= 2 reference samples.

    Returns:
        (P, M−1) values <= 0, in nats.

    Raises:
        ValueError: on NaN, empty input, shapes that do not fit, or M < 2.
    """
    _, at_most, num_ref = count_below(rewards, ref_rewards)
    _check_enough(num_ref)
    terms_JM = choose_table(num_ref) / torch.arange(1, num_ref + 1, dtype=torch.float64)
    # Row G of the cumulated terms holds the series cut at k = 1..M; the first M−1 of them, longest first, are n = 1...
    cut_JN = -terms_JM.cumsum(1)[:, : num_ref - 1].flip(1)
    counts_PJ = _count_table(num_ref - at_most, num_ref)
    return back(counts_PJ @ cut_JN.to(at_most.device) / at_most.shape[-1], rewards, ref_rewards)


def best_of_n_log_quantiles(ref_rewards: Array) -> Array:
    """Estimate the mean log-quantile of Best-of-n, cut after M−n terms, for n = 1..M−1.

    The best of n samples is compared with the M−n others, by the harmonic estimate of `log_quantile`. Without ties it
    is exactly −1/n plus the tail that is cut off the series; ties bring it closer to 0.

    Args:
        ref_rewards: (P, M) rewards of M >= 2 independent reference samples of each prompt.

    Returns:
        (P, M−1) values <= 0, in nats.

    Raises:
        ValueError: on NaN, empty input, or M < 2.
    """
    lower, at_most, num_ref = count_below(ref_rewards, ref_rewards)
    _check_enough(num_ref)
    lower, at_most = lower.long(), at_most.long()
    tied = (at_most - lower).double()
    shares_JM, values_JN = choose_table(num_ref).to(tied.device), _harmonic_table(num_ref).to(tied.device)
    # One order at a time: no P x M x M array.
    columns = [
        ((share_J.take(at_most) - share_J.take(lower)) / tied * value_J.take(at_most)).sum(-1)
        for share_J, value_J in zip(shares_JM.unbind(1)[:-1], values_JN.unbind(1), strict=True)
    ]
    return back(torch.stack(columns, dim=-1), ref_rewards)


def best_of_n_weights(ref_rewards: Array, n: int) -> Array:
    """Return the probability that each of the M samples is the best of n drawn from them, ties shared equally.

    Args:
        ref_rewards: (P, M) rewards of reference samples.
        n: order, an integer between 1 and M.

    Returns:
        (P, M) weights that sum to 1 along a row.

    Raises:
        ValueError: on NaN, empty input, or an order out of range.
    """
    lower, at_most, num_ref = count_below(ref_rewards, ref_rewards)
    if check_order(n) != int(n) or n > num_ref:
        raise ValueError(f"n must be an integer between 1 and M = {num_ref}; got {n!r}")
    share_J = choose_table(num_ref)[:, int(n) - 1].to(lower.device)
    return back((share_J[at_most.long()] - share_J[lower.long()]) / (at_most - lower), ref_rewards)


def winner_log_quantile(ref_rewards: Array, n: int) -> Array:
    """Return the log-quantile of each sample when it is the winner of n, by the harmonic estimate over the M−n others.

    All samples better than the winner are among the others, and the winner itself is not, so it adds no bias.

    Args:
        ref_rewards: (P, M) rewards of reference samples.
        n: order, an integer between 1 and M−1.

    Returns:
        (P, M) values <= 0; meaningless (0) for samples that cannot win, whose weight is 0.

    Raises:
        ValueError: on NaN, empty input, M < 2 or an order out of range.
    """
    _, at_most, num_ref = count_below(ref_rewards, ref_rewards)
    _check_enough(num_ref)
    if check_order(n) != int(n) or n >= num_ref:
        raise ValueError(f"n must be an integer between 1 and M - 1 = {num_ref - 1}; got {n!r}")
    return back(_harmonic_table(num_ref)[:, int(n) - 1].to(at_most.device)[at_most.long()], ref_rewards)


def solve_reward(value_R: Tensor, curve_RM: Tensor) -> Tensor:
    """Return the real N >= 1 at which each row's curve, linear between n = 1..M, reaches the value; inf beyond M.

    Where the curve is flat the result is the smallest N, but inf at its end: a policy that is as good as the best of
    all M samples may be worth any N.
    """
    curve_RM = curve_RM.cummax(1).values  # it never decreases but for rounding
    # Relative to the curve's rise and to the rewards themselves: a flat curve differs only by rounding.
    scale_R = torch.maximum(curve_RM[:, -1] - curve_RM[:, 0], 0.01 * curve_RM.abs().amax(1))
    scale_R = scale_R.clamp(min=torch.finfo(torch.float64).tiny)  # all rewards 0
    gap_RM = (value_R[:, None] - curve_RM) / scale_R[:, None]
    return open_ended(_first_crossing(gap_RM), -gap_RM[:, -1], _TOLERANCE)


def solve_log_quantile(policy_RN: Tensor, curve_RN: Tensor) -> Tensor:
    """Return the real N >= 1 at which each row's Best-of-n log-quantile reaches the policy's; inf beyond M−1.

    It is inf as well for a policy with log-quantile 0, which is never below a sample of the reference: with ties the
    curve reaches 0 and is flat from there on.

    Column n−1 of both is cut after M−n terms. Between integers −1/log-quantile is linear, which is exact for continuous
    rewards (there it is N itself) up to the terms that are cut off.
    """
    gap_RN = policy_RN - curve_RN
    product_RN = policy_RN * curve_RN
    # (π − c) / (π·c) = 1/c − 1/π is N − n for continuous rewards; a log-quantile of 0 has no reciprocal.
    scaled_RN = gap_RN / product_RN
    left, right = scaled_RN[:, :-1], scaled_RN[:, 1:]
    usable = torch.isfinite(left) & torch.isfinite(right)
    share_RN = torch.where(usable, left / (left - right), gap_RN[:, :-1] / (gap_RN[:, :-1] - gap_RN[:, 1:]))
    return open_ended(_first_crossing(gap_RN, share_RN), -policy_RN[:, 0], 0.0)


def _first_crossing(gap_RK: Tensor, share_RK: Tensor | None = None) -> Tensor:
    """Return the first N at which the gap, at n = 1..K, is 0 or less; `share` says how far between n and n+1."""
    reached_RK = gap_RK <= _TOLERANCE
    first_R = reached_RK.int().argmax(1)
    if share_RK is None:
        share_RK = gap_RK[:, :-1] / (gap_RK[:, :-1] - gap_RK[:, 1:])
    if share_RK.shape[1] == 0:
        share_R = torch.zeros_like(gap_RK[:, 0])
    else:
        share_R = share_RK.gather(1, (first_R - 1).clamp(min=0)[:, None])[:, 0].clamp(0.0, 1.0)
    # If it crosses at n = 1, N is 1. Otherwise N is between the previous knot and this one.
    solution_R = torch.where(first_R == 0, torch.ones_like(share_R), first_R + share_R)
    return torch.where(reached_RK.any(1), solution_R, torch.full_like(solution_R, math.inf))


def choose_table(num_ref: int) -> Tensor:
    """Return the (M+1, M) table C(c, n) / C(M, n), row c = 0..M, column n−1 for n = 1..M.

    A running product of (c−j) / (M−j): every factor is in [0, 1], so nothing overflows, and it is exactly 0 for n > c.
    """
    counts = torch.arange(num_ref + 1, dtype=torch.float64)[:, None]
    drawn = torch.arange(num_ref, dtype=torch.float64)
    # The clamp is for n > c, where nothing can be chosen.
    return ((counts - drawn).clamp(min=0.0) / (num_ref - drawn)).cumprod(1)


def _harmonic_table(num_ref: int) -> Tensor:
    """Return the (M+1, M−1) table −(H_{M−n} − H_{M−n−G}), row A = M−G at most, column n−1; 0 where A < n."""
    inverse = 1.0 / torch.arange(1, num_ref + 1, dtype=torch.float64)
    harmonic = torch.cat([torch.zeros(1, dtype=torch.float64), inverse.cumsum(0)])
    at_most = torch.arange(num_ref + 1)[:, None]
    orders = torch.arange(1, num_ref)
    left = at_most - orders  # M − n − G others are not better
    return torch.where(left >= 0, harmonic[left.clamp(min=0)] - harmonic[num_ref - orders], torch.zeros(()).double())


def _count_table(counts: Tensor, num_ref: int) -> Tensor:
    """Return the (P, M+1) number of entries of each row that are 0, 1, .., M."""
    table = torch.zeros(*counts.shape[:-1], num_ref + 1, dtype=torch.float64, device=counts.device)
    return table.scatter_add_(-1, counts.long(), torch.ones_like(counts))


def _check_enough(num_ref: int) -> None:
    if num_ref < 2:
        raise ValueError(f"ref_rewards must have at least 2 samples per prompt; got {num_ref}")
