"""Comparisons of policies whose worth is known: by closed form, by exact enumeration of a table, and by coverage."""

import math

import numpy as np
import pytest
import torch

from bestofn.brute import win_prob
from bondlm.bestofn import best_of_n_kl, best_of_n_probs, bootstrap_mean, effective_n, kl_bound, kl_divergence
from bondlm.bestofn.comparison import compare_samples, quantile_histogram, within_prompt_correlation


def normal_case(seed, num_prompts, num_ref, n, m=4):
    rng = np.random.default_rng(seed)
    mine, refs = rng.normal(size=(num_prompts, m, n)).max(-1), rng.normal(size=(num_prompts, num_ref))
    return mine, refs, rng.normal(kl_bound(n), 1.0, mine.shape), np.full(mine.shape, 10.0)


class Table:
    """Prompts of a finite population, each with K outcomes, a reference and a policy that is Best-of-n of it."""

    def __init__(self, seed, num_tables=6, num_outcomes=40, n=4):
        rng = np.random.default_rng(seed)
        self.ref = rng.dirichlet(np.full(num_outcomes, 2.0), num_tables)
        self.rewards = rng.normal(size=(num_tables, num_outcomes))
        self.rewards[0] = np.round(self.rewards[0])  # one prompt with ties
        self.policy = best_of_n_probs(self.ref, self.rewards, n)
        self.log_ratio = np.log(self.policy) - np.log(self.ref)

    def draw(self, rng, num_prompts, m, num_ref):
        tables = rng.integers(0, len(self.ref), num_prompts)

        def outcomes(probs, count):
            sums = probs.cumsum(1)[tables]
            return (rng.random((num_prompts, count, 1)) * sums[:, None, -1:] > sums[:, None]).sum(-1)

        mine, refs = outcomes(self.policy, m), outcomes(self.ref, num_ref)
        at = tables[:, None]
        return self.rewards[at, mine], self.rewards[at, refs], self.log_ratio[at, mine], self.log_ratio[at, refs]


@pytest.mark.parametrize("n", [1, 2, 4, 8, 16])
def test_a_best_of_n_policy_is_worth_n_by_every_measure(n):
    result = compare_samples(*normal_case(n, 3000, 32, n), num_bootstrap=300, confidence=0.999)
    for name, found in result.matched.items():
        assert found.value == pytest.approx(n, rel=0.08), name
        assert found.low <= n <= found.high, name
    assert result.log_quantile.value == pytest.approx(-1 / n, abs=0.05)
    for point in result.against:
        assert point.win_rate.low <= n / (n + point.n) <= point.win_rate.high


@pytest.mark.parametrize("n", [1, 2, 4, 8])
def test_ties_and_prompts_that_differ_leave_n_right(n):
    table = Table(3, n=n)
    mine, refs, ratio, ref_ratio = table.draw(np.random.default_rng(n), 4000, 8, 32)
    result = compare_samples(mine, refs, ratio, np.ones_like(mine), ref_ratio, num_bootstrap=200, confidence=0.999)
    for name, found in result.matched.items():
        assert found.value == pytest.approx(n, rel=0.08), name
        assert found.low <= n <= found.high, name
    exact = np.mean([win_prob(table.rewards[i], table.policy[i], table.ref[i]) for i in range(6)])
    assert result.win_rate.value == pytest.approx(exact, abs=0.01)
    assert result.kl.value == pytest.approx(kl_divergence(table.policy, table.ref).mean(), rel=0.06, abs=1e-12)
    if n <= 2:  # beyond, k3 needs more samples than anyone has: its variance is that of the ratio ref / policy
        assert result.kl_k3.value == pytest.approx(result.kl.value, rel=0.1, abs=1e-12)


@pytest.mark.parametrize(("n", "order"), [(1, 1), (4, 2), (2, 4), (4, 4), (8, 2)])
def test_divergences_to_best_of_n_against_the_exact_distribution(n, order):
    table = Table(5, num_outcomes=200, n=n)
    mine, refs, ratio, ref_ratio = table.draw(np.random.default_rng(9), 3000, 8, 64)
    result = compare_samples(mine, refs, ratio, np.ones_like(mine), ref_ratio, num_bootstrap=2)
    target = best_of_n_probs(table.ref, table.rewards, order)
    point = next(p for p in result.against if p.n == order)
    forward, backward = kl_divergence(target, table.policy).mean(), kl_divergence(table.policy, target).mean()
    assert point.forward_kl.value == pytest.approx(forward, rel=0.08, abs=0.03)
    assert point.backward_kl.value == pytest.approx(backward, rel=0.08, abs=0.03)


def test_the_curve_of_best_of_n():
    result = compare_samples(*normal_case(0, 2000, 16, 2), num_bootstrap=50)
    assert [p.n for p in result.curve] == list(range(1, 17))
    for point in result.curve[:15]:
        assert point.win_rate == pytest.approx(point.n / (point.n + 1), rel=1e-9)
        assert point.kl == pytest.approx(math.log(point.n) - (point.n - 1) / point.n)
    assert math.isnan(result.curve[15].win_rate)
    assert result.curve[1].log_quantile == pytest.approx(-0.5, abs=0.005)
    assert result.curve[1].reward.value == pytest.approx(1 / math.sqrt(math.pi), abs=0.03)
    assert [p.n for p in result.against] == [1, 2, 4, 8, 16]
    assert all(math.isnan(p.forward_kl.value) for p in result.against)  # the reference's samples were not scored


