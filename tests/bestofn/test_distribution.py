import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bestofn.brute import best_of_n_by_enumeration, kl, win_prob
from bondlm.bestofn import best_of_n_kl, best_of_n_probs, iterated_best_of_n, kl_bound

TIED = (np.array([0.1, 0.15, 0.2, 0.25, 0.3]), np.array([-1.0, 0.5, 0.5, 2.0, 2.0]))
CASES = {
    "tied": TIED,
    "tied, shuffled": (TIED[0][[3, 0, 4, 2, 1]], TIED[1][[3, 0, 4, 2, 1]]),
    "distinct": (np.array([0.4, 0.05, 0.3, 0.25]), np.array([3.0, -7.0, 0.1, 0.2])),
    "all tied": (np.array([0.7, 0.2, 0.1]), np.array([5.0, 5.0, 5.0])),
    "zero probability": (np.array([0.5, 0.0, 0.5, 0.0, 0.0]), np.array([1.0, 2.0, 2.0, -1.0, 9.0])),
    "one outcome": (np.array([1.0]), np.array([0.0])),
}


@pytest.mark.parametrize("tie_break", ["first", "uniform"])
@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("case", CASES)
def test_distribution_and_kl_equal_the_enumeration_of_all_draws(case, n, tie_break):
    probs, rewards = CASES[case]
    expected = best_of_n_by_enumeration(probs, rewards, n, tie_break)
    np.testing.assert_allclose(best_of_n_probs(probs, rewards, n), expected, rtol=0, atol=1e-12)
    assert best_of_n_kl(probs, rewards, n) == pytest.approx(kl(expected, probs), abs=1e-12)


@settings(deadline=None, database=None, max_examples=60)
@given(
    weights=st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=5),
    levels=st.lists(st.integers(0, 2), min_size=5, max_size=5),
    n=st.integers(1, 4),
)
def test_distribution_of_any_small_space_equals_the_enumeration(weights, levels, n):
    probs = np.array(weights) / sum(weights)
    rewards = np.array(levels[: len(weights)], dtype=float)
    expected = best_of_n_by_enumeration(probs, rewards, n, "first")
    np.testing.assert_allclose(best_of_n_probs(probs, rewards, n), expected, rtol=0, atol=1e-12)
    assert best_of_n_kl(probs, rewards, n) <= kl_bound(n) + 1e-12


@pytest.mark.parametrize("n", [1, 2, 3.5, 16])
@pytest.mark.parametrize("pass_rate", [0.02, 0.5, 0.9])
def test_binary_reward_has_the_pass_rate_form(pass_rate, n):
    probs = np.array([0.3 * (1 - pass_rate), 0.6 * pass_rate, 0.7 * (1 - pass_rate), 0.4 * pass_rate])
    rewards = np.array([0.0, 1.0, 0.0, 1.0])
    right, wrong = (1 - (1 - pass_rate) ** n) / pass_rate, (1 - pass_rate) ** (n - 1)
    np.testing.assert_allclose(best_of_n_probs(probs, rewards, n), probs * np.where(rewards == 1, right, wrong))
    # A binary reward cannot move the policy further than log(1/pass rate).
    assert best_of_n_kl(probs, rewards, 10_000) == pytest.approx(-math.log(pass_rate), rel=1e-9)


@pytest.mark.parametrize("case", CASES)
def test_one_draw_is_the_reference(case):
    probs, rewards = CASES[case]
    np.testing.assert_allclose(best_of_n_probs(probs, rewards, 1), probs, rtol=1e-14)
    assert best_of_n_kl(probs, rewards, 1) == pytest.approx(0.0, abs=1e-15)


@pytest.mark.parametrize("times", [0, 1, 2, 5])
@pytest.mark.parametrize("case", CASES)
def test_iterating_best_of_two_doubles_the_order(case, times):
    probs, rewards = CASES[case]
    expected = best_of_n_probs(probs, rewards, 2**times)
    np.testing.assert_allclose(iterated_best_of_n(probs, rewards, 2, times), expected, rtol=1e-12, atol=1e-300)


