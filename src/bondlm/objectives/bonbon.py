"""BoNBoN: Gui, Garbacea, Veitch 2024, "BoNBoN Alignment", arXiv 2406.00832: the best and the worst of n samples.

Each step, for each prompt: draw n samples of the anchor; with h = log pi - log pi_anchor descend

    alpha * (-log pi(best)) + (1 - alpha) * (h(best) - h(worst) - c_n)^2,   c_n = 1 / (2 beta*) = (n - 1) H_{n-1},

with H the harmonic numbers (c_8 = 18.15, beta* = 0.02755). The first part is Best-of-n fine-tuning. The second is IPO:
c_n is the mean of h(best) - h(worst) if pi is Best-of-n and rewards are continuous:
(n - 1) (E log max u - E log min u) = (n - 1) (H_n - 1/n).

One margin for all pairs does not determine the distribution: the minimum is not Best-of-n. For continuous rewards its
KL to Best-of-n is 0.03 nats at n = 2, 0.05 at 4, 0.31 at 8, 1.58 at 16 (`bonbon_fixed_point`). If all n rewards tie,
the pair consists of two different samples in random order, so the margin has no effect on average.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from bondlm.objectives.base import Loss, SamplePlan, Selection
from bondlm.objectives.rules import between, check, whole
from bondlm.objectives.terms import argmax_random_ties


@dataclass(frozen=True, kw_only=True, slots=True)
class BoNBoN:
    """BoNBoN on the best and worst of `n` anchor samples; `alpha` weighs the fine-tuning part (paper: 0.005)."""

    n: int
    alpha: float = 0.005

    def __post_init__(self) -> None:
        """Check the settings."""
        check(
            self,
            n=whole(2, "a best and a worst sample are needed"),
            alpha=between(0, 1, "the weight of the fine-tuning part"),
        )

    @property
    def plan(self) -> SamplePlan:
        """Draw n samples of the anchor, learn from two."""
        return SamplePlan(policy=0, anchor=self.n, learn=2, compare=2)

    @property
    def margin(self) -> float:
        """c_n = (n - 1) H_{n-1}, the log-ratio by which the best should beat the worst, in nats."""
        return (self.n - 1) * sum(1 / i for i in range(1, self.n))

    def select(self, rewards_PM: Tensor, noise_PM: Tensor) -> Selection:
        """Learn from the best and the worst; there is no signal."""
        best = argmax_random_ties(rewards_PM, noise_PM)
        worst = argmax_random_ties(-rewards_PM, 1 - noise_PM)  # reversed noise: never the best again, even if all tie
        return Selection(torch.stack([best, worst], dim=1), torch.zeros_like(rewards_PM[:, :2]))

    def returns(self, signal_PC: Tensor, logp_PC: Tensor, anchor_logp_PC: Tensor) -> Tensor:
        """None: zeros."""
        return torch.zeros_like(signal_PC)

    def baseline(self, returns_PC: Tensor) -> Tensor:
        """None: zeros."""
        return torch.zeros_like(returns_PC)

    def loss(self, logp_PL: Tensor, anchor_logp_PC: Tensor, signal_PC: Tensor, baseline_PC: Tensor) -> Loss:
        """Alpha * fine-tuning + (1 - alpha) * squared error of the margin, in nats squared."""
        best, worst = (logp_PL - anchor_logp_PC).unbind(dim=1)
        forward = -logp_PL[:, 0]
        error = best - worst - self.margin
        loss = self.alpha * forward + (1 - self.alpha) * error**2
        return Loss(loss, {"bond/forward_loss": forward.detach(), "bond/margin_error": error.detach()})
