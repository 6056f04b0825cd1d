"""Sampling and scoring: what a training step and an evaluation both start from.

Shapes: P prompts, M completions of each.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bondlm.data.columns import LOGGED_IDS, LOGGED_REWARDS, PROMPT_IDS, PROMPT_ROW
from bondlm.data.tokens import as_messages, decode_completions
from bondlm.engines import Completion, Engine, RemoteEngine, Role
from bondlm.rewards import NamedReward, score

ROLE_NUMBER: dict[Role, int] = {"policy": 0, "anchor": 1, "reference": 2}


@dataclass(frozen=True, kw_only=True)
class Samples:
    """M scored completions of each of P prompts."""

    prompts: list[list[int]]
    completions: list[list[Completion]]
    texts: list[list[str]]
    rewards_PM: Tensor  # float64
    by_name: dict[str, Tensor]  # each reward function's own (P, M)
    dropped: dict[int, str] = field(default_factory=dict)  # prompts that a reward failed for, and why; rewards are 0
    left_out: frozenset[int] = frozenset()  # other prompts, with a completion that was cut
    reranked_PM: Tensor | None = None  # what the objective sees instead of the rewards, if anything
    seconds: float = 0.0  # that drawing them took, of held-out prompts

    @property
    def kept(self) -> Tensor:
        """Which prompts are learned from (P,) bool."""
        return torch.tensor([i not in self.dropped and i not in self.left_out for i in range(len(self.prompts))])

    @property
    def ranked(self) -> Tensor:
        """The rewards as the objective sees them (P, M)."""
        return self.rewards_PM if self.reranked_PM is None else self.reranked_PM

    @property
    def flat(self) -> list[Completion]:
        """All completions, prompt by prompt."""
        return [completion for row in self.completions for completion in row]


def prompt_seed(seed: int, step: int, position: int, role: Role) -> int:
    """The seed of one prompt's samples: a function of the run's seed, the step, the prompt's place and the role alone.

    So a rollout can be repeated after a resume, whoever else has used a random number generator meanwhile.
    """
    return int(np.random.SeedSequence([seed, step, position, ROLE_NUMBER[role]]).generate_state(1, np.uint64)[0])


def tie_noise(seed: int, step: int, positions: Sequence[int], num_samples: int) -> Tensor:
    """Uniform numbers (P, M) float64 that break ties between rewards, each prompt's from its own seed."""
    rows = [np.random.default_rng([seed, step, position, 9]).random(num_samples) for position in positions]
    return torch.from_numpy(np.stack(rows))


def draw(
    engine: Engine,
    rows: Sequence[Mapping[str, Any]],
    num_samples: Mapping[Role, int],
    *,
    max_new_tokens: int,
    seed: int,
    step: int,
    positions: Sequence[int],
    temperature: float = 1.0,
) -> list[list[Completion]]:
    """P lists of completions, role by role in the order of `num_samples`."""
    prompts = [row[PROMPT_IDS] for row in rows]
    wanted = {
        role: (count, [prompt_seed(seed, step, position, role) for position in positions])
        for role, count in num_samples.items()
        if count
    }
    if isinstance(engine, RemoteEngine):
        engine.sync()
    drawn = engine.generate_roles(prompts, wanted, max_new_tokens=max_new_tokens, temperature=temperature)
    return [[c for role in wanted for c in drawn[role][i]] for i in range(len(rows))]


def longest_prompt(*datasets: Any) -> int:
    """Tokens of the longest encoded prompt of the data sets (dictionaries of them, and None, too); 0 without any."""
    longest = 0
    for dataset in datasets:
        if isinstance(dataset, dict):
            longest = max(longest, longest_prompt(*dataset.values()))
        elif dataset is not None:
            longest = max([longest, *(len(ids) for ids in dataset[PROMPT_IDS])])
    return longest


def score_samples(
    rewards: Sequence[NamedReward],
    rows: Sequence[Mapping[str, Any]],
    completions: list[list[Completion]],
    *,
    tokenizer: Any,
    eos_ids: Sequence[int],
    drop: bool = False,
) -> Samples:
    """Decode the completions and score each text once: equal answers to a prompt share their reward.

    `drop` marks a prompt as dropped when a reward fails for one of its completions, instead of raising.
    """
    texts = [decode_completions([c.ids for c in row], tokenizer, eos_ids) for row in completions]
    keys: dict[tuple[int, str, bool], int] = {}
    places = []
    for i, (row_texts, row) in enumerate(zip(texts, completions, strict=True)):
        places.append(
            [keys.setdefault((i, text, c.finished), len(keys)) for text, c in zip(row_texts, row, strict=True)]
        )
    owner = [i for i, _, _ in keys]
    ids_by_place = {
        place: c.ids for row, at in zip(completions, places, strict=True) for c, place in zip(row, at, strict=True)
    }
    answers = [text for _, text, _ in keys]
    prompts = [rows[i]["prompt"] for i in owner]
    conversational = bool(prompts) and not isinstance(prompts[0], str)
    columns = {
        name: [rows[i][name] for i in owner] for name in rows[0] if name not in ("prompt", PROMPT_IDS, PROMPT_ROW)
    }
    columns |= {
        "completion_ids": [ids_by_place[place] for place in range(len(keys))],
        "truncated": [not finished for _, _, finished in keys],
    }
    scores = score(rewards, prompts, as_messages(answers) if conversational else answers, columns, allow_bad_rows=drop)
    dropped: dict[int, str] = {}
    for place, reason in scores.bad.items():
        dropped.setdefault(owner[place], reason)
    index = torch.tensor(places)
    is_dropped_P1 = torch.tensor([[i in dropped] for i in range(len(rows))])
    return Samples(
        prompts=[list(row[PROMPT_IDS]) for row in rows],
        completions=completions,
        texts=texts,
        rewards_PM=scores.total[index].masked_fill(is_dropped_P1, 0.0),
        by_name={name: values[index].masked_fill(is_dropped_P1, 0.0) for name, values in scores.by_name.items()},
        dropped=dropped,
    )


def completion_metrics(completions: Sequence[Completion]) -> dict[str, float]:
    """Lengths in tokens and the fraction cut at the budget, under TRL's names; and the fraction that says nothing."""
    lengths = [len(c.ids) for c in completions]
    return {
        "completions/mean_length": float(np.mean(lengths)),
        "completions/min_length": float(min(lengths)),
        "completions/max_length": float(max(lengths)),
        "completions/clipped_ratio": float(np.mean([not c.finished for c in completions])),
        "completions/frac_empty": float(np.mean([c.finished and len(c.ids) == 1 for c in completions])),
        # -log p of a sample is an unbiased estimate of the entropy of its law; the mean is over tokens.
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
        metrics |= {
            f"rewards/{name}/mean": float(v[counted_P, :num_policy].mean()) for name, v in samples.by_name.items()
        }
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


def logged_samples(rows: Sequence[Mapping[str, Any]]) -> Samples:
    """The scored samples that the rows hold (`bondlm.data.scored`); files keep no log-probabilities, so these are 0."""
    completions = [[Completion(list(ids), [0.0] * len(ids), finished=True) for ids in row[LOGGED_IDS]] for row in rows]
    return Samples(
        prompts=[list(row[PROMPT_IDS]) for row in rows],
        completions=completions,
        texts=[["" for _ in row] for row in completions],
        rewards_PM=torch.tensor([row[LOGGED_REWARDS] for row in rows], dtype=torch.float64),
        by_name={},
    )
