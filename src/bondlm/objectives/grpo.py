"""GRPO: rewards normalised inside each prompt (Shao et al. 2024, arXiv 2402.03300), one optimizer step per rollout.

Each step, for each prompt:

1. draw y_1 .. y_m from the policy; A_i = (r(y_i) - mean) / (std + 1e-4), mean and std over the prompt's own rewards,
   std with m - 1 in its denominator; without std ("none", Liu et al. 2025, arXiv 2503.20783) A_i = r(y_i) - mean;
2. h_i = log pi(y_i) - log pi_anchor(y_i), minus the mean of the prompt's *other* h;
3. descend the mean of -log pi(y_i) (A_i - beta_rl h_i).

With one step per rollout all importance ratios are 1, so nothing is clipped and this is GRPO's gradient for every clip
range. The KL has the unbiased gradient of KL(pi || anchor), and a completion is one action: the log-probabilities of
its tokens are summed, not averaged, so long and short answers have equal weight.

The reward part is not the policy gradient of a scalar, because A_i depends on the other rewards. Without the std it is
(m-1)/m times RLOO's. With the std, a prompt whose rewards are close counts as much as one whose rewards are far apart,
and for m = 2 only the order matters.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from bondlm.objectives.base import Loss, SamplePlan, Selection
from bondlm.objectives.rules import check, finite, one_of, whole
from bondlm.objectives.terms import (
    learn_from_all,
    mean_of_prompts_others,
    own_samples,
    policy_gradient,
    with_share_without_signal,
)

STD_FLOOR = 1e-4  # the usual value: rewards that differ only by rounding must not be scaled up to 1


@dataclass(frozen=True, kw_only=True, slots=True)
class GRPO:
    """GRPO with KL coefficient `beta_rl` per nat, m = `num_samples` samples per prompt, with or without their std."""

    beta_rl: float
    num_samples: int = 8
    scale_rewards: Literal["group", "none"] = "group"

    default_anchor: ClassVar[str] = "fixed"  # GRPO's KL is to the model that it started from

    def __post_init__(self) -> None:
        """Check the settings."""
        check(
            self,
            beta_rl=finite(0, "a negative value pushes away from the anchor"),
            num_samples=whole(2, "an advantage compares a prompt's samples with each other"),
            scale_rewards=one_of("group", "none"),
        )

    @property
    def plan(self) -> SamplePlan:
        """Draw m samples of the policy, learn from all."""
        return own_samples(self.num_samples)

    def select(self, rewards_PM: Tensor, noise_PM: Tensor) -> Selection:
        """Learn from all samples; the signal of each is (m-1)/m A_i, which the baseline below makes A_i."""
        # The baseline would subtract the mean too, but in fp32, which cannot hold rewards of 1e6 and their differences.
        advantage_PM = rewards_PM - rewards_PM.mean(dim=1, keepdim=True)
        if self.scale_rewards == "group":
            advantage_PM = advantage_PM / (rewards_PM.std(dim=1, keepdim=True) + STD_FLOOR)
        return learn_from_all(advantage_PM * (self.num_samples - 1) / self.num_samples)

    def returns(self, signal_PC: Tensor, logp_PC: Tensor, anchor_logp_PC: Tensor) -> Tensor:
        """R = signal - beta_rl (log pi - log pi_anchor)."""
        return signal_PC - self.beta_rl * (logp_PC - anchor_logp_PC)

    def baseline(self, returns_PC: Tensor) -> Tensor:
        """Mean return of the prompt's other samples; the others' signals sum to minus the sample's own."""
        return mean_of_prompts_others(returns_PC)

    def loss(self, logp_PL: Tensor, anchor_logp_PC: Tensor, signal_PC: Tensor, baseline_PC: Tensor) -> Loss:
        """Mean over the prompt's samples of -log pi (R - baseline)."""
        advantage_PC = self.returns(signal_PC, logp_PL.detach(), anchor_logp_PC) - baseline_PC
        return with_share_without_signal(policy_gradient(logp_PL, advantage_PC), signal_PC)
