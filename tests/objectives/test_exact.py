"""Every objective against the oracle: its mean gradient is the exact one, and descent on that ends where it should."""

import math

import pytest
import torch

from bondlm.bestofn import best_of_n_probs, iterated_best_of_n, kl_divergence, mean_signal
from bondlm.objectives import BOND, RLOO, VBON, BestOfNRegression, BestOfNSFT, BoNBoN, Reinforce

from .tables import (
    ANCHOR,
    LOGITS,
    NAMES,
    OBJECTIVES,
    REWARDS,
    draw,
    enumerated_gradient,
    exact_fixed_point,
    exact_gradient,
    loss_on,
    sampled_gradients,
    standard_errors_off,
)

every_objective = pytest.mark.parametrize("name", OBJECTIVES)
every_table = pytest.mark.parametrize("table", range(3), ids=NAMES)


@every_table
@every_objective
def test_mean_over_all_draws_is_the_exact_gradient(name, table):
    objective = OBJECTIVES[name]
    tables = LOGITS[table], ANCHOR[table], REWARDS[table]
    exact = exact_gradient(objective, *tables)
    torch.testing.assert_close(enumerated_gradient(objective, *tables), exact, rtol=1e-10, atol=1e-12)
    assert float(exact.norm()) > 0.01, "a gradient of zero proves nothing"


@every_objective
def test_mean_over_many_draws_is_the_exact_gradient(name):
    """With the baseline over a batch of different prompts, which enumeration leaves out."""
    gradients = sampled_gradients(OBJECTIVES[name], draws_per_table=20_000, seed=1)
    for gradient_DK, *tables in zip(gradients, LOGITS, ANCHOR, REWARDS, strict=True):
        assert standard_errors_off(gradient_DK, exact_gradient(OBJECTIVES[name], *tables)) < 4


@pytest.mark.parametrize("objective", [RLOO(beta_rl=0.2), RLOO(beta_rl=1.0, num_samples=4)])
def test_the_baseline_inside_a_prompt_leaves_the_mean_gradient(objective):
    for tables in zip(LOGITS, ANCHOR, REWARDS, strict=True):
        torch.testing.assert_close(
            enumerated_gradient(objective, *tables, use_baseline=True),
            exact_gradient(objective, *tables),
            rtol=1e-10,
            atol=1e-12,
        )


@every_objective
def test_descent_with_exact_gradients_reaches_the_stated_fixed_point(name):
    objective = OBJECTIVES[name]
    target = exact_fixed_point(objective, ANCHOR, REWARDS)
    logits, momentum = ANCHOR.log(), torch.zeros_like(ANCHOR)
    for _ in range(2000):
        gradient = exact_gradient(objective, logits, ANCHOR, REWARDS)
        if float(gradient.abs().max()) < 1e-8:
            break
        momentum = 0.9 * momentum + gradient
        logits = logits - 0.3 * momentum
    assert float(kl_divergence(target, logits.softmax(-1)).max()) < 1e-6
    assert float(kl_divergence(target, ANCHOR)[:2].min()) > 0.01, "the fixed point is not where descent started"
    torch.testing.assert_close(target[2], ANCHOR[2], rtol=1e-9, atol=1e-12)  # all tied: stay


@pytest.mark.parametrize(
    "objective",
    [
        BestOfNSFT(n=4),
        BOND(n=4, beta=0.0),
        BOND(n=4, beta=0.5, num_anchor_samples=2000, log_quantile="harmonic", correction=True),
        BestOfNRegression(n=4, num_samples=2000),
    ],
    ids=lambda objective: type(objective).__name__,
)
def test_these_stop_at_best_of_n(objective):
    best = best_of_n_probs(ANCHOR, REWARDS, 4)
    assert float(kl_divergence(best, exact_fixed_point(objective, ANCHOR, REWARDS)).max()) < 1e-6


