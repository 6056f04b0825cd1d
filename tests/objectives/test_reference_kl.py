"""gamma_ref * KL(policy || reference): its sampled gradient, its baseline, and where a moving anchor comes to rest."""

import itertools
import math

import numpy as np
import pytest
import torch

from bondlm.bestofn import (
    backward_kl_gradient,
    best_of_n_probs,
    bond_gradient,
    bond_resting_point,
    kl_divergence,
    kl_reward_gradient,
    kl_reward_optimum,
)
from bondlm.bestofn.own_quantiles import reached_by
from bondlm.objectives import BOND, JBOND, RLOO, VBON, Loss, Reinforce, reference_pull, with_reference_kl

from .tables import ANCHOR, LOGITS, REWARDS, bond_keywords, draw, exact_gradient, loss_on, standard_errors_off

REF = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.1, 0.3, 0.3, 0.3], [0.3, 0.2, 0.1, 0.4]], dtype=torch.float64)
MOVING = [JBOND(), BOND(n=3, beta=0.7, num_anchor_samples=4), VBON(n=3, num_anchor_samples=4)]
MOVING += [Reinforce(beta_rl=1.5), RLOO(beta_rl=0.8, num_samples=3)]


def pull_alone(logp, pull):
    """Loss of the pull without any objective."""
    return with_reference_kl(Loss(torch.zeros(len(logp)), {}), logp, pull).loss_P


def pulled_loss(objective, outcomes, noise, logits, anchor, rewards, ref, gamma_ref, use_baseline=True):
    """Objective and pull on given outcomes, as the trainer adds them."""
    loss = loss_on(objective, outcomes, noise, logits, anchor, rewards, use_baseline)
    policy = outcomes[:, : objective.plan.policy]
    logp = logits.log_softmax(-1).gather(1, policy)
    log_ratio = logp.detach() - ref.log().gather(1, policy)
    baseline = objective.baseline(log_ratio) if use_baseline else torch.zeros_like(log_ratio)
    return with_reference_kl(loss, logp, reference_pull(log_ratio, baseline, gamma_ref)).loss_P


@pytest.mark.parametrize("objective", MOVING, ids=lambda objective: type(objective).__name__)
def test_the_mean_gradient_is_that_of_the_kl(objective):
    """Over many draws, with the objective's baseline over different prompts, for the sum and for the pull alone."""
    rows, generator = 20_000, torch.Generator().manual_seed(2)
    logits, anchor, rewards, ref = (table.repeat(rows, 1) for table in (LOGITS, ANCHOR, REWARDS, REF))
    outcomes, noise = draw(objective.plan, logits, anchor, generator)
    for gamma_ref in (0.0, 0.6):
        leaf = logits.clone().requires_grad_()
        loss = pulled_loss(objective, outcomes, noise, leaf, anchor, rewards, ref, gamma_ref)
        gradients = torch.autograd.grad(loss.sum(), leaf)[0].view(rows, 3, -1).transpose(0, 1)
        expected = exact_gradient(objective, LOGITS, ANCHOR, REWARDS) + gamma_ref * backward_kl_gradient(LOGITS, REF)
        for gradient, exact in zip(gradients, expected, strict=True):
            assert standard_errors_off(gradient, exact) < 4


@pytest.mark.parametrize("sign", [1, -1])
def test_all_draws_of_one_sample(sign):
    """Exactly the gradient of the KL; a flipped sign is far from it."""
    leaf = LOGITS[0].clone().requires_grad_()
    logp = leaf.log_softmax(-1)[:, None]
    log_ratio = sign * (logp.detach() - REF[0].log()[:, None])
    loss = pull_alone(logp, reference_pull(log_ratio, torch.zeros_like(log_ratio), 0.7))
    (gradient,) = torch.autograd.grad((loss * LOGITS[0].softmax(-1)).sum(), leaf)
    error = (gradient - 0.7 * backward_kl_gradient(LOGITS[0], REF[0])).abs().max()
    assert (float(error) < 1e-14) == (sign == 1)


@pytest.mark.parametrize("objective", [JBOND(), RLOO(beta_rl=1.0, num_samples=4)], ids=["JBOND", "RLOO"])
def test_the_baseline_takes_noise_away(objective):
    """At a policy far from the reference, as a long run has it."""
    generator, spread = torch.Generator().manual_seed(0), []
    ref, logits = torch.tensor([[0.92, 0.03, 0.02, 0.02, 0.01]]).double(), torch.tensor([[-9.0, 0, 0, 0, 0]]).double()
    assert float(kl_divergence(logits.softmax(-1), ref)) > 2
    outcomes = 1 + torch.randint(4, (20_000, objective.plan.policy), generator=generator)
    for use_baseline in (True, False):
        leaf = logits.repeat(len(outcomes), 1).requires_grad_()
        logp = leaf.log_softmax(-1).gather(1, outcomes)
        log_ratio = logp.detach() - ref.log().expand(len(outcomes), -1).gather(1, outcomes)
        baseline = objective.baseline(log_ratio) if use_baseline else torch.zeros_like(log_ratio)
        loss = pull_alone(logp, reference_pull(log_ratio, baseline, 1.0))
        spread.append(float(torch.autograd.grad(loss.sum(), leaf)[0].var(0).sum()))
    assert spread[0] < 0.2 * spread[1]


