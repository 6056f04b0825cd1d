"""REINFORCE with KL regularisation, the baseline that BOND is compared with: max E_pi[r] - beta_rl KL(pi || anchor).

Each step, for each prompt: draw y from the policy; its return is R = r(y) - beta_rl (log pi(y) - log pi_anchor(y)),
minus the mean return of the other prompts' samples. Unlike BOND, it depends on the scale of the reward, so beta_rl must
fit that scale. The fixed point is pi_anchor exp(r / beta_rl), normalised (Sessa et al. 2024, arXiv 2407.14622, section
3.3). With a fixed anchor it is the usual RLHF; with an EMA anchor it is the ablation that separates BOND's loss from
its moving anchor.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from bondlm.objectives.base import Loss, SamplePlan, Selection
from bondlm.objectives.rules import check, finite
from bondlm.objectives.terms import learn_from_all, leave_one_out_mean, policy_gradient


@dataclass(frozen=True, kw_only=True, slots=True)
class Reinforce:
    """REINFORCE with KL coefficient `beta_rl`, in units of reward per nat."""

    beta_rl: float

    default_anchor: ClassVar[str] = "fixed"  # as in the paper's baseline
    plan: ClassVar[SamplePlan] = SamplePlan(policy=1, anchor=0, learn=1, compare=1)

    def __post_init__(self) -> None:
        """Check the settings."""
        check(self, beta_rl=finite(0, "a negative value pushes away from the anchor"))

    def select(self, rewards_PM: Tensor, noise_PM: Tensor) -> Selection:
        """Learn from the policy's sample; its reward is the signal."""
        return learn_from_all(rewards_PM)

    def returns(self, signal_PC: Tensor, logp_PC: Tensor, anchor_logp_PC: Tensor) -> Tensor:
        """R = r - beta_rl (log pi - log pi_anchor)."""
        return signal_PC - self.beta_rl * (logp_PC - anchor_logp_PC)

    def baseline(self, returns_PC: Tensor) -> Tensor:
        """Mean return of the batch's other samples."""
        return leave_one_out_mean(returns_PC)

    def loss(self, logp_PL: Tensor, anchor_logp_PC: Tensor, signal_PC: Tensor, baseline_PC: Tensor) -> Loss:
        """-log pi (R - baseline)."""
        return policy_gradient(logp_PL, self.returns(signal_PC, logp_PL.detach(), anchor_logp_PC) - baseline_PC)
