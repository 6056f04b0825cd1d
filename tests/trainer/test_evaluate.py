"""Evaluations: what a policy has gained over its reference, and that measuring leaves the run alone."""

import json
import math
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset, DatasetDict, IterableDatasetDict
from tiny import prompt_rows
from transformers import TrainerCallback, TrainerState

from bondlm import BONDTrainer
from bondlm.errors import ConfigError, RewardError
from bondlm.evaluation import evaluate_run
from bondlm.evaluation.table import wide_console
from bondlm.rewards import NamedReward, RankReward, by_pairs
from trainer.helpers import logged, low_ids, same, trainer, weights, without_times

PROMPTS_8 = Dataset.from_list(prompt_rows(8))


def held_out(made: BONDTrainer) -> dict[str, float]:
    return made.evaluate(prompt_rows(96)[64:])


def test_jbond_beats_its_reference(tmp_path: Path) -> None:
    made = trainer(
        tmp_path,
        rows=64,
        max_steps=40,
        per_device_train_batch_size=16,
        max_completion_length=6,
        learning_rate=1e-2,
        logging_steps=10,
        eval_num_samples=8,
        eval_num_reference_samples=16,
    )
    before = held_out(made)
    assert before["eval_kl"] == pytest.approx(0.0, abs=1e-6)
    assert before["eval_win_rate_low"] <= 0.5 <= before["eval_win_rate_high"]
    made.train()
    after = held_out(made)
    assert after["eval_win_rate_low"] > 0.6
    assert after["eval_effective_n_low"] > 2
    assert after["eval_kl_low"] > 0
    assert after["eval_reward_low"] > before["eval_reward_high"]
    assert after["eval_reference_reward"] == before["eval_reference_reward"]  # the reference never moves
    rows = [row for row in logged(tmp_path) if "loss" in row]
    assert rows[-1]["anchor/reward"] > rows[0]["anchor/reward"]  # and the anchor follows


def test_gamma_holds_the_policy_near_the_reference(tmp_path: Path) -> None:
    results = {}
    for gamma in (0.0, 10.0):
        made = trainer(
            tmp_path / str(gamma),
            rows=64,
            max_steps=20,
            per_device_train_batch_size=32,
            learning_rate=2e-3,
            eta=0.3,
            gamma=gamma,
            eval_num_samples=8,
        )
        made.train()
        results[gamma] = held_out(made)
    assert results[10.0]["eval_kl_high"] < results[0.0]["eval_kl_low"]


class NoteEvaluation(TrainerCallback):
    def __init__(self) -> None:
        self.metrics: list[dict[str, float]] = []

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        self.metrics.append(metrics)


def test_evaluation_is_repeatable_and_leaves_the_run_alone(tmp_path: Path) -> None:
    plain, watched = trainer(tmp_path / "plain"), trainer(tmp_path / "watched", eval_dataset=prompt_rows(12)[8:])
    note = NoteEvaluation()
    watched.add_callback(note)
    once = watched.evaluate()
    assert without_times([watched.evaluate()]) == without_times([once])
    assert note.metrics[0] == once
    watched.args.eval_strategy, watched.args.eval_steps = "steps", 1
    for made in (plain, watched):
        made.train()
    assert same(weights(plain.roles.model), weights(watched.roles.model))
    parts = watched.evaluate({"one": prompt_rows(4), "two": prompt_rows(8)[4:]})
    assert {name.split("_")[1] for name in parts if name != "epoch"} == {"one", "two"}


@pytest.mark.parametrize(
    ("target_n", "gain", "num_prompts", "steps"), [(3.0, 10, 24, 1), (3.0, 0, 24, 3), (None, 10, 4, 3), (3.0, 10, 4, 3)]
)
def test_target_n_stops_the_run_once_it_is_reached(
    target_n: float | None, gain: float, num_prompts: int, steps: int, tmp_path: Path
) -> None:
    def stub(dataset: Any) -> Any:
        """Policy samples that are the reference's, with `gain` on every reward."""
        samples = made.sample(dataset.to_list(), "reference", 4)
        return replace(samples, rewards_PM=samples.rewards_PM + gain), samples

    made = trainer(
        tmp_path,
        max_steps=3,
        eval_strategy="steps",
        eval_steps=1,
        eval_dataset=prompt_rows(num_prompts),
        target_n=target_n,
    )
    made.held_out_samples = stub  # type: ignore[method-assign]
    made.train()  # four prompts that are always won are no proof of any N
    assert made.state.global_step == steps


def test_evaluation_without_prompts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="eval_dataset"):
        trainer(tmp_path).evaluate()


