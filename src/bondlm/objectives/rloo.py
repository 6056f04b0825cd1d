"""RLOO: REINFORCE with a leave-one-out baseline inside each prompt (Ahmadian et al. 2024, arXiv 2402.14740).

Each step, for each prompt: draw y_1 .. y_m from the policy; the return of each is R_i = r(y_i) - beta_rl (log pi(y_i) -
log pi_anchor(y_i)), minus the mean of the *other* returns of the same prompt. Two samples and beta_rl in {0.001, .., 1}
are the baseline of Sessa et al. 2024, arXiv 2407.14622, Fig. 7. The objective and the fixed point are those of
`Reinforce`; the baseline inside each prompt also removes differences between prompts, such as their mean reward.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from bondlm.objectives.base import Loss, SamplePlan, Selection
from bondlm.objectives.rules import check, finite, whole
from bondlm.objectives.terms import (
    learn_from_all,
    mean_of_prompts_others,
    own_samples,
    policy_gradient,
    with_share_without_signal,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class RLOO:
    """RLOO with KL coefficient `beta_rl`, in units of reward per nat, and `num_samples` samples per prompt."""

    beta_rl: float
    num_samples: int = 2

    default_anchor: ClassVar[str] = "fixed"  # RLOO's KL is to the model that it started from

    def __post_init__(self) -> None:
        """Check the settings."""
        check(
            self,
            beta_rl=finite(0, "a negative value pushes away from the anchor"),
            num_samples=whole(2, "the baseline is the mean of a prompt's other samples"),
        )

    @property
    def plan(self) -> SamplePlan:
        """Draw m samples of the policy, learn from all."""
        return own_samples(self.num_samples)

    def select(self, rewards_PM: Tensor, noise_PM: Tensor) -> Selection:
        """Learn from all samples; their rewards are the signal."""
        return learn_from_all(rewards_PM)

    def returns(self, signal_PC: Tensor, logp_PC: Tensor, anchor_logp_PC: Tensor) -> Tensor:
        """R = r - beta_rl (log pi - log pi_anchor)."""
        return signal_PC - self.beta_rl * (logp_PC - anchor_logp_PC)

    def baseline(self, returns_PC: Tensor) -> Tensor:
        """Mean return of the prompt's other samples."""
        return mean_of_prompts_others(returns_PC)

    def loss(self, logp_PL: Tensor, anchor_logp_PC: Tensor, signal_PC: Tensor, baseline_PC: Tensor) -> Loss:
        """Mean over the prompt's samples of -log pi (R - baseline)."""
        advantage_PC = self.returns(signal_PC, logp_PL.detach(), anchor_logp_PC) - baseline_PC
        return with_share_without_signal(policy_gradient(logp_PL, advantage_PC), signal_PC)
