"""Apply `missing_eos` to completions that reached `max_completion_length` without an end, before they are learned from.

Only the objective sees the result; logs and evaluations use the original rewards.

Shapes: P prompts, M completions of each.
"""

from dataclasses import replace

import torch
from torch import Tensor

from bondlm.rollout.samples import Samples

REASON = "a completion did not end within max_completion_length (missing_eos='drop')"


def treat_truncated(samples: Samples, missing_eos: str) -> Samples:
    """Samples for the objective: unchanged, with truncated ones ranked last, or without prompts that have any."""
    if missing_eos == "keep":
        return samples
    finished_PM = samples.finished_PM.bool()
    if missing_eos == "worst":
        return replace(samples, reranked_PM=rank_truncated_last(samples.rewards_PM, finished_PM))
    # Whole prompts are dropped, as after a failed reward: a set with fewer samples would have a different n.
    cut = torch.nonzero(~finished_PM.all(dim=1))[:, 0].tolist()
    return replace(samples, left_out=frozenset(cut) - samples.dropped.keys())


def rank_truncated_last(rewards_PM: Tensor, finished_PM: Tensor) -> Tensor:
    """Rewards (P, M) in which a prompt's truncated samples are below all its finished ones.

    They move down together until the distance of the best of them to the lowest finished one equals the range of the
    prompt's rewards (1 if all are equal). So their order stays, and for objectives that use values instead of ranks
    (rloo, grpo) the shift is on the reward's own scale. If none is finished, or all are below already, nothing moves.
    """
    lowest_P1 = rewards_PM.masked_fill(~finished_PM, torch.inf).amin(dim=1, keepdim=True)
    highest_P1 = rewards_PM.masked_fill(finished_PM, -torch.inf).amax(dim=1, keepdim=True)
    spread_P1 = rewards_PM.amax(dim=1, keepdim=True) - rewards_PM.amin(dim=1, keepdim=True)
    margin_P1 = torch.where(spread_P1 > 0, spread_P1, 1.0)
    moved_PM = rewards_PM - (highest_P1 - (lowest_P1 - margin_P1))
    moved_PM = moved_PM.clamp(min=torch.finfo(rewards_PM.dtype).min)  # rewards of 1e308 would become infinite
    return torch.where(~finished_PM & (highest_P1 >= lowest_P1), moved_PM, rewards_PM)
