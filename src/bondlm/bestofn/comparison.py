"""Compare samples of a policy with samples of its reference, with all intervals from one set of resamples.

Assumptions of the estimates, and differences between them:

- Effective N is matched on three measures. The win rate and the log-quantile depend only on the order of rewards; the
  mean reward also depends on their scale, so a monotone transform changes it. All three agree for a policy that *is*
  Best-of-N. A policy that is narrower (always the 80th percentile, say) or wider gets a different N from each: the
  log-quantile penalises rare bad answers most, and the reward credits rare excellent ones.
- Ties count half in win rates. The curves of Best-of-n come from the same tied rewards, so N stays right.
- The KL divergences to Best-of-n use the harmonic estimate of the log-quantile and a plug-in for ties
  (`log_collision_correction`). Without ties they are exact up to the terms that M samples cannot show. The forward KL
  is NaN beyond n = M/2, where too few other samples are left to rank a winner.

Shape suffixes: P prompts, m policy samples of a prompt (lower case in the text), M reference samples, R resamples,
J columns: quantities that are averaged over prompts.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bondlm.bestofn._arrays import check_finite, check_same_shape, to_float64
from bondlm.bestofn.bootstrap import Estimate, check_settings, percentile_interval, resample_means, with_share_ends
from bondlm.bestofn.distribution import log_collisions
from bondlm.bestofn.divergences import kl_k3
from bondlm.bestofn.effective import (
    EffectiveN,
    _solve,
    best_of_n_win_rates,
    never_falls_short,
    open_ended,
    shortfalls,
    widened,
    win_rates,
)
from bondlm.bestofn.matching import (
    best_of_n_log_quantiles,
    best_of_n_opponents,
    best_of_n_weights,
    solve_log_quantile,
    solve_reward,
    truncated_log_quantiles,
    winner_log_quantile,
)
from bondlm.bestofn.order import best_of_n_curve, best_of_n_kls
from bondlm.bestofn.quantiles import count_below, log_collision_correction, log_quantile

HISTOGRAM_BINS = 10


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """Best-of-n of the reference; NaN where M samples do not determine it. `kl` accounts for ties among the samples."""

    n: int
    reward: Estimate
    win_rate: float
    log_quantile: float
    kl: float
    policy_win_rate: float  # of the policy against Best-of-n


@dataclass(frozen=True, kw_only=True)
class Against:
    """The policy against Best-of-n of the reference."""

    n: int
    win_rate: Estimate
    forward_kl: Estimate
    backward_kl: Estimate


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A policy compared with its reference; `matched` has the effective N by "win_rate", "log_quantile", "reward"."""

    reward: Estimate
    reference_reward: Estimate
    gain: Estimate  # in reward over the reference, per prompt
    win_rate: Estimate
    log_quantile: Estimate
    matched: dict[str, EffectiveN]
    kl: Estimate
    kl_k3: Estimate
    kl_per_token: Estimate
    kl_k3_per_token: Estimate
    kl_of_best_of_n: float  # of Best-of-N at the policy's N by win rate, at most M
    curve: list[CurvePoint]
    against: list[Against]
    histogram: list[float]
    reward_length_correlation: float