def test_only_the_policys_samples_are_pulled():
    logp = torch.tensor([[-1.0, -2.0], [-3.0, -4.0]], requires_grad=True)
    loss = pull_alone(logp, torch.tensor([[0.5], [-2.0]]))
    assert loss.tolist() == [-0.5, 6.0]
    (gradient,) = torch.autograd.grad(loss.sum(), logp)
    assert gradient.tolist() == [[0.5, 0.0], [-2.0, 0.0]]


# -- where it rests


@pytest.mark.parametrize(
    ("objective", "gamma_ref"),
    [(JBOND(), 1.0), (JBOND(beta=1.0), 0.8), (BOND(n=4, beta=0.3, num_anchor_samples=4), 0.9), (MOVING[2], 1.5)],
    ids=lambda value: type(value).__name__,
)
def test_descent_with_an_ema_anchor_comes_to_rest_there(objective, gamma_ref):
    keywords = {name: value for name, value in bond_keywords(objective).items() if name != "gamma"}
    target = bond_resting_point(ANCHOR, REWARDS, gamma_ref=gamma_ref, **keywords)
    logits, anchor = ANCHOR.log(), ANCHOR
    for _ in range(1000):
        gradient = exact_gradient(objective, logits, anchor, REWARDS) + gamma_ref * backward_kl_gradient(logits, ANCHOR)
        logits = logits - gradient
        anchor = 0.7 * anchor + 0.3 * logits.softmax(-1)
    assert float(kl_divergence(target, logits.softmax(-1)).max()) < 1e-6
    assert float(kl_divergence(target, ANCHOR)[:2].min()) > 0.05
    torch.testing.assert_close(target[2], ANCHOR[2], rtol=1e-9, atol=1e-12)  # all tied


@pytest.mark.parametrize(("beta", "gamma_ref"), list(itertools.product((0.0, 0.5, 1.0), (0.6, 2.0))))
def test_the_gradient_vanishes_there(beta, gamma_ref):
    keywords = {"n": 2, "beta": beta, "estimate": "jbond", "k": 2}
    probs = bond_resting_point(ANCHOR, REWARDS, gamma_ref=gamma_ref, **keywords)
    gradient = bond_gradient(probs.log(), probs, REWARDS, **keywords)
    total = gradient + gamma_ref * backward_kl_gradient(probs.log(), ANCHOR)
    assert float(total.abs().max()) < 1e-10


@pytest.mark.parametrize(("n", "gamma_ref"), [(2, 2.0), (2, 1.25), (3, 4.0)])
def test_with_exact_quantiles_it_is_best_of_n_of_another_order(n, gamma_ref):
    """gamma_ref log(pi / ref) = (n - 1) log p_pi is Best-of-N's own equation, 1 - 1/N = (n - 1) / gamma_ref."""
    ref, rewards = torch.full((400,), 1 / 400, dtype=torch.float64), torch.arange(400, dtype=torch.float64)
    order = gamma_ref / (gamma_ref - (n - 1))
    reached = bond_resting_point(ref, rewards, n, 1.0, gamma_ref)
    assert float(kl_divergence(best_of_n_probs(ref, rewards, order), reached)) < 1e-3
    with pytest.raises(RuntimeError, match="no fixed point"):
        bond_resting_point(ref[:50] * 8, rewards[:50], n, 1.0, 0.9 * (n - 1))


@pytest.mark.parametrize(("beta", "gamma_ref", "order", "ratio"), [(0.5, 0.5, 4.87, 1.21), (0.5, 1.0, 2.30, 0.94)])
def test_the_n_that_jbond_keeps(beta, gamma_ref, order, ratio):
    """Continuous rewards: 2 (1 - beta) p - beta log 16 (1 - p)^2 over gamma_ref, a polynomial in the own quantile."""
    policy = reached_by(np.array([-beta * math.log(16), 1 - beta, 2 * (1 - beta)]) / gamma_ref)
    reached = policy.win_rate / (1 - policy.win_rate)
    assert reached == pytest.approx(order, abs=5e-3)
    assert policy.kl / (math.log(reached) - (reached - 1) / reached) == pytest.approx(ratio, abs=5e-3)
    ref, rewards = torch.full((400,), 1 / 400, dtype=torch.float64), torch.arange(400, dtype=torch.float64)
    probs = bond_resting_point(ref, rewards, 2, beta, gamma_ref, estimate="jbond", k=2)
    win_rate = float((probs * (rewards + 0.5) / 400).sum())
    assert win_rate / (1 - win_rate) == pytest.approx(order, rel=5e-3)


def test_rewards_with_a_moving_anchor_rest_at_the_tilt_by_gamma_ref():
    for beta_rl in (0.1, 2.0):
        rest = kl_reward_optimum(ANCHOR, REWARDS, 0.7)
        gradient = kl_reward_gradient(rest.log(), rest, REWARDS, beta_rl)
        total = gradient + 0.7 * backward_kl_gradient(rest.log(), ANCHOR)
        assert float(total.abs().max()) < 1e-12


@pytest.mark.parametrize("gamma_ref", [0.0, -1.0, math.inf, math.nan])
def test_a_weight_that_does_not_pull_is_refused(gamma_ref):
    with pytest.raises(ValueError, match="gamma"):
        bond_resting_point(ANCHOR, REWARDS, 2, 0.5, gamma_ref)
