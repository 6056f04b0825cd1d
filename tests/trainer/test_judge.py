"""A whole run whose reward is a judge on a real socket."""

from pathlib import Path
from typing import Any

import pytest
from rewards.judge_stub import by_scalar, judging, scalar
from tiny import prompt_rows

from bondlm.errors import ConfigError, RewardOutageError
from bondlm.runs.folder import DROPPED_FILE
from trainer.helpers import same, trainer, weights


def by_number(completions: list[str]) -> list[float]:
    return [scalar(text) for text in completions]


def test_a_judge_that_goes_by_a_scalar_trains_and_measures_as_the_scalar(tmp_path: Path) -> None:
    held_out = prompt_rows(20)[12:]
    made = []
    with judging(by_scalar) as server:
        for name, reward in (("scalar", by_number), ("judge", server.spec(rounds=2))):
            made.append(trainer(tmp_path / name, reward=reward, max_steps=2))
            made[-1].train()
        assert same(*[weights(one.roles.model) for one in made])
        metrics = [one.evaluate(held_out) for one in made]
    for name in ("eval_win_rate", "eval_effective_n", "eval_win_rate_low", "eval_effective_n_high", "eval_kl"):
        assert metrics[0][name] == metrics[1][name], name


def test_a_prompt_that_the_judge_refuses_is_dropped_and_counted(tmp_path: Path) -> None:
    asked: list[str] = []
    with judging(by_scalar) as server:

        def says(answers: dict[str, str]) -> Any:
            text = server.requests[-1]["messages"][1]["content"]
            asked.append(text)
            return "No." if bad in text else by_scalar(answers)

        bad, server.says = prompt_rows(4)[2]["prompt"], says
        made = trainer(tmp_path, reward=server.spec(concurrency=1), rows=4, max_steps=1)
        made.train()
    (row,) = (tmp_path / DROPPED_FILE).read_text().splitlines()
    assert bad in row
    assert "no ranking from the judge" in row
    assert len(asked) == 3 + 3


def test_a_spent_budget_saves_the_run_and_the_next_one_goes_on(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    with judging(by_scalar) as server:
        made = trainer(tmp_path / "run", reward=server.spec(cache=tmp_path, concurrency=1, max_calls=5), **settings)
        with pytest.raises(RewardOutageError, match="max_calls"):
            made.train()
        assert (tmp_path / "run" / "checkpoint-1").is_dir()
        before = len(server.requests)
        again = trainer(tmp_path / "run", reward=server.spec(cache=tmp_path), **settings)
        with pytest.raises(ConfigError, match="max_calls=5"):  # another budget is another setting
            again.train(resume_from_checkpoint=True)
        again.train(resume_from_checkpoint=True, allow_config_change=True)
        whole = trainer(tmp_path / "whole", reward=server.spec(), **settings)
        whole.train()
    assert same(weights(again.roles.model), weights(whole.roles.model))
    assert before == 5
    assert again.rewards[0].function.usage.cached >= 1  # the step that was cut short is not paid twice
