from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_tokenizer

from bondlm.data.columns import PROMPT_IDS
from bondlm.data.prompt_encoder import PromptEncoder
from bondlm.engines import Completion, Role
from bondlm.errors import RewardError
from bondlm.rewards import Aggregation, NamedReward
from bondlm.rollout.samples import SamplingParams, draw, score_samples
from bondlm.rollout.seeds import Seeds
from bondlm.training.metrics import completion_metrics

TOKENIZER = tiny_tokenizer()
EOS = 2
ENCODER = PromptEncoder(tokenizer=TOKENIZER, config=None, eos_ids=(EOS,), pad_id=0, start_id=None)


def answer(text: str, *, finished: bool = True) -> Completion:
    ids = TOKENIZER.encode(text) + ([EOS] if finished else [])
    return Completion(ids, [-1.0] * len(ids), finished)


class StubEngine:
    """Answers with what it was asked: role, prompt, seed and number."""

    def __init__(self) -> None:
        self.calls: list[tuple[Role, int, list[int], float]] = []

    def generate(self, *args: Any, **settings: Any) -> list[list[Completion]]:
        raise AssertionError("a rollout asks for all roles at once")

    def generate_roles(
        self,
        prompts: Sequence[Sequence[int]],
        wanted: Mapping[Role, tuple[int, Sequence[int]]],
        *,
        max_new_tokens: int,
        temperature: float = 1.0,
    ) -> dict[Role, list[list[Completion]]]:
        self.calls += [(role, max_new_tokens, list(seeds), temperature) for role, (_, seeds) in wanted.items()]
        return {
            role: [[answer(f"{role} {list(prompt)} {j}") for j in range(count)] for prompt in prompts]
            for role, (count, _) in wanted.items()
        }


ROWS: list[dict[str, Any]] = [
    {"prompt": "one", PROMPT_IDS: [5, 6], "topic": "a"},
    {"prompt": "two", PROMPT_IDS: [7], "topic": "b"},
]


def test_seeds_are_a_function_of_all_four_and_of_nothing_else() -> None:
    torch.manual_seed(1)
    before = Seeds(3, 10).of_prompt(2, "policy")
    np.random.default_rng().random()
    torch.manual_seed(2)
    assert Seeds(3, 10).of_prompt(2, "policy") == before
    roles: tuple[Role, ...] = ("policy", "anchor", "reference")
    seeds = {
        Seeds(seed, step).of_prompt(position, role)
        for seed in range(4)
        for step in (0, 1, 2, 1 << 40)
        for position in range(20)
        for role in roles
    }
    assert len(seeds) == 4 * 4 * 20 * 3


def test_tie_noise_belongs_to_the_prompt_and_the_step() -> None:
    noise = Seeds(0, 5).tie_noise([3, 8], 3)
    assert torch.equal(Seeds(0, 5).tie_noise([8], 3)[0], noise[1])
    assert not torch.equal(Seeds(0, 6).tie_noise([8], 3)[0], noise[1])
    assert not torch.equal(Seeds(1, 5).tie_noise([8], 3)[0], noise[1])
    many = Seeds(0, 1).tie_noise(range(4000), 3)
    assert many.dtype == torch.float64
    assert float(many.min()) >= 0
    assert float(many.max()) < 1
    assert abs(float(many.mean()) - 0.5) < 4 * (1 / 12 / 12_000) ** 0.5


def test_draw_asks_role_by_role_and_joins_them_in_order() -> None:
    engine = StubEngine()
    params = SamplingParams(max_new_tokens=9, seeds=Seeds(4, 6))
    completions = draw(engine, ROWS, {"policy": 1, "reference": 0, "anchor": 2}, params, [10, 11])
    assert [[TOKENIZER.decode(c.ids[:-1]) for c in row] for row in completions] == [
        [f"policy {ids} 0", f"anchor {ids} 0", f"anchor {ids} 1"] for ids in ([5, 6], [7])
    ]
    assert engine.calls == [
        ("policy", 9, [Seeds(4, 6).of_prompt(p, "policy") for p in (10, 11)], 1.0),
        ("anchor", 9, [Seeds(4, 6).of_prompt(p, "anchor") for p in (10, 11)], 1.0),
    ]


def scored(completions: list[list[Completion]], reward: Any, rows: list[dict[str, Any]] = ROWS) -> Any:
    return score_samples([NamedReward("r", reward)], rows, completions, encoder=ENCODER)


def test_equal_answers_to_a_prompt_are_scored_once_and_share_their_reward() -> None:
    seen: list[tuple[str, str, str, bool, list[int]]] = []

    def reward(
        prompts: list[str],
        completions: list[str],
        topic: list[str],
        truncated: list[bool],
        completion_ids: list[list[int]],
    ) -> list[float]:
        seen.extend(zip(prompts, completions, topic, truncated, completion_ids, strict=True))
        return [float(len(seen) - len(prompts) + i) for i in range(len(prompts))]

    completions = [
        [answer("yes"), answer("no"), answer("yes"), answer("yes", finished=False)],
        [answer("yes"), answer("yes"), answer("maybe"), answer("no")],
    ]
    samples = scored(completions, reward)
    yes, no, maybe = (TOKENIZER.encode(text) for text in ("yes", "no", "maybe"))
    assert seen == [
        ("one", "yes", "a", False, [*yes, EOS]),
        ("one", "no", "a", False, [*no, EOS]),
        ("one", "yes", "a", True, yes),  # cut at the budget: another answer than the finished one
        ("two", "yes", "b", False, [*yes, EOS]),
        ("two", "maybe", "b", False, [*maybe, EOS]),
        ("two", "no", "b", False, [*no, EOS]),
    ]
    assert samples.rewards_PM.tolist() == [[0, 1, 0, 2], [3, 3, 4, 5]]
    assert samples.rewards_PM.dtype == torch.float64
    assert torch.equal(samples.by_name["r"], samples.rewards_PM)
    assert samples.prompt_ids == [[5, 6], [7]]
    assert samples.texts[1] == ["yes", "yes", "maybe", "no"]
    assert samples.flat == completions[0] + completions[1]


