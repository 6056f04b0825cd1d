"""Functions that rank a prompt's samples: what they are asked, what counts as a ranking, and comparisons of pairs."""

import asyncio
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bondlm.errors import ConfigError, RewardError
from bondlm.rewards import NamedReward, RankReward, Scores, by_pairs, is_ranking, load_rewards, score

PROMPTS = ["p", "q", "p", "q", "p"]
TEXTS = ["aaa", "b", "a", "bbbb", "aa"]
GROUPS = [0, 1, 0, 1, 0]
BY_LENGTH = [5 / 6, 1 / 4, 1 / 6, 3 / 4, 3 / 6]


def ask(function: Any, *, columns: Any = None, **how: Any) -> Scores:
    reward = function if isinstance(function, NamedReward) else NamedReward("r", RankReward(function))
    return score([reward], PROMPTS, TEXTS, columns or {}, groups=GROUPS, **how)


def ranking(prompt: str, completions: list[str]) -> dict[str, list[int]]:
    return {"ranking": sorted(range(len(completions)), key=lambda i: -len(completions[i]))}


async def later(prompt: str, completions: list[str]) -> Any:
    await asyncio.sleep(0)
    return ranking(prompt, completions)


@pytest.mark.parametrize(
    "function",
    [
        ranking,
        later,
        lambda completions: [len(text) for text in completions],
        lambda completions: np.array([float(len(text)) for text in completions]),
        lambda completions: torch.tensor([1e6 + len(text) for text in completions]),
        lambda prompt, completions: [len(text) - 1e9 * (prompt == "p") for text in completions],
        lambda completions: {"ranking": tuple(np.argsort([-len(text) for text in completions]))},
        lambda completions: {"ranking": np.argsort([-len(text) for text in completions])},
        lambda completions: {"ranking": torch.tensor([len(text) for text in completions]).argsort(descending=True)},
    ],
)
def test_rankings_and_scores_become_ranks_within_the_prompt(function: Any) -> None:
    assert ask(function).total.tolist() == BY_LENGTH


def test_it_is_asked_once_per_prompt_with_what_its_signature_accepts() -> None:
    seen = []

    def rank(prompt: str, completions: list[str], topic: str, truncated: list[bool], log_metric: Any) -> list[float]:
        seen.append((prompt, completions, topic, truncated))
        log_metric("asked", 1)
        return [0.0] * len(completions)

    columns = {"topic": ["x", "y", "x", "y", "x"], "truncated": [False, False, True, False, False]}
    scores = ask(rank, columns=columns | {"completion_ids": [[1]] * 5})
    assert seen == [
        ("p", ["aaa", "a", "aa"], "x", [False, True, False]),
        ("q", ["b", "bbbb"], "y", [False, False]),
    ]
    assert scores.metrics == {"asked": 1.0}
    assert scores.total.tolist() == [0.5] * 5
    with pytest.raises(ConfigError, match=r"'r'.*topic"):
        ask(rank)
    with pytest.raises(ConfigError, match=r"'r'.*groups"):
        score([NamedReward("r", RankReward(ranking))], PROMPTS, TEXTS)


NO_RANKINGS: dict[str, Any] = {
    "an id twice": {"ranking": [0, 0, 1]},
    "half": {"ranking": [0, 1]},
    "too long": {"ranking": [0, 1, 2, 2]},
    "invented": {"ranking": [0, 1, 7]},
    "negative": {"ranking": [0, 1, -1]},
    "booleans": {"ranking": [True, False, 2]},
    "texts": {"ranking": ["0", "1", "2"]},
    "no list": {"ranking": "012"},
    "an array of another shape": {"ranking": np.array([[0, 1, 2]])},
    "a number as an array": {"ranking": np.array(0)},
    "an array of floats": {"ranking": np.array([0.0, 1.0, 2.0])},
    "another key": {"order": [0, 1, 2]},
    "one score short": [1.0, 2.0],
    "text": "aaa",
    "a number": 3.0,
    "NaN": [1.0, math.nan, 2.0],
    "infinite": [1.0, math.inf, 2.0],
    "no number": [1.0, "2", 3.0],
    "None among numbers": [1.0, None, 2.0],
}


@pytest.mark.parametrize("answer", NO_RANKINGS.values(), ids=NO_RANKINGS.keys())
def test_what_is_no_ranking_is_one_error_or_drops_its_prompt(answer: Any) -> None:
    def rank(prompt: str, completions: list[str]) -> Any:
        return answer if prompt == "p" else ranking(prompt, completions)

    with pytest.raises(RewardError, match="'r'"):
        ask(rank)
    scores = ask(rank, allow_bad_rows=True)
    assert {GROUPS[row] for row in scores.bad} == {0}
    assert scores.total[[1, 3]].tolist() == [BY_LENGTH[1], BY_LENGTH[3]]