def test_several_eval_sets_have_names_and_one_leads(tmp_path: Path) -> None:
    sets = {"chat": prompt_rows(4), "math": DatasetDict({"train": PROMPTS_8, "test": PROMPTS_8.select([5, 6])})}
    made = trainer(tmp_path, eval_dataset=sets, main_eval="math", eval_strategy="steps", eval_steps=2)
    assert {name: len(part) for name, part in made.eval_dataset.items()} == {"chat": 4, "math": 2}  # type: ignore[union-attr, arg-type]
    made.train()
    rows = [row for row in logged(tmp_path) if any(name.endswith("effective_n") for name in row)]
    assert [{"eval_reward", "eval_chat_reward", "eval_math_reward"} & row.keys() for row in rows] == [
        {"eval_chat_reward"},
        {"eval_math_reward", "eval_reward"},
    ]
    assert rows[1]["eval_kl_low"] == rows[1]["eval_math_kl_low"]


@pytest.mark.parametrize("fails", [False, True])
def test_judges_that_rank_are_asked_when_every_set_is_measured(fails: bool, tmp_path: Path) -> None:
    """The main process asks them alone, and the others would wait for it in the next set."""
    seen: list[str] = []

    def rank(prompt: str, completions: list[str]) -> list[int]:
        seen.append("asked")
        if fails:
            raise ValueError("no quota")
        return [len(text) for text in completions]

    made = trainer(tmp_path, eval_dataset={"a": prompt_rows(2), "b": prompt_rows(4)[2:]}, main_eval="b")
    drawn = made.held_out_samples
    made.held_out_samples = lambda dataset: seen.append("measured") or drawn(dataset)  # type: ignore[method-assign,func-returns-value]
    judges = [NamedReward("j", RankReward(rank))]
    with pytest.raises(RewardError, match="no quota") if fails else nullcontext():
        evaluate_run(made, tmp_path, wide_console(), judges=judges)
    assert seen[:3] == ["measured", "measured", "asked"]
    for file in ("eval-a/eval.json", "eval.json"):
        assert ("pairwise" in json.loads((tmp_path / file).read_text())) is not fails


@pytest.mark.parametrize(("main", "steps"), [("good", 1), ("bad", 3)])
def test_the_set_that_main_eval_names_ends_the_run(main: str, steps: int, tmp_path: Path) -> None:
    def stub(dataset: Any) -> Any:
        samples = made.sample(list(dataset), "reference", 4)
        gain = 10 if len(dataset) == 16 else 0
        return replace(samples, rewards_PM=samples.rewards_PM + gain), samples

    sets = {"bad": prompt_rows(3), "good": prompt_rows(16)}  # four that are always won do not prove N = 3
    goal = {"max_steps": 3, "eval_strategy": "steps", "eval_steps": 1, "target_n": 3.0}
    made = trainer(tmp_path, eval_dataset=sets, main_eval=main, **goal)
    made.held_out_samples = stub  # type: ignore[method-assign]
    made.train()
    assert made.state.global_step == steps


@pytest.mark.parametrize(
    ("sets", "settings", "message"),
    [
        (prompt_rows(2), {"main_eval": "a"}, "main_eval='a'"),
        ({"a": prompt_rows(2)}, {"main_eval": "b"}, "main_eval='b'"),
        ({}, {}, "eval_dataset"),
        ({"a/b": prompt_rows(2)}, {}, "'a/b'"),
        ({"a": prompt_rows(2), "b": prompt_rows(2)}, {"target_n": 2.0}, r"target_n=2\.0.*main_eval.*a, b"),
        ({"a": prompt_rows(2), "b": prompt_rows(2)}, {"kl_budget": 2.0}, r"kl_budget=2\.0.*main_eval"),
    ],
)
def test_names_of_eval_sets_are_checked_before_a_model_is_loaded(
    sets: Any, settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        trainer(tmp_path, "no such model", eval_dataset=sets, eval_strategy="steps", eval_steps=1, **settings)


def test_prompts_drawn_together_do_not_change_an_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics, sizes = [], []
    for together in (None, 2):
        made = trainer(tmp_path / str(together), per_device_eval_batch_size=together)
        drawn = made.engine.generate_roles
        note = lambda prompts, *more, d=drawn, **how: sizes.append(len(prompts)) or d(prompts, *more, **how)  # noqa: E731
        monkeypatch.setattr(made.engine, "generate_roles", note)
        metrics += without_times([made.evaluate(prompt_rows(5))])
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-6)
    assert sizes == [5, 5, 2, 2, 1, 2, 2, 1]  # of the reference, then of the policy
    assert made.args.to_sanitized_dict()["eval_batch_size"] == 2  # a logger asks for it


def test_splits_and_streams_are_eval_sets(tmp_path: Path) -> None:
    splits = DatasetDict(train=PROMPTS_8, validation=PROMPTS_8.select([1]), test=PROMPTS_8.select([2, 3]))
    streams = IterableDatasetDict({name: part.to_iterable_dataset() for name, part in splits.items()})
    wanted = {name: part.to_list() for name, part in splits.items() if name != "train"}
    for source in (splits, streams):
        made = trainer(tmp_path, eval_dataset=source)
        assert {name: part.select_columns("prompt").to_list() for name, part in made.eval_dataset.items()} == wanted  # type: ignore[union-attr]
        assert made.main_eval == "validation"
    once = made.evaluate(streams["test"])
    assert without_times([once]) == without_times([made.evaluate(splits["test"])])


