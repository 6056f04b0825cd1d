"""A fault of an evaluation in training: asked for once, and the run is saved before its error is raised."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import prompt_rows

from bondlm.errors import ConfigError, ResourceError, RewardError, RewardOutageError
from bondlm.runs.manifest import MANIFEST_FILE, fault
from trainer.helpers import low_ids, trainer

BEST: dict[str, Any] = {"metric_for_best_model": "eval_win_rate", "greater_is_better": True}
ENDS_EPOCH: dict[str, Any] = {"rows": 8, "max_steps": 4, "eval_dataset": prompt_rows(12)[10:]}


class Down:
    """A reward whose server is down for held-out prompts, or for all from the given call on."""

    def __init__(self, error: Exception | None, since: int | None = None) -> None:
        self.error, self.since, self.calls, self.failures = error, since, 0, 0

    def __call__(self, completion_ids: list[list[int]], held_out: list[Any] | None = None) -> list[float]:
        self.calls += 1
        if held_out is not None or (self.since is not None and self.calls >= self.since):
            self.failures += 1
            if self.error is not None:
                raise self.error
        return low_ids(completion_ids)


@pytest.mark.parametrize(
    "settings",
    [
        {"eval_strategy": "steps", "eval_steps": 2},
        {"eval_strategy": "epoch"},
        {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True} | BEST,
        {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "best"} | BEST,
        {"eval_strategy": "steps", "eval_steps": 2, "lr_scheduler_type": "reduce_lr_on_plateau"} | BEST,
    ],
    ids=["steps", "epoch", "best at the end", "best saved", "plateau"],
)
@pytest.mark.parametrize("error", [RewardOutageError("down"), RewardError("wrong")], ids=["outage", "wrong"])
def test_an_evaluation_whose_rewards_fail_is_tried_once(
    settings: dict[str, Any], error: Exception, tmp_path: Path
) -> None:
    """Two sets, at the end of an epoch of two steps."""
    rows = [row | {"held_out": 1} for row in prompt_rows(12)[8:]]
    reward = Down(error)
    made = trainer(
        tmp_path, reward=reward, max_steps=4, eval_dataset={"a": rows[:2], "b": rows[2:]}, **settings_of(settings)
    )
    with pytest.raises(type(error), match=str(error)):
        made.train()
    assert (reward.failures, made.state.global_step) == (1, 2)
    assert fault(tmp_path / "checkpoint-2") is None


@pytest.mark.parametrize("schedule", ["greedy", "reduce_lr_on_plateau"])
def test_a_schedule_that_follows_a_metric_does_not_see_an_evaluation_that_failed(schedule: str, tmp_path: Path) -> None:
    """A NaN would stay in its running mean, and a best value given again would count as no progress."""
    kwargs: dict[str, Any] = {"smooth": True} if schedule == "greedy" else {"patience": 0}
    how: dict[str, Any] = {"lr_scheduler_type": schedule, "lr_scheduler_kwargs": kwargs, "eval_steps": 1} | BEST
    rows = [row | {"held_out": 1} for row in prompt_rows(12)[8:]]
    reward = Down(RewardOutageError("down"))
    made = trainer(tmp_path, reward=reward, max_steps=3, eval_strategy="steps", eval_dataset=rows, **how)
    fresh = copy.deepcopy(made.create_scheduler(3, made.create_optimizer()).state_dict())
    with pytest.raises(RewardOutageError):
        made.train()
    assert made.state.global_step == 1
    saved = torch.load(tmp_path / "checkpoint-1" / "scheduler.pt", weights_only=False)
    assert saved == fresh
    reward.error = None
    again = trainer(tmp_path, reward=reward, max_steps=3, eval_strategy="steps", eval_dataset=rows, **how)
    again.train(resume_from_checkpoint=True)
    assert "nan" not in str(again.lr_scheduler.state_dict())


def test_a_metric_of_a_reward_that_applies_to_no_held_out_prompt_pauses_the_run(tmp_path: Path) -> None:
    def applies(completion_ids: list[list[int]], held_out: list[Any] | None = None) -> list[Any]:
        return [None] * len(completion_ids) if held_out is not None else low_ids(completion_ids)

    rows = [row | {"held_out": 1} for row in prompt_rows(12)[8:]]
    how = {"metric_for_best_model": "rewards/applies/win_rate", "greater_is_better": True, "save_strategy": "best"}
    made = trainer(
        tmp_path, reward=[applies, low_ids], max_steps=4, eval_strategy="steps", eval_steps=2, eval_dataset=rows, **how
    )
    with pytest.raises(ConfigError, match=r"metric_for_best_model='rewards/applies/win_rate'.*None for every held-out"):
        made.train()
    assert fault(tmp_path / "checkpoint-2") is None


def settings_of(settings: dict[str, Any]) -> dict[str, Any]:
    """The metric is that of a set where there are several."""
    named = {"metric_for_best_model": "eval_a_win_rate"} if "metric_for_best_model" in settings else {}
    return settings | named


def test_an_outage_in_a_step_is_not_waited_for_in_an_evaluation_of_the_epochs_end(tmp_path: Path) -> None:
    reward = Down(RewardOutageError("down"), since=2)
    made = trainer(tmp_path, reward=reward, **ENDS_EPOCH, eval_strategy="epoch")
    with pytest.raises(RewardOutageError):
        made.train()
    assert (reward.failures, made.state.global_step) == (1, 1)
    assert fault(tmp_path / "checkpoint-1") is None


def test_a_pause_saves_again_what_is_damaged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As after a kill during the pause's save, or with a damaged checkpoint that the resume has skipped."""
    how: dict[str, Any] = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2}
    for spoilt in (MANIFEST_FILE, "trainer_state.json"):
        folder = tmp_path / spoilt
        with pytest.raises(RewardOutageError):
            trainer(folder, reward=Down(RewardOutageError("down"), since=4), **how).train()
        (folder / "checkpoint-3" / spoilt).unlink()
        again = trainer(folder, reward=Down(RewardOutageError("down"), since=2), **how)
        with pytest.raises(RewardOutageError):
            again.train(resume_from_checkpoint=True)
        assert again.state.global_step == 3
        assert fault(folder / "checkpoint-3") is None
    assert "single sample" not in caplog.text


def test_memory_that_is_spent_in_an_evaluation_saves_the_run(tmp_path: Path) -> None:
    made = trainer(tmp_path, **ENDS_EPOCH, eval_strategy="steps", eval_steps=2)

    def spent(*args: Any) -> Any:
        raise ResourceError("the memory is spent")

    made.log_ratio = spent  # type: ignore[method-assign]
    with pytest.raises(ResourceError, match="the memory is spent"):
        made.train()
    assert fault(tmp_path / "checkpoint-2") is None
    with pytest.raises(ResourceError):  # outside of training there is nothing to save
        made.evaluate()


def test_behind_a_run_that_ended_by_an_error_an_evaluation_raises_its_own(tmp_path: Path) -> None:
    reward = Down(RewardOutageError("down"))
    made = trainer(tmp_path, reward=reward)
    made.training_step = lambda *args, **kwargs: 1 / 0  # type: ignore[method-assign]
    with pytest.raises(ZeroDivisionError):
        made.train()
    with pytest.raises(RewardOutageError):
        made.evaluate([row | {"held_out": 1} for row in prompt_rows(2)])
