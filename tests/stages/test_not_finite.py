"""A training that diverges ends with code 5, and leaves no model behind."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import prompt_rows

from bondlm.cli import main
from bondlm.errors import NonFiniteError
from bondlm.stages.reward_model import accuracy_of
from stages.helpers import CHEAP, preferences, save, write

DIVERGES = ["--learning_rate", "1e38", "--max_steps", "20"]


def command(tmp_path: Path, stage: str, *extra: str) -> list[str]:
    rows: list[dict[str, Any]] = preferences(20)
    if stage == "sft":
        rows = [row | {"completion": "blue"} for row in prompt_rows(8)]
    data, model = write(tmp_path / "rows.jsonl", rows), save(tmp_path / "model", "causal")
    given = [stage, "--model", model, "--train_dataset", data, "--output_dir", str(tmp_path / "out"), *CHEAP, *extra]
    return [*given, "--max_completion_length", "16"] if stage == "sft" else given


@pytest.mark.parametrize("stage", ["sft", "reward-model"])
@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--logging_steps", "1"], "the loss is nan"),
        (["--logging_steps", "100"], "not finite"),
        (["--logging_steps", "100", "--save_strategy", "steps", "--save_steps", "10"], "weights are not finite"),
        (["--logging_steps", "100", "--use_peft"], "not finite"),
    ],
)
def test_a_training_that_diverges_saves_nothing(
    tmp_path: Path, stage: str, extra: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command(tmp_path, stage, *DIVERGES), *extra]) == 5
    error = capsys.readouterr().err
    assert message in error
    assert "learning_rate" in error
    assert not list((tmp_path / "out").rglob("*.safetensors"))


def test_a_member_that_diverges_ends_them_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rates = ["--members", "2", "--member_learning_rates", "[1e-4, 1e38]", "--max_steps", "20", "--logging_steps", "100"]
    assert main(command(tmp_path, "reward-model", *rates)) == 5
    assert "held-out pairs are not finite" in capsys.readouterr().err
    assert not list((tmp_path / "out").rglob("*.safetensors"))


def test_a_held_out_loss_that_is_not_finite_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """After the one step the weights are large, and still finite."""
    start = command(tmp_path, "sft", "--learning_rate", "1e38", "--max_steps", "1")
    assert main([*start, "--eval_dataset", str(tmp_path / "rows.jsonl")]) == 5
    assert "held-out loss is nan" in capsys.readouterr().err
    assert not list((tmp_path / "out").rglob("*.safetensors"))


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
def test_an_accuracy_is_of_finite_margins(wrong: float) -> None:
    margins = torch.tensor([1.0, wrong, 0.5], dtype=torch.float64)
    with pytest.raises(NonFiniteError, match=r"1 of 3 held-out pairs.*pair 1"):
        accuracy_of(margins, preferences(3))
