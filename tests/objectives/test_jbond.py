"""J-BOND's estimator on a finite outcome space: its mean is the exact gradient, and no other sign would pass.

Shapes: P prompts (all with the same K outcomes), M = 3 samples of each: the policy's, then the anchor's two.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from bondlm.bestofn import best_of_n_probs, jbond_fixed_point, jbond_gradient, kl_divergence
from bondlm.objectives import JBOND, Selection
from bondlm.objectives.terms import argmax_random_ties, leave_one_out_mean
from bondlm.rollout.seeds import Seeds

REWARDS_K = torch.tensor([0.0, 1.0, 1.0, 2.0, 3.0], dtype=torch.float64)  # outcomes 1 and 2 are tied
LOGITS_K = torch.tensor([0.9, 0.4, -0.6, 0.1, -0.8], dtype=torch.float64)
ANCHOR_K = torch.tensor([0.25, 0.1, 0.3, 0.2, 0.15], dtype=torch.float64)
SETTINGS = [(0.0, 0.0), (1.0, 0.0), (0.5, 0.0), (0.5, 1.0), (1.0, 2.0)]
NUM_PROMPTS = 20_000
PENALTY = -2.772588722239781  # -log 16


def draw_outcomes(logits_K: Tensor, anchor_K: Tensor, num_prompts: int, generator: torch.Generator) -> Tensor:
    """(P, 3) outcomes: one of the policy's, two of the anchor's."""
    policy = torch.multinomial(logits_K.softmax(-1), num_prompts, replacement=True, generator=generator)
    anchor = torch.multinomial(anchor_K, 2 * num_prompts, replacement=True, generator=generator)
    return torch.cat([policy[:, None], anchor.view(num_prompts, 2)], dim=1)


def gradients(
    objective: Any,
    outcomes_PM: Tensor,
    noise_PM: Tensor,
    rewards_K: Tensor = REWARDS_K,
    logits_K: Tensor = LOGITS_K,
    anchor_K: Tensor = ANCHOR_K,
) -> tuple[Tensor, Tensor]:
    """Loss (P,) and gradient (P, K) of each prompt, by autograd through the objective's own four functions."""
    logits_PK = logits_K.expand(len(outcomes_PM), -1).clone().requires_grad_()
    selection = objective.select(rewards_K[outcomes_PM], noise_PM)
    logp_PL = logits_PK.log_softmax(-1).gather(1, outcomes_PM.gather(1, selection.rows_PL))
    compared_PC = outcomes_PM.gather(1, selection.rows_PL[:, :1])
    anchor_logp_PC = anchor_K.log()[compared_PC]
    returns_PC = objective.returns(selection.signal_PC, logp_PL[:, :1].detach(), anchor_logp_PC)
    result = objective.loss(logp_PL, anchor_logp_PC, selection.signal_PC, objective.baseline(returns_PC))
    (gradient_PK,) = torch.autograd.grad(result.loss_P.sum(), logits_PK)
    return result.loss_P.detach(), gradient_PK