def test_kl_of_one_draw_is_never_negative():
    probs = np.random.default_rng(0).dirichlet(np.ones(7), size=500)
    rewards = np.random.default_rng(1).integers(0, 4, size=(500, 7))
    kls = best_of_n_kl(probs, rewards, 1)
    assert ((kls >= 0) & (kls < 1e-15)).all()


def test_fractional_orders_compose_and_lie_between_the_integers():
    probs, rewards = TIED
    twice = best_of_n_probs(best_of_n_probs(probs, rewards, 1.5), rewards, 2.5)
    np.testing.assert_allclose(twice, best_of_n_probs(probs, rewards, 3.75), rtol=1e-13)
    means = [float(best_of_n_probs(probs, rewards, n) @ rewards) for n in (1, 1.2, 2, 2.7, 3)]
    assert means == sorted(set(means))


@pytest.mark.parametrize(("n", "expected"), [(8, 1.163), (32, 2.005)])
def test_kl_of_eight_equal_outcomes(n, expected):
    uniform = np.full(8, 1 / 8)
    assert best_of_n_kl(uniform, np.arange(8.0), n) == pytest.approx(expected, abs=5e-4)


def test_tied_example_of_the_notes():
    probs, rewards = TIED
    assert best_of_n_kl(probs, rewards, 4) == pytest.approx(0.4447, abs=5e-5)
    assert kl_bound(4) == pytest.approx(0.6363, abs=5e-5)
    assert win_prob(rewards, best_of_n_probs(probs, rewards, 4), probs) == pytest.approx(0.7065, abs=5e-5)


@pytest.mark.parametrize("n", [2, 4, 16])
def test_many_rare_outcomes_approach_the_bound_from_below(n):
    gaps = [kl_bound(n) - best_of_n_kl(np.full(K, 1 / K), np.arange(float(K)), n) for K in (100, 10_000)]
    assert 0 < gaps[1] < gaps[0] / 10 < 0.01


@pytest.mark.parametrize(("n", "expected"), [(2, 0.193), (4, 0.636), (8, 1.204), (16, 1.835)])
def test_bound_values(n, expected):
    assert kl_bound(n) == pytest.approx(expected, abs=5e-4)
    assert kl_bound(1) == 0.0


def test_tiny_and_huge_masses_stay_accurate():
    probs = np.array([1e-18, 1.0 - 1e-12, 1e-12])
    best = best_of_n_probs(probs, np.array([0.0, 1.0, 2.0]), 1000)
    assert best[2] == pytest.approx(1e-9, rel=1e-6)
    assert best[0] == 0.0
    # A rare level under a likely one: plain subtraction of two numbers near 1 would lose it.
    low = best_of_n_probs(np.array([0.9, 1e-17, 0.1 - 1e-17]), np.array([0.0, 1.0, 2.0]), 2)
    assert low[1] == pytest.approx(2 * 0.9 * 1e-17, rel=1e-9)
    # Huge n: p_≤ = 1 − 1e-13 is known to 1e-16 only, the mass above it far better.
    middle = best_of_n_probs(np.array([0.5, 0.5 - 1e-13, 1e-13]), np.array([0.0, 1.0, 2.0]), 1e13)
    assert middle[1] == pytest.approx(math.exp(-1), rel=1e-9)
    top = best_of_n_probs(np.full(8, 1 / 8), np.arange(8.0), 1e12)
    np.testing.assert_allclose(top, np.eye(8)[7], rtol=0, atol=1e-15)


