"""The oracle of GRPO against plain enumeration of a prompt's samples."""

import itertools
import math
import statistics

import pytest
import torch

from bondlm.bestofn import grpo_fixed_point, grpo_gradient, kl_reward_gradient, kl_reward_optimum

PROBS = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.4, 0.1, 0.3, 0.2]], dtype=torch.float64)
LOGITS = torch.tensor([[0.3, -0.8, 0.5, 0.2], [0.0, 0.6, -0.9, 0.4]], dtype=torch.float64)
REWARDS = torch.tensor([[0.3, -1.0, 2.0, 0.7], [0.0, 1.0, 1.0, 2.0]], dtype=torch.float64)


def plain_gradient(logits, rewards, num_samples, scale):
    """-E of the samples' mean A grad log pi, over all K^m draws, in plain Python."""
    probs = logits.softmax(-1).tolist()
    gradient = [0.0] * len(probs)
    for draw in itertools.product(range(len(probs)), repeat=num_samples):
        values = [float(rewards[i]) for i in draw]
        divisor = statistics.stdev(values) + 1e-4 if scale == "group" else 1.0
        weight = math.prod(probs[i] for i in draw)
        for i, value in zip(draw, values, strict=True):
            push = weight * (value - statistics.fmean(values)) / divisor / num_samples
            for k, p in enumerate(probs):
                gradient[k] -= push * ((k == i) - p)
    return torch.tensor(gradient, dtype=torch.float64)


@pytest.mark.parametrize("scale", ["group", "none"])
@pytest.mark.parametrize("num_samples", [2, 3, 5])
def test_the_gradient_is_that_of_all_draws(num_samples, scale):
    exact = grpo_gradient(LOGITS, PROBS, REWARDS, 0.0, num_samples, scale)
    for gradient, logits, rewards in zip(exact, LOGITS, REWARDS, strict=True):
        expected = plain_gradient(logits, rewards, num_samples, scale)
        torch.testing.assert_close(gradient, expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("num_samples", [2, 8])
def test_without_std_it_is_the_policy_gradient_of_a_smaller_reward(num_samples):
    smaller = (num_samples - 1) / num_samples * REWARDS
    torch.testing.assert_close(
        grpo_gradient(LOGITS, PROBS, REWARDS, 0.7, num_samples, "none"),
        kl_reward_gradient(LOGITS, PROBS, smaller, 0.7),
        rtol=1e-11,
        atol=1e-13,
    )
    torch.testing.assert_close(
        grpo_fixed_point(PROBS, REWARDS, 0.7, num_samples, "none"),
        kl_reward_optimum(PROBS, smaller, 0.7),
        rtol=1e-9,
        atol=1e-12,
    )


@pytest.mark.parametrize("num_samples", [2, 4])
def test_the_fixed_point_has_no_gradient_and_does_not_know_the_rewards_scale(num_samples):
    fixed = grpo_fixed_point(PROBS, 1e6 * REWARDS, 0.5, num_samples)
    gradient = grpo_gradient(fixed.log(), PROBS, 1e6 * REWARDS, 0.5, num_samples)
    torch.testing.assert_close(gradient, torch.zeros_like(PROBS), rtol=0, atol=1e-12)
    torch.testing.assert_close(fixed, grpo_fixed_point(PROBS, 2e6 * REWARDS - 1e6, 0.5, num_samples), rtol=1e-6, atol=0)
    assert float((fixed / PROBS).log().abs().max()) > 0.5


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: grpo_gradient(LOGITS, PROBS, REWARDS, -1.0, 2), "beta_rl"),
        (lambda: grpo_fixed_point(PROBS, REWARDS, 0.0, 2), "beta_rl"),
        (lambda: grpo_gradient(LOGITS, PROBS, REWARDS, 0.1, 1), "num_samples"),
        (lambda: grpo_gradient(LOGITS, PROBS, REWARDS, 0.1, 2, "batch"), "scale"),
        (lambda: grpo_gradient(LOGITS, PROBS, REWARDS[:, :3], 0.1, 2), "rewards"),
        (lambda: grpo_fixed_point(PROBS, REWARDS * math.inf, 0.1, 2), "rewards"),
    ],
)
def test_what_is_not_valid_is_refused(call, match):
    with pytest.raises(ValueError, match=match):
        call()
