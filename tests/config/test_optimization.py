"""What Trainer makes after the first rollout is tried when the settings are read, in both kinds of commands."""

import json
from pathlib import Path
from typing import Any

import pytest

from bondlm.cli import main
from bondlm.config import BONDConfig
from bondlm.errors import ConfigError

REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("optim_args='abc'", {"optim_args": "abc"}),
    ("optim='adamw_torch_fused', adam_beta1=2.0: ", {"adam_beta1": 2.0}),
    ("adam_epsilon=-1.0", {"adam_epsilon": -1.0}),
    ("adam_beta2=0.9: optim='sgd' ignores it", {"optim": "sgd", "adam_beta2": 0.9}),
    ("optim_args='x=1': optim='adafactor' ignores it", {"optim": "adafactor", "optim_args": "x=1"}),
    ("optim_args='x=1': optim='rmsprop' ignores it", {"optim": "rmsprop", "optim_args": "alpha=0.5,x=1"}),
    ("optim_target_modules=", {"optim_target_modules": ["q_proj"]}),
    ("optim='lomo': You need to install", {"optim": "lomo"}),
    ("lr_scheduler_type='cosine_with_min_lr', lr_sched", {"lr_scheduler_type": "cosine_with_min_lr"}),
    ("num_decay_steps", {"lr_scheduler_type": "warmup_stable_decay"}),
    (
        "lr_end",
        {"lr_scheduler_type": "polynomial", "learning_rate": 1e-4, "lr_scheduler_kwargs": {"lr_end": 1e-3}},
    ),
    ("lr_scheduler_type='constant_with_warmup' does not use it", {"lr_scheduler_kwargs": {"foo": 1}}),
    ("gradient_checkpointing_kwargs=", {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"foo": 1}}),
    ("max_steps=-2", {"max_steps": -2}),
    ("num_train_epochs=-1", {"num_train_epochs": -1}),
    ("logging_steps=-1", {"logging_steps": -1}),
    ("save_steps=-5", {"save_steps": -5}),
    ("log_level='loud'", {"log_level": "loud"}),
    ("dataloader_num_workers=-1", {"dataloader_num_workers": -1}),
]


@pytest.mark.parametrize(("said", "settings"), REFUSED)
def test_refused_before_any_work(said: str, settings: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        BONDConfig(output_dir=str(tmp_path), use_cpu=True, **settings)
    assert said in str(error.value)


TAKEN: list[dict[str, Any]] = [
    {"optim": "rmsprop", "optim_args": "alpha=0.5,centered=true"},
    {"adam_beta2": 0.95},
    {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 10}},
    {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}},
    {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False, "every_n_layers": 2}},
]


@pytest.mark.parametrize("settings", TAKEN)
def test_taken(settings: dict[str, Any], tmp_path: Path) -> None:
    BONDConfig(output_dir=str(tmp_path), use_cpu=True, **settings)


@pytest.mark.parametrize(("settings", "said"), [({}, 0), ({"max_steps": 4}, 1), ({"max_steps": 0}, 1)])
def test_of_two_lengths_it_is_said_which_one_wins(
    settings: dict[str, Any], said: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("WARNING"):
        BONDConfig(output_dir=str(tmp_path), use_cpu=True, num_train_epochs=2, **settings)
    BONDConfig(output_dir=str(tmp_path), use_cpu=True, **settings)
    assert caplog.text.count("num_train_epochs=2 is ignored: max_steps=") == said


@pytest.mark.parametrize("command", ["sft", "reward-model"])
@pytest.mark.parametrize(("said", "settings"), REFUSED)
def test_of_the_stages_before(
    command: str, said: str, settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if "lr_scheduler_kwargs" in settings or "gradient_checkpointing" in settings:
        pytest.skip("a mapping is no word of a command line")
    words = [f"--{name}={value[0] if isinstance(value, list) else value}" for name, value in settings.items()]
    rows = tmp_path / "rows.jsonl"
    row = {"prompt": "a", "completion": "b", "chosen": "c", "rejected": "d"}
    rows.write_text("".join(json.dumps(row | {"prompt": f"a{i}"}) + "\n" for i in range(40)))
    where = ["--train_dataset", str(rows), "--output_dir", str(tmp_path / "out"), "--use_cpu", "true"]
    assert main([command, "--model", str(tmp_path), *where, *words]) == 2
    assert said in capsys.readouterr().err
