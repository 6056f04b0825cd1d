"""Samples scored in parts are those scored together."""

from dataclasses import fields
from typing import Any

import pytest
import torch
from tiny import prompt_rows, tiny_causal, tiny_tokenizer

from bondlm.data.prompt_encoder import PromptEncoder
from bondlm.engines import Completion
from bondlm.rewards import NamedReward, RankReward
from bondlm.rollout.parts import joined, part_of
from bondlm.rollout.samples import Samples, score_samples


def _first_ids(prompts: list[Any], completions: list[Any], completion_ids: Any, log_extra: Any, log_metric: Any) -> Any:
    log_extra("first", [ids[0] for ids in completion_ids])
    log_metric("asked", len(prompts))
    return [float(ids[0]) for ids in completion_ids]


def _orders(prompt: Any, completions: list[Any]) -> list[float]:
    texts = [str(answer) for answer in completions]
    return [float(sorted(texts).index(text)) for text in texts]


def _fails_for_the_second(prompts: list[Any], completions: list[Any], **columns: Any) -> Any:
    return [None if PROMPTS[1] in str(prompt) else 0.5 for prompt in prompts]


PROMPTS = [row["prompt"] for row in prompt_rows(5)]


def _scored(places: list[int], *, reference: Samples | None = None, drop: bool = False) -> Samples:
    tokenizer = tiny_tokenizer()
    encoder = PromptEncoder.of_model(tiny_causal(tokenizer), tokenizer, max_prompt_length=None, max_completion_length=4)
    rows = encoder.encoded(prompt_rows(5), None)
    dice = torch.Generator().manual_seed(3)
    ids = torch.randint(5, 20, (5, 3, 2), generator=dice).tolist()
    completions = [[Completion(one, [-1.0, -2.0], finished=one[0] > 8) for one in row] for row in ids]
    rewards = [NamedReward("ids", _first_ids), NamedReward("order", RankReward(_orders), 0.5)]
    if drop:
        rewards = [NamedReward("fails", _fails_for_the_second)]
    chosen = [rows[i] for i in places]
    compared = None if reference is None else part_of(reference, places)
    return score_samples(
        rewards, chosen, [completions[i] for i in places], encoder=encoder, reference=compared, drop=drop
    )


def _same(one: Any, two: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == two.dtype and bool((one == two).all())
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(_same(one[name], two[name]) for name in one)
    return bool(one == two)


@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize("of_processes", [[[0, 3], [1, 4], [2]], [[0, 1, 2, 3, 4], []], [[4, 2], [0], [3, 1]]])
def test_joined_parts_are_the_whole(of_processes: list[list[int]], drop: bool) -> None:
    everyone = list(range(5))
    reference = None if drop else _scored(everyone)
    whole = _scored(everyone, reference=reference, drop=drop)
    parts = [(places, _scored(places, reference=reference, drop=drop)) for places in of_processes]
    again = joined(parts)
    for name in (field.name for field in fields(Samples)):
        if name not in ("metrics", "dropped"):  # a reason names its row
            assert _same(getattr(whole, name), getattr(again, name)), name
    assert list(whole.dropped) == list(again.dropped) == ([1] if drop else [])


def test_what_a_reward_logs_is_the_mean_over_prompts_and_none_where_it_logged_nothing() -> None:
    parts = [(places, _scored(places)) for places in ([0, 3], [1, 4], [2])]
    asked = [part.metrics["asked"] for _, part in parts]
    assert joined(parts).metrics == {"asked": pytest.approx((2 * asked[0] + 2 * asked[1] + asked[2]) / 5)}
    parts[1][1].extras.clear()
    again = joined(parts).extras["first"]
    assert [again[i] for i in (1, 4)] == [[None] * 3] * 2
    assert [again[i] for i in (0, 3)] == parts[0][1].extras["first"]
