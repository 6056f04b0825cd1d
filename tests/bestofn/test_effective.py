import itertools
import math

import numpy as np
import pytest
import torch

from bestofn.brute import naive_best_of_n_win_rate, win_prob
from bondlm.bestofn import EffectiveN, best_of_n_probs, best_of_n_win_rates, effective_n, win_rate, win_rates
from bondlm.bestofn.effective import _solve

THREE = (np.array([0.5, 0.3, 0.2]), np.array([0.0, 1.0, 2.0]))


def best_of_n_samples(rng, num_prompts, num_samples, n):
    return rng.normal(size=(num_prompts, num_samples, n)).max(-1)


def test_win_rate_equals_all_pairs_with_ties_half():
    rng = np.random.default_rng(0)
    rewards, refs = rng.integers(0, 4, size=(30, 3)), rng.integers(0, 4, size=(30, 5))
    pairs = (np.sign(rewards[:, :, None] - refs[:, None, :]) + 1) / 2
    np.testing.assert_allclose(win_rates(rewards, refs), pairs.mean((1, 2)), rtol=1e-15)
    assert win_rate(rewards, refs) == pytest.approx(pairs.mean(), rel=1e-14)
    assert win_rate(rewards[0], refs[0]) == pytest.approx(pairs[0].mean(), rel=1e-14)
    assert win_rate(refs, rewards) == pytest.approx(1 - pairs.mean(), rel=1e-14)
    assert win_rate(refs, refs) == 0.5


@pytest.mark.parametrize("num_ref", [2, 3, 16, 200])
def test_without_ties_best_of_n_wins_n_in_n_plus_one(num_ref):
    refs = np.random.default_rng(1).normal(size=(3, num_ref))
    orders = np.arange(1, num_ref)
    expected = np.broadcast_to(orders / (orders + 1), (3, num_ref - 1))
    np.testing.assert_allclose(best_of_n_win_rates(refs), expected, rtol=1e-13)


def test_win_rates_of_best_of_n_equal_all_choices_with_ties():
    samples = np.random.default_rng(2).integers(0, 3, size=(6, 5))
    expected = [[naive_best_of_n_win_rate(row, n) for n in range(1, 5)] for row in samples]
    np.testing.assert_allclose(best_of_n_win_rates(samples), expected, rtol=1e-14)
    np.testing.assert_allclose(best_of_n_win_rates(samples[0]), expected[0], rtol=1e-14)


def test_win_rates_of_best_of_n_are_unbiased():
    probs, rewards = THREE
    draws = np.array(list(itertools.product(range(3), repeat=4)))
    mean = probs[draws].prod(1) @ best_of_n_win_rates(rewards[draws])
    exact = [win_prob(rewards, best_of_n_probs(probs, rewards, n), probs) for n in (1, 2, 3)]
    np.testing.assert_allclose(mean, exact, rtol=1e-13)


@pytest.mark.parametrize("n", [1, 2, 4, 8, 16])
def test_best_of_n_policies_have_effective_n(n):
    rng = np.random.default_rng(n)
    refs = rng.normal(size=(4000, 32)) * 3
    result = effective_n(best_of_n_samples(rng, 4000, 8, n) * 3, refs, confidence=0.999)
    assert result.value == pytest.approx(n, rel=0.05)
    assert result.low <= n <= result.high
    assert result.high - result.low < 0.15 * n
    assert result.max_n == 32


@pytest.mark.parametrize("n", [1, 2, 3.4, 6])
def test_tied_rewards_use_the_exact_curve(n):
    probs, rewards = THREE
    rng = np.random.default_rng(5)
    best = best_of_n_probs(probs, rewards, n)
    mine = rng.choice(rewards, p=best, size=(6000, 8))
    refs = rng.choice(rewards, p=probs, size=(6000, 12))
    result = effective_n(mine, refs, num_bootstrap=200)
    # Linear in odds between integers: at a fractional N the curve of tied rewards is met to about 1%.
    assert result.value == pytest.approx(n, rel=0.05)
    wins = win_prob(rewards, best, probs)
    if n >= 2:
        assert wins / (1 - wins) < 0.95 * n, "without the correction for ties N would be too small"


def test_continuous_rewards_give_the_odds():
    rng = np.random.default_rng(3)
    mine, refs = rng.normal(size=(7, 5)) + 0.7, rng.normal(size=(7, 9))
    wins = float(win_rate(mine, refs))
    assert effective_n(mine, refs, num_bootstrap=2).value == pytest.approx(wins / (1 - wins), rel=1e-10)


