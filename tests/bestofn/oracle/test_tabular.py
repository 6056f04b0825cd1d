import itertools
import math

import numpy as np
import pytest
import torch

from bestofn.brute import best_of_n_by_enumeration
from bondlm.bestofn import (
    backward_kl_gradient,
    best_of_n_probs,
    forward_kl_gradient,
    jbond_backward_target,
    jbond_fixed_point,
    jbond_gradient,
    jeffreys_gradient,
    kl_divergence,
    mean_two_level_reward,
)

ANCHOR = torch.tensor([[0.1, 0.15, 0.2, 0.25, 0.3], [0.5, 0.2, 0.05, 0.05, 0.2]], dtype=torch.float64)
REWARDS = torch.tensor([[0.0, 1.0, 1.0, 2.0, 2.0], [0.3, 0.2, 5.0, -1.0, 0.1]], dtype=torch.float64)
LOGITS = torch.tensor([[0.3, -1.0, 0.5, 0.2, 2.0], [0.0, 1.0, -2.0, 0.4, 0.0]], dtype=torch.float64)
WEIGHTS = [(0.0, 0.0), (1.0, 0.0), (0.5, 0.0), (0.5, 1.0), (0.3, 2.5)]


def kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return (p * (p.log() - q.log())).sum(-1)


def two_anchor_reward_by_enumeration(anchor: np.ndarray, rewards: np.ndarray) -> np.ndarray:
    """Mean of Eq. 17 over all pairs of anchor samples."""
    result = np.zeros(len(anchor))
    for i, j in itertools.product(range(len(anchor)), repeat=2):
        below_both = rewards < min(rewards[i], rewards[j])
        result -= math.log(16) * anchor[i] * anchor[j] * below_both
    return result


def exact_objective(logits: torch.Tensor, beta: float, gamma: float) -> torch.Tensor:
    """(1−β)·KL(Bo2‖π) + β·(KL(π‖anchor) − E_π[r]) + γ·KL(π‖anchor), from enumerations alone, summed over prompts."""
    total = torch.zeros((), dtype=torch.float64)
    for logits_K, anchor, rewards in zip(logits, ANCHOR, REWARDS, strict=True):
        probs = logits_K.softmax(-1)
        best = torch.from_numpy(best_of_n_by_enumeration(anchor.numpy(), rewards.numpy(), 2, "first"))
        reward = torch.from_numpy(two_anchor_reward_by_enumeration(anchor.numpy(), rewards.numpy()))
        total = total + (1 - beta) * kl(best, probs) + (beta + gamma) * kl(probs, anchor) - beta * probs @ reward
    return total


def autograd(function, logits: torch.Tensor) -> torch.Tensor:
    leaf = logits.clone().requires_grad_()
    return torch.autograd.grad(function(leaf), leaf)[0]


def finite_differences(function, logits: torch.Tensor, step: float = 1e-5) -> torch.Tensor:
    result = torch.zeros_like(logits)
    for index in itertools.product(*map(range, logits.shape)):
        shift = torch.zeros_like(logits)
        shift[index] = step
        result[index] = (function(logits + shift) - function(logits - shift)) / (2 * step)
    return result


def test_mean_reward_equals_all_pairs_of_anchors():
    for anchor, rewards in zip(ANCHOR.numpy(), REWARDS.numpy(), strict=True):
        expected = two_anchor_reward_by_enumeration(anchor, rewards)
        np.testing.assert_allclose(mean_two_level_reward(anchor, rewards), expected, atol=1e-15)
    worst = mean_two_level_reward(ANCHOR, REWARDS, k=5)[0, 0]
    assert float(worst) == pytest.approx(2**5 * math.log(0.5) * 0.9**5, rel=1e-12)