def _grown(completion_ids: list[list[int]], state: Any) -> list[float]:
    return [len(ids) + sum(ids) / 1e4 + 10.0 * state.global_step for ids in completion_ids]


async def _later(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    return _grown(completion_ids, columns["trainer_state"])


FOLLOWING = {
    "named": lambda completion_ids, trainer_state: _grown(completion_ids, trainer_state),
    "columns": lambda completion_ids, **columns: _grown(completion_ids, columns["trainer_state"]),
    "vars": lambda completion_ids, **columns: _grown(completion_ids, SimpleNamespace(**vars(columns["trainer_state"]))),
    "async": _later,
}


@pytest.mark.parametrize("form", FOLLOWING)
def test_a_reward_that_follows_training_is_asked_about_the_reference_again(form: str, tmp_path: Path) -> None:
    """It grows with the steps: a policy that has not moved is still no better than the reference."""
    made = trainer(tmp_path, reward=FOLLOWING[form], learning_rate=1e-12, max_steps=2, eval_num_samples=4)
    before = made.evaluate(PROMPTS_8)
    made.train()
    after = made.evaluate(PROMPTS_8)
    assert after["eval_win_rate"] == before["eval_win_rate"]
    assert after["eval_reference_reward"] == pytest.approx(before["eval_reference_reward"] + 20)


def test_a_comparison_that_follows_training_is_asked_about_the_reference_again(tmp_path: Path) -> None:
    steps = []

    def compare(first: list[Any], **columns: Any) -> list[float]:
        steps.append(columns["trainer_state"].global_step)
        return [0.5] * len(first)

    made = trainer(tmp_path, reward=by_pairs(compare), max_steps=1)
    made.evaluate(PROMPTS_8)
    made.train()
    steps.clear()
    made.evaluate(PROMPTS_8)
    assert steps == [1] * 16  # about the reference's answers alone, and beside the policy's


def test_a_reward_that_is_handed_the_state_and_does_not_look_is_not_asked_again(tmp_path: Path) -> None:
    calls = []

    def counted(completion_ids: list[list[int]], **columns: Any) -> list[float]:
        assert isinstance(columns["trainer_state"], TrainerState)
        calls.append(len(completion_ids))
        return low_ids(completion_ids)

    made = trainer(tmp_path, reward=counted)
    made.evaluate(PROMPTS_8)
    made.evaluate(PROMPTS_8)
    assert len(calls) == 3  # the reference's once, the policy's twice


def test_the_best_model_may_be_that_of_one_of_several_rewards(tmp_path: Path) -> None:
    """Its win rate is logged, and was refused as unknown."""
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_rewards/longest/win_rate"}
    steps = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}

    def longest(completions: list[str]) -> list[float]:
        return [float(len(text)) for text in completions]

    made = trainer(tmp_path, reward=[low_ids, longest], eval_dataset=prompt_rows(4), **steps, **best)
    made.train()
    rates = [row["eval_rewards/longest/win_rate"] for row in logged(tmp_path) if "eval_rewards/longest/win_rate" in row]
    assert made.state.best_metric == max(rates)
    best["metric_for_best_model"] = "eval_rewards/shortest/win_rate"
    with pytest.raises(ConfigError, match="the rewards are called low_ids, longest"):
        trainer(tmp_path / "none", reward=[low_ids, longest], eval_dataset=prompt_rows(4), **steps, **best)


class Measures(TrainerCallback):
    """Evaluates at the end of a step, before its books are closed."""

    made: BONDTrainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.made.evaluate(PROMPTS_8)


def test_an_evaluation_in_a_callback_leaves_the_steps_books_alone(tmp_path: Path) -> None:
    measures = Measures()
    made = trainer(tmp_path, callbacks=[measures], eval_num_samples=64)
    measures.made = made
    made.train()
    steps = [row for row in logged(tmp_path) if "loss" in row]
    evaluations = [row["eval_runtime"] for row in logged(tmp_path) if "eval_runtime" in row]
    assert len(steps) == len(evaluations) == 2
    for row, runtime in zip(steps, evaluations, strict=True):
        assert min(row["time/learn"], row["time/optimizer"], runtime) > 0
        assert row["step_time"] == pytest.approx(sum(v for k, v in row.items() if k.startswith("time/")))


@pytest.mark.parametrize("temperature", [-1.0, 1e-39, math.nan, math.inf, True])
def test_a_temperature_that_samples_nothing_is_refused(tmp_path: Path, temperature: float) -> None:
    """At -1 the distribution would be upside down, and its samples look like any others."""
    with pytest.raises(ConfigError, match="temperature="):
        trainer(tmp_path).sample([], "policy", 2, temperature=temperature)


def test_a_role_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"role='polcy'.*anchor"):
        trainer(tmp_path).sample([], "polcy", 2)  # type: ignore[arg-type]
