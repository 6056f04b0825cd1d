"""Win rates, and the effective N: the N at which Best-of-N has a policy's win rate.

Shape suffixes: P prompts, M reference samples of a prompt, m policy samples of a prompt (lower case in the text),
R bootstrap resamples.
"""

import math
from typing import Any, NamedTuple, overload

import numpy as np
import torch
from numpy.typing import NDArray

from bondlm.bestofn._arrays import Array, back, to_float64
from bondlm.bestofn.bootstrap import Estimate, check_settings, percentile_interval, resample_means, share_ends
from bondlm.bestofn.quantiles import count_below

# A win rate this close (relative, in odds) counts as reached. Rounding would otherwise miss two ends of a curve: the
# flat end of a curve with ties, which a policy that always draws the best level equals but computes by another sum; and
# N = M itself.
_ODDS_TOLERANCE = 1e-12


class EffectiveN(NamedTuple):
    """The effective N of a policy, with its interval. `math.inf` means more than `max_n`, the samples at hand."""

    value: float
    low: float
    high: float
    max_n: int

    def __str__(self) -> str:
        """Return "6.3 [5.1, 7.8]", "6.3 [5.1, > 16]", "> 16 [12.1, > 16]", or "> 16" if the low end is also beyond."""
        value, low, high = (f"{x:.1f}" if math.isfinite(x) else f"> {self.max_n}" for x in self[:3])
        return value if math.isinf(self.low) else f"{value} [{low}, {high}]"


def win_rates(rewards: Array, ref_rewards: Array) -> Array:
    """Return each prompt's win rate of the policy against the reference over all m·M pairs, ties counting half.

    Args:
        rewards: (P, m) rewards of policy samples, or (m,) for one prompt.
        ref_rewards: (P, M) rewards of reference samples of the same prompts, or (M,).

    Returns:
        (P,) values in [0, 1]; 0-dim for one prompt.

    Raises:
        ValueError: on NaN, empty input or shapes that do not fit.
    """
    return back(_win_rates(rewards, ref_rewards), rewards, ref_rewards)


@overload
def win_rate(rewards: NDArray[Any], ref_rewards: NDArray[Any]) -> np.float64: ...
@overload
def win_rate(rewards: torch.Tensor, ref_rewards: torch.Tensor) -> torch.Tensor: ...
def win_rate(rewards: Any, ref_rewards: Any) -> Any:
    """Return the mean over prompts of the policy's win rate against the reference, ties counting half.

    Best-of-N of the reference has N/(N+1) when rewards are continuous, and less with ties.

    Args:
        rewards: (P, m) rewards of policy samples, or (m,) for one prompt.
        ref_rewards: (P, M) rewards of reference samples of the same prompts, or (M,).

    Returns:
        A 0-dim value in [0, 1]: `numpy.float64`, or a tensor for tensors.

    Raises:
        ValueError: on NaN, empty input or shapes that do not fit.
    """
    return back(_win_rates(rewards, ref_rewards).mean(), rewards, ref_rewards)


def best_of_n_win_rates(ref_rewards: Array) -> Array:
    """Estimate each prompt's win rate of Best-of-N against one more reference sample, for N = 1..M−1, without bias.

    The U-statistic over all ways to take one sample i as the opponent and N others as the draws:
    `W_N = 1 − ½ Σ_i [ (C_i − 1)_N + (C'_i)_N ] / (M)_{N+1}`, with C_i and C'_i the number of samples at most, and
    below, sample i, and (x)_N the falling factorial. Exactly N/(N+1) when no two rewards are equal.

    Args:
        ref_rewards: (P, M) rewards of M >= 2 independent reference samples of each prompt, or (M,) for one prompt.

    Returns:
        (P, M−1) win rates, column N−1 for Best-of-N; (M−1,) for one prompt.

    Raises:
        ValueError: on NaN, empty input, or M < 2.
    """
    lower, at_most, num_ref = count_below(ref_rewards, ref_rewards)
    if num_ref < 2:
        raise ValueError(f"ref_rewards must have at least 2 samples per prompt; got shape {tuple(lower.shape)}")
    counts = torch.zeros_like(lower)
    for index in (lower.long(), at_most.long() - 1):
        counts.scatter_add_(-1, index, torch.ones_like(lower))
    return back(1.0 - 0.5 * counts @ _loss_table(num_ref).to(lower.device), ref_rewards)