@pytest.mark.parametrize(
    ("rewards", "refs", "value"),
    [
        ([[9.0]], [[0.0, 1.0, 2.0, 3.0]], math.inf),  # always wins
        ([[-1.0]], [[0.0, 1.0, 2.0, 3.0]], 1.0),  # always loses
        ([[1.5]], [[0.0, 1.0, 2.0, 3.0]], 1.0),  # wins half
        ([[2.5]], [[0.0, 1.0, 2.0, 3.0]], 3.0),  # odds 3 : 1
        ([[2.5, 2.5, 2.5, 9.0]], [[0.0, 1.0, 2.0, 3.0]], math.inf),  # odds 13 : 3, past M = 4
        ([[2.5, 9.0, 2.5, 2.5, 2.5]], [[0.0, 1.0, 2.0, 3.0]], 4.0),  # odds 16 : 4, just M
        ([[0.0]], [[0.0, 0.0, 0.0]], 1.0),  # all tied
        ([[0.1]], [[0.0, 0.0, 0.0]], math.inf),  # above a flat curve
        ([[1.0]], [[0.0, 1.0, 1.0, 1.0]], math.inf),  # the curve is flat from N = 2 on: any N above has this win rate
        ([[1.0]], [[0.0, 0.0, 0.0, 1.0]], math.inf),  # as good as the best of M, where the curve is not flat yet
        ([[1.5]], [[0.0, 1.0, 1.0, 1.0]], math.inf),  # above its end
        ([[1.0, 1.0, 2.0]], [[0.0, 2.0]], 1.4),  # odds 7 : 5, M = 2
        ([[1.0, 3.0, 3.0, 3.0, 1.0, 1.0]], [[0.0, 2.0]], math.inf),  # odds 3, M = 2
        ([[1.0, 3.0, 1.0]], [[0.0, 2.0]], 2.0),  # odds 2, M = 2
    ],
)
def test_exact_small_cases(rewards, refs, value):
    result = effective_n(np.array(rewards), np.array(refs))
    assert result.value == pytest.approx(value, rel=1e-9)
    assert result[1:] == (1.0, math.inf, len(refs[0])), "one prompt says nothing about the spread"


@pytest.mark.parametrize("num_ref", range(4, 40))
def test_a_policy_at_the_end_of_a_saturated_curve_has_no_upper_bound(num_ref):
    # Pass rates 1/2 and 1/3 or so: the curve is flat at its end but for rounding, which must not decide.
    refs = np.stack([np.arange(num_ref) % 2, np.arange(num_ref) % 3 == 0]).astype(float)
    curve = best_of_n_win_rates(refs).mean(0)
    flat_from = 1 + np.argmax(curve >= curve[-1] - 1e-13)
    for mine in ([[1.0] * 3] * 2, [[1.0] * 3, [1.0, 1.0, 2.0]]):
        assert effective_n(np.array(mine), refs)[0:3:2] == (math.inf, math.inf)
    once_short = np.ones((2, 300))
    once_short[0, 7] = 0.0
    assert 1 < effective_n(once_short, refs).value <= flat_from


@pytest.mark.parametrize(
    ("num_ref", "m", "rate", "n"),
    [(16, 4, 0.7, 8), (16, 4, 0.8, 4), (16, 4, 0.9, 4), (16, 4, 0.9, 8), (32, 8, 0.8, 8), (32, 8, 0.7, 8)],
)
def test_a_policy_that_hardly_ever_fails_has_an_interval_that_holds_its_n(num_ref, m, rate, n):
    rng = np.random.default_rng(0)
    found = [
        effective_n(
            (rng.random((150, m)) < 1 - (1 - rate) ** n).astype(float),
            (rng.random((150, num_ref)) < rate).astype(float),
            num_bootstrap=400,
        )
        for _ in range(40)
    ]
    assert sum(e.low <= n <= e.high for e in found) >= 37
    assert all(1 < e.low < num_ref / 2 for e in found), "what no failure shows is a bound from below, and a modest one"


def test_a_few_prompts_that_are_always_won_bound_n_from_below_only():
    refs = np.random.default_rng(0).normal(size=(3, 16))
    assert effective_n(refs + 99.0, refs) == (math.inf, 1.0, math.inf, 16)  # 3 of 3: a win rate of 0.29 or more
    always = effective_n(np.full((60, 2), 99.0), np.random.default_rng(1).normal(size=(60, 64)))
    lowest = 0.025 ** (1 / 60)
    assert always == pytest.approx((math.inf, lowest / (1 - lowest), math.inf, 64))
    assert effective_n(refs - 99.0, refs).high == pytest.approx((1 - 0.025 ** (1 / 3)) / 0.025 ** (1 / 3))
    assert effective_n(np.zeros((9, 2)), np.zeros((9, 4))) == (1.0, 1.0, math.inf, 4)  # all tied: nothing is known


def test_rounding_at_the_flat_end_of_a_curve_does_not_decide():
    def solve(odds: list[float]) -> float:
        odds_M = torch.tensor([odds], dtype=torch.float64)
        return float(_solve(odds_M / (1 + odds_M)))

    assert solve([2.5, 1.0, 2.0, 2.0 - 1e-15]) == math.inf  # seen with 5 prompts of 18 binary rewards: the end dips
    assert solve([2.0, 1.0, 2.0 - 2.4e-12, 2.0 - 1.8e-12]) == pytest.approx(3.0)  # reached, just past the last knot
    assert solve([2.0, 1.0, 2.0, 2.0 - 1e-15]) == pytest.approx(2.0)


