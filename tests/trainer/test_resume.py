"""A run that was stopped and resumed is the run that never stopped."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_causal, tiny_t5
from transformers import TrainerCallback

from bondlm import BONDTrainer
from bondlm.errors import CheckpointError
from bondlm.runs.checkpoint import ANCHOR_FILE
from trainer.helpers import (
    TOKENIZER,
    ends_often,
    logged,
    lora,
    optimizer_tensors,
    same,
    trainer,
    weights,
    without_times,
)


def run_of_six(folder: Path, kind: str, **settings: Any) -> BONDTrainer:
    model = ends_often(tiny_t5(TOKENIZER) if kind == "t5" else tiny_causal(TOKENIZER))
    return trainer(
        folder,
        model,
        max_steps=6,
        save_strategy="steps",
        save_steps=1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        rows=10,  # 5 batches: windows of 4, 4 and 2 prompts; the epoch ends after step 3
        gamma=0.3,
        lr_scheduler_type="linear",
        peft_config=lora() if kind == "lora" else None,
        **settings,
    )


@pytest.mark.parametrize("kind", ["lora", "t5"])
def test_resuming_after_any_step_equals_never_stopping(kind: str, tmp_path: Path) -> None:
    whole = run_of_six(tmp_path / "whole", kind)
    whole.train()
    expected = without_times(logged(tmp_path / "whole"))
    assert [row["step"] for row in expected] == [1, 2, 3, 4, 5, 6, 6]
    samples = (tmp_path / "whole" / "samples.jsonl").read_text()
    for stop in (1, 3, 4) if kind == "lora" else (3,):
        folder = tmp_path / f"stopped-{stop}"
        shutil.copytree(tmp_path / "whole", folder)
        for step in range(stop + 1, 7):  # as if killed here, with what was logged beyond still on disk
            shutil.rmtree(folder / f"checkpoint-{step}")
        with (folder / "metrics.jsonl").open("a") as file:
            file.write('{"step": 7, "lo')
        torch.rand(stop)
        resumed = run_of_six(folder, kind)
        resumed.train(resume_from_checkpoint=True)
        assert resumed.state.global_step == 6
        assert same(weights(resumed.roles.model), weights(whole.roles.model))
        assert same(resumed.anchor.state_dict(), whole.anchor.state_dict())
        mine, theirs = optimizer_tensors(resumed), optimizer_tensors(whole)
        assert len(mine) == len(theirs) > 0
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
        rows = without_times(logged(folder))
        assert rows[:-1] == expected[:-1]  # the last row sums up the process's own part of the run
        assert (folder / "samples.jsonl").read_text() == samples
        # And so does what is drawn next.
        encoded: Any = list(whole.train_dataset)[:2]  # type: ignore[arg-type]
        assert resumed.sample(encoded, "anchor", 2).completions == whole.sample(encoded, "anchor", 2).completions


def test_a_checkpoint_by_name(tmp_path: Path) -> None:
    whole = run_of_six(tmp_path, "lora")
    whole.train()
    for step in (5, 6):
        shutil.rmtree(tmp_path / f"checkpoint-{step}")
    made = run_of_six(tmp_path, "lora")
    made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert same(made.anchor.state_dict(), whole.anchor.state_dict())


def test_a_second_run_of_one_trainer_is_refused_and_a_resume_is_exact(tmp_path: Path) -> None:
    """It would count from 0, over the logs and the checkpoints of the first."""
    whole = run_of_six(tmp_path / "whole", "lora")
    whole.train()
    made = run_of_six(tmp_path / "run", "lora", callbacks=[Interrupted(4)])
    with pytest.raises(KeyboardInterrupt):
        made.train()
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError, match=r"trained 4 steps.*resume_from_checkpoint=True.*new BONDTrainer"):
        made.train()
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before
    made.train(resume_from_checkpoint=True)  # as the message advises
    assert same(weights(made.roles.model), weights(whole.roles.model))
    assert same(made.anchor.state_dict(), whole.anchor.state_dict())
    assert without_times(logged(tmp_path / "run"))[:-1] == without_times(logged(tmp_path / "whole"))[:-1]


def test_a_run_of_no_step_is_no_first_run(tmp_path: Path) -> None:
    made = trainer(tmp_path, max_steps=0)
    made.train()
    made.args.max_steps = 1
    made.train()
    assert made.state.global_step == 1


class Interrupted(TrainerCallback):
    """Ctrl-C after a step, once."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.step = -1
            raise KeyboardInterrupt


def test_resume_without_the_anchor_is_refused(tmp_path: Path) -> None:
    run_of_six(tmp_path, "lora").train()
    (tmp_path / "checkpoint-6" / ANCHOR_FILE).unlink()
    made = run_of_six(tmp_path, "lora")
    before = weights(made.roles.model)
    with pytest.raises(CheckpointError, match=f"checkpoint-6 .*{ANCHOR_FILE}"):
        made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert same(weights(made.roles.model), before)
    made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))  # what the message advises


def test_resume_falls_back_to_the_newest_checkpoint_that_verifies_and_says_so(tmp_path: Path) -> None:
    whole = run_of_six(tmp_path, "lora")
    whole.train()
    damaged = tmp_path / "checkpoint-6" / ANCHOR_FILE
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(bytes(data))
    (tmp_path / "checkpoint-5" / "manifest.json").unlink()
    resumed = run_of_six(tmp_path, "lora")
    with pytest.warns(UserWarning, match=r"checkpoint-[56]") as warned:
        resumed.train(resume_from_checkpoint=True)
    messages = [str(w.message) for w in warned if "checkpoint-" in str(w.message)]
    assert len(messages) == 2
    assert re.search(rf"checkpoint-6.*{ANCHOR_FILE}.*hash", messages[0])
    assert re.search(r"checkpoint-5.*manifest\.json", messages[1])
    assert same(weights(resumed.roles.model), weights(whole.roles.model))  # from 4 on, again


@pytest.mark.parametrize("exists", [False, True])
def test_nothing_to_resume_is_refused(exists: bool, tmp_path: Path) -> None:
    made = trainer(tmp_path / "run")
    if exists:
        (tmp_path / "run").mkdir(exist_ok=True)
    else:
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
    with pytest.raises(CheckpointError, match=f"'{tmp_path / 'run'}'.*resume_from_checkpoint"):
        made.train(resume_from_checkpoint=True)


def test_a_signal_finishes_the_step_saves_and_stops(tmp_path: Path) -> None:
    class Signal(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1:
                made.stop.signal = 15

    made = trainer(tmp_path, max_steps=5, callbacks=[Signal()])
    made.train()
    assert made.state.global_step == 2
    assert (tmp_path / "checkpoint-2" / ANCHOR_FILE).is_file()