def test_vbon_stops_at_the_normalised_bound():
    """∝ anchor · F^(n-1), F strict: with many samples the lowest outcome loses all its mass."""
    fixed = exact_fixed_point(VBON(n=3, num_anchor_samples=100_000), ANCHOR[0], REWARDS[0])
    order = REWARDS[0].argsort()
    below = ANCHOR[0][order].cumsum(0) - ANCHOR[0][order]
    expected = ANCHOR[0][order] * below**2
    torch.testing.assert_close(fixed[order], expected / expected.sum(), rtol=1e-3, atol=1e-6)
    smoothed = mean_signal(ANCHOR, REWARDS, 3, estimate="smoothed", k=16)
    few = exact_fixed_point(VBON(n=3, num_anchor_samples=16), ANCHOR, REWARDS)
    torch.testing.assert_close(few, (ANCHOR.log() + smoothed).softmax(-1), rtol=1e-10, atol=1e-13)


def test_iterated_distillation_multiplies_the_order():
    """Best-of-2 distilled three times, each from the fixed point before, is Best-of-8 (Algorithm 1, Eq. 16)."""
    anchor, objective = ANCHOR, BestOfNSFT(n=2)
    for times in range(1, 4):
        anchor = exact_fixed_point(objective, anchor, REWARDS)
        torch.testing.assert_close(anchor, iterated_best_of_n(ANCHOR, REWARDS, 2, times), rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(anchor, best_of_n_probs(ANCHOR, REWARDS, 8), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("name", ["jbond", "bond", "best_of_n_sft", "reinforce", "rloo", "grpo", "vbon"])
def test_descent_on_samples_comes_close_to_the_fixed_point(name):
    """The real loop: draw, select, baseline, loss, gradient. The anchor stands still."""
    objective, generator = OBJECTIVES[name], torch.Generator().manual_seed(0)
    target, rows = exact_fixed_point(objective, ANCHOR, REWARDS), 192
    logits = LOGITS.clone()
    before = float(kl_divergence(target, logits.softmax(-1)).mean())
    for step in range(300):
        leaf = logits.clone().requires_grad_()
        tables = [table.repeat(rows, 1) for table in (leaf, ANCHOR, REWARDS)]
        outcomes_PM, noise_PM = draw(objective.plan, tables[0].detach(), tables[1], generator)
        loss_on(objective, outcomes_PM, noise_PM, *tables).loss_P.sum().div(rows).backward()
        logits = logits - (0.5 if step < 200 else 0.1) * leaf.grad
    assert float(kl_divergence(target, logits.softmax(-1)).mean()) < 0.02 * before


def test_bonbon_margin_is_the_papers():
    assert BoNBoN(n=8).margin == pytest.approx(18.15, abs=5e-3)
    assert 1 / (2 * BoNBoN(n=8).margin) == pytest.approx(0.02755, abs=5e-6)


@pytest.mark.parametrize("n", [2, 4, 8])
def test_bonbon_margin_is_the_mean_log_ratio_of_best_to_worst_under_best_of_n(n):
    generator = torch.Generator().manual_seed(0)
    u = torch.rand(200_000, n, generator=generator, dtype=torch.float64)
    difference = (n - 1) * (u.amax(1).log() - u.amin(1).log())
    standard_error = float(difference.std()) / math.sqrt(len(difference))
    assert abs(float(difference.mean()) - BoNBoN(n=n).margin) < 4 * standard_error


@pytest.mark.parametrize("objective", [Reinforce(beta_rl=1e5), RLOO(beta_rl=1e5)])
def test_a_huge_kl_coefficient_stays_at_the_anchor(objective):
    assert float(kl_divergence(exact_fixed_point(objective, ANCHOR, REWARDS), ANCHOR).max()) < 1e-9
    gradient = enumerated_gradient(objective, LOGITS[0], ANCHOR[0], REWARDS[0]) / 1e5
    pull = exact_gradient(Reinforce(beta_rl=1.0), LOGITS[0], ANCHOR[0], torch.zeros_like(REWARDS[0]))
    torch.testing.assert_close(gradient, pull, rtol=1e-3, atol=1e-4)
