import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bestofn.brute import naive_quantile
from bondlm.bestofn import (
    best_of_n_win_rates,
    effective_n,
    log_quantile,
    quantile,
    two_level_penalty,
    win_rate,
    win_rates,
)
from bondlm.bestofn.quantiles import tied_share

METHODS = ["jbond", "clamped", "harmonic"]


def binomial_mean(values: np.ndarray, p: float) -> float:
    """E[values[count]] for a count ~ Binomial(k, p), k = len(values) - 1."""
    k = len(values) - 1
    return sum(math.comb(k, j) * p**j * (1 - p) ** (k - j) * values[j] for j in range(k + 1))


def log_quantile_by_count(k: int, method: str) -> np.ndarray:
    """The estimate when j = 0..k of the k reference rewards are at most the reward."""
    refs = np.array([[0.0] * j + [2.0] * (k - j) for j in range(k + 1)])
    return log_quantile(np.ones((k + 1, 1)), refs, method=method)[:, 0]


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(("num_samples", "num_ref"), [(1, 1), (1, 2), (5, 16), (7, 3)])
def test_quantile_equals_the_naive_comparison_with_ties(num_samples, num_ref, strict):
    rng = np.random.default_rng(num_ref)
    rewards, refs = rng.integers(0, 4, size=(20, num_samples)) / 4, rng.integers(0, 4, size=(20, num_ref)) / 4
    expected = naive_quantile(rewards, refs, strict)
    np.testing.assert_array_equal(quantile(rewards, refs, strict=strict), expected)
    np.testing.assert_array_equal(quantile(rewards[0], refs[0], strict), expected[0])


def test_infinite_rewards_are_ordinary_extremes():
    rewards, refs = np.array([-np.inf, 0.0, np.inf]), np.array([-np.inf, 0.0, 1.0, np.inf])
    np.testing.assert_array_equal(quantile(rewards, refs), [0.25, 0.5, 1.0])
    np.testing.assert_array_equal(quantile(rewards, refs, strict=True), [0.0, 0.25, 0.75])


def test_jbond_reward_is_minus_log_16_only_below_both_anchors():
    refs = np.array([[1.0, 3.0]] * 5)
    rewards = np.array([[0.0], [1.0], [2.0], [3.0], [4.0]])
    expected = np.array([[-math.log(16)], [0], [0], [0], [0]])
    np.testing.assert_allclose(log_quantile(rewards, refs), expected, rtol=1e-15)
    assert two_level_penalty(2) == pytest.approx(-2.7726, abs=5e-5)


@pytest.mark.parametrize("p", [0.0, 0.1, 0.25, 0.5, 0.77, 1.0])
@pytest.mark.parametrize("k", [1, 2, 3, 8])
def test_jbond_mean_is_the_two_level_form(k, p):
    mean = binomial_mean(log_quantile_by_count(k, "jbond"), p)
    assert mean == pytest.approx(2**k * math.log(0.5) * (1 - p) ** k, rel=1e-12, abs=1e-15)
    if k == 2:
        assert mean == pytest.approx(-math.log(16) * (1 - p) ** 2, rel=1e-12, abs=1e-15)
    if p == 0.5:
        assert mean == pytest.approx(math.log(p), rel=1e-12)


