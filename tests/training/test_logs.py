"""What cannot be written ends a run once it is saved, and a step that a fault interrupts counts once."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import prompt_rows
from trainer.helpers import Spoiled, logged, low_ids, same, trainer, weights
from transformers import AutoModelForCausalLM, TrainerCallback

from bondlm.errors import ResourceError, RewardError
from bondlm.runs.manifest import fault


class Block(TrainerCallback):
    """Puts a folder where a file is to be written, behind step 1, or before the run's summary is logged."""

    def __init__(self, path: Path, *, at_the_end: bool = False) -> None:
        self._path, self._at_the_end = path, at_the_end

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self._at_the_end and state.global_step == 1:
            self._path.mkdir()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self._at_the_end and "train_runtime" in logs:
            self._path.unlink()
            self._path.mkdir()


class Fails:
    """A reward that fails for the first prompt of each call but the first."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, completion_ids: list[list[int]]) -> list[float | None]:
        self.calls += 1
        values: list[float | None] = list(low_ids(completion_ids))
        return values if self.calls == 1 else [None, *values[1:]]


def test_dropped_prompts_that_cannot_be_written(tmp_path: Path) -> None:
    blocked = tmp_path / "dropped.jsonl"
    made = trainer(tmp_path, reward=Fails(), max_steps=3, callbacks=[Block(blocked)], max_skipped_frac=0.5)
    with pytest.raises(ResourceError, match=r"step 2: .*dropped\.jsonl .*Is a directory"):
        made.train()
    assert fault(tmp_path / "checkpoint-1") is None
    assert made.drops.state() == {"seen": 4, "dropped": 0, "left_out": 0}
    blocked.rmdir()
    made = trainer(tmp_path, reward=Fails(), max_steps=3, max_skipped_frac=0.5)
    made.train(resume_from_checkpoint=True)
    assert made.drops.state() == {"seen": 12, "dropped": 1, "left_out": 0}


def test_a_skipped_step_that_cannot_be_written(tmp_path: Path) -> None:
    made = trainer(tmp_path, max_steps=3, callbacks=[Block(tmp_path / "skipped.jsonl")])
    Spoiled(made, {2})
    with pytest.raises(ResourceError, match=r"step 2: .*skipped\.jsonl .*Is a directory"):
        made.train()
    assert made.state.global_step == 2
    assert fault(tmp_path / "checkpoint-2") is None


def test_a_summary_that_cannot_be_written(tmp_path: Path) -> None:
    """It is the last row: no checkpoint was asked for, and the model is saved all the same."""
    made = trainer(tmp_path, callbacks=[Block(tmp_path / "metrics.jsonl", at_the_end=True)])
    with pytest.raises(ResourceError, match=r"step 2: .*metrics\.jsonl .*is saved"):
        made.train()
    saved = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert same(weights(saved), weights(made.roles.model))


def test_an_evaluation_that_cannot_be_logged_outside_of_training(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(ResourceError, match=r"metrics\.jsonl"):
        made.evaluate(prompt_rows(2))


def test_too_many_failed_rewards_save_the_run_and_count_once(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"max_steps": 3, "max_skipped_frac": 0.0, "logging_steps": 3}
    made = trainer(tmp_path, reward=Fails(), **settings)
    with pytest.raises(RewardError, match=r"step 2: .*1 of 4 prompts failed, 1 of 8 "):
        made.train()
    assert fault(tmp_path / "checkpoint-1") is None
    again = trainer(tmp_path, **settings)
    again.train(resume_from_checkpoint=True)
    assert again.drops.state() == {"seen": 12, "dropped": 0, "left_out": 0}
    whole = trainer(tmp_path / "whole", **settings)
    whole.train()
    assert same(weights(again.roles.model), weights(whole.roles.model))


def test_a_step_that_is_interrupted_behind_its_rewards_counts_once(tmp_path: Path) -> None:
    """The memory is spent while the anchor scores what was drawn, or while the learned quantile reads it."""
    settings: dict[str, Any] = {"objective": "bond", "quantile": "learned", "n": 2, "max_steps": 3, "logging_steps": 3}
    whole = trainer(tmp_path / "whole", **settings)
    whole.train()
    for name in ("_logprob", "_features"):
        folder = tmp_path / name
        made = trainer(folder, **settings)
        plain = getattr(made.step, name)

        def spent(*args: Any, made: Any = made, plain: Any = plain) -> Any:
            if made.state.global_step == 1:
                raise ResourceError("the memory is spent")
            return plain(*args)

        setattr(made.step, name, spent)
        with pytest.raises(ResourceError, match="the memory is spent"):
            made.train()
        again = trainer(folder, **settings)
        again.train(resume_from_checkpoint=True)
        assert again.drops.seen == 12
        rows = [[row for row in logged(f) if "loss" in row] for f in (folder, tmp_path / "whole")]
        assert rows[0][0]["bond/quantile_loss"] == rows[1][0]["bond/quantile_loss"]
        tensors = [made.quantile_model.tensors() for made in (again, whole)]
        assert all(torch.equal(tensors[0][key], tensors[1][key]) for key in tensors[0])
        assert json.loads((folder / "ending.json").read_text())["step"] == 3
