"""Off-policy regression onto Best-of-n: QRPO (Matrenok et al. 2025, arXiv 2507.08068), transform log, beta = 1/(n-1).

QRPO regresses the log-ratio onto its optimum under a reward f(u) of the quantile u: (f(u) - beta log Z - beta h)^2 with
h = log pi - log pi_anchor. With f = log, beta = 1/(n-1) and Z = beta/(1 + beta) = 1/n that optimum *is* Best-of-n
(Sessa et al. 2024, arXiv 2407.14622, Eq. 4). Divided by 2 beta^2 it reads, for each of the M samples of a prompt,

    1/2 (t(y) - h(y))^2,   t(y) = (n - 1) log u_(y) + log B_(y),

where B_ is the collision term of Eq. 4. Its logarithm is log n if nothing ties; with ties (0/1 rewards, repeated
answers) it keeps the target exact.

Scale: the loss is half the square of an error in nats. On the policy's own samples its gradient would be -(t - h) grad
log pi, which is BOND's backward gradient, so both can use the same learning rate. Estimate: u_ is taken among the
*other* M - 1 samples (a sample always reaches itself, which would add up to 1/M). log u_ is the "harmonic" estimate
because a regression learns the mean of its target: it is unbiased except for the tail of a series, whereas the bias of
a clamp would be learned.

The samples are drawn from the anchor beforehand. Training draws nothing, so it runs from a file of scored completions.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from bondlm.bestofn import log_collision_correction, log_quantile
from bondlm.objectives.base import Loss, SamplePlan, Selection
from bondlm.objectives.rules import check, whole


@dataclass(frozen=True, kw_only=True, slots=True)
class BestOfNRegression:
    """Regression of the log-ratio onto Best-of-`n`; the M = `num_samples` scored samples per prompt weigh the same."""

    n: int
    num_samples: int

    def __post_init__(self) -> None:
        """Check the settings."""
        check(self, n=whole(2, "Best-of-1 is the anchor itself"))
        check(self, num_samples=whole(self.n, f"n={self.n} needs at least n scored samples per prompt"))

    @property
    def plan(self) -> SamplePlan:
        """M samples of the anchor, drawn beforehand; learn from all."""
        return SamplePlan(policy=0, anchor=self.num_samples, learn=self.num_samples, compare=self.num_samples)

    def select(self, rewards_PM: Tensor, noise_PM: Tensor) -> Selection:
        """Learn from all samples; the target log-ratio t is the signal."""
        log_u = log_quantile(rewards_PM, None, method="harmonic")
        target = (self.n - 1) * log_u + log_collision_correction(rewards_PM, None, self.n)
        return Selection(torch.arange(self.num_samples).expand(len(rewards_PM), -1), target)

    def returns(self, signal_PC: Tensor, logp_PC: Tensor, anchor_logp_PC: Tensor) -> Tensor:
        """None: zeros."""
        return torch.zeros_like(signal_PC)

    def baseline(self, returns_PC: Tensor) -> Tensor:
        """None: zeros."""
        return torch.zeros_like(returns_PC)

    def loss(self, logp_PL: Tensor, anchor_logp_PC: Tensor, signal_PC: Tensor, baseline_PC: Tensor) -> Loss:
        """Mean over the prompt's samples of 1/2 (t - h)^2."""
        error = signal_PC - (logp_PL - anchor_logp_PC)
        loss = (error**2).mean(dim=1) / 2
        return Loss(loss, {"bond/regression_error": error.detach().mean(dim=1), "bond/regression_loss": loss.detach()})