def effective_n(
    rewards: Array, ref_rewards: Array, *, confidence: float = 0.95, num_bootstrap: int = 2000, seed: int = 0
) -> EffectiveN:
    """Return the real N >= 1 at which Best-of-N of the reference has the policy's mean win rate.

    The policy's win rate w is `win_rate`; that of Best-of-N is the mean over prompts of `best_of_n_win_rates`. The
    curve is linear in the odds w/(1−w) between integers, and its last segment is extended to N = M. With continuous
    rewards this is `N = w/(1−w)`. Where ties make the curve flat, the result is the smallest N that reaches w. With
    M = 2 the curve has a single point, and the odds are taken to grow by one per draw, as with continuous rewards.

    A policy that wins as often as the best of a prompt's M samples would has no N that the data bound from above, since
    the curve is flat from some N <= M on. Its N is `inf`.

    Args:
        rewards: (P, m) rewards of policy samples, or (m,) for one prompt.
        ref_rewards: (P, M) rewards of M >= 2 reference samples of the same prompts, or (M,).
        confidence: coverage of the interval, in (0, 1).
        num_bootstrap: number of resamples of the prompts.
        seed: of the resampling.

    Returns:
        `EffectiveN`. `value = 1.0` for w <= 1/2, and `inf` if w is beyond N = M or reaches the end of a curve that ties
        make flat. The interval is a percentile bootstrap over prompts, and its ends may be `inf` too; with fewer than 2
        prompts it is [1, inf]. Where no sample of the policy is below the best of its prompt, or all prompts have the
        same win rate, resamples show too little spread, and the ends are those of `bootstrap.share_ends`.

    Raises:
        ValueError: on NaN, empty input, shapes that do not fit, M < 2, or bootstrap settings out of range.
    """
    check_settings(confidence, num_bootstrap)
    wins = _win_rates(rewards, ref_rewards).detach().cpu().reshape(-1, 1)
    refs = to_float64(ref_rewards, "ref_rewards").detach().cpu()
    max_n = refs.shape[-1]
    # Column 0: the policy; columns 1..M-1: Best-of-N. One matrix so that a resample draws both from the same prompts.
    table_PM = torch.cat([wins, best_of_n_win_rates(refs).reshape(-1, max_n - 1)], dim=1)
    mean_1M = table_PM.mean(0, keepdim=True)
    lacking_P1 = shortfalls(wins[:, 0], refs)[:, None]
    value = float(open_ended(_solve(mean_1M), lacking_P1.mean(0)))
    if len(table_PM) < 2:
        return EffectiveN(value, 1.0, math.inf, max_n)
    # Resampled apart from the table, as one more column could change its last bits.
    lacking_R = resample_means(lacking_P1, num_bootstrap, seed)[:, 0]
    draws_R = open_ended(_solve(resample_means(table_PM, num_bootstrap, seed)), lacking_R)
    found = Estimate(value, *percentile_interval(draws_R, confidence))
    is_best = never_falls_short(to_float64(rewards, "rewards").detach().cpu(), refs)
    return EffectiveN(*widened(found, wins[:, 0], mean_1M[:, 1:], is_best, confidence), max_n)


def shortfalls(wins_P: torch.Tensor, refs_PM: torch.Tensor) -> torch.Tensor:
    """Return what each prompt's win rate (P,) lacks to that of a policy that always draws the best of the M rewards."""
    num_ref = refs_PM.shape[-1]
    num_best = (refs_PM == refs_PM.amax(-1, keepdim=True)).sum(-1).reshape(-1)
    # Whole numbers are divided here as in `_win_rates`, so that a policy that never falls short lacks exactly 0.
    return (2 * num_ref - num_best).double() / (2.0 * num_ref) - wins_P


