"""Settings of transformers in `sft` and `reward-model`: each does something, or is refused before a model is loaded."""

from pathlib import Path
from typing import Any

import pytest

from bondlm.cli import main
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
    saves = ["--max_steps", "1", "--save_strategy", "steps", "--save_steps", "1"]
    assert main(command(tmp_path, stage, *saves, model=save(tmp_path / "model", "causal"))) == 0
    assert (tmp_path / "out" / "checkpoint-1" / "optimizer.pt").exists()
    assert not list((tmp_path / "out").rglob("training_args.bin"))
