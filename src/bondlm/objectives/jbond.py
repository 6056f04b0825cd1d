"""J-BOND, the practical algorithm: Sessa et al. 2024, arXiv 2407.14622, section 5 and Algorithm 2.

Each step, for each prompt x:

1. draw y from the policy and y'_1, y'_2 from the anchor; score all three;
2. forward KL to Best-of-2 of the anchor: raise log pi(better of y'_1, y'_2);
3. backward KL to it: REINFORCE with the return  R = r(y) - (log pi(y) - log pi_anchor(y)),  r(y) = -log 16 if y is
   worse than both anchor samples, else 0 (Eq. 17), minus the mean return of the other prompts' samples;
4. optionally an extra pull towards the anchor, gamma * KL(pi || anchor);
5. descend (1 - beta) * [2] + beta * [3] + gamma * [4]; then the anchor moves a little towards the policy (Eq. 18).

Two notes. The paper prints G_Reg in Algorithm 2 with a minus sign, which would push *away* from the anchor; Eq. 19, its
text and Fig. 6 need plus (docs/theory.md, E1). The coefficient of the log-ratio is exactly 1 because n - 1 = 1.

Two generalisations, off by default. With k > 2 anchor samples r(y) = 2^k log(1/2) if y is worse than all k; [2] still
takes the better of the first 2, so both parts aim at Best-of-2. This works up to k = 4, where the backward part on its
own settles 0.1 nats from Best-of-2 (k = 2: 0.01). At k = 16 the penalty is 45,426 nats, and only the worst samples are
moved at all. "harmonic" is a finer r(y) for any k: see `log_quantile`.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from bondlm.bestofn import log_quantile
from bondlm.bestofn.quantiles import two_level_penalty
from bondlm.errors import ConfigError
from bondlm.objectives.base import Loss, SamplePlan, Selection
from bondlm.objectives.rules import between, check, finite, one_of, whole
from bondlm.objectives.terms import argmax_random_ties, leave_one_out_mean

MAX_TWO_LEVEL = 4  # anchor samples: a penalty of 11 nats


@dataclass(frozen=True, kw_only=True, slots=True)
class JBOND:
    """J-BOND with Jeffreys weight `beta` (0: forward KL only, 1: backward only) and regularisation `gamma` >= 0."""

    beta: float = 0.5
    gamma: float = 0.0
    num_anchor_samples: int = 2
    log_quantile: Literal["jbond", "harmonic"] = "jbond"

    n: ClassVar[int] = 2

    def __post_init__(self) -> None:
        """Check the settings."""
        check(
            self,
            beta=between(0, 1, "the weight of the backward KL"),
            gamma=finite(0, "a negative value pushes away from the anchor"),
            num_anchor_samples=whole(self.n, "J-BOND compares with 2 or more"),
            log_quantile=one_of("jbond", "harmonic"),
        )
        if self.log_quantile == "jbond" and self.num_anchor_samples > MAX_TWO_LEVEL:
            penalty = two_level_penalty(min(self.num_anchor_samples, 1000))
            raise ConfigError(
                f"num_anchor_samples={self.num_anchor_samples}: log_quantile='jbond' penalises an answer below all of "
                f"them by {penalty:.3g} nats, and is no estimate of log p beyond {MAX_TWO_LEVEL}; set log_quantile: "
                "harmonic, or fewer samples"
            )

    @property
    def plan(self) -> SamplePlan:
        """One sample of the policy, k of the anchor."""
        return SamplePlan(policy=1, anchor=self.num_anchor_samples, learn=2, compare=1)

    def select(self, rewards_PM: Tensor, noise_PM: Tensor) -> Selection:
        """Learn from the policy's sample and the better of the anchor's first two; Eq. 17 is the signal."""
        policy, anchor = rewards_PM[:, :1], rewards_PM[:, 1:]
        best = 1 + argmax_random_ties(anchor[:, : self.n], noise_PM[:, 1 : 1 + self.n])
        rows = torch.stack([torch.zeros_like(best), best], dim=1)
        return Selection(rows, log_quantile(policy, anchor, method=self.log_quantile))

    def returns(self, signal_PC: Tensor, logp_PC: Tensor, anchor_logp_PC: Tensor) -> Tensor:
        """R = r - (log pi - log pi_anchor)."""
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
        regulariser = logp * log_ratio  # its mean gradient is that of KL(pi || anchor); plus sign: see E1
        loss = (1 - self.beta) * forward + self.beta * backward + self.gamma * regulariser
        below_all = log_quantile(torch.zeros(1, 1), torch.ones(1, self.num_anchor_samples), method=self.log_quantile)
        return Loss(
            loss,
            {
                "bond/forward_loss": forward.detach(),
                "bond/advantage": advantage,
                "bond/penalty_rate": (signal_PC.squeeze(1) < float(below_all) + 0.5).to(loss.dtype),
            },
        )