def never_falls_short(mine_Pm: torch.Tensor, refs_PM: torch.Tensor) -> bool:
    """Return whether no sample of the policy is below the best reference reward of its prompt."""
    return bool((mine_Pm.amin(-1) >= refs_PM.amax(-1)).all())


def open_ended(n_R: torch.Tensor, lacking_R: torch.Tensor, tolerance: float = _ODDS_TOLERANCE) -> torch.Tensor:
    """Return each N, or `inf` where it is above 1 and the policy lacks nothing to the flat end of the curve."""
    return torch.where((lacking_R <= tolerance) & (n_R > 1.0), torch.full_like(n_R, math.inf), n_R)


def widened(
    found: Estimate, wins_P: torch.Tensor, curve_1N: torch.Tensor, is_best: bool, confidence: float
) -> Estimate:
    """Return N with wider ends where resamples cannot show its spread (`share_ends`)."""
    if len(wins_P) < 2 or not (is_best or bool((wins_P == wins_P[0]).all())):
        return found
    low, high = (
        float(_solve(torch.cat([torch.full_like(curve_1N[:, :1], win), curve_1N], dim=1)))
        for win in share_ends(float(wins_P.mean()), len(wins_P), confidence)
    )
    return Estimate(found.value, min(found.low, low), math.inf if is_best else max(found.high, high))


def _win_rates(rewards: object, ref_rewards: object) -> torch.Tensor:
    """Return the (P,) win rates as a tensor: sums of integer counts, so the order of the samples changes no bit."""
    lower, at_most, num_ref = count_below(rewards, ref_rewards)
    return (lower + at_most).sum(-1) / (2.0 * num_ref * lower.shape[-1])


def _loss_table(num_ref: int) -> torch.Tensor:
    """Return the (M, M−1) table (c)_N / (M)_{N+1}, row c = 0..M−1, column N = 1..M−1.

    A running product of (c−j)/(M−j), j = 0..N−1: every factor is in [0, 1), so nothing overflows, and it is exactly
    0 from N > c on.
    """
    below = torch.arange(num_ref, dtype=torch.float64)[:, None]
    drawn = torch.arange(num_ref - 1, dtype=torch.float64)
    # The clamp is for N > c: fewer than N samples are available, and the falling factorial is 0.
    falling = ((below - drawn).clamp(min=0.0) / (num_ref - drawn)).cumprod(1)
    return falling / (num_ref - 1.0 - drawn)


def _solve(table_RM: torch.Tensor) -> torch.Tensor:
    """Find N for each row (policy's win rate, then the curve at N = 1..M−1); (R,) values >= 1, `inf` beyond M."""
    odds_RM = table_RM / (1.0 - table_RM)
    target_R = odds_RM[:, 0]
    max_n = table_RM.shape[1]
    # The knot N = 0 with odds 0 gives M = 2 a segment. Otherwise it is below every result, as the odds at N = 1 are 1.
    knots_RM = torch.cat([torch.zeros_like(odds_RM[:, :1]), odds_RM[:, 1:]], dim=1)
    knots_RM = knots_RM.cummax(1).values  # it decreases only by rounding
    reached_R = torch.searchsorted(knots_RM, (target_R * (1.0 - _ODDS_TOLERANCE))[:, None])[:, 0]
    right_R = reached_R.clamp(1, max_n - 1)
    low_R = knots_RM.gather(1, right_R[:, None] - 1)[:, 0]
    high_R = knots_RM.gather(1, right_R[:, None])[:, 0]
    solution_R = right_R - 1 + (target_R - low_R) / (high_R - low_R)
    # Within the tolerance of a knot, the result is the knot itself; past the last knot its segment is extended up to
    # N = M.
    limit_R = torch.where(reached_R < max_n, right_R, max_n).double()
    # A flat last segment divides by zero, which gives inf. A win rate of at most 1/2 means N = 1.
    beyond_R = (reached_R == max_n) & ~(solution_R <= max_n * (1.0 + _ODDS_TOLERANCE))
    solution_R = torch.minimum(solution_R, limit_R).clamp(min=1.0)
    return torch.where(beyond_R, torch.full_like(solution_R, math.inf), solution_R)