def sampled_gradients(objective: Any, *, num_prompts: int = NUM_PROMPTS, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    outcomes = draw_outcomes(LOGITS_K, ANCHOR_K, num_prompts, generator)
    noise = torch.rand(outcomes.shape, dtype=torch.float64, generator=generator)
    return gradients(objective, outcomes, noise)[1]


def standard_errors_off(gradient_PK: Tensor, beta: float, gamma: float) -> float:
    """Largest distance of the mean from the exact gradient, in standard errors."""
    exact_K = jbond_gradient(LOGITS_K, ANCHOR_K, REWARDS_K, beta, gamma)
    error_K = gradient_PK.std(0) / math.sqrt(len(gradient_PK))
    return float(((gradient_PK.mean(0) - exact_K).abs() / error_K).max())


@pytest.mark.parametrize(("beta", "gamma"), SETTINGS)
def test_mean_gradient_is_the_exact_one(beta: float, gamma: float) -> None:
    assert standard_errors_off(sampled_gradients(JBOND(beta=beta, gamma=gamma)), beta, gamma) < 4


@dataclass(frozen=True)
class Mutant:
    """J-BOND written again with a factor before every term: all 1 is J-BOND, a -1 is a wrong sign somewhere."""

    beta: float
    gamma: float
    forward: float = 1.0
    backward: float = 1.0
    signal: float = 1.0
    log_ratio: float = 1.0
    baseline_sign: float = 1.0
    regulariser: float = 1.0
    best: Callable[[Tensor], Tensor] = field(default=lambda rewards: rewards)
    is_worse: Callable[[Tensor, Tensor], Tensor] = field(default=lambda mine, theirs: mine < theirs.amin(1))

    def select(self, rewards_PM: Tensor, noise_PM: Tensor) -> Selection:
        best = 1 + argmax_random_ties(self.best(rewards_PM[:, 1:]), noise_PM[:, 1:])
        signal = -math.log(16.0) * self.is_worse(rewards_PM[:, 0], rewards_PM[:, 1:]).double()
        return Selection(torch.stack([torch.zeros_like(best), best], 1), self.signal * signal[:, None])

    def returns(self, signal_PC: Tensor, logp_PC: Tensor, anchor_logp_PC: Tensor) -> Tensor:
        return signal_PC - self.log_ratio * (logp_PC - anchor_logp_PC)

    def baseline(self, returns_PC: Tensor) -> Tensor:
        return self.baseline_sign * leave_one_out_mean(returns_PC)

    def loss(self, logp_PL: Tensor, anchor_logp_PC: Tensor, signal_PC: Tensor, baseline_PC: Tensor) -> Any:
        @dataclass
        class Result:
            loss_P: Tensor

        logp, best = logp_PL.unbind(1)
        gap = logp.detach() - anchor_logp_PC[:, 0]
        advantage = self.returns(signal_PC, logp_PL[:, :1].detach(), anchor_logp_PC)[:, 0] - baseline_PC[:, 0]
        return Result(
            (1 - self.beta) * self.forward * -best
            + self.beta * self.backward * -logp * advantage
            + self.gamma * self.regulariser * logp * gap
        )


def test_the_mutants_without_a_mutation_are_jbond() -> None:
    mutant, real = Mutant(beta=0.5, gamma=1.0), JBOND(beta=0.5, gamma=1.0)
    torch.testing.assert_close(sampled_gradients(mutant), sampled_gradients(real), rtol=1e-12, atol=1e-12)


FLIPS: dict[str, dict[str, Any]] = {
    "forward": {"forward": -1.0},
    "backward": {"backward": -1.0},
    "signal": {"signal": -1.0},
    "log-ratio of the return": {"log_ratio": -1.0},
    "no log-ratio": {"log_ratio": 0.0},
    "regulariser, as Algorithm 2 prints it": {"regulariser": -1.0},
    "no regulariser": {"regulariser": 0.0},
    "worse anchor sample": {"best": torch.neg},
    "worse than one anchor sample only": {"is_worse": lambda mine, theirs: mine < theirs.amax(1)},
    "ties are worse": {"is_worse": lambda mine, theirs: mine <= theirs.amin(1)},
}


@pytest.mark.parametrize("flip", FLIPS.values(), ids=FLIPS.keys())
def test_the_check_fails_for_every_wrong_sign(flip: dict[str, Any]) -> None:
    assert standard_errors_off(sampled_gradients(Mutant(beta=0.5, gamma=1.0, **flip)), 0.5, 1.0) > 8


def test_the_check_fails_when_beta_weighs_the_wrong_part() -> None:
    assert standard_errors_off(sampled_gradients(JBOND(beta=0.8)), 0.2, 0.0) > 8


def test_a_baseline_of_any_sign_leaves_the_mean_gradient() -> None:
    assert standard_errors_off(sampled_gradients(Mutant(beta=1.0, gamma=0.0, baseline_sign=-1.0)), 1.0, 0.0) < 4


def small_batch_gradients(baseline: Callable[[Tensor], Tensor], num_batches: int = 4_000) -> Tensor:
    """(batches, K): mean gradients of batches of 2 prompts, each with its own baseline; beta = 1."""

    class Small(Mutant):
        def baseline(self, returns_PC: Tensor) -> Tensor:
            return torch.cat([baseline(pair) for pair in returns_PC.view(-1, 2, 1)])

    return sampled_gradients(Small(1.0, 0.0), num_prompts=2 * num_batches).view(num_batches, 2, -1).mean(1)


def test_leave_one_out_is_unbiased_even_for_two_prompts() -> None:
    assert standard_errors_off(small_batch_gradients(JBOND().baseline), 1.0, 0.0) < 4


def test_a_baseline_with_the_sample_itself_shifts_the_mean_gradient() -> None:
    including_self = small_batch_gradients(lambda returns: returns.mean().expand_as(returns))
    assert standard_errors_off(including_self, 1.0, 0.0) > 8
    # It shrinks the backward part by 1 - 1/P: that is the whole shift.
    half = jbond_gradient(LOGITS_K, ANCHOR_K, REWARDS_K, 1.0, 0.0) / 2
    error_K = including_self.std(0) / math.sqrt(len(including_self))
    assert float(((including_self.mean(0) - half).abs() / error_K).max()) < 4


def test_leave_one_out_mean_by_hand() -> None:
    values = torch.tensor([[1.0], [2.0], [6.0]])
    assert leave_one_out_mean(values).tolist() == [[4.0], [3.5], [1.5]]
    assert leave_one_out_mean(values[:1]).tolist() == [[0.0]]  # a lone sample has no others


def test_the_worked_example() -> None:
    """Prompt 0: y is worse than both anchor samples; prompt 1: it lies between them."""
    rewards = torch.tensor([[0.1, 0.5, 0.7], [0.6, 0.9, 0.2]], dtype=torch.float64)
    logp = torch.tensor([[-3.0, -4.0], [-2.0, -1.5]], dtype=torch.float64, requires_grad=True)
    anchor_logp = torch.tensor([[-3.5], [-1.0]], dtype=torch.float64)
    objective = JBOND(beta=0.5, gamma=2.0)
    selection = objective.select(rewards, torch.zeros_like(rewards))
    assert selection.rows_PL.tolist() == [[0, 2], [0, 1]]
    assert selection.signal_PC.tolist() == [[PENALTY], [0.0]]
    returns = objective.returns(selection.signal_PC, logp[:, :1].detach(), anchor_logp)
    assert returns.flatten().tolist() == pytest.approx([-3.272588722239781, 1.0], abs=1e-15)
    baseline = objective.baseline(returns)
    assert baseline.flatten().tolist() == pytest.approx([1.0, -3.272588722239781], abs=1e-15)
    result = objective.loss(logp, anchor_logp, selection.signal_PC, baseline)
    advantage = [-4.272588722239781, 4.272588722239781]
    assert result.metrics["bond/advantage"].tolist() == pytest.approx(advantage, abs=1e-14)
    assert result.metrics["bond/forward_loss"].tolist() == [4.0, 1.5]
    assert result.metrics["bond/penalty_rate"].tolist() == [1.0, 0.0]
    # 4/2 - 3 * 4.27.../2 - 2 * 1.5  and  1.5/2 + 2 * 4.27.../2 + 2 * 2
    assert result.loss_P.tolist() == pytest.approx([-7.408883083359672, 9.022588722239781], abs=1e-14)
    (gradient,) = torch.autograd.grad(result.loss_P.sum(), logp)
    # -beta * advantage + gamma * log-ratio, and -(1 - beta)
    expected = [3.1362943611198906, -0.5, -4.136294361119891, -0.5]
    assert gradient.flatten().tolist() == pytest.approx(expected, abs=1e-14)


@pytest.mark.parametrize(
    "increasing",
    [lambda r: 3 * r + 7, torch.exp, lambda r: r**3 - 100, lambda r: r.sign() * r.abs().sqrt(), lambda r: 1e-9 * r],
    ids=["affine", "exp", "cube", "root", "tiny"],
)
def test_an_increasing_map_of_the_rewards_changes_no_bit(increasing: Callable[[Tensor], Tensor]) -> None:
    generator = torch.Generator().manual_seed(3)
    outcomes = draw_outcomes(LOGITS_K, ANCHOR_K, 300, generator)
    noise = torch.rand(outcomes.shape, dtype=torch.float64, generator=generator)
    objective = JBOND(beta=0.5, gamma=0.7)
    loss, gradient = gradients(objective, outcomes, noise)
    mapped_loss, mapped_gradient = gradients(objective, outcomes, noise, rewards_K=increasing(REWARDS_K))
    assert torch.equal(loss, mapped_loss)
    assert torch.equal(gradient, mapped_gradient)
    decreasing_loss, _ = gradients(objective, outcomes, noise, rewards_K=-REWARDS_K)
    assert not torch.equal(loss, decreasing_loss)


def chi_square(counts: Tensor, probs: Tensor) -> float:
    expected = probs * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 2, 1, 0], [1, 3, 0, 2]])
