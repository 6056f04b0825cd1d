"""Sampling and scoring, for both training steps and evaluations.

Shapes: P prompts, M completions of each.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from bondlm.bestofn.aggregation import mid_ranks
from bondlm.data.columns import LOGGED_IDS, LOGGED_REWARDS, PROMPT_IDS, PROMPT_ROW
from bondlm.data.prompt_encoder import PromptEncoder
from bondlm.data.tokens import as_messages
from bondlm.engines import Completion, Engine, RemoteEngine, Role
from bondlm.rewards import SUM, Aggregation, NamedReward, Scores, score
from bondlm.rewards.scoring import refuse_uneven
from bondlm.rollout.seeds import Seeds


@dataclass(frozen=True, kw_only=True)
class Samples:
    """M scored completions of each of P prompts: just drawn, or read back from a file; numbers are (P, M) float64."""

    prompts: list[Any]  # text or messages
    texts: list[list[str]]  # all M of each prompt, or the first few if read from a file
    rewards_PM: Tensor
    lengths_PM: Tensor  # tokens, end-of-sequence included
    finished_PM: Tensor  # 0 where a completion was truncated
    logprobs_PM: Tensor  # of the whole completion, under the distribution that it was drawn from
    prompt_ids: list[list[int]] = field(default_factory=list)  # these two only for samples just drawn
    completions: list[list[Completion]] = field(default_factory=list)
    by_name: dict[str, Tensor] = field(default_factory=dict)  # values of each reward function; NaN: it does not apply
    extras: dict[str, list[list[Any]]] = field(default_factory=dict)  # what they logged for each sample by `log_extra`
    metrics: dict[str, float] = field(default_factory=dict)  # and for all samples by `log_metric`
    judges: dict[str, Tensor] = field(default_factory=dict)  # rewards that were not optimised
    log_ratio_PM: Tensor | None = None  # log pi(y) - log pi_ref(y), whichever model drew y
    dropped: dict[int, str] = field(default_factory=dict)  # prompts that a reward failed for, and why; rewards are 0
    left_out: frozenset[int] = frozenset()  # other prompts, with a truncated completion
    reranked_PM: Tensor | None = None  # what the objective sees instead of the rewards, if set

    @classmethod
    def of_rows(
        cls, rows: Sequence[Mapping[str, Any]], completions: list[list[Completion]], rewards_PM: Tensor, **more: Any
    ) -> "Samples":
        """Completions of encoded rows with their rewards; `more` sets other fields."""

        def numbers(value: Callable[[Completion], float]) -> Tensor:
            return torch.tensor([[float(value(c)) for c in row] for row in completions], dtype=torch.float64)

        return cls(
            prompts=[row["prompt"] for row in rows],
            prompt_ids=[list(row[PROMPT_IDS]) for row in rows],
            completions=completions,
            rewards_PM=rewards_PM,
            lengths_PM=numbers(lambda c: len(c.ids)),
            finished_PM=numbers(lambda c: c.finished),
            logprobs_PM=numbers(lambda c: c.logprob),
            **more,
        )

    @property
    def kept(self) -> Tensor:
        """Which prompts are learned from, (P,) bool."""
        return torch.tensor([i not in self.dropped and i not in self.left_out for i in range(len(self.prompts))])

    @property
    def ranked(self) -> Tensor:
        """The rewards as the objective sees them (P, M)."""
        return self.rewards_PM if self.reranked_PM is None else self.reranked_PM

    def goals(self, reference: "Samples") -> dict[str, tuple[Tensor, Tensor]]:
        """With several rewards, the values of each, for these samples (P, m) and for the reference's (P, M).

        They cover only the prompts that the reward applies to; a reward that applies to none is left out.
        """
        found = {}
        for name in self.by_name if len(self.by_name) > 1 else ():
            mine, refs = self.by_name[name], reference.by_name[name]
            applies_P = ~(mine.isnan().any(dim=1) | refs.isnan().any(dim=1))
            if applies_P.any():
                found[name] = (mine[applies_P], refs[applies_P])
        return found

    @property
    def flat(self) -> list[Completion]:
        """All completions, prompt by prompt."""
        return [completion for row in self.completions for completion in row]


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How completions are drawn."""

    max_new_tokens: int  # end-of-sequence included
    seeds: Seeds
    temperature: float = 1.0  # 1 samples the model's own distribution, 0 is greedy