def test_flat_parts_between_prompts_use_the_mean_curve():
    # Prompt 1 saturates at N = 2 (win rate 5/8), prompt 2 has no ties: means .5, (5/8 + 2/3)/2, (5/8 + 3/4)/2.
    refs = np.array([[0.0, 1.0, 1.0, 1.0], [0.0, 1.0, 2.0, 3.0]])
    np.testing.assert_allclose(best_of_n_win_rates(refs).mean(0), [0.5, 31 / 48, 33 / 48], rtol=1e-14)
    mine = np.array([[1.0], [2.0]])  # win rates 5/8 and 5/8: mean odds 5/3 lie below 31/17 at N = 2
    assert effective_n(mine, refs, num_bootstrap=2).value == pytest.approx(1 + (5 / 3 - 1) / (31 / 17 - 1), rel=1e-12)


def test_interval_covers_about_as_often_as_it_says():
    rng = np.random.default_rng(11)
    covered = 0
    for repetition in range(60):
        mine, refs = best_of_n_samples(rng, 60, 4, 4), rng.normal(size=(60, 16))
        result = effective_n(mine, refs, num_bootstrap=300, seed=repetition)
        assert result.low <= result.value <= result.high
        covered += result.low <= 4 <= result.high
    assert 50 <= covered, f"{covered} of 60 intervals at 95% hold the true N"
    narrow = sum(
        r.low <= 4 <= r.high
        for r in (
            effective_n(best_of_n_samples(rng, 60, 4, 4), rng.normal(size=(60, 16)), num_bootstrap=300, confidence=0.5)
            for _ in range(60)
        )
    )
    assert 15 <= narrow <= 45, f"{narrow} of 60 intervals at 50% hold the true N"


def test_the_interval_depends_on_the_seed_only():
    rng = np.random.default_rng(4)
    mine, refs = best_of_n_samples(rng, 30, 2, 3), rng.normal(size=(30, 8))
    first = effective_n(mine, refs, seed=1)
    assert first == effective_n(mine, refs, seed=1)
    other = effective_n(mine, refs, seed=2)
    assert other.value == first.value
    assert other[1:3] != first[1:3]
    assert first == effective_n(torch.tensor(mine), torch.tensor(refs), seed=1)


def test_an_open_end_is_shown_as_more_than_m():
    rng = np.random.default_rng(6)
    refs = rng.normal(size=(40, 4))
    result = effective_n(best_of_n_samples(rng, 40, 2, 4), refs)
    assert 1 < result.low < 4
    assert result.high == math.inf
    certain = effective_n(np.full((40, 1), 99.0), refs)
    assert certain == (math.inf, math.inf, math.inf, 4)
    assert str(certain) == "> 4"


@pytest.mark.parametrize(
    ("result", "text"),
    [
        (EffectiveN(6.31, 5.08, 7.84, 16), "6.3 [5.1, 7.8]"),
        (EffectiveN(14.2, 12.0, math.inf, 16), "14.2 [12.0, > 16]"),
        (EffectiveN(math.inf, 12.06, math.inf, 16), "> 16 [12.1, > 16]"),
        (EffectiveN(math.inf, math.inf, math.inf, 16), "> 16"),
        (EffectiveN(1.0, 1.0, 1.0, 2), "1.0 [1.0, 1.0]"),
    ],
)
def test_text(result, text):
    assert str(result) == text
    assert f"{result}" == text


def test_kinds():
    mine, refs = np.array([[1.0], [2.0]]), np.array([[0.0, 1.0, 3.0], [1.0, 5.0, 6.0]])
    assert isinstance(win_rate(mine, refs), np.float64)
    assert isinstance(win_rates(mine, refs), np.ndarray)
    assert isinstance(best_of_n_win_rates(refs), np.ndarray)
    mine_t, refs_t = torch.tensor(mine), torch.tensor(refs)
    assert win_rate(mine_t, refs_t).shape == ()
    assert torch.equal(win_rates(mine_t, refs_t), torch.tensor(win_rates(mine, refs)))
    assert torch.equal(best_of_n_win_rates(refs_t), torch.tensor(best_of_n_win_rates(refs)))
    assert all(isinstance(x, float) for x in effective_n(mine_t, refs_t)[:3])


@pytest.mark.parametrize(
    ("settings", "message"), [({"confidence": 1.0}, "confidence"), ({"num_bootstrap": 0}, "num_bootstrap")]
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        effective_n(np.zeros((2, 1)), np.zeros((2, 3)), **settings)
    with pytest.raises(ValueError, match=r"^ref_rewards .*\(2, 1\)"):
        effective_n(np.zeros((2, 1)), np.zeros((2, 1)))
