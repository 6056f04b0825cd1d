"""BOND, Sessa et al. 2024, arXiv 2407.14622, section 4: the anchor's Best-of-n, any n, by Jeffreys divergence (Eq. 11).

Each step, for each prompt x:

1. draw y from the policy and y'_1 .. y'_m from the anchor, m = max(n, k); score all of them;
2. forward KL to Best-of-n: raise log pi(best of the first n of y') (Eq. 13);
3. backward KL to it: REINFORCE with the return (Eq. 15 times its factor n - 1, so that Eq. 11 stays exact)

       R = (n - 1) log p_(y) [+ log B(y)] - (log pi(y) - log pi_anchor(y)),

   where p_ is the share of the first k of y' that y reaches (Eq. 10); subtract the mean return of the other prompts'
   samples;
4. optionally gamma * KL(pi || anchor), as in Eq. 19, with a plus sign (docs/theory.md, E1);
5. descend (1 - beta) * [2] + beta * [3] + gamma * [4].

B is the collision term of Eq. 4, which the paper drops. It is the constant n for continuous rewards, and keeps 0/1
rewards exact. With a fixed anchor this is Best-of-n of the reference; with a copied or EMA anchor it is iterative BOND
(Algorithm 1). With a learned quantile, log p_ comes from a small model trained together with the policy (App. B.1, see
`bondlm.models.learned_quantile`); then m = n, and the first k of y' (one by default) give its training labels. The n
candidates of [2] are among the k of [3]: this biases neither, since they are different terms. J-BOND is n = 2 with the
two-level reward in place of log p_.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bondlm.bestofn import log_collision_correction, log_quantile
from bondlm.objectives.base import LearnedQuantile, Loss, SamplePlan, Selection
from bondlm.objectives.rules import between, check, finite, one_of, whole
from bondlm.objectives.terms import argmax_random_ties, leave_one_out_mean


@dataclass(frozen=True, kw_only=True, slots=True)
class BOND:
    """BOND to Best-of-`n`, Jeffreys weight `beta`, k = `num_anchor_samples` for the quantile, collision term or not."""

    n: int
    beta: float = 0.5
    gamma: float = 0.0
    num_anchor_samples: int = 16
    log_quantile: Literal["clamped", "harmonic"] = "clamped"
    correction: bool = False
    quantile: Literal["monte_carlo", "learned"] = "monte_carlo"

    def __post_init__(self) -> None:
        """Check the settings."""
        check(
            self,
            n=whole(2, "Best-of-1 is the anchor itself"),
            beta=between(0, 1, "the weight of the backward KL"),
            gamma=finite(0, "a negative value pushes away from the anchor"),
            num_anchor_samples=whole(1 if self.learned else 2, "a quantile needs samples to compare with"),
            log_quantile=one_of("clamped", "harmonic"),
            quantile=one_of("monte_carlo", "learned"),
        )

    @property
    def learned(self) -> bool:
        """Whether a model estimates the quantiles."""
        return self.quantile == "learned"

    @property
    def plan(self) -> SamplePlan:
        """One sample of the policy, max(n, k) of the anchor: the forward term's n and the quantile's k share them."""
        anchor = max(self.n, self.num_anchor_samples)
        return SamplePlan(policy=1, anchor=anchor, learn=2, compare=1, learned_quantile=self.learned)

    def select(self, rewards_PM: Tensor, noise_PM: Tensor) -> Selection:
        """Learn from the policy's sample and the best of the first n; (n - 1) log p_ [+ log B] is the signal."""
        policy, quantile_anchor = rewards_PM[:, :1], rewards_PM[:, 1 : 1 + self.num_anchor_samples]
        best = 1 + argmax_random_ties(rewards_PM[:, 1 : 1 + self.n], noise_PM[:, 1 : 1 + self.n])
        rows = torch.stack([torch.zeros_like(best), best], dim=1)
        if self.learned:
            labels = LearnedQuantile(self.labels(rewards_PM), self.signal)
            return Selection(rows, torch.zeros_like(policy), labels)
        signal = self.signal(log_quantile(policy, quantile_anchor, method=self.log_quantile))
        if self.correction:
            signal = signal + log_collision_correction(policy, quantile_anchor, self.n)
        return Selection(rows, signal)

    def signal(self, log_p_PC: Tensor) -> Tensor:
        """(n - 1) log p_, the reward part of the return."""
        return (self.n - 1) * log_p_PC

    def labels(self, rewards_PM: Tensor) -> Tensor:
        """Labels (P,) of a learned quantile: the share of the first k anchor samples that the policy's reaches."""
        at_most = rewards_PM[:, 1 : 1 + self.num_anchor_samples] <= rewards_PM[:, :1]
        return at_most.to(rewards_PM.dtype).mean(dim=1)

    def returns(self, signal_PC: Tensor, logp_PC: Tensor, anchor_logp_PC: Tensor) -> Tensor:
        """R = signal - (log pi - log pi_anchor)."""
        return signal_PC - (logp_PC - anchor_logp_PC)

    def baseline(self, returns_PC: Tensor) -> Tensor:
        """Mean return of the batch's other policy samples."""
        return leave_one_out_mean(returns_PC)

    def loss(self, logp_PL: Tensor, anchor_logp_PC: Tensor, signal_PC: Tensor, baseline_PC: Tensor) -> Loss:
        """(1 - beta) G_FW + beta G_BW + gamma G_Reg, as a loss whose gradient they are."""
        logp, logp_best = logp_PL.unbind(dim=1)
        log_ratio = logp.detach() - anchor_logp_PC.squeeze(1)
        advantage = signal_PC.squeeze(1) - log_ratio - baseline_PC.squeeze(1)
        forward = -logp_best
        backward = -logp * advantage
        regulariser = logp * log_ratio
        loss = (1 - self.beta) * forward + self.beta * backward + self.gamma * regulariser
        return Loss(
            loss,
            {
                "bond/forward_loss": forward.detach(),
                "bond/advantage": advantage,
                "bond/signal": signal_PC.squeeze(1),
            },
        )
