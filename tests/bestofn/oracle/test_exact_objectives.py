"""Exact gradients against autograd of the plain loss, fixed points against descent, limits and closed forms."""

import itertools
import math

import numpy as np
import pytest
import torch

from bondlm.bestofn import (
    best_and_worst_probs,
    best_of_n_probs,
    bonbon_fixed_point,
    bonbon_gradient,
    bond_fixed_point,
    bond_gradient,
    jbond_gradient,
    kl_divergence,
    kl_reward_gradient,
    kl_reward_optimum,
    mean_signal,
    regression_fixed_point,
    regression_gradient,
)

ANCHOR = torch.tensor(
    [[0.1, 0.2, 0.3, 0.25, 0.15], [0.5, 0.05, 0.2, 0.15, 0.1], [0.2, 0.2, 0.3, 0.1, 0.2]], dtype=torch.float64
)
REWARDS = torch.tensor(
    [[0.3, -1.0, 2.0, 0.7, 0.1], [0.0, 1.0, 1.0, 2.0, 0.0], [1.0, 1.0, 1.0, 1.0, 1.0]], dtype=torch.float64
)
LOGITS = torch.tensor(
    [[0.3, -1.0, 0.5, 0.2, 1.0], [0.0, 1.0, -2.0, 0.4, 0.0], [0.1, 0.2, 0.3, -0.4, 0.0]], dtype=torch.float64
)
ESTIMATES = [("exact", None, False), ("exact", None, True), ("clamped", 4, False), ("harmonic", 3, True)]


