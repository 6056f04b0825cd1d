import itertools
import math

import numpy as np
import pytest
import torch

from bondlm.bestofn import best_of_n_kl, best_of_n_probs, expected_best_of_n, kl_bound
from bondlm.bestofn.order import best_of_n_kls


@pytest.mark.parametrize("num_samples", [1, 2, 5, 7])
def test_estimate_is_the_mean_maximum_over_all_subsets(num_samples):
    rewards = np.random.default_rng(num_samples).integers(-3, 4, size=(4, num_samples)) / 3.0
    for n in range(1, num_samples + 1):
        expected = [np.mean([max(s) for s in itertools.combinations(row, n)]) for row in rewards]
        np.testing.assert_allclose(expected_best_of_n(rewards, n), expected, rtol=0, atol=1e-14)


def test_estimate_is_unbiased():
    probs, rewards = np.array([0.2, 0.5, 0.3]), np.array([-1.0, 0.0, 4.0])
    for n in (1, 2, 3):
        draws = np.array(list(itertools.product(range(3), repeat=4)))
        mean = expected_best_of_n(rewards[draws], n) @ probs[draws].prod(1)
        assert mean == pytest.approx(best_of_n_probs(probs, rewards, n) @ rewards, abs=1e-13)


def test_limits_and_large_sizes():
    rewards = np.random.default_rng(0).normal(size=(2, 4000))
    np.testing.assert_allclose(expected_best_of_n(rewards, 1), rewards.mean(1), atol=1e-14)
    np.testing.assert_allclose(expected_best_of_n(rewards, 4000), rewards.max(1))
    # The mean maximum of n of the numbers 1..M is n(M+1)/(n+1).
    ladder = np.arange(1.0, 4001.0)
    for n in (2, 63, 2000, 3999):
        assert expected_best_of_n(ladder, n) == pytest.approx(n * 4001 / (n + 1), rel=1e-12)


def test_kinds_and_order_of_samples():
    rewards = np.random.default_rng(1).normal(size=(3, 6))
    result = expected_best_of_n(rewards, 4)
    assert isinstance(result, np.ndarray)
    assert result.shape == (3,)
    as_torch = expected_best_of_n(torch.tensor(rewards), 4)
    assert isinstance(as_torch, torch.Tensor)
    np.testing.assert_array_equal(as_torch.numpy(), result)
    np.testing.assert_array_equal(expected_best_of_n(rewards[:, ::-1], 4), result)


@pytest.mark.parametrize("n", [0, -1, 4, 1.5, float("nan"), float("inf")])
def test_impossible_orders_are_refused(n):
    with pytest.raises(ValueError, match=rf"^n .*got {n}$"):
        expected_best_of_n(np.zeros((2, 3)), n)


def test_a_reward_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match=r"^rewards .*nan"):
        expected_best_of_n(np.array([[0.0, np.nan]]), 1)


@pytest.mark.parametrize("n", [1.0, 1.5, 4.0, 16.0])
def test_the_kl_of_continuous_rewards_is_the_bound_and_all_tied_there_is_none(n):
    continuous = np.random.default_rng(2).normal(size=(5, 16))
    assert best_of_n_kls(continuous, [n]) == pytest.approx([kl_bound(n)], abs=1e-12)
    assert best_of_n_kls(np.ones((5, 16)), [n]) == pytest.approx([0.0], abs=1e-12)


def test_the_kl_of_tied_rewards_is_the_exact_one():
    """0/1 rewards, exact shares: against the distribution's own formula, and by hand."""
    rewards = np.repeat([[0.0] * 12 + [1.0] * 4, [0.0] * 8 + [1.0] * 8], 3, axis=0)
    for n in (2.0, 3.7, 8.0):
        exact = [float(best_of_n_kl(np.array([1 - p, p]), np.array([0.0, 1.0]), n)) for p in (0.25, 0.5)]
        assert best_of_n_kls(rewards, [n]) == pytest.approx([np.mean(exact)], abs=1e-12)
    by_hand = 0.5625 * np.log(0.5625 / 0.75) + 0.4375 * np.log(0.4375 / 0.25)
    assert best_of_n_kls(rewards[:1], [2]) == pytest.approx([by_hand], abs=1e-12)
    mixed = np.concatenate([np.zeros((4, 8)), np.random.default_rng(3).uniform(1, 2, (4, 8))], axis=1)
    # Half an atom, half continuous: the atom by hand, the rest by the integral from 1/2 to 1.
    u = (np.arange(100_000) + 0.5) / 200_000 + 0.5
    smooth = np.mean(4 * u**3 * np.log(4 * u**3)) / 2
    assert best_of_n_kls(mixed, [4]) == pytest.approx([0.5**4 * np.log(0.5**4 / 0.5) + smooth], abs=1e-8)


@pytest.mark.parametrize(
    ("n", "passes", "error"), [(4, 0.1, -0.04), (8, 0.1, -0.08), (16, 0.1, -0.12), (8, 0.8, 0.02), (2, 0.9, -0.06)]
)
def test_the_mean_kl_of_few_samples_of_a_rare_level_is_too_low(n, passes, error):
    """32 samples, 0/1 rewards: the sum over all counts of passes, relative to the exact KL."""
    rewards = [[0.0] * (32 - count) + [1.0] * count for count in range(33)]
    chances = [math.comb(32, count) * passes**count * (1 - passes) ** (32 - count) for count in range(33)]
    mean = sum(chance * best_of_n_kls([row], [n])[0] for chance, row in zip(chances, rewards, strict=True))
    exact = float(best_of_n_kl(np.array([1 - passes, passes]), np.array([0.0, 1.0]), n))
    assert mean / exact - 1 == pytest.approx(error, abs=0.006)
