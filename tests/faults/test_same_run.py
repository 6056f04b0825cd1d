"""Rows D9 to D11 and T11 of the fault matrix on one process: a run goes on as the run that it was, or not at all."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from trainer.helpers import trainer
from transformers import get_scheduler

from bondlm.cli import main
from bondlm.cli.train import _changed_settings, training_arguments
from bondlm.errors import CheckpointError, ConfigError
from bondlm.runs.manifest import newest_checkpoint
from bondlm.trainer import BONDTrainer
from faults.children import job, kill, said, start, train, wait, wrap

CHANGES = {
    "beta": 0.25,
    "learning_rate": 2e-3,
    "seed": 7,
    "gamma": 0.5,
    "reward_funcs": "{folder}/reward.py:saver",
    "num_anchor_samples": 4,
}


@pytest.mark.parametrize("name", CHANGES)
def test_d10_other_config_is_refused(name: str, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    value = CHANGES[name]
    value = value.format(folder=copy.parent) if isinstance(value, str) else value
    assert main(["train", "--config", str(copy), f"--{name}", str(value)]) == 2
    error = capsys.readouterr().err
    assert f"{name}: " in error
    assert f"-> {value!r}" in error
    assert ("--allow_config_change" in error) is (name != "learning_rate")  # that cannot change


def test_d10_a_change_that_is_allowed_is_on_file(copy: Path) -> None:
    allowed = ("--allow_config_change", "true", "--max_steps", "4")
    assert train(copy, lambda: None, *allowed, "--beta", "0.25") == 0, said(copy)
    run = copy.parent / "run"
    assert json.loads((run / "env.json").read_text())["config_changes"] == ["beta: None -> 0.25"]
    assert yaml.safe_load((run / "config.yaml").read_text())["beta"] == 0.25
    assert train(copy, lambda: None, *allowed, "--beta", "0.25", "--learning_rate", "0.5") == 2
    assert "learning_rate cannot change" in said(copy)


@pytest.mark.parametrize(
    ("schedule", "is_refused"),
    [
        ({"lr_scheduler_type": "linear", "warmup_steps": 0}, True),
        ({"lr_scheduler_type": "cosine", "warmup_steps": 1}, True),
        ({"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 0.5}, True),  # a share of the run
        ({"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 2}, False),
        ({"lr_scheduler_type": "inverse_sqrt", "warmup_steps": 2}, False),
        ({"lr_scheduler_type": "constant"}, False),
    ],
    ids=str,
)
def test_d10_the_length_is_a_setting_of_a_schedule_that_depends_on_it(
    schedule: dict[str, Any], is_refused: bool, tmp_path: Path
) -> None:
    """And it does so for just those whose learning rates of the first steps change with the length of the run."""
    options = {"max_steps": 3, "beta": 0.5} | schedule
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(options))
    for change, line in (
        ({"max_steps": 4}, "max_steps: 3 -> 4"),
        ({"num_train_epochs": 2}, "num_train_epochs: None -> 2"),
    ):
        changed, path = options | change, tmp_path / "config.yaml"
        if is_refused:
            with pytest.raises(ConfigError, match=rf"\({line}\).*--allow_config_change"):
                _changed_settings(path, changed)
        allowed = _changed_settings(path, changed | {"allow_config_change": True})
        assert allowed == ([line] if is_refused else [])
        assert is_refused or _changed_settings(path, changed) == []

    def rates(num_steps: int) -> list[float]:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        args = training_arguments({"output_dir": str(tmp_path / "out"), "use_cpu": True} | schedule)
        warmup = args.get_warmup_steps(num_steps)
        scheduler = get_scheduler(args.lr_scheduler_type, optimizer, warmup, num_steps)
        seen = []
        for _ in range(5):
            seen.append(scheduler.get_last_lr()[0])
            optimizer.step()
            scheduler.step()
        return seen

    assert (rates(5) != rates(10)) == is_refused


def test_d10_a_run_under_such_a_schedule_does_not_go_on_longer(copy: Path) -> None:
    for path in (copy, copy.parent / "run" / "config.yaml"):
        path.write_text(path.read_text() + "lr_scheduler_type: linear\n")
    assert train(copy, lambda: None, "--max_steps", "4") == 2
    assert "(max_steps: 3 -> 4)" in said(copy)
    assert train(copy, lambda: None, "--max_steps", "4", "--allow_config_change") == 0, said(copy)
    assert json.loads((copy.parent / "run" / "env.json").read_text())["config_changes"] == ["max_steps: 3 -> 4"]


def steps_of(run: Path) -> list[int]:
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [row["step"] for row in rows if "loss" in row]


def test_d10_a_run_that_goes_back_leaves_no_checkpoint_that_a_later_resume_would_take(copy: Path) -> None:
    run = copy.parent / "run"
    back = ("--resume", str(run / "checkpoint-1"), "--beta", "0.25", "--allow_config_change", "true")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert train(copy, lambda: None, *back) == 6
    assert f"rm -r {run}/checkpoint-2 {run}/checkpoint-3" in said(copy)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    again = trainer(run, max_steps=3)
    with pytest.raises(CheckpointError, match=f"{run}/checkpoint-2 or {run}/checkpoint-3"):
        again.train(resume_from_checkpoint=str(run / "checkpoint-1"))
    for step in (2, 3):
        shutil.rmtree(run / f"checkpoint-{step}")
    killed = start(copy, lambda: wrap(BONDTrainer, "training_step", 2, kill, after=False), *back)
    assert wait(killed) == -9
    assert newest_checkpoint(run)[0] == run / "checkpoint-2"
    assert train(copy, lambda: None, *back) == 0, said(copy)
    assert "from step 2 to 3" in said(copy)
    shutil.rmtree(run / "checkpoint-1")  # as save_total_limit does
    assert train(copy, lambda: None, *back, "--max_steps", "4") == 0, said(copy)
    assert "from step 3 to 4" in said(copy)
    assert train(copy, lambda: None, *back, "--beta", "0.5") == 6  # no command of before
    assert steps_of(run) == [1, 2, 3, 4]
    assert json.loads((run / "env.json").read_text())["config_changes"] == ["beta: None -> 0.25"]


def test_d10_a_checkpoint_of_another_run_begins_a_new_folder_and_does_not_mix_with_a_third(copy: Path) -> None:
    run, other, third = (copy.parent / name for name in ("run", "other", "third"))
    env = json.loads((run / "env.json").read_text()) | {"config_changes": ["n: 1 -> 2"]}
    (run / "env.json").write_text(json.dumps(env))
    there = ("--resume", str(run / "checkpoint-1"), "--output_dir")
    killed = start(copy, lambda: wrap(BONDTrainer, "training_step", 2, kill, after=False), *there, str(other))
    assert wait(killed) == -9
    for path in other.glob("checkpoint-*"):  # as if it had been killed before its first one
        shutil.rmtree(path)
    (other / ".sealed").unlink()
    assert train(copy, lambda: None, *there, str(other)) == 0, said(copy)
    assert (steps_of(other), steps_of(run)) == ([2, 3], [1, 2, 3])
    assert json.loads((other / "env.json").read_text())["config_changes"] == ["n: 1 -> 2"]
    assert train(copy, lambda: None, "--output_dir", str(third), "--max_steps", "1") == 0, said(copy)
    before = (third / "metrics.jsonl").read_bytes()
    for kept in (True, False):
        if not kept:
            shutil.rmtree(third / "checkpoint-1")
            (third / ".sealed").unlink()
        assert train(copy, lambda: None, *there, str(third)) == 6
        assert f"output_dir='{third}' already holds another run" in said(copy)
        with pytest.raises(CheckpointError, match="third"):
            trainer(third, max_steps=3).train(resume_from_checkpoint=str(run / "checkpoint-1"))
    assert (third / "metrics.jsonl").read_bytes() == before


def test_d10_another_tokenizer_is_refused(copy: Path) -> None:
    template = copy.parent / "model" / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|im_start|>", "<|im_start|> "))
    assert train(copy, lambda: None, "--max_steps", "4") == 2
    assert re.search("chat template.*truncate_prompt", said(copy))


def test_d11_another_number_of_prompts_a_step_is_refused(copy: Path, straight: Path) -> None:
    """A checkpoint counts steps: with twice as many prompts each, some would never be trained."""
    twice = ("--max_steps", "4", "--per_device_train_batch_size", "8")
    for allowed in ((), ("--allow_config_change", "true")):
        assert train(copy, lambda: None, *twice, *allowed) == 2
        assert re.search(
            r"checkpoint-3 .*\b4 prompts per step.*per_device_train_batch_size=4 .*\b8\b", said(copy).replace("\n", " ")
        )
    cut = ("--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2")
    assert train(copy, lambda: None, "--max_steps", "4", *cut) == 0, said(copy)
    assert train(straight, lambda: None, "--output_dir", str(copy.parent / "whole"), "--max_steps", "4") == 0
    drawn = [(copy.parent / name / "samples.jsonl").read_text().splitlines()[-4:] for name in ("run", "whole")]
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize("name", ["save_only_model", "ignore_data_skip"])
def test_d9_settings_under_which_no_resume_is_exact_are_refused(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = job(tmp_path / "job", **{name: True})
    assert main(["train", "--config", str(config)]) == 2
    assert f"{name}=True: " in capsys.readouterr().err


def test_t11_data_that_changed_are_refused_at_resume(copy: Path) -> None:
    data = copy.parent / "train.jsonl"
    rows = data.read_text().splitlines(keepends=True)
    data.write_text("".join([*rows[1:], rows[0]]))
    assert train(copy, lambda: None, "--max_steps", "4") == 3
    assert re.search("train_dataset .*checkpoint-3", said(copy))
    data.write_text("".join(rows))
    assert train(copy, lambda: None, "--max_steps", "4") == 0