def test_batches_are_rows_and_shapes_of_reward_do_not_matter():
    generator = torch.Generator().manual_seed(0)
    probs = torch.rand(3, 2, 5, generator=generator, dtype=torch.float64).softmax(-1)
    rewards = torch.randint(0, 3, (3, 2, 5), generator=generator)
    batch, kls = best_of_n_probs(probs, rewards, 3), best_of_n_kl(probs, rewards, 3)
    assert batch.shape == (3, 2, 5)
    assert kls.shape == (3, 2)
    for i in range(3):
        for j in range(2):
            assert torch.equal(batch[i, j], best_of_n_probs(probs[i, j], rewards[i, j], 3))
            assert torch.equal(kls[i, j], best_of_n_kl(probs[i, j], rewards[i, j], 3))
    torch.testing.assert_close(batch.sum(-1), torch.ones(3, 2, dtype=torch.float64))
    assert torch.equal(batch, best_of_n_probs(probs, (rewards.double() / 7).exp(), 3))


def test_the_kind_that_comes_in_goes_out_in_float64():
    probs, rewards = TIED
    as_numpy = best_of_n_probs(probs, rewards, 3)
    as_torch = best_of_n_probs(torch.tensor(probs), torch.tensor(rewards), 3)
    assert isinstance(as_numpy, np.ndarray)
    assert as_numpy.dtype == np.float64
    assert as_torch.dtype == torch.float64
    np.testing.assert_array_equal(as_numpy, as_torch.numpy())
    assert isinstance(best_of_n_kl(probs, rewards, 3), np.float64)
    assert best_of_n_kl(torch.tensor(probs), torch.tensor(rewards), 3).shape == ()
    float32 = torch.tensor(probs).float().log_softmax(-1).exp()
    assert float(best_of_n_probs(float32, torch.tensor(rewards), 3).sum()) == pytest.approx(1.0, abs=1e-14)


@pytest.mark.parametrize(
    ("probs", "rewards", "n", "message"),
    [
        ([0.5, 0.4], [0.0, 1.0], 2, "^ref_probs .*sum"),
        ([1.5, -0.5], [0.0, 1.0], 2, r"^ref_probs .*-0\.5"),
        ([math.nan, 1.0], [0.0, 1.0], 2, "^ref_probs .*nan"),
        ([0.5, 0.5], [0.0, math.nan], 2, "^rewards .*nan"),
        ([0.5, 0.5], [0.0, math.inf], 2, "^rewards .*inf"),
        ([0.5, 0.5], [0.0, 1.0, 2.0], 2, "^ref_probs and rewards "),
        ([], [], 2, r"^ref_probs .*\(0,\)"),
        (1.0, 1.0, 2, r"^ref_probs .*\(\)"),
        ([0.5, 0.5], [0.0, 1.0], 0.5, r"^n .*0\.5"),
        ([0.5, 0.5], [0.0, 1.0], math.nan, "^n .*nan"),
        ([0.5, 0.5], [0.0, 1.0], math.inf, "^n .*inf"),
        ([0.5, 0.5], ["a", "b"], 2, "^rewards .*'a'"),
    ],
)
@pytest.mark.parametrize("function", [best_of_n_probs, best_of_n_kl])
def test_bad_input_is_refused(function, probs, rewards, n, message):
    with pytest.raises(ValueError, match=message):
        function(np.array(probs), np.array(rewards), n)


def test_negative_rounds_and_small_orders_are_refused():
    with pytest.raises(ValueError, match=r"^times .*-1"):
        iterated_best_of_n(*TIED, 2, -1)
    with pytest.raises(ValueError, match=r"^n .*0\.99"):
        kl_bound(0.99)


def test_a_softmax_over_a_vocabulary_sums_to_1_well_enough():
    """In fp32, 5e-6 are missing from 152,000 outcomes; what is missing is divided out."""
    logits = 3 * torch.randn(4, 152_000, generator=torch.Generator().manual_seed(0))
    probs, rewards = logits.softmax(-1), torch.arange(152_000.0).expand(4, -1)
    probs = probs * torch.tensor([[1.0], [1.00001], [0.99999], [1.00005]])  # as other machines may add up
    best = best_of_n_probs(probs, rewards, 4)
    assert torch.allclose(best.sum(-1), torch.ones(4).double(), atol=1e-12)
    with pytest.raises(ValueError, match="must sum to 1"):
        best_of_n_probs(probs * 0.999, rewards, 4)