def test_ties_go_to_every_candidate_alike_wherever_it_stands(order: list[int]) -> None:
    values = torch.tensor([5.0, 1.0, 5.0, 5.0], dtype=torch.float64)[order]
    noise = Seeds(0, 1).tie_noise(range(4000), 4)
    winners = torch.tensor(order)[argmax_random_ties(values.expand(4000, 4), noise)]
    counts = winners.bincount(minlength=4).double()
    assert counts[1] == 0
    assert chi_square(counts[[0, 2, 3]], torch.full((3,), 1 / 3, dtype=torch.float64)) < 18.4  # p = 1e-4, 2 d.o.f.


def test_tied_anchor_samples_are_learned_from_alike() -> None:
    rewards = torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64).expand(4000, 3)
    rows = JBOND().select(rewards, Seeds(1, 7).tie_noise(range(4000), 3)).rows_PL
    assert not rows[:, 0].any()
    counts = rows[:, 1].bincount(minlength=3).double()
    assert chi_square(counts[1:], torch.full((2,), 0.5, dtype=torch.float64)) < 15.1  # p = 1e-4, 1 d.o.f.
    # Noise decides between equals alone: a better sample wins with any noise.
    noise = torch.tensor([[0.5, 0.99, 0.0]], dtype=torch.float64)
    better = torch.tensor([[0.0, 1.0, 1.0 + 1e-12]], dtype=torch.float64)
    assert JBOND().select(better, noise).rows_PL.tolist() == [[0, 2]]


