import math

import numpy as np
import pytest
import torch

from bondlm.bestofn import Estimate, bootstrap_mean
from bondlm.bestofn.bootstrap import bootstrap_win_rate, resample_means


def test_interval_is_that_of_the_normal_distribution_for_many_prompts():
    values = np.random.default_rng(0).exponential(size=2000)
    result = bootstrap_mean(values, num_bootstrap=4000)
    spread = 1.96 * values.std() / math.sqrt(2000)
    assert result.value == pytest.approx(values.mean(), rel=1e-14)
    assert result.high - result.value == pytest.approx(spread, rel=0.1)
    assert result.value - result.low == pytest.approx(spread, rel=0.1)
    wide, narrow = bootstrap_mean(values, confidence=0.99), bootstrap_mean(values, confidence=0.5)
    assert wide.low < result.low < narrow.low < narrow.high < result.high < wide.high


def test_small_samples_follow_the_exact_resampling_distribution():
    # Two prompts: means 0, 1/2, 1 with chances 1/4, 1/2, 1/4.
    means = resample_means(torch.tensor([[0.0], [1.0]], dtype=torch.float64), 20_000, 3)[:, 0]
    assert [float((means == x).double().mean()) for x in (0.0, 0.5, 1.0)] == pytest.approx([0.25, 0.5, 0.25], abs=0.02)
    assert bootstrap_mean(np.array([0.0, 1.0])) == Estimate(0.5, 0.0, 1.0)


def test_columns_are_resampled_together_and_chunks_join(monkeypatch):
    values = torch.randn(50, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    both = resample_means(torch.cat([values, 2 * values + 1], dim=1), 301, 7)
    torch.testing.assert_close(both[:, 1], 2 * both[:, 0] + 1)
    monkeypatch.setattr("bondlm.bestofn.bootstrap._CELLS_PER_CHUNK", 120)
    torch.testing.assert_close(resample_means(values, 301, 7)[:, 0], both[:, 0])


def test_constants_and_single_prompts():
    assert bootstrap_mean(np.full(9, 2.5)) == (2.5, 2.5, 2.5)
    assert bootstrap_mean(torch.tensor([2.5])) == (2.5, -math.inf, math.inf)


def test_win_rates_that_are_all_alike_have_the_exact_interval_and_others_that_of_resampling():
    # Clopper and Pearson for 3 of 3 and 0 of 20: the rate at which that has a chance of 2.5%.
    assert bootstrap_win_rate(np.ones(3)) == pytest.approx((1.0, 0.025 ** (1 / 3), 1.0))
    assert bootstrap_win_rate(np.zeros(20)) == pytest.approx((0.0, 0.0, 1 - 0.025 ** (1 / 20)))
    assert bootstrap_win_rate(np.ones(20), confidence=0.5) == pytest.approx((1.0, 0.25 ** (1 / 20), 1.0))
    half = bootstrap_win_rate(torch.full((20,), 0.5))
    assert (half.value, half.low + half.high) == pytest.approx((0.5, 1.0))
    assert half.high - half.low == pytest.approx(1 - 0.025 ** (1 / 20))
    assert bootstrap_win_rate(torch.tensor([0.5])) == (0.5, -math.inf, math.inf)
    mixed = np.random.default_rng(0).random(50)
    assert bootstrap_win_rate(mixed) == bootstrap_mean(mixed)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], r"^values .*\(0,\)"),
        ([[1.0, 2.0]], r"^values .*\(1, 2\)"),
        ([1.0, math.nan], "^values .*nan"),
        ([1.0, math.inf], "^values .*inf"),
    ],
)
def test_bad_values_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        bootstrap_mean(np.array(values))