def draw(
    engine: Engine,
    rows: Sequence[Mapping[str, Any]],
    num_samples: Mapping[Role, int],
    params: SamplingParams,
    positions: Sequence[int],
    num_parts: int = 1,
) -> list[list[Completion]]:
    """P lists of completions of encoded rows, role by role in the order of `num_samples`.

    `positions` are the rows' places in their data set, on which the seeds of their samples depend. The engine is called
    `num_parts` times, for equal parts of the rows; the last parts may be smaller or empty.
    """
    if isinstance(engine, RemoteEngine):
        engine.sync()
    size = max(1, math.ceil(len(rows) / num_parts))
    drawn: list[list[Completion]] = []
    for start in range(0, num_parts * size, size):
        part = slice(start, start + size)
        wanted = {
            role: (count, [params.seeds.of_prompt(position, role) for position in positions[part]])
            for role, count in num_samples.items()
            if count
        }
        prompts = [row[PROMPT_IDS] for row in rows[part]]
        found = engine.generate_roles(
            prompts, wanted, max_new_tokens=params.max_new_tokens, temperature=params.temperature
        )
        drawn += [[c for role in wanted for c in found[role][i]] for i in range(len(prompts))]
    return drawn


def longest_prompt(*datasets: Any) -> int:
    """Tokens of the longest encoded prompt of the data sets (also dictionaries of them, and None); 0 without any."""
    longest = 0
    for dataset in datasets:
        if isinstance(dataset, dict):
            longest = max(longest, longest_prompt(*dataset.values()))
        elif isinstance(dataset, Dataset):  # for a stream it is not known
            longest = max([longest, *(len(ids) for ids in dataset[PROMPT_IDS])])
    return longest


def longest_rows(*datasets: Any, count: int = 32) -> list[dict[str, Any]]:
    """The rows with the longest encoded prompts, `count` from each data set (also dictionaries of them, and None)."""
    rows: list[dict[str, Any]] = []
    for dataset in datasets:
        if isinstance(dataset, dict):
            rows += longest_rows(*dataset.values(), count=count)
        elif isinstance(dataset, Dataset):
            lengths = [len(ids) for ids in dataset[PROMPT_IDS]]
            rows += dataset.select(sorted(range(len(lengths)), key=lambda row: -lengths[row])[:count])
    return rows


def score_samples(
    rewards: Sequence[NamedReward],
    rows: Sequence[Mapping[str, Any]],
    completions: list[list[Completion]],
    *,
    encoder: PromptEncoder,
    drop: bool = False,
    trainer_state: Any = None,
    aggregation: Aggregation = SUM,
    reference: Samples | None = None,
    num_judges: int = 0,
) -> Samples:
    """Decode the completions and score each distinct text once: equal answers to a prompt share their reward.

    Args:
        rewards: in the order of their priority, with their weights.
        rows: P encoded prompts.
        completions: M of each.
        encoder: turns tokens into text.
        drop: if a reward fails for a completion, mark its prompt as dropped instead of raising.
        trainer_state: for reward functions that ask for it.
        aggregation: how several rewards become one.
        reference: scored samples of the same prompts, among which ranks are counted, so that ranks from several calls
            can be compared. None: ranks among the completions themselves.
        num_judges: this many of the last rewards are judges: scored separately and not combined with the others.

    Raises:
        RewardError: a reward fails (without `drop`), or applies to a prompt's completions and not to the reference's.
    """
    if not rows:  # there are fewer prompts than processes, and none is left for this one
        return Samples.of_rows([], [], torch.zeros(0, 0, dtype=torch.float64), texts=[])
    texts = encoder.decode([[c.ids for c in row] for row in completions])
    distinct = _Distinct(texts, [[c.finished for c in row] for row in completions])
    index_PM = torch.tensor(distinct.places)
    own, index_PK = len(distinct.owner), None
    if reference is not None and any(reward.ranks for reward in rewards):
        index_PK = torch.tensor(distinct.add(reference.texts, reference.finished_PM.bool().tolist()))
    how: dict[str, Any] = {"allow_bad_rows": drop, "trainer_state": trainer_state, "add": not aggregation.by_order}
    scores = _ask(rewards, rows, completions, distinct, num_for_comparison=len(distinct.owner) - own, **how)
    dropped: dict[int, str] = {}
    for place, reason in sorted(scores.bad.items()):
        dropped.setdefault(distinct.owner[place], reason)
    is_dropped_P1 = torch.tensor([[i in dropped] for i in range(len(rows))])
    by_name, among = dict[str, Tensor](), dict[str, Tensor]()
    for reward in rewards:
        values = scores.by_name[reward.name]
        mine = values[index_PM].masked_fill(is_dropped_P1, 0.0)
        if reward.ranks:
            others = mine if index_PK is None else values[index_PK].masked_fill(is_dropped_P1, 0.0)
            by_name[reward.name], among[reward.name] = _ranks(mine, others), _ranks(others, others)
        else:
            by_name[reward.name] = mine
            if reference is not None and aggregation.by_order:
                among[reward.name] = reference.by_name[reward.name]
    if reference is not None:
        refuse_uneven(by_name, reference.by_name, [row["prompt"] for row in rows])
    total = aggregation.combine(rewards[: len(rewards) - num_judges], by_name, None if reference is None else among)
    return Samples.of_rows(
        rows,
        completions,
        total.masked_fill(is_dropped_P1, 0.0),
        texts=texts,
        by_name=by_name,
        extras={name: [[vs[i] for i in row] for row in index_PM.tolist()] for name, vs in scores.columns.items()},
        metrics=scores.metrics,
        dropped=dropped,
    )


