"""Scored samples whose worth is known."""

import numpy as np
import torch

from bondlm.rollout.samples import Samples


def scored(rewards, *, length=10.0, log_ratio=None, judges=None, text="one two three", finished=1.0):
    rewards = torch.from_numpy(np.asarray(rewards, dtype=float))
    return Samples(
        prompts=[f"prompt {i}" for i in range(len(rewards))],
        texts=[[text] * rewards.shape[1] for _ in rewards],
        rewards_PM=rewards,
        lengths_PM=torch.full_like(rewards, length),
        finished_PM=torch.full_like(rewards, finished),
        logprobs_PM=torch.full_like(rewards, -2.0 * length),
        log_ratio_PM=None if log_ratio is None else torch.full_like(rewards, log_ratio),
        judges={name: torch.from_numpy(values) for name, values in (judges or {}).items()},
    )


def case(n=4, num_prompts=400, m=4, num_ref=16, seed=0, **options):
    rng = np.random.default_rng(seed)
    mine = rng.normal(size=(num_prompts, m, n)).max(-1)
    return (
        scored(mine, **({"log_ratio": 1.2} | options)),
        scored(rng.normal(size=(num_prompts, num_ref)), log_ratio=-0.5),
        {"reference, T=0.7": scored(rng.normal(size=(num_prompts, 2)))},
    )