def compare_samples(
    rewards: object,
    ref_rewards: object,
    log_ratio: object,
    lengths: object,
    ref_log_ratio: object | None = None,
    *,
    orders: Sequence[int] | None = None,
    confidence: float = 0.95,
    num_bootstrap: int = 2000,
    seed: int = 0,
) -> Comparison:
    """Compare m policy samples with M reference samples of the same prompts.

    Args:
        rewards: (P, m) rewards of policy samples.
        ref_rewards: (P, M) rewards of M >= 2 reference samples.
        log_ratio: (P, m) log π(y) − log π_ref(y) of the policy samples, in nats.
        lengths: (P, m) tokens of the policy samples.
        ref_log_ratio: (P, M) the same log-ratio for the *reference* samples, for the forward KL; None omits it.
        orders: the n of each Best-of-n to compare with, integers from 1 to M. None is 1, 2, 4, .. up to M.
        confidence: coverage of the intervals, in (0, 1).
        num_bootstrap: resamples of the prompts. With fewer than 2 prompts the intervals are infinite.
        seed: of the resampling.

    Raises:
        ValueError: on values that are not finite, empty input, shapes that do not fit, M < 2, or bad settings.
    """
    check_settings(confidence, num_bootstrap)
    mine, refs, ratio, tokens = (
        to_float64(value, name).detach().cpu()
        for value, name in (
            (rewards, "rewards"),
            (ref_rewards, "ref_rewards"),
            (log_ratio, "log_ratio"),
            (lengths, "lengths"),
        )
    )
    for values, name in ((mine, "rewards"), (refs, "ref_rewards"), (ratio, "log_ratio"), (tokens, "lengths")):
        check_finite(values, name)
    check_same_shape(mine, "rewards", ratio, "log_ratio")
    check_same_shape(mine, "rewards", tokens, "lengths")
    ref_ratio = None if ref_log_ratio is None else to_float64(ref_log_ratio, "ref_log_ratio").detach().cpu()
    if ref_ratio is not None:
        check_finite(ref_ratio, "ref_log_ratio")
        check_same_shape(refs, "ref_rewards", ref_ratio, "ref_log_ratio")
    num_ref = refs.shape[-1]
    orders = against_orders(num_ref) if orders is None else list(orders)
    columns = _columns(mine, refs, ratio, tokens, orders) | _kl_columns(mine, refs, ratio, ref_ratio, orders)
    # Resampled apart, as one more column could change the last bits of the others.
    lacking = {"lacking": shortfalls(columns["win_rate"][:, 0], refs)[:, None]}
    means = _Means([columns, lacking], confidence, num_bootstrap, seed)
    matched = _matched(means, num_ref, is_best=never_falls_short(mine, refs))
    kls = best_of_n_kls(refs, [*range(1, num_ref + 1), min(matched["win_rate"].value, num_ref)])
    return Comparison(
        **{name: means.estimate(name) for name in _SIMPLE},
        win_rate=means.win_rate("win_rate"),
        matched=matched,
        kl_per_token=means.estimate_of(lambda rows: rows("kl")[:, 0] / rows("tokens")[:, 0]),
        kl_k3_per_token=means.estimate_of(lambda rows: rows("kl_k3")[:, 0] / rows("tokens")[:, 0]),
        kl_of_best_of_n=kls[-1],
        curve=_curve(means, kls[:-1], best_of_n_opponents(mine, refs, range(1, num_ref + 1)).mean(0).tolist()),
        against=_against(means, orders),
        histogram=quantile_histogram(mine, refs),
        reward_length_correlation=within_prompt_correlation(mine, tokens),
    )


_SIMPLE = ("reward", "reference_reward", "gain", "log_quantile", "kl", "kl_k3")


def against_orders(num_ref: int) -> list[int]:
    """Return the orders 1, 2, 4, .. up to M at which the policy is compared with Best-of-n."""
    return [1 << i for i in range(num_ref.bit_length()) if 1 << i <= num_ref]


def _columns(mine: Tensor, refs: Tensor, ratio: Tensor, tokens: Tensor, orders: list[int]) -> dict[str, Tensor]:
    """Return each quantity for every prompt, (P, J) under its name; shapes are checked on the way."""
    singles = {
        "win_rate": win_rates(mine, refs),
        "reward": mine.mean(1),
        "reference_reward": refs.mean(1),
        "gain": mine.mean(1) - refs.mean(1),
        "log_quantile": log_quantile(mine, refs, "harmonic").mean(1),
        "kl": ratio.mean(1),
        "kl_k3": kl_k3(ratio, torch.zeros_like(ratio)).mean(1),
        "tokens": tokens.mean(1),
    }
    return {name: values[:, None] for name, values in singles.items()} | {
        "curve_win_rate": best_of_n_win_rates(refs),
        "curve_reward": best_of_n_curve(refs),
        "curve_log_quantile": best_of_n_log_quantiles(refs),
        "cut_log_quantile": truncated_log_quantiles(mine, refs),
        "against_win_rate": best_of_n_opponents(mine, refs, orders),
    }