def test_constant_rewards_give_no_signal() -> None:
    """Then only the two KL terms are left, and at policy = anchor the mean gradient is zero."""
    selection = JBOND().select(torch.full((50, 3), 0.3, dtype=torch.float64), Seeds(0, 0).tie_noise(range(50), 3))
    assert not selection.signal_PC.any()
    generator = torch.Generator().manual_seed(5)
    anchor_K = LOGITS_K.softmax(-1)
    outcomes = draw_outcomes(LOGITS_K, anchor_K, NUM_PROMPTS, generator)
    noise = torch.rand(outcomes.shape, dtype=torch.float64, generator=generator)
    constant_K = torch.ones_like(REWARDS_K)
    for beta, gamma in SETTINGS:
        _, gradient = gradients(JBOND(beta=beta, gamma=gamma), outcomes, noise, rewards_K=constant_K, anchor_K=anchor_K)
        error_K = gradient.std(0) / math.sqrt(len(gradient))
        assert bool((gradient.mean(0).abs() <= 4 * error_K + 1e-12).all())


def test_beta_zero_is_fine_tuning_on_the_better_anchor_sample() -> None:
    generator = torch.Generator().manual_seed(11)
    outcomes = draw_outcomes(LOGITS_K, ANCHOR_K, 500, generator)
    loss, gradient = gradients(JBOND(beta=0.0), outcomes, torch.zeros(500, 3, dtype=torch.float64))
    for outcome, loss_p, gradient_K in zip(outcomes.tolist(), loss.tolist(), gradient, strict=True):
        # Zero noise: a tie goes to the first.
        best = max(outcome[1:], key=lambda k: float(REWARDS_K[k]))
        logits = LOGITS_K.clone().requires_grad_()
        sft = torch.nn.functional.cross_entropy(logits, torch.tensor(best))
        assert loss_p == pytest.approx(sft.item(), rel=1e-12)
        torch.testing.assert_close(gradient_K, torch.autograd.grad(sft, logits)[0], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("draws", "rate"), [(1, 1 / 3), (2, 1 / 6)], ids=["policy = anchor", "policy = Best-of-2"])
