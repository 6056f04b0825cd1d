"""Held-out numbers of policies whose worth is known: a Best-of-N policy is worth N."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from bondlm.rollout.samples import Samples
from bondlm.training.held_out import compare


def samples(rewards_PM: Tensor) -> Samples:
    numbers = {f"{name}_PM": torch.ones_like(rewards_PM) for name in ("lengths", "finished", "logprobs")}
    return Samples(prompts=[], texts=[], rewards_PM=rewards_PM, by_name={"r": rewards_PM}, **numbers)


@pytest.mark.parametrize("n", [1, 2, 4])
def test_a_best_of_n_policy_is_worth_n(n: int) -> None:
    rng = np.random.default_rng(0)
    policy = torch.from_numpy(rng.random((400, 4, n)).max(-1))
    reference = torch.from_numpy(rng.random((400, 16)))
    kl = torch.from_numpy(rng.normal(math.log(n), 1.0, (400, 4)))
    result = compare(samples(policy), samples(reference), kl)
    for estimate, truth in (
        (result.reward, n / (n + 1)),
        (result.reference_reward, 0.5),
        (result.win_rate, n / (n + 1)),
        (result.kl, math.log(n)),
        (result.effective_n, n),
    ):
        assert estimate.low <= estimate.value <= estimate.high
        assert abs(estimate.value - truth) <= estimate.high - estimate.low  # about 4 standard errors
    assert result.effective_n.high - result.effective_n.low < 0.35 * n  # the interval says something


def test_metrics_by_hand() -> None:
    policy, reference = torch.tensor([[1.0], [3.0]]).double(), torch.tensor([[0.0, 2.0], [1.0, 3.0]]).double()
    result = compare(samples(policy), samples(reference), torch.tensor([[0.25], [0.75]]).double())
    metrics = result.metrics("eval")
    assert {name for name in metrics if not name.endswith(("_low", "_high"))} == {
        "eval_reward",
        "eval_reference_reward",
        "eval_win_rate",
        "eval_effective_n",
        "eval_kl",
    }
    assert len(metrics) == 15
    assert metrics["eval_reward"] == 2.0
    assert metrics["eval_reference_reward"] == 1.5
    assert metrics["eval_win_rate"] == 0.625  # 1/2, and 3/4 with a tie that counts half
    assert metrics["eval_kl"] == 0.5
    assert (metrics["eval_reward_low"], metrics["eval_reward_high"]) == (1.0, 3.0)


def test_win_rate_and_effective_n_see_the_order_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    policy = torch.rand(50, 4, dtype=torch.float64, generator=generator)
    reference = torch.rand(50, 8, dtype=torch.float64, generator=generator)
    kl = torch.zeros(50, 4, dtype=torch.float64)
    one = compare(samples(policy), samples(reference), kl)
    other = compare(samples((9 * policy).exp()), samples((9 * reference).exp()), kl)
    assert one.win_rate == other.win_rate
    assert one.effective_n == other.effective_n
    assert one.reward != other.reward