def _kl_columns(
    mine: Tensor, refs: Tensor, ratio: Tensor, ref_ratio: Tensor | None, orders: list[int]
) -> dict[str, Tensor]:
    """Return KL(policy ‖ Best-of-n) and KL(Best-of-n ‖ policy) of every prompt, (P, O) each."""
    log_p = log_quantile(mine, refs, "harmonic")
    backward = [(ratio - (n - 1) * log_p - log_collision_correction(mine, refs, n)).mean(1) for n in orders]
    unknown = torch.full_like(backward[0], math.nan)
    forward = [unknown if ref_ratio is None else _forward_kl(refs, ref_ratio, n) for n in orders]
    return {"backward_kl": torch.stack(backward, dim=1), "forward_kl": torch.stack(forward, dim=1)}


def _forward_kl(refs: Tensor, ref_ratio: Tensor, n: int) -> Tensor:
    """Return Σ_i w_i [log π_BoN(y_i) − log π(y_i)] over the reference's own samples, w_i their chances to win; (P,)."""
    if 2 * n > refs.shape[1]:
        return torch.full_like(refs[:, 0], math.nan)
    lower, at_most, _ = count_below(refs, refs)
    others = at_most - 1.0  # a winner must not count itself among its ties
    tied_share = torch.where(others > 0, (others - lower) / others, torch.zeros_like(others))
    terms = (n - 1) * winner_log_quantile(refs, n) + log_collisions(tied_share, n) - ref_ratio
    return (best_of_n_weights(refs, n) * terms).sum(1)


class _Means:
    """Means over prompts of named columns, and the same means in every resample."""

    def __init__(
        self, groups: Sequence[Mapping[str, Tensor]], confidence: float, num_bootstrap: int, seed: int
    ) -> None:
        self.confidence = confidence
        self.prompts: dict[str, Tensor] = {}  # (P, J) by name
        self._means: dict[str, Tensor] = {}  # (1, J)
        self._draws: dict[str, Tensor] = {}  # (R, J); none with a single prompt
        for columns in groups:
            table_PJ, sizes = torch.cat(list(columns.values()), dim=1), [len(v[0]) for v in columns.values()]
            self.prompts |= columns
            self._means |= zip(columns, torch.split_with_sizes(table_PJ.mean(0, keepdim=True), sizes, 1), strict=True)
            if len(table_PJ) > 1:
                draws_RJ = resample_means(table_PJ, num_bootstrap, seed)
                self._draws |= zip(columns, torch.split_with_sizes(draws_RJ, sizes, 1), strict=True)

    def mean(self, name: str) -> list[float]:
        """Return the means of the columns of that name."""
        means: list[float] = self._means[name][0].tolist()
        return means

    def estimate(self, name: str, column: int = 0) -> Estimate:
        """Return the mean of one column with its interval."""
        return self.estimate_of(lambda rows: rows(name)[:, column])

    def win_rate(self, name: str, column: int = 0) -> Estimate:
        """Return the mean of one column of win rates with its interval."""
        return with_share_ends(self.estimate(name, column), self.prompts[name][:, column], self.confidence)

    def estimate_of(self, function: Callable[[Callable[[str], Tensor]], Tensor]) -> Estimate:
        """Return a function of the means with its interval; it gets `rows(name)` (R, J) and returns (R,)."""
        value = float(function(self._means.__getitem__))
        if math.isnan(value):
            return Estimate(value, value, value)
        if not self._draws:
            return Estimate(value, -math.inf, math.inf)
        return Estimate(value, *percentile_interval(function(self._draws.__getitem__), self.confidence))


