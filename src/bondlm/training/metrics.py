"""What a step logs of its samples, under TRL's names where the meaning is the same (docs/metrics.md)."""

import math
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from bondlm.data.columns import LOGGED_IDS
from bondlm.engines import Completion
from bondlm.errors import RewardError
from bondlm.rollout.samples import Samples
from bondlm.training.clock import StepMeans
from bondlm.training.rollout import Rollout

TAKEN = (
    *("loss", "grad_norm", "learning_rate", "epoch", "step", "step_time", "kl", "anchor/kl", "skipped_steps"),
    *("noise/trace", "noise/gradient_sq", "noise/scale"),
)


def record(rollout: Rollout, means: StepMeans, num_processes: int = 1) -> None:
    """Add a step's metrics to `means`, which are means over `num_processes`; tokens are those of all."""
    samples, plan, counted_P = rollout.samples, rollout.plan, rollout.is_counted_P
    if plan.policy:
        means.record_of_each({"anchor/kl": rollout.sampled_logp_PC - rollout.anchor_logp_PC}, counted_P)
        if rollout.reference_logp_PC is not None:
            means.record_of_each({"kl": rollout.sampled_logp_PC - rollout.reference_logp_PC}, counted_P)
    own = reward_metrics(samples, plan.policy, counted_P)
    means.record(own, weight=float(counted_P.sum()))
    work = work_metrics(samples, plan.policy, rollout.learned, plan.compare, rollout.num_passes)
    if LOGGED_IDS in rollout.rows[0]:  # samples on file: nobody has drawn them here, from whichever distribution
        del work["entropy"], work["num_tokens"]
    work |= {name: num_processes * value for name, value in work.items() if name.startswith("num_tokens")}
    means.record(work)
    for name in samples.by_name if plan.policy else ():
        record_reward(name, samples.by_name[name][counted_P, : plan.policy], means)
    if taken := sorted(samples.metrics.keys() & (own | work | dict.fromkeys(TAKEN)).keys()):
        raise RewardError(f"log_metric({taken[0]!r}): bondlm has a metric of this name, choose another one")
    means.record(samples.metrics)


def record_reward(name: str, values_Pm: Tensor, means: StepMeans) -> None:
    """Mean and spread of one reward over the samples of the prompts that it applies to; elsewhere it is NaN."""
    applies_Pm = values_Pm[~values_Pm.isnan().any(dim=1)]
    means.record({f"rewards/{name}/mean": float(applies_Pm.mean())}, weight=float(len(applies_Pm)))
    spread = float(applies_Pm.std()) if applies_Pm.numel() > 1 else math.nan
    means.record({f"rewards/{name}/std": spread}, weight=float(len(applies_Pm)) if applies_Pm.numel() > 1 else 0.0)


def completion_metrics(completions: Sequence[Completion]) -> dict[str, float]:
    """Lengths in tokens and the fraction cut at the budget, under TRL's names; and the fraction that says nothing."""
    lengths = [len(c.ids) for c in completions]
    return {
        "completions/mean_length": float(np.mean(lengths)),
        "completions/min_length": float(min(lengths)),
        "completions/max_length": float(max(lengths)),
        "completions/clipped_ratio": float(np.mean([not c.finished for c in completions])),
        "completions/frac_empty": float(np.mean([c.finished and len(c.ids) == 1 for c in completions])),
        # -log p of a sample is an unbiased estimate of the entropy of its distribution; the mean is over tokens.
        "entropy": -sum(c.logprob for c in completions) / sum(lengths),
    }


def reward_metrics(samples: Samples, num_policy: int, counted_P: Tensor) -> dict[str, float]:
    """What a step logs of the rewards of the prompts that count; the policy's samples come first."""
    rewards_PM = samples.rewards_PM[counted_P]
    policy, anchor = rewards_PM[:, :num_policy], rewards_PM[:, num_policy:]
    ordered = samples.ranked[counted_P].sort(dim=1).values
    tied = (ordered[:, 1:] == ordered[:, :-1]).any(dim=1)
    metrics = {
        "reward_std": float(rewards_PM.std()) if len(rewards_PM) else math.nan,  # all dropped: the step is skipped
        "bond/frac_tied": float(tied.double().mean()),
    }
    if num_policy:
        metrics["reward"] = float(policy.mean())
    if anchor.shape[1]:
        metrics["anchor/reward"] = float(anchor.mean())
    return metrics


def work_metrics(
    samples: Samples, num_policy: int, learned: Sequence[Sequence[Completion]], num_compared: int, num_passes: int = 1
) -> dict[str, float]:
    """Lengths of the policy's samples (without any, of the anchor's), and the completion tokens that a step draws,
    learns on, and has `num_passes` roles score: what its phases worked through.
    """
    measured = [c for row in samples.completions for c in (row[:num_policy] if num_policy else row)]
    return completion_metrics(measured) | {
        "num_tokens": float(sum(len(c.ids) for c in samples.flat)),
        "num_tokens/learned": float(sum(len(c.ids) for row in learned for c in row)),
        "num_tokens/compared": float(num_passes * sum(len(c.ids) for row in learned for c in row[:num_compared])),
    }
