"""Signals among the policy's own samples: the distribution they reach, their solved strengths, ties."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from bondlm.bestofn import best_of_n_probs, kl_bound, solve_strength
from bondlm.bestofn.own_quantiles import (
    FORMS,
    OwnQuantile,
    kl_over_best_of_n,
    largest_order,
    rank_signal,
    reached_by,
    signal_table,
    tilt_of_order,
    win_table,
)

every_form = pytest.mark.parametrize("form", FORMS)

# Harmonic signal of strength c among k others: effective N by win rate, and KL over Best-of-N's at that N.
HARMONIC = {
    2: [(1, 1.66, 0.87), (1.5, 2.13, 0.94), (2, 2.71, 1.02), (3, 4.16, 1.20), (4, 5.92, 1.40)],
    3: [(1, 1.87, 0.89), (1.5, 2.56, 0.97), (2, 3.44, 1.07), (3, 5.77, 1.28), (4, 8.60, 1.54)],
    5: [(1, 2.18, 0.91), (1.5, 3.27, 1.01), (2, 4.79, 1.12), (3, 9.01, 1.39), (4, 14.1, 1.71)],
    7: [(1, 2.42, 0.93), (1.5, 3.88, 1.02), (2, 6.04, 1.14), (3, 12.3, 1.45), (4, 19.6, 1.81)],
    15: [(1, 3.02, 0.95), (1.5, 5.75, 1.05), (2, 10.5, 1.19), (3, 25.2, 1.56), (4, 41.8, 2.02)],
}
# KL over Best-of-n's at n = 2, 4, 8, 16, by samples of a prompt and form (the table in docs/theory.md).
KL_RATIOS: dict[tuple[int, OwnQuantile], tuple[float, float, float, float]] = {
    (4, "harmonic"): (0.91, 1.12, 1.48, 2.21),
    (4, "tilt"): (0.90, 1.05, 1.25, 1.63),
    (4, "best_of_n"): (0.90, 1.03, 1.23, 1.60),
    (6, "harmonic"): (0.90, 1.06, 1.32, 1.83),
    (6, "tilt"): (0.90, 1.01, 1.13, 1.33),
    (6, "best_of_n"): (0.91, 0.99, 1.11, 1.30),
    (8, "harmonic"): (0.89, 1.03, 1.24, 1.63),
    (8, "tilt"): (0.90, 0.99, 1.08, 1.21),
    (8, "best_of_n"): (0.92, 0.98, 1.06, 1.19),
    (16, "harmonic"): (0.90, 0.99, 1.12, 1.33),
    (16, "tilt"): (0.89, 0.98, 1.03, 1.09),
    (16, "best_of_n"): (0.95, 0.98, 1.02, 1.07),
}
TILTS = {4: (2.0, 3.9, 5.8, 8.5), 6: (2.0, 3.9, 5.5, 7.4), 8: (2.1, 3.9, 5.5, 7.1), 16: (2.1, 4.1, 5.7, 7.1)}


def order_of(win_rate: float) -> float:
    return win_rate / (1 - win_rate)


@pytest.mark.parametrize("others", HARMONIC)
def test_what_a_harmonic_signal_reaches(others: int) -> None:
    for strength, order, ratio in HARMONIC[others]:
        policy = reached_by(rank_signal(2, others + 1, "harmonic", strength))
        reached = order_of(policy.win_rate)
        assert reached == pytest.approx(order, rel=5e-3)
        assert policy.kl / kl_bound(reached) == pytest.approx(ratio, abs=6e-3)


@pytest.mark.parametrize(("num_samples", "form"), KL_RATIOS)
def test_kl_for_the_win_rate_of_best_of_n(num_samples: int, form: OwnQuantile) -> None:
    for n, ratio in zip((2, 4, 8, 16), KL_RATIOS[num_samples, form], strict=True):
        assert kl_over_best_of_n(n, num_samples, form) == pytest.approx(ratio, abs=6e-3)
        policy = reached_by(rank_signal(n, num_samples, form, solve_strength(n, num_samples, form)))
        assert order_of(policy.win_rate) == pytest.approx(n, rel=1e-9)


@pytest.mark.parametrize("num_samples", TILTS)
def test_solved_tilts(num_samples: int) -> None:
    for n, tilt in zip((2, 4, 8, 16), TILTS[num_samples], strict=True):
        assert solve_strength(n, num_samples, "tilt") == pytest.approx(tilt, abs=0.06)


@every_form
@pytest.mark.parametrize(("n", "num_samples"), [(2, 3), (4, 8), (16, 8), (8, 33)])
def test_win_rate_and_kl_by_a_plain_sum(n: int, num_samples: int, form: OwnQuantile) -> None:
    """du/dG = Z exp(-f_k(G)), added up in 40,000 steps, f_k by de Casteljau's rule."""
    signal = rank_signal(n, num_samples, form, solve_strength(n, num_samples, form))
    own = (np.arange(40_000) + 0.5) / 40_000
    rows = np.repeat(signal[:, None], len(own), axis=1)
    while len(rows) > 1:
        rows = rows[:-1] * (1 - own) + rows[1:] * own
    density = np.exp(-rows[0]) / np.exp(-rows[0]).mean()
    reference_quantile = (np.cumsum(density) - density / 2) / len(own)
    policy = reached_by(signal)
    assert policy.win_rate == pytest.approx(reference_quantile.mean(), abs=2e-6)
    assert policy.kl == pytest.approx(-np.log(density).mean(), abs=2e-5)


