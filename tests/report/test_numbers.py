"""The numbers that a report derives, and how it writes them."""

import numpy as np
import pytest

from bondlm.bestofn import kl_bound
from bondlm.report.numbers import best_of_n_kl, best_of_n_win_rate, curve, estimate, headline, kl_ratio, number
from report.helpers import eval_json


def test_kl_of_best_of_n_is_the_one_of_the_library():
    n = np.array([1.0, 1.5, 2, 6.3, 64, 1e6])
    assert best_of_n_kl(n) == pytest.approx([kl_bound(float(order)) for order in n], abs=1e-12)
    assert best_of_n_win_rate(np.array([1.0, 3.0])).tolist() == [0.5, 0.75]


@pytest.mark.parametrize(
    ("value", "low", "high", "text"),
    [
        (0.86301, 0.8417, 0.8843, "0.863 [0.842, 0.884]"),
        (1.0, 0.98, 1.02, "1.000 [0.980, 1.020]"),
        (6.3, 5.0, 7.6, "6.3 [5.0, 7.6]"),
        (1234.5, 1000.0, 1500.0, "1,234 [1,000, 1,500]"),
        (-0.02, -0.05, 0.01, "-0.020 [-0.050, 0.010]"),
        (0.5, 0.5, 0.5, "0.5 [0.5, 0.5]"),
        (None, 2.0, None, "– [2, –]"),
        (None, None, None, "–"),
    ],
)
def test_an_estimate_is_written_with_the_digits_that_its_interval_supports(value, low, high, text):
    assert estimate({"value": value, "low": low, "high": high}) == text


def test_a_number_is_written_with_three_digits():
    assert [number(x) for x in (999.4, 999.7, -999.9)] == ["999", "1,000", "-1,000"]
    assert [number(x) for x in (None, 0.04567, 12345.6, 1.0, -3.14159)] == ["–", "0.0457", "12,346", "1", "-3.14"]


def test_an_old_file_without_the_ratio_gets_it_from_its_kl():
    result = eval_json()
    del result["kl_ratio"]
    assert kl_ratio(result) == pytest.approx(1.4)
    assert kl_ratio(result | {"kl_of_best_of_n": 0.0}) is None
    assert headline(result | {"kl_of_best_of_n": 0.0}) == "One sample = Best-of-6.3 [5.0, 7.6]."
    assert kl_ratio(result | {"kl_ratio": None}) is None


def test_there_is_no_ratio_where_n_is_not_told_from_1():
    """A policy like its reference, N = 1.03, was said to be at 1343 times the KL that Best-of-1.0 needs."""
    worth = {"value": 1.03, "low": 1.0, "high": 1.1, "text": "1.0 [1.0, 1.1]"}
    result = eval_json() | {"effective_n": worth, "kl_ratio": 1343.0, "kl_of_best_of_n": 0.00036}
    assert kl_ratio(result) is None
    assert headline(result) == "One sample = Best-of-1.0 [1.0, 1.1]."


@pytest.mark.parametrize(("value", "low"), [(-0.0019, -0.0038), (0.001, -0.001), (-0.1, None)])
def test_there_is_no_ratio_where_the_kl_is_not_told_from_0(value, low):
    """The estimate of a KL may be negative: it was "at -0.0x the KL that Best-of-2.6 needs"."""
    result = eval_json() | {"kl": {"value": value, "low": low, "high": 0.01}, "kl_ratio": value / 0.5}
    assert kl_ratio(result) is None
    assert headline(result) == "One sample = Best-of-6.3 [5.0, 7.6]."


def test_a_policy_below_its_reference_has_no_n():
    result = eval_json() | {"win_rate": {"value": 0.31, "low": 0.2, "high": 0.4}}
    assert headline(result) == "One sample is below the reference (win rate 0.31, under 0.5), so there is no N."


def test_an_old_file_without_a_curve_has_one_in_its_baselines():
    result = eval_json()
    points = curve(result)
    assert [point["n"] for point in points] == list(range(1, 17))
    del result["curve"]
    assert [(point["n"], point["reward"]["value"]) for point in curve(result)] == [(1, 1.0), (8, 16 / 9)]