@pytest.mark.parametrize("p", [0.05, 0.25, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("k", [1, 2, 5, 16])
def test_harmonic_mean_is_the_series_of_log_p_cut_at_k(k, p):
    series = -sum((1 - p) ** j / j for j in range(1, k + 1))
    assert binomial_mean(log_quantile_by_count(k, "harmonic"), p) == pytest.approx(series, abs=1e-13)


@pytest.mark.parametrize(
    ("method", "p", "mean", "sd"),
    [("harmonic", 0.25, -1.385, 0.453), ("harmonic", 0.5, -0.693, 0.255), ("clamped", 0.25, -1.500, None)],
)
def test_sixteen_samples_have_the_published_bias_and_spread(method, p, mean, sd):
    values = log_quantile_by_count(16, method)
    assert binomial_mean(values, p) == pytest.approx(mean, abs=5e-4)
    if sd is not None:
        variance = binomial_mean(values**2, p) - binomial_mean(values, p) ** 2
        assert math.sqrt(variance) == pytest.approx(sd, abs=5e-4)


def test_two_anchors_harmonic_and_clamped_values():
    np.testing.assert_allclose(log_quantile_by_count(2, "harmonic"), [-1.5, -0.5, 0.0], rtol=1e-15)
    np.testing.assert_allclose(np.exp(log_quantile_by_count(2, "clamped")), [0.25, 0.5, 1.0], rtol=1e-15)


def rewards_and_maps():
    """Rewards with many ties, and a strictly increasing map of their levels."""
    levels = st.lists(st.floats(-1e6, 1e6), min_size=6, max_size=6, unique=True)
    shape = st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(3, 6))
    return st.tuples(levels, shape, st.integers(0, 2**31))


@settings(deadline=None, database=None, max_examples=60)
@given(rewards_and_maps())
def test_increasing_maps_and_permutations_change_no_bit(case):
    levels, (num_prompts, num_samples, num_ref), seed = case
    rng = np.random.default_rng(seed)
    before, after = np.arange(6.0), np.sort(np.array(levels))
    mine = rng.integers(0, 6, size=(num_prompts, num_samples))
    refs = rng.integers(0, 6, size=(num_prompts, num_ref))
    mixed = refs[:, rng.permutation(num_ref)]
    for strict in (False, True):
        expected = quantile(before[mine], before[refs], strict)
        np.testing.assert_array_equal(quantile(after[mine], after[refs], strict), expected)
        np.testing.assert_array_equal(quantile(before[mine], before[mixed], strict), expected)
        np.testing.assert_array_equal(quantile(before[mine[:, ::-1]], before[refs], strict), expected[:, ::-1])
    for method in METHODS:
        expected = log_quantile(before[mine], before[refs], method)
        np.testing.assert_array_equal(log_quantile(after[mine], after[refs], method), expected)
        np.testing.assert_array_equal(log_quantile(before[mine], before[mixed], method), expected)
    for function in (win_rate, win_rates, lambda r, f: effective_n(r, f, num_bootstrap=20)):
        expected = function(before[mine], before[refs])
        np.testing.assert_array_equal(function(after[mine], after[refs]), expected)
        np.testing.assert_array_equal(function(before[mine[:, ::-1]], before[mixed]), expected)
    np.testing.assert_array_equal(best_of_n_win_rates(after[refs]), best_of_n_win_rates(before[mixed]))


@pytest.mark.parametrize("method", METHODS)
def test_log_quantile_never_rewards_a_lower_reward(method):
    values = log_quantile_by_count(9, method)
    assert (np.diff(values) >= 0).all()
    assert values[-1] == 0.0
    assert np.isfinite(values).all()


def test_kinds():
    rewards, refs = np.array([[1.0, 2.0]]), np.array([[0.0, 1.0, 3.0]])
    for function in (quantile, log_quantile, lambda r, f: log_quantile(r, f, "harmonic")):
        as_numpy, as_torch = function(rewards, refs), function(torch.tensor(rewards), torch.tensor(refs).float())
        assert isinstance(as_numpy, np.ndarray)
        assert isinstance(as_torch, torch.Tensor)
        assert as_torch.dtype == torch.float64
        np.testing.assert_array_equal(as_numpy, as_torch.numpy())


@pytest.mark.parametrize("function", [quantile, log_quantile, win_rate, win_rates, effective_n])
@pytest.mark.parametrize(
    ("rewards", "refs", "message"),
    [
        ([[math.nan, 1.0]], [[0.0, 1.0]], "^rewards .*NaN"),
        ([[0.0, 1.0]], [[0.0, math.nan]], "^ref_rewards .*NaN"),
        ([[0.0], [1.0]], [[0.0, 1.0]], r"\(2, 1\) and \(1, 2\)"),
        ([0.0], [[0.0, 1.0]], r"\(1,\) and \(1, 2\)"),
        (0.0, 1.0, r"\(\) and \(\)"),
        ([[]], [[0.0, 1.0]], r"empty.*\(1, 0\) and \(1, 2\)"),
        ([[0.0]], [[]], r"empty.*\(1, 1\) and \(1, 0\)"),
    ],
)
def test_bad_input_is_refused(function, rewards, refs, message):
    with pytest.raises(ValueError, match=message):
        function(np.array(rewards), np.array(refs))


def test_unknown_method_and_too_many_samples_are_refused():
    with pytest.raises(ValueError, match="method 'log'"):
        log_quantile(np.zeros(1), np.zeros(2), method="log")
    with pytest.raises(ValueError, match=r"1024.*harmonic"):
        log_quantile(np.zeros(1), np.zeros(1024))
    assert math.isfinite(log_quantile(np.zeros(1), np.zeros(1024), method="harmonic")[0])


def test_the_tied_share_is_that_of_all_pairs():
    rewards = torch.randint(0, 4, (40, 6), generator=torch.Generator().manual_seed(0)).double()
    pairs = [[row[i] == row[j] for i in range(6) for j in range(i)] for row in rewards]
    expected = [sum(map(bool, row)) / len(row) for row in pairs]
    assert tied_share(rewards).tolist() == pytest.approx(expected, abs=1e-15)
    assert tied_share(rewards[:, :1]).tolist() == [0.0] * 40