def test_none_does_not_apply_and_another_reward_decides() -> None:
    def rank(prompt: str, completions: list[str]) -> Any:
        return None if prompt == "p" else ranking(prompt, completions)

    def absolute(completions: list[str]) -> list[float]:
        return [10.0 * len(text) for text in completions]

    both = [NamedReward("rank", RankReward(rank)), NamedReward("length", absolute, 0.5)]
    scores = score(both, PROMPTS, TEXTS, groups=GROUPS)
    assert scores.total.tolist() == [15.0, 5.25, 5.0, 20.75, 10.0]
    assert scores.by_name["rank"].isnan().tolist() == [True, False, True, False, True]
    with pytest.raises(RewardError, match=r"'r' is None.*no other"):
        ask(rank)


def test_rows_beside_are_compared_with_and_not_scored_themselves() -> None:
    asked = []

    def absolute(completions: list[str]) -> list[float]:
        asked.append(completions)
        return [1.0] * len(completions)

    rewards = [NamedReward("rank", RankReward(ranking)), NamedReward("one", absolute)]
    scores = score(rewards, PROMPTS, TEXTS, groups=GROUPS, num_for_comparison=2)
    assert asked == [TEXTS[:3]]
    assert scores.by_name["rank"].tolist() == BY_LENGTH
    assert scores.by_name["one"].isnan().tolist() == [False] * 3 + [True] * 2
    assert scores.total.tolist() == [1 + rank for rank in BY_LENGTH[:3]]


def test_a_function_that_raises_ends_at_once() -> None:
    def rank(prompt: str, completions: list[str]) -> Any:
        raise KeyError("gone")

    with pytest.raises(RewardError, match=r"KeyError.*gone"):
        ask(rank, allow_bad_rows=True)


def test_pairs_are_asked_in_both_orders_and_wins_are_counted() -> None:
    seen = []

    def longer(prompt: str, first: list[str], second: list[str]) -> list[float]:
        seen.extend(zip(first, second, strict=True))
        return [0.9 if len(a) > len(b) else 0.2 for a, b in zip(first, second, strict=True)]

    reward = by_pairs(longer)
    assert reward.__name__ == "longer"
    assert reward("p", completions=["a", "bbb", "cc"]) == pytest.approx([0.6, 3.4, 2.0])
    assert len(set(seen)) == 6
    assert reward("p", completions=["alone"]) == [0.0]
    assert ask(NamedReward("r", reward)).total.tolist() == BY_LENGTH


@pytest.mark.parametrize("chance", [0.1, 0.6, 0.7, 0.9])
def test_a_preference_for_the_first_answer_cancels_to_the_last_bit(chance: float) -> None:
    """Summed one by one, 8 equal samples had the order of their places."""
    reward = by_pairs(lambda first, second: [chance] * len(first))
    assert reward("p", completions=list("abcdefgh")) == [7.0] * 8


@pytest.mark.parametrize(
    "answer",
    [
        lambda count: [1.5] * count,
        lambda count: [None] * count,
        lambda count: torch.full((count,), math.nan),
        lambda count: [[0.3, 0.7]] * count,
        lambda count: [0.5] * (count + 1),
        lambda count: 0.5,
    ],
)
def test_what_is_no_chance_is_one_error_or_drops_its_prompt(answer: Any) -> None:
    """They ended the run, whatever max_skipped_frac was."""

    def longer(prompt: str, first: list[str], second: list[str]) -> Any:
        return (
            answer(len(first))
            if prompt == "p"
            else [float(len(a) > len(b)) for a, b in zip(first, second, strict=True)]
        )

    reward = NamedReward("r", by_pairs(longer))
    with pytest.raises(RewardError, match=r"'r' returned .*the chance"):
        ask(reward)
    scores = ask(reward, allow_bad_rows=True)
    assert {GROUPS[row] for row in scores.bad} == {0}
    assert scores.total[[1, 3]].tolist() == [BY_LENGTH[1], BY_LENGTH[3]]


def test_a_comparison_may_be_async_or_not_apply() -> None:
    async def longer(first: list[str], second: list[str]) -> Any:
        await asyncio.sleep(0)
        return [float(len(a) > len(b)) for a, b in zip(first, second, strict=True)]

    assert ask(NamedReward("r", by_pairs(longer))).total.tolist() == BY_LENGTH
    absolute = NamedReward("length", lambda completions: [float(len(text)) for text in completions])
    none = NamedReward("none", by_pairs(lambda first, second: None))
    assert score([none, absolute], PROMPTS, TEXTS, groups=GROUPS).total.tolist() == [len(text) for text in TEXTS]


def test_they_are_loaded_by_name(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("def longest(prompt, completions):\n    return [len(text) for text in completions]\n")
    (reward,) = load_rewards(f"rank:{file}:longest")
    assert (reward.name, reward.ranks) == ("longest", True)
    assert ask(reward).total.tolist() == BY_LENGTH
    assert is_ranking(f"rank:{file}:longest")
    assert is_ranking(RankReward(ranking))
    assert not is_ranking(f"{file}:longest")
    assert not is_ranking(ranking)
    with pytest.raises(ConfigError, match="file"):
        load_rewards(f"rank:{tmp_path}/absent.py:f")
    with pytest.raises(ConfigError, match="rank:"):
        load_rewards("rnk:module:f")
