"""Metrics of a step's samples, under TRL's names where the meaning is the same (docs/metrics.md)."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from bondlm.bestofn.quantiles import tied_share
from bondlm.data.columns import LOGGED_IDS
from bondlm.engines import Completion
from bondlm.engines.agreement import GAP_METRIC
from bondlm.training.clock import StepMeans
from bondlm.training.processes import World
from bondlm.training.rollout import Rollout


def record(rollout: Rollout, means: StepMeans, world: World) -> None:
    """Add a step's metrics, over all processes; every process must call this."""
    samples, plan, counted_P = rollout.samples, rollout.plan, rollout.is_counted_P
    if plan.policy:
        means.record_of_each({"anchor/kl": rollout.sampled_logp_PC - rollout.anchor_logp_PC}, counted_P)
        if rollout.reference_logp_PC is not None:
            means.record_of_each({"kl": rollout.sampled_logp_PC - rollout.reference_logp_PC}, counted_P)
    is_real_P, is_counted_P = world.gather(rollout.is_real_P), world.gather(counted_P)
    numbers = [samples.rewards_PM, samples.ranked, samples.lengths_PM, samples.finished_PM, samples.logprobs_PM]
    everyone = world.gather(torch.stack([t.double() for t in (*numbers, *samples.by_name.values())], dim=2))
    rewards_PM, ranked_PM, *drawn, by_name = everyone.split([1, 1, 1, 1, 1, len(samples.by_name)], dim=2)
    own = reward_metrics(rewards_PM[is_counted_P, :, 0], ranked_PM[is_counted_P, :, 0], plan.policy)
    means.record(own, weight=float(is_counted_P.sum()))
    for place, name in enumerate(samples.by_name if plan.policy else ()):
        record_reward(name, by_name[is_counted_P, : plan.policy, place], means)
    # Among drawn samples, dropped prompts count, but rows that only fill up a last batch do not.
    lengths_PM, finished_PM, logprobs_PM = (tensor[is_real_P, :, 0] for tensor in drawn)
    measured = slice(plan.policy or None)  # if there are no policy samples, those of the anchor
    work = completion_numbers(lengths_PM[:, measured], finished_PM[:, measured], logprobs_PM[:, measured])
    work |= {"num_tokens": float(lengths_PM.sum())} | worked_tokens(rollout, world)
    if LOGGED_IDS in rollout.rows[0]:  # samples from a file were not drawn here, and their distribution is unknown
        del work["entropy"], work["num_tokens"]
    means.record(work)
    means.record(samples.metrics, weight=float(rollout.is_real_P.sum()))  # each process has those of its own prompts


def record_gap(logp_PLT: Tensor, sampled_PCT: Tensor, counted_P: Tensor, means: StepMeans) -> None:
    """Mean absolute difference between learner and sampler over the completion tokens of the prompts that count."""
    sampled_PCT = sampled_PCT[counted_P]
    real = sampled_PCT.isfinite()
    gaps = (logp_PLT[counted_P, : sampled_PCT.shape[1]].detach() - sampled_PCT)[real].abs()
    means.record({GAP_METRIC: float(gaps.mean())}, weight=float(len(gaps)))


def record_reward(name: str, values_Pm: Tensor, means: StepMeans) -> None:
    """Record mean and spread of one reward over the prompts that it applies to; it is NaN for the others."""
    applies_Pm = values_Pm[~values_Pm.isnan().any(dim=1)]
    means.record({f"rewards/{name}/mean": float(applies_Pm.mean())}, weight=float(len(applies_Pm)))
    spread = float(applies_Pm.std()) if applies_Pm.numel() > 1 else math.nan
    means.record({f"rewards/{name}/std": spread}, weight=float(len(applies_Pm)) if applies_Pm.numel() > 1 else 0.0)


def completion_metrics(completions: Sequence[Completion]) -> dict[str, float]:
    """Lengths in tokens and the truncated fraction, under TRL's names; and the fraction of empty completions."""
    of_each = [(len(c.ids), c.finished, c.logprob) for c in completions]
    return completion_numbers(*torch.tensor(of_each, dtype=torch.float64).unbind(dim=1))


def completion_numbers(lengths: Tensor, finished: Tensor, logprobs: Tensor) -> dict[str, float]:
    """`completion_metrics` of completions with these lengths, `finished` flags and log-probabilities."""
    return {
        "completions/mean_length": float(lengths.mean()),
        "completions/min_length": float(lengths.min()),
        "completions/max_length": float(lengths.max()),
        "completions/clipped_ratio": float((1 - finished).mean()),
        "completions/frac_empty": float(((finished == 1) & (lengths == 1)).double().mean()),
        # -log p of a sample is an unbiased estimate of the entropy of its distribution; the mean is over tokens.
        "entropy": float(-logprobs.sum() / lengths.sum()),
    }


def reward_metrics(rewards_PM: Tensor, ranked_PM: Tensor, num_policy: int) -> dict[str, float]:
    """Reward metrics of the prompts that count; the policy's samples come first."""
    policy, anchor = rewards_PM[:, :num_policy], rewards_PM[:, num_policy:]
    metrics = {
        "reward_std": float(rewards_PM.std()) if rewards_PM.numel() > 1 else math.nan,
        "bond/frac_tied": float(tied_share(ranked_PM).mean()) if len(ranked_PM) else math.nan,
    }
    if num_policy:
        metrics["reward"] = float(policy.mean())
    if anchor.shape[1]:
        metrics["anchor/reward"] = float(anchor.mean())
    return metrics


def worked_tokens(rollout: Rollout, world: World) -> dict[str, float]:
    """The completion tokens that all processes learn from and that roles score: the workload of a step's phases."""
    learned = [row for row, is_real in zip(rollout.learned, rollout.is_real_P.tolist(), strict=True) if is_real]
    compared = [row[: rollout.plan.compare] for row in learned]
    counts = [float(sum(len(c.ids) for row in rows for c in row)) for rows in (learned, compared)]
    all_learned, all_compared = world.sum(torch.tensor(counts, dtype=torch.float64)).tolist()
    return {"num_tokens/learned": all_learned, "num_tokens/compared": rollout.num_passes * all_compared}
