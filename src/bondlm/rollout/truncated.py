"""Completions that ran into `max_completion_length` without an end: what `missing_eos` makes of them before they teach.

Rewards are logged, and evaluations made, with the rewards as they are; the objective alone sees what is made here.

Shapes: P prompts, M completions of each.
"""

from dataclasses import replace

import torch
from torch import Tensor

from bondlm.rollout.samples import Samples

REASON = "a completion did not end within max_completion_length (missing_eos='drop')"


def treat_truncated(samples: Samples, missing_eos: str) -> Samples:
    """Samples as the objective is to see them: as they are, with cut ones ranked last, or without their prompts."""
    if missing_eos == "keep":
        return samples
    finished_PM = samples.finished_PM.bool()
    if missing_eos == "worst":
        return replace(samples, reranked_PM=rank_truncated_last(samples.rewards_PM, finished_PM))
    # Whole prompts, as for a reward that failed: a set short of a sample would have another n.
    cut = torch.nonzero(~finished_PM.all(dim=1))[:, 0].tolist()
    return replace(samples, left_out=frozenset(cut) - samples.dropped.keys())


def rank_truncated_last(rewards_PM: Tensor, finished_PM: Tensor) -> Tensor:
    """Rewards (P, M) in which a prompt's truncated samples lie below all its finished ones.

    They move down together, until the best of them is as far below the lowest finished one as the prompt's rewards are
    apart (by 1 if all are equal). So their order stays, and for objectives that look at the value and not at the order
    (rloo, grpo) it is of the reward's own scale. Where none is finished, or all lie below already, nothing moves.
    """
    lowest_P1 = rewards_PM.masked_fill(~finished_PM, torch.inf).amin(dim=1, keepdim=True)
    highest_P1 = rewards_PM.masked_fill(finished_PM, -torch.inf).amax(dim=1, keepdim=True)
    spread_P1 = rewards_PM.amax(dim=1, keepdim=True) - rewards_PM.amin(dim=1, keepdim=True)
    margin_P1 = torch.where(spread_P1 > 0, spread_P1, 1.0)
    moved_PM = rewards_PM - (highest_P1 - (lowest_P1 - margin_P1))
    moved_PM = moved_PM.clamp(min=torch.finfo(rewards_PM.dtype).min)  # rewards of 1e308 would become infinite
    return torch.where(~finished_PM & (highest_P1 >= lowest_P1), moved_PM, rewards_PM)