def test_forward_kl_needs_others_to_place_the_winner_among():
    mine, refs, ratio, lengths = normal_case(0, 50, 16, 2)
    result = compare_samples(mine, refs, ratio, lengths, np.zeros_like(refs), num_bootstrap=5)
    assert [math.isnan(p.forward_kl.value) for p in result.against] == [False] * 4 + [True]
    # A policy that equals the reference: KL(Best-of-n ‖ reference), without any luck of the draw but the tail's.
    for point in result.against[:4]:
        assert point.forward_kl.value == pytest.approx(kl_bound(point.n), abs=0.01)


def test_numbers_equal_those_of_the_single_functions():
    mine, refs, ratio, lengths = normal_case(1, 60, 16, 3)
    result = compare_samples(mine, refs, ratio, lengths)
    assert result.matched["win_rate"] == effective_n(mine, refs)
    assert result.kl == pytest.approx(bootstrap_mean(ratio.mean(1)), rel=1e-12)
    assert result.reward == pytest.approx(bootstrap_mean(mine.mean(1)), rel=1e-12)
    assert result.gain.value == pytest.approx(result.reward.value - result.reference_reward.value)
    assert result.against[0].win_rate.value == pytest.approx(result.win_rate.value)
    assert result.against[0].backward_kl == pytest.approx(result.kl, rel=1e-12)


def test_kl_per_token_is_a_ratio_of_sums():
    rewards, ratio = np.zeros((2, 2)), np.array([[1.0, 3.0], [0.0, 0.0]])
    result = compare_samples(rewards, rewards, ratio, np.array([[2.0, 2.0], [6.0, 10.0]]), num_bootstrap=200)
    assert result.kl_per_token.value == pytest.approx(4 / 20)
    assert (result.kl_per_token.low, result.kl_per_token.high) == (0.0, 1.0)


def test_monotone_transforms_change_what_depends_on_scale_alone():
    mine, refs, ratio, lengths = normal_case(2, 80, 16, 3)
    ref_ratio = np.random.default_rng(0).normal(size=refs.shape)
    one = compare_samples(mine, refs, ratio, lengths, ref_ratio, num_bootstrap=100)
    other = compare_samples(np.exp(2 * mine), np.exp(2 * refs), ratio, lengths, ref_ratio, num_bootstrap=100)
    for name in ("win_rate", "log_quantile", "kl", "histogram"):
        assert getattr(one, name) == getattr(other, name), name
    assert repr(one.against) == repr(other.against)  # NaN equals nothing
    assert [p.win_rate for p in one.curve[:-1]] == [p.win_rate for p in other.curve[:-1]]
    assert one.matched["win_rate"] == other.matched["win_rate"]
    assert one.matched["log_quantile"] == other.matched["log_quantile"]
    assert one.matched["reward"] != other.matched["reward"]
    affine = compare_samples(3 * mine + 7, 3 * refs + 7, ratio, lengths, num_bootstrap=100)
    assert affine.matched["reward"][:3] == pytest.approx(one.matched["reward"][:3], rel=1e-9)


def test_a_narrow_policy_is_worth_another_n_by_each_measure():
    """Always the 3/4 quantile: wins 3 of 4 (N = 3), log-quantile log 3/4 (N = 3.5), reward below Best-of-3's mean."""
    refs = np.random.default_rng(4).exponential(size=(4000, 32))
    mine = np.full((4000, 1), math.log(4.0))
    result = compare_samples(mine, refs, np.zeros_like(mine), np.ones_like(mine), num_bootstrap=20)
    assert result.matched["win_rate"].value == pytest.approx(3.0, rel=0.05)
    assert result.matched["log_quantile"].value == pytest.approx(-1 / math.log(0.75), rel=0.05)
    # Best-of-2 of an exponential distribution has mean 3/2, one sample 1; log 4 = 1.386.
    assert result.matched["reward"].value == pytest.approx(1 + 0.386 / 0.5, rel=0.05)


def test_intervals_cover_the_truth_as_often_as_they_say():
    """500 repetitions on a tabular policy that is Best-of-4: 95% intervals of N, win rate and KL."""
    table, repetitions, m, num_ref = Table(7), 500, 4, 16
    truth = {
        "win_rate": np.mean([win_prob(table.rewards[i], table.policy[i], table.ref[i]) for i in range(6)]),
        "kl": kl_divergence(table.policy, table.ref).mean(),
        "reward": (table.policy * table.rewards).sum(1).mean(),
    }
    rng = np.random.default_rng(12)
    covered = dict.fromkeys([*truth, *(f"N by {name}" for name in ("win_rate", "log_quantile", "reward"))], 0)
    for repetition in range(repetitions):
        mine, refs, ratio, _ = table.draw(rng, 150, m, num_ref)
        result = compare_samples(mine, refs, ratio, np.ones_like(mine), num_bootstrap=600, seed=repetition)
        for name, value in truth.items():
            estimate = getattr(result, name)
            covered[name] += estimate.low <= value <= estimate.high
        for name, found in result.matched.items():
            covered[f"N by {name}"] += found.low <= 4 <= found.high
    for name, count in covered.items():
        assert 0.92 <= count / repetitions <= 0.98, (name, count / repetitions)


