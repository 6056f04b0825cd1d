"""Best-of-n fine-tuning (RAFT: Dong et al. 2023, arXiv 2304.06767), the forward half of BOND (beta = 0).

Each step, for each prompt: draw n samples of the anchor, raise the log-probability of the best. In expectation this is
descent on KL(Best-of-n || pi), Sessa et al. 2024, arXiv 2407.14622, Eq. 13; Best-of-n is its only fixed point. The
policy draws no samples: where the anchor's best samples never occur, its probability is pushed down only through the
softmax.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from bondlm.objectives.base import Loss, SamplePlan, Selection
from bondlm.objectives.rules import check, whole
from bondlm.objectives.terms import argmax_random_ties


@dataclass(frozen=True, kw_only=True, slots=True)
class BestOfNSFT:
    """Fine-tuning on the best of `n` anchor samples."""

    n: int

    def __post_init__(self) -> None:
        """Check the settings."""
        check(self, n=whole(2, "Best-of-1 is the anchor itself"))

    @property
    def plan(self) -> SamplePlan:
        """Draw n samples of the anchor, learn from one."""
        return SamplePlan(policy=0, anchor=self.n, learn=1, compare=0)

    def select(self, rewards_PM: Tensor, noise_PM: Tensor) -> Selection:
        """Learn from the best; there is no signal."""
        return Selection(argmax_random_ties(rewards_PM, noise_PM)[:, None], rewards_PM[:, :0])

    def returns(self, signal_PC: Tensor, logp_PC: Tensor, anchor_logp_PC: Tensor) -> Tensor:
        """None: (P, 0)."""
        return torch.zeros_like(signal_PC)

    def baseline(self, returns_PC: Tensor) -> Tensor:
        """None: (P, 0)."""
        return torch.zeros_like(returns_PC)

    def loss(self, logp_PL: Tensor, anchor_logp_PC: Tensor, signal_PC: Tensor, baseline_PC: Tensor) -> Loss:
        """-log pi(best)."""
        loss = -logp_PL.squeeze(1)
        return Loss(loss, {"bond/forward_loss": loss.detach()})
