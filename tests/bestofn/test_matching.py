import itertools
import math

import numpy as np
import pytest
import torch

from bondlm.bestofn import best_of_n_probs, best_of_n_win_rates, expected_best_of_n
from bondlm.bestofn.matching import (
    best_of_n_log_quantiles,
    best_of_n_opponents,
    best_of_n_weights,
    choose_table,
    solve_log_quantile,
    solve_reward,
    truncated_log_quantiles,
    winner_log_quantile,
)
from bondlm.bestofn.order import best_of_n_curve


def subsets(num_ref, n):
    return list(itertools.combinations(range(num_ref), n))


def test_the_curve_is_expected_best_of_n_at_every_order():
    refs = np.random.default_rng(0).normal(size=(5, 9))
    curve = best_of_n_curve(refs)
    for n in range(1, 10):
        np.testing.assert_allclose(curve[:, n - 1], expected_best_of_n(refs, n), rtol=1e-13)


def test_a_table_of_binomials():
    table = choose_table(7)
    expected = [[math.comb(c, n) / math.comb(7, n) for n in range(1, 8)] for c in range(8)]
    np.testing.assert_allclose(table, expected, rtol=1e-14)


def test_opponents_equal_all_choices_with_ties():
    rng = np.random.default_rng(1)
    mine, refs = rng.integers(0, 4, (6, 3)), rng.integers(0, 4, (6, 5))
    orders = [1, 2, 4, 5]
    result = best_of_n_opponents(mine, refs, orders)
    for i, (row, ref) in enumerate(zip(mine, refs, strict=True)):
        for j, n in enumerate(orders):
            duels = [(np.sign(y - ref[list(s)].max()) + 1) / 2 for y in row for s in subsets(5, n)]
            assert result[i, j] == pytest.approx(np.mean(duels), abs=1e-14)


@pytest.mark.parametrize(("mine", "theirs"), [(1, 1), (4, 1), (4, 4), (2, 8), (16, 2)])
def test_best_of_big_n_against_best_of_n(mine, theirs):
    rng = np.random.default_rng(mine)
    policy, refs = rng.normal(size=(3000, 8, mine)).max(-1), rng.normal(size=(3000, 16))
    result = best_of_n_opponents(policy, refs, [theirs]).mean()
    assert result == pytest.approx(mine / (mine + theirs), abs=0.012)


def series(share, terms):
    return -sum(share**k / k for k in range(1, terms + 1))


def test_cut_log_quantiles_are_unbiased_for_policy_and_best_of_n():
    """Against the exact expectation over every draw of M = 5 reference samples from three tied outcomes."""
    probs, rewards, num_ref = np.array([0.5, 0.3, 0.2]), np.array([0.0, 1.0, 2.0]), 5
    policy = np.array([0.1, 0.6, 0.3])
    draws = np.array(list(itertools.product(range(3), repeat=num_ref)))
    chance = probs[draws].prod(1)
    better = np.array([0.5, 0.2, 0.0])
    curve = chance @ best_of_n_log_quantiles(rewards[draws])
    own = sum(
        policy[k] * chance @ truncated_log_quantiles(np.full((len(draws), 1), rewards[k]), rewards[draws])
        for k in range(3)
    )
    for n in range(1, num_ref):
        exact_K = np.array([series(share, num_ref - n) for share in better])
        assert curve[n - 1] == pytest.approx(best_of_n_probs(probs, rewards, n) @ exact_K, rel=1e-12)
        assert own[n - 1] == pytest.approx(policy @ exact_K, rel=1e-12)


def test_without_ties_the_log_quantile_of_best_of_n_is_minus_one_over_n_but_for_the_tail():
    refs = np.random.default_rng(2).normal(size=(2, 12))
    result = best_of_n_log_quantiles(refs)
    for n in range(1, 12):
        exact = -sum(1 / (k * math.comb(n + k, n)) for k in range(1, 12 - n + 1))
        np.testing.assert_allclose(result[:, n - 1], exact, rtol=1e-12)
    assert result[0, 3] == pytest.approx(-1 / 4, rel=3e-3)


