"""Detect rewards that are equal for all completions of a prompt, which cannot teach or select anything."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

NEARLY_ALL = 0.9


def constant_rewards(rewards_PM: Tensor, texts: Sequence[Sequence[str]], prompts: Sequence[Any]) -> str | None:
    """A sentence with the likely cause if nearly all prompts have the same reward for all their samples; else None.

    Args:
        rewards_PM: rewards of P prompts with M samples each; NaN if missing.
        texts: the samples, as text.
        prompts: P strings or conversations.
    """
    num_prompts, num_samples = rewards_PM.shape
    if num_prompts == 0 or num_samples < 2:
        return None
    constant_P = (rewards_PM == rewards_PM[:, :1]).all(dim=1)
    if float(constant_P.double().mean()) < NEARLY_ALL:
        return None
    value = float(rewards_PM[constant_P][0, 0])
    return (
        f"the reward is the same for all {num_samples} completions of {int(constant_P.sum())} of {num_prompts} prompts "
        f"({value:g} for the first), so it says nothing about which is better. {_likely_cause(texts, prompts)}"
    )


def _likely_cause(texts: Sequence[Sequence[str]], prompts: Sequence[Any]) -> str:
    alike = [len(set(row)) == 1 for row in texts]
    if sum(alike) >= NEARLY_ALL * len(alike):
        return "The completions of a prompt are themselves the same: the model answers each prompt in one way"
    if not isinstance(prompts[0], str):
        return (
            "The prompts are conversations, so a completion is a list of messages, and len(completion) is 1 for all: "
            'check that the reward reads its text, completion[0]["content"]'
        )
    return (
        "Check that the reward reads the completions, and has more than a few values (0/1, clipped, rounded: "
        "docs/rewards.md)"
    )
