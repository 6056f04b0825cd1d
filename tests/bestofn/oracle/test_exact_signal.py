"""The exact means against plain enumeration of all draws, through the estimators themselves."""

import itertools
import math

import numpy as np
import pytest
import torch

from bondlm.bestofn import best_of_n_probs, log_collision_correction, log_quantile, mean_signal, quantile

ANCHOR = np.array([[0.1, 0.2, 0.3, 0.4], [0.55, 0.05, 0.25, 0.15], [0.25, 0.25, 0.4, 0.1]])
REWARDS = np.array([[0.3, -1.0, 2.0, 0.7], [0.0, 1.0, 1.0, 2.0], [5.0, 5.0, 5.0, 5.0]])  # untied, tied, all tied


def mean_over_all_draws(anchor, rewards, k, signal):
    """Σ over the K^k draws of k anchor samples of their probability times signal(reward of y, rewards of the draw)."""
    draws = np.array(list(itertools.product(range(len(anchor)), repeat=k)))
    weights = anchor[draws].prod(1)
    own = np.broadcast_to(rewards, (len(draws), len(rewards)))
    return weights @ signal(own, rewards[draws])


def signal_of(estimate, n, correction):
    def signal(own, refs):
        if estimate == "smoothed":
            k = refs.shape[1]
            log_p = np.log((quantile(own, refs, strict=True) * k + 1) / (k + 1))
        else:
            log_p = log_quantile(own, refs, estimate)
        return (n - 1) * log_p + (log_collision_correction(own, refs, n) if correction else 0.0)

    return signal


@pytest.mark.parametrize("correction", [False, True])
@pytest.mark.parametrize("estimate", ["jbond", "clamped", "harmonic", "smoothed"])
@pytest.mark.parametrize(("n", "k"), [(2, 1), (2, 2), (5, 3), (3, 5)])
def test_mean_signal_is_the_mean_over_all_draws(n, k, estimate, correction):
    for anchor, rewards in zip(ANCHOR, REWARDS, strict=True):
        expected = mean_over_all_draws(anchor, rewards, k, signal_of(estimate, n, correction))
        exact = mean_signal(anchor, rewards, n, estimate=estimate, k=k, correction=correction)
        np.testing.assert_allclose(exact, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("n", [1, 2, 3.5, 8, 1000])
def test_the_exact_corrected_signal_is_the_log_ratio_of_best_of_n(n):
    signal = mean_signal(ANCHOR, REWARDS, n, correction=True)
    np.testing.assert_allclose(ANCHOR * np.exp(signal), best_of_n_probs(ANCHOR, REWARDS, n), rtol=1e-9, atol=1e-300)


def test_the_paper_drops_nothing_that_matters_when_rewards_are_continuous():
    num_outcomes = 5000
    anchor, rewards = np.full(num_outcomes, 1 / num_outcomes), np.arange(float(num_outcomes))
    difference = mean_signal(anchor, rewards, 4, correction=True) - mean_signal(anchor, rewards, 4)
    np.testing.assert_allclose(difference[100:], math.log(4), atol=0.02)
    assert difference[0] == pytest.approx(0.0, abs=1e-12)  # the worst outcome: nothing is below it


@pytest.mark.parametrize("estimate", ["clamped", "harmonic", "smoothed"])
def test_estimates_converge_to_the_exact_signal(estimate):
    # The smoothed one to log p_<, which is -inf for the lowest level: the untied table without its worst outcome.
    anchor, rewards = ANCHOR[0], REWARDS[0]
    order = rewards.argsort()
    exact = mean_signal(anchor, rewards, 3)[order]
    if estimate == "smoothed":
        exact = np.append(np.inf, exact[:-1])
        exact[1:] = 2 * np.log(np.cumsum(anchor[order])[:-1])
    previous = np.inf
    for k in (4, 32, 256):
        error = np.abs(mean_signal(anchor, rewards, 3, estimate=estimate, k=k)[order] - exact)[1:].max()
        assert error < previous
        previous = error
    assert previous < 0.02


def test_collision_correction_by_hand():
    refs = np.array([0.0, 1.0, 1.0, 3.0])
    values = log_collision_correction(np.array([-1.0, 0.0, 0.5, 1.0, 2.0, 3.0, 4.0]), refs, 3)
    # ratios p_</p_<=: 0/0 (none ties: 1), 0/1, 1/1, 1/3, 3/3, 3/4, 4/4
    expected = [3, 1, 3, 1 + 1 / 3 + 1 / 9, 3, 1 + 3 / 4 + 9 / 16, 3]
    np.testing.assert_allclose(np.exp(values), expected, rtol=1e-14)
    np.testing.assert_allclose(log_collision_correction(np.array([1.0]), refs, 1), [0.0], atol=1e-15)
    assert isinstance(log_collision_correction(torch.zeros(1, 1), torch.zeros(1, 2), 2), torch.Tensor)


@pytest.mark.parametrize("n", [2, 5, 1000])
def test_collision_correction_equals_the_sum(n):
    refs = np.array([0.0, 0.0, 1.0, 1.0, 2.0])
    for reward, (lower, at_most) in {0.0: (0, 2), 1.0: (2, 4), 2.0: (4, 5)}.items():
        expected = math.log(sum((lower / at_most) ** i for i in range(n)))
        assert log_collision_correction(np.array([reward]), refs, n)[0] == pytest.approx(expected, rel=1e-13, abs=1e-15)


@pytest.mark.parametrize("function", [quantile, log_quantile, lambda r, f: log_collision_correction(r, f, 4)])
def test_none_compares_each_reward_with_the_others_of_its_row(function):
    rewards = np.random.default_rng(0).integers(0, 4, size=(6, 5)).astype(float)
    together = function(rewards, None)
    for i in range(5):
        alone = function(rewards[:, [i]], np.delete(rewards, i, axis=1))
        np.testing.assert_array_equal(together[:, [i]], alone)
    with pytest.raises(ValueError, match="ref_rewards"):
        function(np.zeros((3, 1)), None)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"estimate": "clamped"}, "k=None"),
        ({"estimate": "exact", "k": 4}, "k=4"),
        ({"estimate": "clamped", "k": 0}, "^k .*got 0"),
        ({"estimate": "log", "k": 2}, "estimate 'log'"),
    ],
)
def test_bad_input_is_refused(keywords, message):
    with pytest.raises(ValueError, match=message):
        mean_signal(ANCHOR, REWARDS, 2, **keywords)