@pytest.mark.parametrize(("beta", "gamma"), WEIGHTS)
def test_jbond_gradient_is_that_of_the_exact_objective(beta, gamma):
    gradient = jbond_gradient(LOGITS, ANCHOR, REWARDS, beta, gamma)
    torch.testing.assert_close(
        gradient, autograd(lambda x: exact_objective(x, beta, gamma), LOGITS), rtol=1e-12, atol=1e-14
    )
    torch.testing.assert_close(
        gradient, finite_differences(lambda x: exact_objective(x, beta, gamma), LOGITS), rtol=1e-7, atol=1e-8
    )
    torch.testing.assert_close(gradient.sum(-1), torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-15)


@pytest.mark.parametrize(("beta", "gamma"), WEIGHTS)
def test_jbond_gradient_is_the_expected_estimator_of_algorithm_2(beta, gamma):
    # All outcomes of one step: the policy's y, two anchor samples, a first-index winner; signs as in bond.md 1.6, E1.
    for logits, anchor, rewards in zip(LOGITS, ANCHOR, REWARDS, strict=True):
        logp = logits.log_softmax(-1)
        scores = torch.eye(5, dtype=torch.float64) - logp.exp()  # row y: gradient of log π(y)
        expected = torch.zeros(5, dtype=torch.float64)
        for y, i, j in itertools.product(range(5), repeat=3):
            weight = logp[y].exp() * anchor[i] * anchor[j]
            winner = j if rewards[j] > rewards[i] else i
            penalty = -math.log(16) if rewards[y] < min(rewards[i], rewards[j]) else 0.0
            log_ratio = logp[y] - anchor[y].log()
            step = -(1 - beta) * scores[winner] - beta * scores[y] * (penalty - log_ratio)
            expected += weight * (step + gamma * scores[y] * log_ratio)
        torch.testing.assert_close(
            jbond_gradient(logits, anchor, rewards, beta, gamma), expected, rtol=1e-12, atol=1e-14
        )


@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
def test_divergence_gradients(beta):
    target = ANCHOR.roll(1, 0)
    exact = autograd(lambda x: kl(target, x.softmax(-1)).sum(), LOGITS)
    torch.testing.assert_close(forward_kl_gradient(LOGITS, target), exact, rtol=1e-12, atol=1e-14)
    exact = autograd(lambda x: kl(x.softmax(-1), target).sum(), LOGITS)
    torch.testing.assert_close(backward_kl_gradient(LOGITS, target), exact, rtol=1e-12, atol=1e-14)

    def jeffreys(x: torch.Tensor) -> torch.Tensor:
        return ((1 - beta) * kl(target, x.softmax(-1)) + beta * kl(x.softmax(-1), target)).sum()

    torch.testing.assert_close(
        jeffreys_gradient(LOGITS, target, beta), autograd(jeffreys, LOGITS), rtol=1e-12, atol=1e-14
    )


def test_the_general_order_aims_at_best_of_n():
    # With the exact log-quantile in place of the two-level reward both parts would stop at Best-of-n. The two-level
    # reward of k = n = 4 is close to it where it should be: nearer to Best-of-4 than to Best-of-2 and Best-of-8.
    num_outcomes = 512
    anchor, rewards = np.full(num_outcomes, 1 / num_outcomes), np.arange(float(num_outcomes))
    fixed = jbond_fixed_point(anchor, rewards, 0.5, 0.0, k=2, n=4)
    distance = {n: float(kl_divergence(fixed, best_of_n_probs(anchor, rewards, n))) for n in (2, 4, 8)}
    assert distance[4] < 0.1 * min(distance[2], distance[8])
    gradient = jbond_gradient(np.log(fixed), anchor, rewards, 0.0, 0.0, n=4)
    np.testing.assert_allclose(gradient, fixed - best_of_n_probs(anchor, rewards, 4), atol=1e-15)


