"""Measures of the policy on held-out prompts: reward, win rate, effective N and KL, each with its interval.

Shapes: P prompts, m policy samples and M reference samples of each.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from bondlm.bestofn import EffectiveN, Estimate, bootstrap_mean, effective_n, win_rates
from bondlm.bestofn.bootstrap import bootstrap_win_rate
from bondlm.rollout.samples import Samples


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """An evaluation's numbers; intervals are 95%, from a bootstrap over prompts."""

    reward: Estimate
    reference_reward: Estimate
    win_rate: Estimate
    effective_n: EffectiveN
    kl: Estimate
    goals: dict[str, tuple[Estimate, EffectiveN]] = field(default_factory=dict)  # win rate and N of several rewards

    def metrics(self, prefix: str, others: Mapping[str, float] | None = None) -> dict[str, float]:
        """Flat numbers for loggers: each value under its name, its interval under `_low` and `_high`; and `others`."""
        flat = {f"{prefix}_{name}": value for name, value in (others or {}).items()}
        names = ("reward", "reference_reward", "win_rate", "effective_n", "kl")
        estimates: dict[str, Estimate | EffectiveN] = {name: getattr(self, name) for name in names}
        for name, (wins, worth) in self.goals.items():
            estimates |= {f"rewards/{name}/win_rate": wins, f"rewards/{name}/effective_n": worth}
        for name, estimate in estimates.items():
            flat[f"{prefix}_{name}"] = estimate.value
            flat[f"{prefix}_{name}_low"] = estimate.low
            flat[f"{prefix}_{name}_high"] = estimate.high
        return flat


def compare(policy: Samples, reference: Samples, log_ratio_Pm: Tensor) -> HeldOut:
    """Compare policy samples with reference samples of the same prompts.

    Args:
        policy: m samples of each prompt from the policy.
        reference: M samples of each from the reference.
        log_ratio_Pm: log pi(y) - log pi_ref(y) of the policy's samples; its mean is the k1 estimate of the KL.
    """
    return HeldOut(
        reward=bootstrap_mean(policy.rewards_PM.mean(dim=1)),
        reference_reward=bootstrap_mean(reference.rewards_PM.mean(dim=1)),
        win_rate=bootstrap_win_rate(win_rates(policy.rewards_PM, reference.rewards_PM)),
        effective_n=effective_n(policy.rewards_PM, reference.rewards_PM),
        kl=bootstrap_mean(log_ratio_Pm.mean(dim=1)),
        goals={
            name: (bootstrap_win_rate(win_rates(mine, refs)), effective_n(mine, refs))
            for name, (mine, refs) in policy.goals(reference).items()
        },
    )
