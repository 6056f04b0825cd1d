"""Averaged weights in a run: one set of weights is evaluated, saved and left; the steps are those of a run without."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import prompt_rows, tiny_causal
from torch import Tensor
from transformers import TrainerCallback

from bondlm import BONDTrainer
from bondlm.errors import CheckpointError, ConfigError
from bondlm.models.load import load_model
from bondlm.runs.checkpoint import AVERAGE_FILE
from trainer.helpers import TOKENIZER, ends_often, logged, lora, low_ids, same, trainer, weights, without_times

FRACTION, STEPS = 0.5, 4


class EveryStep(TrainerCallback):
    """The weights after every step."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.seen.append(weights(model))


def run(folder: Path, kind: str, **settings: Any) -> BONDTrainer:
    defaults: dict[str, Any] = {
        **{
            "objective": "self_bond",
            "n": 3,
            "num_samples": 4,
            "anchor": "fixed",
            "average_weights": FRACTION,
            "learning_rate": 0.02,
        },
        **{"max_steps": STEPS, "save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 2},
        **{"eval_dataset": prompt_rows(12)[8:], "peft_config": lora() if kind == "lora" else None},
    }
    return trainer(folder, ends_often(tiny_causal(TOKENIZER)), **defaults | settings)


def mean_of(seen: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """By the weights s (s + 1) of fraction 1/2."""
    share = torch.tensor([s * (s + 1.0) for s in range(1, len(seen) + 1)])
    share = share / share.sum()
    return {name: sum(float(w) * each[name] for w, each in zip(share, seen, strict=True)) for name in seen[0]}  # type: ignore[misc]


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_what_is_evaluated_saved_and_left_is_the_average(kind: str, tmp_path: Path) -> None:
    steps = EveryStep()
    made = run(tmp_path / "run", kind, eval_strategy="steps", eval_steps=2, callbacks=[steps])
    made.train()
    average = mean_of(steps.seen)
    left = weights(made.roles.model)
    assert not same(left, steps.seen[-1])
    for name, tensor in left.items():
        torch.testing.assert_close(tensor, average[name], rtol=1e-5, atol=1e-6)
    # The evaluation of the last step was the average's: with the same seeds its numbers come again.
    in_training = [row for row in logged(tmp_path / "run") if "eval_kl" in row][-1]
    assert in_training["step"] == STEPS
    now = made.evaluate()
    assert {name: in_training[name] for name in now if "runtime" not in name} == pytest.approx(
        {name: value for name, value in now.items() if "runtime" not in name}, abs=1e-5
    )
    # A checkpoint holds both; the steps are those of a run that neither averages nor evaluates.
    plain = run(tmp_path / "plain", kind, average_weights=0.0)
    plain.train()
    assert same(weights(plain.roles.model), steps.seen[-1])
    held = load_file(tmp_path / "run" / f"checkpoint-{STEPS}" / AVERAGE_FILE)
    assert held.keys() == made.anchor.state_dict().keys()
    assert all(torch.equal(tensor, left[name]) for name, tensor in held.items())
    assert not (tmp_path / "plain" / f"checkpoint-{STEPS}" / AVERAGE_FILE).exists()
    weights_file = "adapter_model.safetensors" if kind == "lora" else "model.safetensors"
    files = [load_file(tmp_path / name / f"checkpoint-{STEPS}" / weights_file) for name in ("run", "plain")]
    assert same(*files)
    # What is saved at the end is the average.
    made.save_model()
    if kind == "full":
        assert same(weights(load_model(tmp_path / "run", dtype=torch.float32)), left)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_resumed_run_has_the_same_average(kind: str, tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", kind)
    whole.train()
    shutil.copytree(tmp_path / "whole", tmp_path / "stopped")
    shutil.rmtree(tmp_path / "stopped" / f"checkpoint-{STEPS}")
    for _ in range(2 if kind == "full" else 1):  # then at its end: no step is taken, and the average is there
        resumed = run(tmp_path / "stopped", kind)
        resumed.train(resume_from_checkpoint=True)
        assert resumed.state.global_step == STEPS
        assert same(weights(resumed.roles.model), weights(whole.roles.model))
    files = [load_file(tmp_path / name / f"checkpoint-{STEPS}" / AVERAGE_FILE) for name in ("whole", "stopped")]
    assert same(*files)
    mine, theirs = ([row for row in without_times(logged(tmp_path / f)) if "loss" in row] for f in ("stopped", "whole"))
    assert mine == theirs


def test_a_run_goes_on_from_a_checkpoint_before_which_every_step_was_skipped(tmp_path: Path) -> None:
    """There is no average as yet; it begins with the first step that is taken."""

    class Skips(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            for parameter in model.parameters() if state.global_step < 2 else ():
                if parameter.grad is not None:
                    parameter.grad.fill_(float("nan"))

    runs = []
    for name in ("whole", "stopped"):
        made = run(tmp_path / name, "lora", callbacks=[Skips()])
        made.train(resume_from_checkpoint=name == "stopped")
        assert [row["skipped_steps"] for row in logged(tmp_path / name) if "loss" in row] == [1, 1, 0, 0]
        runs.append(made)
        if name == "whole":
            assert load_file(tmp_path / "whole" / "checkpoint-2" / AVERAGE_FILE) == {}
            shutil.copytree(tmp_path / "whole", tmp_path / "stopped")
            shutil.rmtree(tmp_path / "stopped" / f"checkpoint-{STEPS}")
    assert same(*(weights(made.roles.model) for made in runs))


def test_a_checkpoint_without_its_average_is_no_checkpoint_of_this_run(tmp_path: Path) -> None:
    run(tmp_path, "full", average_weights=0.0, max_steps=2).train()
    with pytest.raises(ConfigError, match=r"average_weights cannot change in a run \(average_weights: 0.0 -> 0.5\)"):
        run(tmp_path, "full", max_steps=3).train(resume_from_checkpoint=True)
    (tmp_path / "config.yaml").unlink()  # then nothing says how it was made
    with pytest.raises(CheckpointError, match=AVERAGE_FILE):
        run(tmp_path, "full", max_steps=3).train(resume_from_checkpoint=True)


def test_an_evaluation_that_fails_and_a_model_saved_on_the_way(tmp_path: Path) -> None:
    """The weights of the steps go on, whatever happens while the average has their place."""
    steps = EveryStep()

    class SavesAndFails(TrainerCallback):
        made: BONDTrainer
        fails = False

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                self.made.save_model(str(tmp_path / "aside"))
                SavesAndFails.fails = True
                with pytest.raises(KeyError):
                    self.made.evaluate()
                SavesAndFails.fails = False

    def reward(completion_ids: list[list[int]], **columns: Any) -> list[float]:
        return low_ids(completion_ids)

    callback = SavesAndFails()
    made = run(tmp_path / "run", "full", callbacks=[steps, callback], reward=reward)
    callback.made = made
    draw = made.step.score

    def score(*args: Any, **kwargs: Any) -> Any:
        if SavesAndFails.fails:
            raise KeyError("anything")
        return draw(*args, **kwargs)

    made.step.score = score  # type: ignore[method-assign]
    made.train()
    assert len(steps.seen) == STEPS
    plain = run(tmp_path / "plain", "full", average_weights=0.0)
    plain.train()
    assert same(weights(plain.roles.model), steps.seen[-1])
    aside = weights(load_model(tmp_path / "aside", dtype=torch.float32))
    for name, tensor in mean_of(steps.seen[:2]).items():
        torch.testing.assert_close(aside[name], tensor, rtol=1e-5, atol=1e-6)