def test_fixed_point_of_the_backward_part_is_close_to_best_of_two():
    num_outcomes = 4096
    anchor, rewards = np.full(num_outcomes, 1 / num_outcomes), np.arange(float(num_outcomes))
    fixed, best = jbond_backward_target(anchor, rewards), best_of_n_probs(anchor, rewards, 2)
    assert float(kl_divergence(fixed, best)) == pytest.approx(0.0078, abs=5e-5)
    assert float(kl_divergence(best, fixed)) == pytest.approx(0.0059, abs=5e-5)
    middle = (np.arange(num_outcomes) + 0.5) / num_outcomes
    assert fixed @ middle == pytest.approx(0.6763, abs=5e-5)
    assert best @ middle == pytest.approx(2 / 3, abs=5e-4)
    assert float(kl_divergence(fixed, anchor)) == pytest.approx(0.209, abs=5e-4)
    assert float(kl_divergence(best, anchor)) == pytest.approx(0.193, abs=5e-4)


@pytest.mark.parametrize("gamma", [0.0, 0.7, 4.0])
def test_fixed_point_with_beta_one_has_a_closed_form(gamma):
    reward = mean_two_level_reward(ANCHOR, REWARDS)
    expected = (ANCHOR.log() + reward / (1 + gamma)).softmax(-1)
    torch.testing.assert_close(jbond_fixed_point(ANCHOR, REWARDS, 1.0, gamma), expected, rtol=1e-12, atol=0)
    if gamma == 0:
        torch.testing.assert_close(jbond_backward_target(ANCHOR, REWARDS), expected, rtol=1e-12, atol=0)