def _matched(means: _Means, num_ref: int, *, is_best: bool) -> dict[str, EffectiveN]:
    """Return the effective N by each measure; a log-quantile cannot be matched beyond M−1.

    If no sample of the policy is below the best of its prompt (`is_best`), each has the lower end of the win rate's.
    """
    worth = means.estimate_of(
        lambda rows: open_ended(_solve(torch.cat([rows("win_rate"), rows("curve_win_rate")], 1)), rows("lacking")[:, 0])
    )
    curve_1N = means.prompts["curve_win_rate"].mean(0, keepdim=True)
    worth = widened(worth, means.prompts["win_rate"][:, 0], curve_1N, is_best, means.confidence)
    found = {
        "win_rate": worth,
        "log_quantile": means.estimate_of(
            lambda rows: solve_log_quantile(rows("cut_log_quantile"), rows("curve_log_quantile"))
        ),
        "reward": means.estimate_of(lambda rows: solve_reward(rows("reward")[:, 0], rows("curve_reward"))),
    }
    if is_best:
        found = {name: Estimate(n.value, min(n.low, worth.low), math.inf) for name, n in found.items()}
    max_n = {"win_rate": num_ref, "log_quantile": num_ref - 1, "reward": num_ref}
    return {name: EffectiveN(n.value, max(1.0, n.low), n.high, max_n[name]) for name, n in found.items()}


def _curve(means: _Means, kls: list[float], opponents: list[float]) -> list[CurvePoint]:
    wins, quantiles = ([*means.mean(name), math.nan] for name in ("curve_win_rate", "curve_log_quantile"))
    return [
        CurvePoint(
            n=n,
            reward=means.estimate("curve_reward", n - 1),
            win_rate=wins[n - 1],
            log_quantile=quantiles[n - 1],
            kl=kls[n - 1],
            policy_win_rate=opponents[n - 1],
        )
        for n in range(1, len(kls) + 1)
    ]


def _against(means: _Means, orders: list[int]) -> list[Against]:
    return [
        Against(
            n=n,
            win_rate=means.win_rate("against_win_rate", i),
            forward_kl=means.estimate("forward_kl", i),
            backward_kl=means.estimate("backward_kl", i),
        )
        for i, n in enumerate(orders)
    ]


def quantile_histogram(rewards: Tensor, ref_rewards: Tensor, num_bins: int = HISTOGRAM_BINS) -> list[float]:
    """Return the shares of policy samples by quantile among the reference's, in equal bins of [0, 1].

    A sample with L of M reference rewards below it and A at most equal could have any place from L to A among the M+1,
    so its mass is spread evenly over [L/(M+1), (A+1)/(M+1)]. The histogram of the reference itself is then flat in
    expectation, with or without ties.

    Args:
        rewards: (P, m) rewards of policy samples.
        ref_rewards: (P, M) rewards of reference samples.
        num_bins: number of bins.
    """
    lower, at_most, num_ref = count_below(rewards, ref_rewards)
    edges = [i / num_bins for i in range(num_bins + 1)]
    below = [float((((num_ref + 1) * e - lower) / (at_most + 1 - lower)).clamp(0.0, 1.0).mean()) for e in edges]
    return [right - left for left, right in itertools.pairwise(below)]


def within_prompt_correlation(rewards: Tensor, lengths: Tensor) -> float:
    """Return Pearson's correlation of reward and length (P, m) among the samples of the same prompt.

    Each prompt's means are subtracted first, so differences between prompts (long answers with high rewards) do not
    count. With one sample per prompt only the overall mean is subtracted. NaN if either does not vary.
    """
    dim = 1 if rewards.shape[1] > 1 else 0
    x, y = _centred(rewards, dim), _centred(lengths, dim)
    spread = float(x.square().sum().sqrt() * y.square().sum().sqrt())
    return float((x * y).sum()) / spread if spread > 0 else math.nan


def _centred(values: Tensor, dim: int) -> Tensor:
    """Values minus their mean; exactly 0 where all are equal, although their mean may have a rounding error."""
    equal = (values == values.narrow(dim, 0, 1)).all(dim, keepdim=True)
    return (values - values.mean(dim, keepdim=True)).masked_fill(equal, 0.0)