def test_an_empty_completion_is_an_answer() -> None:
    samples = scored([[answer("")], [answer("x")]], lambda completions: [float(len(c)) for c in completions])
    assert samples.completions[0][0].ids == [EOS]
    assert samples.rewards_PM.tolist() == [[0.0], [1.0]]


def test_conversational_rewards_see_messages() -> None:
    rows = [{"prompt": [{"role": "user", "content": f"q{i}"}], PROMPT_IDS: [5]} for i in range(2)]

    def reward(prompts: list[Any], completions: list[Any]) -> list[float]:
        assert prompts[1] == [{"role": "user", "content": "q1"}]
        assert completions[1] == [{"role": "assistant", "content": "b"}]
        return [1.0, 2.0]

    assert scored([[answer("a")], [answer("b")]], reward, rows).rewards_PM.tolist() == [[1.0], [2.0]]


def test_weights_are_applied_to_the_sum_alone() -> None:
    rewards = [
        NamedReward("length", lambda completions: [float(len(c)) for c in completions], 0.5),
        NamedReward("constant", lambda completions: [3.0] * len(completions), -1.0),
    ]
    samples = score_samples(rewards, ROWS, [[answer("ab")], [answer("abcd")]], encoder=ENCODER)
    assert samples.rewards_PM.tolist() == [[-2.0], [-1.0]]
    assert samples.by_name["length"].tolist() == [[2.0], [4.0]]


def test_a_nan_never_gets_through() -> None:
    with pytest.raises(RewardError, match="nan"):
        scored([[answer("a")], [answer("b")]], lambda completions: [1.0, float("nan")])


@pytest.mark.parametrize("how", ["sum", "quantile", "worst", "lexicographic"])
@pytest.mark.parametrize("lacking", ["policy", "reference"])
def test_a_reward_applies_to_both_models_samples_of_a_prompt_or_to_none(how: Any, lacking: str) -> None:
    """Their sums differed in a term, and the win rate compared them."""
    length = NamedReward("length", lambda completions: [float(len(c)) for c in completions])

    def samples(model: str, reference: Any = None) -> Any:
        box = NamedReward(
            "box", lambda completions: [1.0] + [None if model == lacking else 2.0] * (len(completions) - 1)
        )
        named = {"encoder": ENCODER, "aggregation": Aggregation(how), "reference": reference}
        return score_samples([length, box], ROWS, [[answer("ab")], [answer("abcd")]], **named)

    with pytest.raises(RewardError, match=r"'box' is None.*row 1.*'two'"):
        samples("policy", samples("reference"))
    assert samples("other", samples("another")).by_name["box"].tolist() == [[1.0], [2.0]]


def test_completion_metrics_by_hand() -> None:
    completions = [
        Completion([5, EOS], [-1.0, -0.5], True),
        Completion([5, 6, 7, 8], [-0.25] * 4, False),
        Completion([EOS], [-3.5], True),
    ]
    assert completion_metrics(completions) == {
        "completions/mean_length": pytest.approx(7 / 3),
        "completions/min_length": 1.0,
        "completions/max_length": 4.0,
        "completions/clipped_ratio": pytest.approx(1 / 3),
        "completions/frac_empty": pytest.approx(1 / 3),
        "entropy": pytest.approx(6 / 7),
    }


def test_parts_of_a_draw_are_drawn_after_one_sync_as_the_whole_would_be() -> None:
    class Remote(StubEngine):
        syncs, exact, on_prompts_done = 0, False, None

        def close(self) -> None: ...

        def sync(self) -> None:
            self.syncs += 1

    rows, params = [{PROMPT_IDS: [i]} for i in range(5)], SamplingParams(max_new_tokens=4, seeds=Seeds(0, 0))
    whole, parts = Remote(), Remote()
    wanted: dict[Role, int] = {"policy": 2, "anchor": 1}
    expected = draw(whole, rows, wanted, params, range(10, 15))
    assert draw(parts, rows, wanted, params, range(10, 15), num_parts=4) == expected
    assert [len(seeds) for role, _, seeds, _ in parts.calls if role == "policy"] == [2, 2, 1, 0]
    seeds = [seed for role, _, part, _ in parts.calls if role == "policy" for seed in part]
    assert seeds == whole.calls[0][2]
    assert (whole.syncs, parts.syncs) == (1, 1)


def test_evaluations_have_seeds_of_their_own_at_each_temperature() -> None:
    temperatures = (0.0, 0.3, 0.5, 0.7, 1.0, 1.3, 1.5, 2.0, 3.0)
    assert len({Seeds.of_evaluation(1, t).step for t in temperatures}) == len(temperatures)
    assert [Seeds.of_evaluation(1, t).step - (1 << 40) for t in (1.0, 0.7, 0.3, 0.0)] == [0, 300, 700, 1000]