def test_a_policy_that_never_falls_short_has_no_sharp_n_by_any_measure():
    rng = np.random.default_rng(2)
    refs = (rng.random((150, 32)) < 0.8).astype(float)
    mine = np.ones((150, 8))
    found = compare_samples(mine, refs, np.ones_like(mine), np.ones_like(mine)).matched
    assert found["win_rate"] == effective_n(mine, refs)
    for name, n in found.items():
        assert (n.value, n.high) == (math.inf, math.inf), name
        assert 1 < n.low < 4, name
    mine[0, 0] = 0.0  # one failure: a point, and a resample without it has no upper bound
    for name, n in compare_samples(mine, refs, np.ones_like(mine), np.ones_like(mine)).matched.items():
        assert 3 < n.value < 6, name
        assert (1 < n.low < n.value, n.high) == (True, math.inf), name


def test_the_histogram_of_the_reference_is_flat_with_and_without_ties():
    rng = np.random.default_rng(0)
    for values in (rng.normal(size=(4000, 20)), rng.integers(0, 3, (4000, 20)).astype(float)):
        mine, refs = torch.from_numpy(values[:, :4]), torch.from_numpy(values[:, 4:])
        shares = quantile_histogram(mine, refs)
        assert sum(shares) == pytest.approx(1.0)
        assert shares == pytest.approx([0.1] * 10, abs=0.012)
    best = torch.from_numpy(rng.normal(size=(4000, 4, 4)).max(-1))
    shares = quantile_histogram(best, torch.from_numpy(rng.normal(size=(4000, 64))))
    edges = np.linspace(0, 1, 11) ** 4
    assert shares == pytest.approx(np.diff(edges), abs=0.02)


def test_reward_and_length_within_a_prompt():
    rewards = torch.tensor([[0.0, 1.0], [10.0, 11.0]]).double()
    assert within_prompt_correlation(rewards, torch.tensor([[5.0, 4.0], [9.0, 8.0]]).double()) == pytest.approx(-1.0)
    assert within_prompt_correlation(rewards[:, :1], torch.tensor([[1.0], [2.0]]).double()) == pytest.approx(1.0)
    assert math.isnan(within_prompt_correlation(rewards, torch.ones(2, 2).double()))
    constant, lengths = torch.full((4, 3), 0.1, dtype=torch.float64), torch.arange(12.0).view(4, 3).double()
    assert (constant - constant.mean(1, keepdim=True)).any()  # rounding alone
    assert math.isnan(within_prompt_correlation(constant, lengths))
    assert math.isnan(within_prompt_correlation(constant[:3, :1], lengths[:3, :1]))
    assert within_prompt_correlation(torch.cat([constant, lengths]), torch.cat([lengths, lengths])) == pytest.approx(
        0.5**0.5
    )


def test_one_prompt_says_nothing_about_the_spread():
    mine, refs, ratio, lengths = normal_case(0, 1, 8, 2)
    result = compare_samples(mine, refs, ratio, lengths)
    assert (result.win_rate.low, result.win_rate.high) == (-math.inf, math.inf)
    assert (result.matched["win_rate"].low, result.matched["win_rate"].high) == (1.0, math.inf)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"log_ratio": np.zeros((3, 1))}, "^rewards and log_ratio "),
        ({"lengths": np.full((3, 2), math.nan)}, "^lengths .*nan"),
        ({"ref_log_ratio": np.zeros((3, 3))}, "^ref_rewards and ref_log_ratio "),
        ({"ref_rewards": np.zeros((3, 1))}, r"^ref_rewards .*\(3, 1\)"),
        ({"rewards": np.zeros((2, 2))}, "^rewards and log_ratio "),
    ],
)
def test_bad_input_is_refused(change, message):
    good = {"rewards": np.zeros((3, 2)), "ref_rewards": np.zeros((3, 4))}
    good |= {"log_ratio": np.zeros((3, 2)), "lengths": np.ones((3, 2))}
    with pytest.raises(ValueError, match=message):
        compare_samples(**(good | change))


def test_tabular_best_of_n_kl_is_below_the_bound_of_the_curve():
    table = Table(7)
    assert (best_of_n_kl(table.ref, table.rewards, 4) <= kl_bound(4) + 1e-12).all()


def test_a_k3_beyond_float64_is_infinite_and_spoils_nothing_else():
    mine, refs, ratio, lengths = normal_case(0, 50, 8, 2)
    ratio[3, 0] = -800.0
    result = compare_samples(mine, refs, ratio, lengths)
    assert result.kl_k3.value == math.inf
    assert math.isfinite(result.kl.low)
    assert math.isfinite(result.win_rate.high)