def test_fixed_point_with_beta_zero_is_best_of_two():
    expected = best_of_n_probs(ANCHOR, REWARDS, 2)
    torch.testing.assert_close(jbond_fixed_point(ANCHOR, REWARDS, 0.0, 0.0), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(jbond_fixed_point(ANCHOR, REWARDS, 1e-9, 0.0), expected, rtol=1e-7, atol=0)


@pytest.mark.parametrize("beta_gamma", [*WEIGHTS, (0.0, 0.5), (0.01, 0.0), (0.5, 50.0)])
@pytest.mark.parametrize("seed", range(3))
def test_gradient_vanishes_at_the_fixed_point(seed, beta_gamma):
    generator = torch.Generator().manual_seed(seed)
    anchor = (4 * torch.randn(6, 9, generator=generator, dtype=torch.float64)).softmax(-1)
    rewards = torch.randint(0, 5, (6, 9), generator=generator)
    fixed = jbond_fixed_point(anchor, rewards, *beta_gamma)
    gradient = jbond_gradient(fixed.log(), anchor, rewards, *beta_gamma)
    assert float(gradient.norm(dim=-1).max()) < 1e-11
    torch.testing.assert_close(fixed.sum(-1), torch.ones(6, dtype=torch.float64), rtol=1e-12, atol=0)


@pytest.mark.parametrize("beta_gamma", WEIGHTS)
def test_descent_from_the_anchor_reaches_the_fixed_point(beta_gamma):
    logits = ANCHOR.log()
    for _ in range(2000):
        logits = logits - jbond_gradient(logits, ANCHOR, REWARDS, *beta_gamma)
    fixed = jbond_fixed_point(ANCHOR, REWARDS, *beta_gamma)
    assert float(kl_divergence(fixed, logits.softmax(-1)).max()) < 1e-6
    assert float(kl_divergence(fixed, ANCHOR).min()) > 1e-3, "the fixed point is not where descent started"


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_a_larger_gamma_keeps_the_policy_nearer_to_the_anchor(beta):
    kls = [kl_divergence(jbond_fixed_point(ANCHOR, REWARDS, beta, g), ANCHOR) for g in (0, 0.2, 0.5, 1, 2, 10, 1000)]
    assert all((after < before).all() for before, after in itertools.pairwise(kls))
    assert float(kls[-1].max()) < 1e-5


def test_tied_rewards_leave_the_anchor_alone():
    flat = torch.zeros_like(REWARDS)
    torch.testing.assert_close(jbond_fixed_point(ANCHOR, flat, 0.5, 0.3), ANCHOR, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        jbond_gradient(ANCHOR.log(), ANCHOR, flat, 0.5, 0.3), torch.zeros_like(ANCHOR), rtol=0, atol=1e-15
    )


def test_moving_the_anchor_to_each_fixed_point_climbs_to_the_best_outcome():
    anchor, means = ANCHOR, []
    for _ in range(12):
        means.append((anchor * REWARDS).sum(-1))
        anchor = jbond_fixed_point(anchor, REWARDS, 0.5, 0.0)
    assert all((after > before).all() for before, after in itertools.pairwise(means))
    assert float(anchor[1, 2]) > 0.98


def test_kl_divergence_edges():
    p, q = np.array([0.5, 0.5, 0.0]), np.array([0.25, 0.25, 0.5])
    assert kl_divergence(p, q) == pytest.approx(math.log(2))
    assert kl_divergence(q, p) == math.inf
    assert kl_divergence(p, p) == 0.0


def test_kinds():
    arrays = (ANCHOR.numpy(), REWARDS.numpy())
    pairs = [
        (jbond_fixed_point(*arrays, 0.5, 0.1), jbond_fixed_point(ANCHOR, REWARDS, 0.5, 0.1)),
        (jbond_backward_target(*arrays), jbond_backward_target(ANCHOR, REWARDS)),
        (mean_two_level_reward(*arrays), mean_two_level_reward(ANCHOR, REWARDS)),
        (jbond_gradient(LOGITS.numpy(), *arrays, 0.5, 0.1), jbond_gradient(LOGITS, ANCHOR, REWARDS, 0.5, 0.1)),
        (jeffreys_gradient(LOGITS.numpy(), arrays[0], 0.5), jeffreys_gradient(LOGITS, ANCHOR, 0.5)),
        (forward_kl_gradient(LOGITS.numpy(), arrays[0]), forward_kl_gradient(LOGITS, ANCHOR)),
        (backward_kl_gradient(LOGITS.numpy(), arrays[0]), backward_kl_gradient(LOGITS, ANCHOR)),
    ]
    for as_numpy, as_torch in pairs:
        assert isinstance(as_numpy, np.ndarray)
        assert isinstance(as_torch, torch.Tensor)
        np.testing.assert_array_equal(as_numpy, as_torch.numpy())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: jbond_gradient(LOGITS, ANCHOR, REWARDS, 1.1, 0.0), "beta"),
        (lambda: jbond_gradient(LOGITS, ANCHOR, REWARDS, 0.5, -1.0), "gamma"),
        (lambda: jbond_gradient(LOGITS, ANCHOR[:1], REWARDS, 0.5, 0.0), "^logits and anchor_probs"),
        (lambda: jbond_gradient(LOGITS, ANCHOR, REWARDS[:1], 0.5, 0.0), "^anchor_probs and rewards"),
        (lambda: jbond_gradient(LOGITS / 0.0, ANCHOR, REWARDS, 0.5, 0.0), "logits"),
        (
            lambda: jbond_gradient(LOGITS[0, :2], torch.tensor([1.0, 0.0]), REWARDS[0, :2], 0.5, 0.0),
            "^anchor_probs .*positive",
        ),
        (lambda: jbond_fixed_point(torch.tensor([1.0, 0.0]), REWARDS[0, :2], 0.5, 0.0), "^anchor_probs .*positive"),
        (lambda: backward_kl_gradient(LOGITS[0, :2], torch.tensor([1.0, 0.0])), "^target .*positive"),
        (lambda: mean_two_level_reward(ANCHOR, REWARDS, k=0), "got 0"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_target_with_zeros_is_fine_for_the_forward_kl():
    target = torch.tensor([1.0, 0.0], dtype=torch.float64)
    logits = torch.zeros(2, dtype=torch.float64)
    expected = torch.tensor([-0.5, 0.5], dtype=torch.float64)
    assert torch.equal(forward_kl_gradient(logits, target), expected)
    assert torch.equal(jeffreys_gradient(logits, target, 0.0), expected)