def assert_gradient(exact, loss):
    leaf = LOGITS.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf.log_softmax(-1)).sum(), leaf)
    torch.testing.assert_close(exact, expected, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(exact.sum(-1), torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("estimate", "k", "correction"), ESTIMATES)
@pytest.mark.parametrize(("n", "beta", "gamma"), [(2, 0.5, 0.0), (4, 0.3, 1.0), (8, 1.0, 0.0), (3, 0.0, 0.5)])
def test_bond_gradient_is_that_of_the_jeffreys_objective(n, beta, gamma, estimate, k, correction):
    keywords = {"estimate": estimate, "k": k, "correction": correction}
    best, signal = best_of_n_probs(ANCHOR, REWARDS, n), mean_signal(ANCHOR, REWARDS, n, **keywords)

    def loss(logp):
        probs, to_anchor = logp.exp(), (logp.exp() * (logp - ANCHOR.log())).sum(-1)
        backward = to_anchor - (probs * signal).sum(-1)
        return -(1 - beta) * (best * logp).sum(-1) + beta * backward + gamma * to_anchor

    assert_gradient(bond_gradient(LOGITS, ANCHOR, REWARDS, n, beta, gamma, **keywords), loss)


def test_the_two_level_estimate_is_jbond():
    for k, beta, gamma in [(2, 0.5, 0.0), (5, 1.0, 2.0)]:
        torch.testing.assert_close(
            bond_gradient(LOGITS, ANCHOR, REWARDS, 2, beta, gamma, estimate="jbond", k=k),
            jbond_gradient(LOGITS, ANCHOR, REWARDS, beta, gamma, k=k),
            rtol=1e-12,
            atol=1e-15,
        )


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("n", [2, 4, 16])
def test_bond_with_exact_corrected_quantiles_stops_at_best_of_n(n, beta):
    fixed = bond_fixed_point(ANCHOR, REWARDS, n, beta, correction=True)
    torch.testing.assert_close(fixed, best_of_n_probs(ANCHOR, REWARDS, n), rtol=1e-9, atol=1e-13)


def test_the_dropped_correction_costs_a_fixed_point_on_coarse_distributions_and_nothing_on_fine_ones():
    n = 4
    best = best_of_n_probs(ANCHOR, REWARDS, n)
    assert float(kl_divergence(best, bond_fixed_point(ANCHOR, REWARDS, n, 1.0))[:2].min()) > 0.001
    anchor, rewards = np.full(2000, 1 / 2000), np.arange(2000.0)
    fine = bond_fixed_point(anchor, rewards, n, 1.0)
    assert float(kl_divergence(best_of_n_probs(anchor, rewards, n), fine)) < 1e-5


@pytest.mark.parametrize("n", [2, 4, 8, 16])
def test_harmonic_quantiles_bring_the_fixed_point_nearer_to_best_of_n(n):
    anchor, rewards = np.full(512, 1 / 512), np.arange(512.0)
    best = best_of_n_probs(anchor, rewards, n)
    distance = {
        estimate: float(kl_divergence(bond_fixed_point(anchor, rewards, n, 0.5, estimate=estimate, k=16), best))
        for estimate in ("clamped", "harmonic", "smoothed")
    }
    assert distance["harmonic"] < distance["clamped"] < 2 * distance["smoothed"] < 0.005


@pytest.mark.parametrize("beta_rl", [0.1, 1.0, 10.0])
def test_kl_reward_gradient_and_optimum(beta_rl):
    def loss(logp):
        return (logp.exp() * (beta_rl * (logp - ANCHOR.log()) - REWARDS)).sum(-1)

    assert_gradient(kl_reward_gradient(LOGITS, ANCHOR, REWARDS, beta_rl), loss)
    optimum = kl_reward_optimum(ANCHOR, REWARDS, beta_rl)
    torch.testing.assert_close(
        kl_reward_gradient(optimum.log(), ANCHOR, REWARDS, beta_rl), torch.zeros_like(ANCHOR), rtol=0, atol=1e-14
    )
    ratio = (optimum / ANCHOR).log()
    torch.testing.assert_close(
        (ratio[:, 0] - ratio[:, 1]) * beta_rl, REWARDS[:, 0] - REWARDS[:, 1], rtol=1e-12, atol=1e-14
    )


def test_a_huge_kl_coefficient_keeps_the_anchor_and_none_at_all_climbs():
    assert float(kl_divergence(kl_reward_optimum(ANCHOR, REWARDS, 1e6), ANCHOR).max()) < 1e-11
    gradient = kl_reward_gradient(LOGITS, ANCHOR, REWARDS, 0.0)
    assert gradient[0].argmin() == 2  # descent raises the best outcome most


@pytest.mark.parametrize("num_samples", [None, 4, 9])
@pytest.mark.parametrize("n", [2, 4])
def test_regression_gradient_and_fixed_point(n, num_samples):
    if num_samples is None:
        target = mean_signal(ANCHOR, REWARDS, n, correction=True)
    else:
        target = mean_signal(ANCHOR, REWARDS, n, estimate="harmonic", k=num_samples - 1, correction=True)
    assert_gradient(
        regression_gradient(LOGITS, ANCHOR, REWARDS, n, num_samples),
        lambda logp: (ANCHOR * (target - (logp - ANCHOR.log())) ** 2).sum(-1) / 2,
    )
    fixed = regression_fixed_point(ANCHOR, REWARDS, n, num_samples)
    gradient = regression_gradient(fixed.log(), ANCHOR, REWARDS, n, num_samples)
    torch.testing.assert_close(gradient, torch.zeros_like(ANCHOR), rtol=0, atol=1e-12)


def test_regression_stops_at_best_of_n_with_exact_quantiles_and_near_it_with_many_samples():
    best = best_of_n_probs(ANCHOR, REWARDS, 4)
    torch.testing.assert_close(regression_fixed_point(ANCHOR, REWARDS, 4), best, rtol=1e-10, atol=1e-13)
    distances = [
        float(kl_divergence(best, regression_fixed_point(ANCHOR, REWARDS, 4, m)).max()) for m in (4, 16, 64, 512)
    ]
    assert all(later < earlier for earlier, later in itertools.pairwise(distances))
    assert distances[-1] < 1e-6
    assert distances[0] > 1e-4


@pytest.mark.parametrize("n", [2, 4, 8])
def test_eight_samples_count_ties_to_a_point_of_the_pass_rate(n):
    """0/1 rewards: the regression, and the corrected quantile of BOND with 16; the regression's own 2 do not."""
    passes = torch.arange(0.05, 1.0, 0.05, dtype=torch.float64)
    anchor = torch.stack([1 - passes, passes], dim=1)
    rewards = torch.tensor([0.0, 1.0], dtype=torch.float64).expand_as(anchor)
    best = best_of_n_probs(anchor, rewards, n)
    near = [regression_fixed_point(anchor, rewards, n, 8)] + [
        bond_fixed_point(anchor, rewards, n, beta, estimate=estimate, k=16, correction=True)
        for beta, estimate in itertools.product([0.5, 1.0], ["clamped", "harmonic"])
    ]
    assert max(float((found - best).abs().max()) for found in near) < 0.0105
    assert float(regression_fixed_point(anchor, rewards, 2, 2)[9, 1]) == pytest.approx(0.61, abs=0.001)


def best_and_worst_by_enumeration(anchor, rewards, n):
    """All K^n draws; ties go to the first for the best, to the last for the worst: two different draws if all tie."""
    result = np.zeros((len(anchor), len(anchor)))
    for draw in itertools.product(range(len(anchor)), repeat=n):
        values = [rewards[i] for i in draw]
        best = draw[values.index(max(values))]
        worst = draw[n - 1 - values[::-1].index(min(values))]
        result[best, worst] += math.prod(anchor[i] for i in draw)
    return result


@pytest.mark.parametrize("n", [2, 3, 5])
def test_the_distribution_of_best_and_worst_equals_enumeration(n):
    joint = best_and_worst_probs(ANCHOR, REWARDS, n)
    for row, anchor, rewards in zip(joint, ANCHOR.tolist(), REWARDS.tolist(), strict=True):
        np.testing.assert_allclose(row, best_and_worst_by_enumeration(anchor, rewards, n), atol=1e-15)
    torch.testing.assert_close(joint.sum(-1), best_of_n_probs(ANCHOR, REWARDS, n), rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(joint.sum(-2), best_of_n_probs(ANCHOR, -REWARDS, n), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("alpha", [0.005, 0.5, 1.0])
@pytest.mark.parametrize("n", [2, 4])
def test_bonbon_gradient_and_fixed_point(n, alpha):
    joint, margin = best_and_worst_probs(ANCHOR, REWARDS, n), (n - 1) * sum(1 / i for i in range(1, n))

    def loss(logp):
        h = logp - ANCHOR.log()
        error = h[:, :, None] - h[:, None, :] - margin
        return -alpha * (joint.sum(-1) * logp).sum(-1) + (1 - alpha) * (joint * error**2).sum((-1, -2))

    assert_gradient(bonbon_gradient(LOGITS, ANCHOR, REWARDS, n, alpha), loss)
    fixed = bonbon_fixed_point(ANCHOR, REWARDS, n, alpha)
    gradient = bonbon_gradient(fixed.log(), ANCHOR, REWARDS, n, alpha)
    torch.testing.assert_close(gradient, torch.zeros_like(ANCHOR), rtol=0, atol=1e-12)
    if alpha == 1:
        torch.testing.assert_close(fixed, best_of_n_probs(ANCHOR, REWARDS, n), rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize(("n", "distance"), [(2, 0.035), (4, 0.054), (8, 0.311), (16, 1.58)])
def test_bonbon_does_not_stop_at_best_of_n(n, distance):
    anchor, rewards = np.full(512, 1 / 512), np.arange(512.0)
    fixed = bonbon_fixed_point(anchor, rewards, n, 0.005)
    assert float(kl_divergence(fixed, best_of_n_probs(anchor, rewards, n))) == pytest.approx(distance, rel=0.02)


def test_all_tied_leaves_the_anchor():
    for fixed in (
        bond_fixed_point(ANCHOR, REWARDS, 4, 0.5, 0.3, estimate="clamped", k=5),
        regression_fixed_point(ANCHOR, REWARDS, 4, 8),
        kl_reward_optimum(ANCHOR, REWARDS, 0.1),
        bonbon_fixed_point(ANCHOR, REWARDS, 4, 0.005),
    ):
        torch.testing.assert_close(fixed[2], ANCHOR[2], rtol=1e-10, atol=1e-13)


def test_kinds():
    logits, anchor, rewards = LOGITS.numpy(), ANCHOR.numpy(), REWARDS.numpy()
    for result in (
        bond_gradient(logits, anchor, rewards, 3, 0.5),
        bond_fixed_point(anchor, rewards, 3, 0.5),
        kl_reward_gradient(logits, anchor, rewards, 0.5),
        kl_reward_optimum(anchor, rewards, 0.5),
        regression_gradient(logits, anchor, rewards, 3, 4),
        regression_fixed_point(anchor, rewards, 3),
        bonbon_gradient(logits, anchor, rewards, 3, 0.1),
        bonbon_fixed_point(anchor, rewards, 3, 0.1),
        best_and_worst_probs(anchor, rewards, 3),
        mean_signal(anchor, rewards, 3),
    ):
        assert isinstance(result, np.ndarray)
    assert isinstance(bond_gradient(LOGITS, anchor, rewards, 3, 0.5), torch.Tensor)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bond_gradient(LOGITS, ANCHOR, REWARDS, 2, 1.5), "beta"),
        (lambda: bond_gradient(LOGITS, ANCHOR, REWARDS, 0, 0.5), "^n .*got 0"),
        (
            lambda: bond_gradient(LOGITS, ANCHOR, REWARDS[:1], 2, 0.5),
            r"^anchor_probs and rewards .*\(1, 5\)",
        ),
        (lambda: bond_fixed_point(torch.tensor([1.0, 0.0]), REWARDS[0, :2], 2, 0.5), "anchor_probs .*positive"),
        (lambda: kl_reward_gradient(LOGITS, ANCHOR, REWARDS, -1.0), "beta_rl"),
        (lambda: kl_reward_optimum(ANCHOR, REWARDS, 0.0), "beta_rl"),
        (lambda: best_and_worst_probs(ANCHOR, REWARDS, 1), "^n .*got 1"),
        (lambda: bonbon_gradient(LOGITS, ANCHOR, REWARDS, 2, -0.1), "alpha"),
        (lambda: regression_gradient(LOGITS, ANCHOR, REWARDS, 2, 1), "^k .*got 0"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_best_and_worst_of_an_outcome_below_rounding_is_a_number() -> None:
    """Its level had a mass of 0 from the difference of two sums: 0/0 in its row and column."""
    joint = best_and_worst_probs(torch.tensor([0.6, 0.4, 1e-18]).double(), torch.tensor([0.0, 1.0, 2.0]).double(), 2)
    expected = torch.tensor([[0.36, 0.0, 0.0], [0.48, 0.16, 0.0], [0.0, 0.0, 0.0]]).double()
    assert torch.allclose(joint, expected, atol=1e-12)