def test_weights_are_the_chances_to_win():
    rng = np.random.default_rng(3)
    refs = rng.integers(0, 3, (4, 6)).astype(float)
    for n in (1, 2, 4, 6):
        weights = best_of_n_weights(refs, n)
        for row, expected_row in zip(weights, refs, strict=True):
            wins = np.zeros(6)
            for s in subsets(6, n):
                best = [i for i in s if expected_row[i] == expected_row[list(s)].max()]
                wins[best] += 1 / len(best) / math.comb(6, n)
            # Which of the tied samples wins is shared over the whole level, so compare the mass of each level.
            for level in set(expected_row):
                at = expected_row == level
                assert row[at].sum() == pytest.approx(wins[at].sum(), abs=1e-13)
                assert np.ptp(row[at]) < 1e-15
        np.testing.assert_allclose((weights * refs).sum(1), expected_best_of_n(refs, n), rtol=1e-12)


def test_a_winner_is_placed_among_the_others():
    refs = np.array([[0.0, 1.0, 2.0, 3.0]])
    # The winner of 2: reward 1 has two better others of two, 2 has one of two, 3 none.
    np.testing.assert_allclose(winner_log_quantile(refs, 2), [[0.0, -1.5, -0.5, 0.0]], rtol=1e-14)
    np.testing.assert_allclose((best_of_n_weights(refs, 2) * winner_log_quantile(refs, 2)).sum(), -5 / 12, rtol=1e-14)


@pytest.mark.parametrize(
    ("value", "expected"),
    [(-1.0, 1.0), (0.0, 1.0), (0.5, 1.5), (1.0, 2.0), (1.4, 3.6), (1.5, math.inf), (1.6, math.inf)],
)
def test_solving_on_the_reward(value, expected):
    curve = torch.tensor([[0.0, 1.0, 1.25, 1.5, 1.5]]).double()
    assert float(solve_reward(torch.tensor([value]).double(), curve)) == pytest.approx(expected)


def test_a_flat_curve_is_worth_one_sample_or_beyond():
    flat = torch.full((1, 4), 0.1 + 0.2, dtype=torch.float64)
    assert float(solve_reward(torch.tensor([0.3], dtype=torch.float64), flat)) == 1.0
    assert float(solve_reward(torch.tensor([0.4]).double(), flat)) == math.inf


def test_solving_on_the_log_quantile():
    curve = -1.0 / torch.arange(1, 9).double()[None]
    for n in (1.0, 1.5, 3.3, 8.0):
        assert float(solve_log_quantile(torch.full_like(curve, -1 / n), curve)) == pytest.approx(n, rel=1e-9)
    assert float(solve_log_quantile(torch.full_like(curve, -2.0), curve)) == 1.0
    assert float(solve_log_quantile(torch.full_like(curve, -1 / 8.1), curve)) == math.inf
    # A curve that reaches the end, 0, has no reciprocal: linear in the log-quantile itself.
    end = torch.tensor([[-1.0, -0.5, 0.0]]).double()
    assert float(solve_log_quantile(torch.full_like(end, -0.25), end)) == pytest.approx(2.5)
    assert float(solve_log_quantile(torch.zeros(1, 3).double(), torch.zeros(1, 3).double())) == 1.0
    assert float(solve_log_quantile(torch.full_like(end, -1e-6), end)) == pytest.approx(3.0, rel=1e-5)
    assert float(solve_log_quantile(torch.zeros(1, 3).double(), end)) == math.inf  # as any larger N has


def test_bad_orders_are_refused():
    refs = np.zeros((2, 3))
    with pytest.raises(ValueError, match="M = 3"):
        best_of_n_opponents(refs, refs, [4])
    with pytest.raises(ValueError, match="M = 3"):
        best_of_n_weights(refs, 4)
    with pytest.raises(ValueError, match="M - 1 = 2"):
        winner_log_quantile(refs, 3)
    with pytest.raises(ValueError, match=r"^ref_rewards "):
        best_of_n_log_quantiles(np.zeros((2, 1)))
    assert best_of_n_win_rates(refs).shape == best_of_n_log_quantiles(refs).shape