@every_form
def test_without_a_signal_nothing_moves(form: OwnQuantile) -> None:
    assert reached_by(np.full(5, 3.0)) == pytest.approx((0.5, 0.0), abs=1e-12)
    near_one = rank_signal(1 + 1e-6, 8, form, solve_strength(1 + 1e-6, 8, form))
    assert np.ptp(near_one) < 1e-5


@pytest.mark.parametrize(("form", "limit"), [("best_of_n", 1.0), ("tilt", 0.969)])
def test_with_many_samples_it_is_best_of_n_or_the_tilt(form: OwnQuantile, limit: float) -> None:
    """The tilt is the cheapest distribution of its win rate: .969 of Best-of-4's KL."""
    errors = [abs(kl_over_best_of_n(4, num_samples, form) - limit) for num_samples in (16, 64, 256)]
    assert errors[0] > errors[2]
    assert errors[2] < 5e-3
    optimum = tilt_of_order(4)
    log_normaliser = math.log(math.expm1(optimum) / optimum)
    assert (optimum * 4 / 5 - log_normaliser) / kl_bound(4) == pytest.approx(0.969, abs=5e-4)


@every_form
def test_a_better_rank_never_has_a_smaller_signal(form: OwnQuantile) -> None:
    for n, num_samples in [(2, 3), (8, 8), (4, 16)]:
        table = signal_table(n, num_samples, form)
        assert (np.diff(table[:, 0]) > 0).all()
        for tied in range(num_samples):
            assert (np.diff(table[: num_samples - tied, tied]) > 0).all()


def share_between(low: float, high: float, n: float, form: OwnQuantile) -> float:
    """What the reference has between two own quantiles of Best-of-n, or of the tilt."""
    if form != "tilt":
        return float(high ** (1 / n) - low ** (1 / n))
    steep = math.exp(tilt_of_order(n)) - 1
    return math.log((1 + high * steep) / (1 + low * steep)) / math.log(1 + steep)


@every_form
def test_the_table_is_the_formula(form: OwnQuantile) -> None:
    n, size = 3, 6
    rank = rank_signal(n, size, form, solve_strength(n, size, form))

    def own_over_reference(below: int, tied: int) -> float:
        low, high = below / size, (below + tied) / size
        return math.log(tied / size / share_between(low, high, n, form))

    table = signal_table(n, size, form)
    for below in range(size):
        for others in range(size):
            if below + others >= size:
                assert math.isnan(table[below, others])
                continue
            places = range(below, below + others + 1)
            excess = sum(rank[j] - own_over_reference(j, 1) for j in places) / len(places)
            assert table[below, others] == pytest.approx(own_over_reference(below, others + 1) + excess, abs=1e-12)
    np.testing.assert_allclose(table[:, 0], rank, atol=1e-12)


