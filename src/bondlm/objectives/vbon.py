"""vBoN's lower bound: Amini, Vieira, Ash, Cotterell 2024, "Variational Best-of-N Alignment", arXiv 2407.06057.

vBoN maximises E_pi[log pi_BoN] + H(pi), a backward KL. Its bound L1 replaces log pi_BoN by (n - 1) log F + log
pi_anchor, where F(y) is the chance that an anchor sample is worse than y. Each step, for each prompt: draw y from the
policy and M samples of the anchor; the return is

    R = (n - 1) log F_(y) - (log pi(y) - log pi_anchor(y)),   F_ = (how many of the M are worse + 1) / (M + 1)

(the estimate of the authors' code), minus the mean return of the other prompts' samples. This is BOND with beta = 1 and
a different estimate of the same quantile: it counts strictly worse samples and smooths by one, so it is never zero,
while the exact F of a tied lowest level would be. The authors cache the M rewards of each prompt (about 300) and use
PPO with KL coefficient 1 / (n - 1); here the anchor may move, the update is REINFORCE, and the return is in nats as in
BOND.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from bondlm.bestofn import quantile
from bondlm.objectives.base import Loss, SamplePlan, Selection
from bondlm.objectives.rules import check, whole
from bondlm.objectives.terms import learn_from_all, leave_one_out_mean, policy_gradient


@dataclass(frozen=True, kw_only=True, slots=True)
class VBON:
    """vBoN's bound L1 for Best-of-`n`, M = `num_anchor_samples` anchor samples for F."""

    n: int
    num_anchor_samples: int = 16

    def __post_init__(self) -> None:
        """Check the settings."""
        check(
            self,
            n=whole(2, "Best-of-1 is the anchor itself"),
            num_anchor_samples=whole(2, "F needs samples to compare with"),
        )

    @property
    def plan(self) -> SamplePlan:
        """One sample of the policy, and M of the anchor that only serve as comparison."""
        return SamplePlan(policy=1, anchor=self.num_anchor_samples, learn=1, compare=1)

    def select(self, rewards_PM: Tensor, noise_PM: Tensor) -> Selection:
        """Learn from the policy's sample; (n - 1) log F_ is the signal."""
        m = self.num_anchor_samples
        worse = m * quantile(rewards_PM[:, :1], rewards_PM[:, 1:], strict=True)
        return learn_from_all((self.n - 1) * torch.log((worse + 1) / (m + 1)))

    def returns(self, signal_PC: Tensor, logp_PC: Tensor, anchor_logp_PC: Tensor) -> Tensor:
        """R = (n - 1) log F_ - (log pi - log pi_anchor)."""
        return signal_PC - (logp_PC - anchor_logp_PC)

    def baseline(self, returns_PC: Tensor) -> Tensor:
        """Mean return of the batch's other samples."""
        return leave_one_out_mean(returns_PC)

    def loss(self, logp_PL: Tensor, anchor_logp_PC: Tensor, signal_PC: Tensor, baseline_PC: Tensor) -> Loss:
        """-log pi (R - baseline)."""
        loss = policy_gradient(logp_PL, self.returns(signal_PC, logp_PL.detach(), anchor_logp_PC) - baseline_PC)
        return loss._replace(metrics=loss.metrics | {"bond/signal": signal_PC.squeeze(1)})