class _Distinct:
    """The distinct answers to each prompt, numbered; a truncated one differs from a finished one of the same text."""

    def __init__(self, texts: Sequence[Sequence[str]], finished: Sequence[Sequence[bool]]) -> None:
        self._keys: dict[tuple[int, str, bool], int] = {}
        self.places = self.add(texts, finished)

    def add(self, texts: Sequence[Sequence[str]], finished: Sequence[Sequence[bool]]) -> list[list[int]]:
        """The numbers of each prompt's answers."""
        return [
            [self._keys.setdefault((i, text, bool(ended)), len(self._keys)) for text, ended in zip(*row, strict=True)]
            for i, row in enumerate(zip(texts, finished, strict=True))
        ]

    @property
    def owner(self) -> list[int]:
        """The prompt of each distinct answer."""
        return [i for i, _, _ in self._keys]

    @property
    def texts(self) -> list[str]:
        return [text for _, text, _ in self._keys]

    @property
    def truncated(self) -> list[bool]:
        return [not ended for _, _, ended in self._keys]


def _ask(
    rewards: Sequence[NamedReward],
    rows: Sequence[Mapping[str, Any]],
    completions: Sequence[Sequence[Completion]],
    distinct: _Distinct,
    **how: Any,
) -> Scores:
    """Score the distinct answers."""
    owner, answers = distinct.owner, distinct.texts
    prompts = [rows[i]["prompt"] for i in owner]
    conversational = bool(prompts) and not isinstance(prompts[0], str)
    columns = {
        name: [rows[i][name] for i in owner] for name in rows[0] if name not in ("prompt", PROMPT_IDS, PROMPT_ROW)
    }
    pairs = (pair for both in zip(completions, distinct.places, strict=True) for pair in zip(*both, strict=True))
    ids_by_place = {place: c.ids for c, place in pairs}
    columns |= {
        "completion_ids": [ids_by_place.get(place, []) for place in range(len(owner))],
        "truncated": distinct.truncated,
    }
    return score(rewards, prompts, as_messages(answers) if conversational else answers, columns, groups=owner, **how)


def _ranks(values_PM: Tensor, among_PK: Tensor) -> Tensor:
    """Mid-ranks (P, M); a prompt that the reward does not apply to stays NaN."""
    missing_P1 = values_PM.isnan().all(dim=1, keepdim=True)
    ranks_PM = mid_ranks(values_PM.masked_fill(missing_P1, 0.0), among_PK.masked_fill(missing_P1, 0.0))
    return ranks_PM.masked_fill(missing_P1, torch.nan)


def logged_samples(rows: Sequence[Mapping[str, Any]], encoder: PromptEncoder) -> Samples:
    """The scored samples in the rows (`bondlm.data.scored`); completions without an end token count as truncated.

    Files have no log-probabilities, so these are 0.
    """
    completions = []
    for row in rows:
        ends = {*encoder.eos_ids, encoder.end_id(row["prompt"])}
        completions.append([Completion(list(i), [0.0] * len(i), finished=i[-1] in ends) for i in row[LOGGED_IDS]])
    rewards_PM = torch.tensor([row[LOGGED_REWARDS] for row in rows], dtype=torch.float64)
    return Samples.of_rows(rows, completions, rewards_PM, texts=[["" for _ in row] for row in completions])
