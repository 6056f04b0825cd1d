"""Listwise BOND: fit a softmax over the samples' log-ratios to the weights that Best-of-n gives to their ranks.

For each prompt draw y_1 .. y_K from the anchor. A sample that is better than a of them and ties with b gets the weight

    w = [((a+b+1)/K)^n - (a/K)^n] / (b+1),

the probability that Best-of-n of draws *from these K* returns it. With h = log pi - log pi_anchor, descend

    -sum_i w_i log softmax(h)_i,      gradient  sum_i (softmax(h)_i - w_i) grad log pi(y_i).

This is the loss of InfoNCA (Chen et al. 2024, arXiv 2402.05369), which is that of ListNet (Cao et al. 2007), but its
target is Best-of-n (Sessa et al. 2024, arXiv 2407.14622, Eq. 4) instead of a softmax of rewards. softmax(h) is the
policy's distribution over the anchor's samples (self-normalised importance weights). All samples are learned from, and
the forces on a prompt's samples sum to zero. The loss is convex in h and has one fixed point, near Best-of-n
(docs/theory.md, "Listwise").
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from bondlm.bestofn.quantiles import count_below
from bondlm.objectives.base import Loss, SamplePlan, Selection
from bondlm.objectives.rules import check, whole
from bondlm.objectives.terms import learn_from_all, with_share_without_signal


@dataclass(frozen=True, kw_only=True, slots=True)
class Listwise:
    """Cross-entropy of the log-ratios to Best-of-`n`'s weights, with K = `num_samples` anchor samples per prompt."""

    n: int
    num_samples: int = 8

    def __post_init__(self) -> None:
        """Check the settings."""
        check(self, n=whole(2, "Best-of-1 is the anchor itself"))
        check(self, num_samples=whole(self.n, f"n={self.n} needs at least n samples per prompt"))

    @property
    def plan(self) -> SamplePlan:
        """K samples of the anchor, learn from all."""
        return SamplePlan(policy=0, anchor=self.num_samples, learn=self.num_samples, compare=self.num_samples)

    def select(self, rewards_PM: Tensor, noise_PM: Tensor) -> Selection:
        """Learn from all samples; Best-of-n's weights are the signal."""
        worse, at_most, others = count_below(rewards_PM, None)
        num_samples, tied = others + 1, at_most - worse + 1
        share = ((at_most + 1) / num_samples) ** self.n - (worse / num_samples) ** self.n
        return learn_from_all(share / tied)

    def returns(self, signal_PC: Tensor, logp_PC: Tensor, anchor_logp_PC: Tensor) -> Tensor:
        """None: zeros."""
        return torch.zeros_like(signal_PC)

    def baseline(self, returns_PC: Tensor) -> Tensor:
        """None: zeros."""
        return torch.zeros_like(returns_PC)

    def loss(self, logp_PL: Tensor, anchor_logp_PC: Tensor, signal_PC: Tensor, baseline_PC: Tensor) -> Loss:
        """Cross-entropy of softmax(log pi - log pi_anchor) to the weights, over the prompt's samples."""
        loss_P = -(signal_PC * (logp_PL - anchor_logp_PC).log_softmax(dim=1)).sum(dim=1)
        entropy_P = torch.special.entr(signal_PC).sum(dim=1)  # the worst of many samples may have weight 0
        loss = Loss(loss_P, {"bond/listwise_kl": (loss_P - entropy_P).detach()})
        return with_share_without_signal(loss, signal_PC)