def test_penalty_rate_of_a_continuous_reward(draws: int, rate: float) -> None:
    generator = torch.Generator().manual_seed(2)
    policy = torch.rand(40_000, draws, dtype=torch.float64, generator=generator).amax(1, keepdim=True)
    rewards = torch.cat([policy, torch.rand(40_000, 2, dtype=torch.float64, generator=generator)], 1)
    penalised = JBOND().select(rewards, torch.zeros_like(rewards)).signal_PC
    assert set(penalised.flatten().tolist()) == {PENALTY, 0.0}
    standard_error = math.sqrt(rate * (1 - rate) / 40_000)
    assert abs(float((penalised < 0).double().mean()) - rate) < 4 * standard_error


@pytest.mark.parametrize(("k", "log_quantile"), [(2, "jbond"), (4, "jbond"), (2, "harmonic"), (16, "harmonic")])
def test_the_penalty_rate_counts_what_is_below_all_whatever_the_estimate(k: int, log_quantile: Any) -> None:
    """Row r has r of the k anchor samples at most equal to the policy's: only row 0 is below all."""
    rewards = torch.tensor(
        [[0.5, *([0.5] * (r % 2)), *([0.0] * (r - r % 2)), *([1.0] * (k - r))] for r in range(k + 1)]
    )
    objective = JBOND(num_anchor_samples=k, log_quantile=log_quantile)
    signal = objective.select(rewards.double(), torch.zeros(k + 1, k + 1).double()).signal_PC.float()
    zeros = torch.zeros(k + 1, 1)
    rate = objective.loss(torch.zeros(k + 1, 2), zeros, signal, zeros).metrics["bond/penalty_rate"]
    assert rate.tolist() == [1.0] + [0.0] * k


@pytest.mark.parametrize(("beta", "gamma"), SETTINGS)
def test_descent_with_a_fixed_anchor_reaches_the_fixed_point(beta: float, gamma: float) -> None:
    target = jbond_fixed_point(ANCHOR_K, REWARDS_K, beta, gamma)
    objective, generator = JBOND(beta=beta, gamma=gamma), torch.Generator().manual_seed(0)
    logits = LOGITS_K.clone()
    before = float(kl_divergence(logits.softmax(-1), target))
    for _ in range(200):
        outcomes = draw_outcomes(logits, ANCHOR_K, 256, generator)
        noise = torch.rand(outcomes.shape, dtype=torch.float64, generator=generator)
        logits -= 0.3 * gradients(objective, outcomes, noise, logits_K=logits)[1].mean(0)
    assert float(kl_divergence(logits.softmax(-1), target)) < 0.02 * before
    if (beta, gamma) == (0.0, 0.0):
        torch.testing.assert_close(target, best_of_n_probs(ANCHOR_K, REWARDS_K, 2))


def test_the_loss_does_not_learn_through_its_weights() -> None:
    """The advantage is a number: a gradient through the log-ratio inside it would count the KL twice."""
    logp = torch.tensor([[-1.0, -2.0]], dtype=torch.float64, requires_grad=True)
    result = JBOND(beta=1.0, gamma=1.0).loss(
        logp, torch.full((1, 1), -1.25).double(), torch.zeros(1, 1), torch.zeros(1, 1)
    )
    (gradient,) = torch.autograd.grad(result.loss_P.sum(), logp)
    assert gradient.tolist() == [[0.5, 0.0]]  # log-ratio 0.25 once from the return, once from gamma
    assert not any(value.requires_grad for value in result.metrics.values())


def test_the_plan_says_what_the_algorithm_draws() -> None:
    plan = JBOND().plan
    assert (plan.policy, plan.anchor, plan.total, plan.learn, plan.compare) == (1, 2, 3, 2, 1)
