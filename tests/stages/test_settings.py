"""Settings of transformers in `sft` and `reward-model`: each does something, or is refused before a model is loaded."""

from pathlib import Path
from typing import Any

import pytest
import torch

from bondlm.cli import main
from bondlm.cli.training import write_facts
from bondlm.stages.reward_model import Pairs
from stages.helpers import CHEAP, preferences, save, write

STAGES = ("sft", "reward-model")


def command(tmp_path: Path, stage: str, *extra: str, model: str = "no/such/model") -> list[str]:
    rows: list[dict[str, Any]] = [row | {"completion": "blue"} for row in preferences(20)]
    data = write(tmp_path / "rows.jsonl", rows)
    given = [stage, "--model", model, "--train_dataset", data, "--output_dir", str(tmp_path / "out"), *CHEAP, *extra]
    return [*given, "--max_completion_length", "16"] if stage == "sft" else given


@pytest.mark.parametrize("stage", STAGES)
def test_a_token_is_refused_and_no_pickle_of_the_settings_is_left(
    tmp_path: Path, stage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(tmp_path, stage, "--hub_token", "hunter2")) == 2
    assert "HF_TOKEN" in capsys.readouterr().err
    saves = ["--max_steps", "1", "--save_steps", "1"]  # which asks for checkpoints, as in transformers
    assert main(command(tmp_path, stage, *saves, model=save(tmp_path / "model", "causal"))) == 0
    assert (tmp_path / "out" / "checkpoint-1" / "optimizer.pt").exists()
    assert not list((tmp_path / "out").rglob("training_args.bin"))


BOTH = {
    "max_steps": "abc",
    "learning_rate": "abc",
    "seed": "abc",
    "bf16": "abc",
    "data_seed": "abc",
    "num_train_epochs": "0",
    "per_device_train_batch_size": "0",
    "gradient_accumulation_steps": "0",
    "resume_from_checkpoint": "nowhere",
    "ignore_data_skip": "true",
    "restore_callback_states_from_checkpoint": "true",
    "enable_jit_checkpoint": "true",
    "logging_nan_inf_filter": "true",
    "do_predict": "true",
    "use_liger_kernel": "true",
    "liger_kernel_config": "{rope: true}",
    "label_names": "[x]",
    "prediction_loss_only": "true",
    "batch_eval_metrics": "true",
    "include_for_metrics": "[loss]",
    "eval_use_gather_object": "true",
    "eval_do_concat_batches": "false",
    "eval_strategy": "steps",
    "eval_on_start": "true",
    "eval_steps": "5",
    "load_best_model_at_end": "true",
    "save_strategy": "best",
    "save_total_limit": "1",
    "lr_scheduler_type": "reduce_lr_on_plateau",
    "metric_for_best_model": "accuracy",
    "report_to": "wanbd",
}
OF_ONE = {
    "sft": {"max_completion_length": "abc", "max_prompt_length": "0"},
    "reward-model": {
        "max_length": "abc",
        "label_smoothing_factor": "0.1",
        "remove_unused_columns": "true",
        "train_sampling_strategy": "group_by_length",
        "eval_delay": "3",
        "eval_accumulation_steps": "2",
        "bf16_full_eval": "true",
    },
}


@pytest.mark.parametrize(
    ("stage", "name", "value"),
    [(stage, name, value) for stage in STAGES for name, value in (BOTH | OF_ONE[stage]).items()],
)
def test_a_setting_that_cannot_be_or_does_nothing_is_refused(
    tmp_path: Path, stage: str, name: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command(tmp_path, stage), f"--{name}", value]) == 2
    assert f"error: {name}=" in capsys.readouterr().err


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("lora_r", "abc", "lora_r="),
        ("lora_alpha", "0", "lora_alpha="),
        ("lora_dropout", "abc", "lora_dropout="),
        ("lora_target_modules", "none", "PEFT refuses"),
        ("lora_target_modules", "q_proj,v_proj", "a list is written '[q_proj, v_proj]'"),
    ],
)
def test_an_adapter_that_cannot_be_is_refused(
    tmp_path: Path, stage: str, name: str, value: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = command(tmp_path, stage, "--use_peft", f"--{name}", value, model=save(tmp_path / "model", "causal"))
    assert main(given) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("stage", STAGES)
def test_no_step_is_no_training(tmp_path: Path, stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(tmp_path, stage, "--max_steps", "0")) == 2
    assert "max_steps=0" in capsys.readouterr().err
    fills = ["--dataloader_drop_last", "--per_device_train_batch_size", "32"]
    assert main([*command(tmp_path, stage), *fills]) == 2
    assert "dataloader_drop_last=True" in capsys.readouterr().err


def test_the_best_evaluation_of_an_sft_has_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = command(tmp_path, "sft", "--eval_dataset", str(tmp_path / "rows.jsonl"), "--load_best_model_at_end")
    assert main([*given, "--eval_strategy", "steps", "--eval_steps", "1", "--save_steps", "2"]) == 2
    assert "eval_steps=1 and save_steps=2" in capsys.readouterr().err


@pytest.mark.parametrize("stage", STAGES)
def test_a_bare_no_of_yaml_is_a_strategy_and_null_the_default(tmp_path: Path, stage: str) -> None:
    strategies = ["--eval_strategy", "no", "--save_strategy", "no", "--logging_strategy", "no", "--max_steps", "1"]
    strategies += ["--learning_rate", "null", "--save_steps", "1", "--save_total_limit", "1"]
    assert main(command(tmp_path, stage, *strategies, model=save(tmp_path / "model", "causal"))) == 0
    assert not list((tmp_path / "out").rglob("checkpoint-*"))


@pytest.mark.parametrize("kind", ["causal", "t5"])
@pytest.mark.parametrize(
    "extra",
    [
        ["--label_smoothing_factor", "0.1", "--train_sampling_strategy", "group_by_length"],
        ["--load_best_model_at_end", "--save_strategy", "steps", "--save_steps", "1"],
        ["--lr_scheduler_type", "reduce_lr_on_plateau", "--save_strategy", "best"],
        ["--lr_scheduler_type", "greedy", "--eval_on_start", "--eval_accumulation_steps", "1"],
    ],
)
def test_the_other_settings_of_an_sft_work(tmp_path: Path, kind: str, extra: list[str]) -> None:
    given = command(tmp_path, "sft", *extra, model=save(tmp_path / "model", kind))
    evaluated = ["--eval_dataset", str(tmp_path / "rows.jsonl"), "--eval_strategy", "steps", "--eval_steps", "1"]
    assert main([*given, *evaluated, "--max_steps", "2"]) == 0


def test_of_several_processes_one_writes_the_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):
        assert not list(tmp_path.iterdir())
        monkeypatch.setenv("RANK", rank)
        write_facts(tmp_path, "sft.json", {})
    assert [path.name for path in tmp_path.iterdir()] == ["sft.json"]


def test_held_out_pairs_are_scored_as_many_at_a_time_as_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []

    def watched(pairs: Pairs, rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        sizes.append(len(rows))
        return collate(pairs, rows)

    collate = Pairs.collate
    monkeypatch.setattr(Pairs, "collate", watched)
    given = command(tmp_path, "reward-model", "--max_steps", "1", model=save(tmp_path / "model", "causal"))
    assert main([*given, "--per_device_eval_batch_size", "1"]) == 0
    assert sizes[-2:] == [1, 1]  # two held-out pairs, behind the training