@every_form
def test_a_tied_level_is_exact_with_many_samples(form: OwnQuantile) -> None:
    """Two levels of shares 1/4 and 3/4: the difference of their signals is that of Best-of-n with ties, or the tilt."""
    errors = []
    expected = math.log(0.75 / share_between(0.25, 1, 4, form)) - math.log(0.25 / share_between(0, 0.25, 4, form))
    for size in (16, 64, 256):
        table, quarter = signal_table(4, size, form), size // 4
        errors.append(abs(table[quarter, size - quarter - 1] - table[0, quarter - 1] - expected))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < (0.35 if form == "harmonic" else 0.02)  # its strength falls to 1 - 1/n slowly


def test_a_large_order_neither_overflows_nor_hides() -> None:
    assert np.isfinite(signal_table(900, 200, "tilt")[:, 0]).all()
    assert math.isinf(solve_strength(1e7, 3, "tilt"))
    assert math.isinf(kl_over_best_of_n(1e7, 3, "tilt"))
    most = largest_order(10_000, 8, "tilt", 2.0)
    assert kl_over_best_of_n(most, 8, "tilt") <= 2.0 < kl_over_best_of_n(most + 1, 8, "tilt")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1.0, 8, "tilt"), "n must be > 1"),
        ((math.nan, 8, "tilt"), "n must be > 1"),
        ((2.0, 1, "tilt"), "num_samples >= 2"),
        ((2.0, 8, "clamped"), "unknown form 'clamped'"),
    ],
)
def test_bad_input_is_refused(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        solve_strength(*arguments)


# -- wins against the reference


def test_wins_without_ties_are_the_share_of_better_samples() -> None:
    """And ties are split in halves where n = 1 would be: there a level's law is the policy's own."""
    table = win_table(4, 8)
    assert table[:, 0].tolist() == pytest.approx([1 - a / 8 for a in range(9)])
    halves = win_table(1 + 1e-9, 8)
    assert halves[2, 4] == pytest.approx(1 - 2 / 8 - 4 / 16)
    assert table[0, 8] == pytest.approx(4 / 5)  # all tied: nothing is known, and nothing is asked for
    assert math.isnan(table[5, 4])


@pytest.mark.parametrize("n", [2, 4, 8])
def test_best_of_n_wins_n_in_n_plus_1_whatever_ties(n: int) -> None:
    """Levels whose own shares are eighths, so that 8 samples may show them as they are; half of ties gives less."""
    own = torch.tensor([1, 0, 2, 4, 1], dtype=torch.float64) / 8
    at_most = own.cumsum(0)
    reference = torch.diff(torch.cat([torch.zeros(1).double(), at_most ** (1 / n)]))
    assert torch.allclose(best_of_n_probs(reference[own > 0], torch.arange(4).double(), n), own[own > 0])
    worse, tied = ((at_most - own) * 8).long(), (own * 8).long()
    wins = torch.tensor(win_table(n, 8))[worse, tied]
    assert float((reference * wins).sum()) == pytest.approx(n / (n + 1), abs=1e-12)
    assert float((reference * (1 - at_most + own / 2)).sum()) < n / (n + 1) - 0.015


@pytest.mark.parametrize(("pass_rate", "order"), [(0.1, 3.98), (0.36, 3.64), (0.6, 2.91)])
def test_rewards_of_0_and_1_with_eight_samples(pass_rate: float, order: float) -> None:
    """The order whose pass rate a run comes to rest at, asked for Best-of-4 (docs/theory.md)."""
    policy = 1 - (1 - pass_rate) ** order
    table, mean = torch.tensor(win_table(4, 8)), 0.0
    for wrong in range(9):
        chance = math.comb(8, wrong) * (1 - policy) ** wrong * policy ** (8 - wrong)
        mean += chance * float((1 - pass_rate) * table[0, wrong] + pass_rate * table[wrong, 8 - wrong])
    assert mean == pytest.approx(4 / 5, abs=2e-3)
