"""A run writes over no file of the user's."""

from datetime import datetime
from pathlib import Path

import pytest
from trainer.helpers import trainer

from bondlm.errors import CheckpointError
from bondlm.runs.foreign import WRITTEN, foreign_file
from bondlm.runs.manifest import remove_unfinished
from bondlm.runs.prompting import write_prompting


@pytest.mark.parametrize("name", WRITTEN)
def test_a_file_that_no_run_wrote_is_refused_before_any_work(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("beta: 0.9\n")
    with pytest.raises(CheckpointError, match=rf"{tmp_path}/{name} already exists.*output_dir"):
        trainer(tmp_path)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(name, "beta: 0.9\n")]


def test_other_files_and_those_of_earlier_runs_are_let_be(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "train.jsonl").write_text("{}\n")
    for _ in range(2):  # without checkpoints a run may be made again
        trainer(tmp_path, max_steps=1).train()
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("sign", ["prompting.json", ".sealed"])
def test_a_run_is_known_by_what_it_always_leaves(sign: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("model: m\n")
    assert foreign_file(tmp_path) == "config.yaml"
    (tmp_path / sign).touch()
    assert foreign_file(tmp_path) is None


@pytest.mark.parametrize("evaluated", [False, True])  # by `bondlm eval`, with this folder as its output
def test_checkpoints_of_another_trainer_are_let_be(evaluated: bool, tmp_path: Path) -> None:
    weights = tmp_path / "checkpoint-500" / "model.safetensors"
    weights.parent.mkdir()
    weights.write_text("another trainer's")
    if evaluated:
        write_prompting(tmp_path, "auto", {}, datetime.now())
    before = {*tmp_path.rglob("*")}
    assert remove_unfinished(tmp_path) == []
    with pytest.raises(CheckpointError, match=r"checkpoint-500.*another program wrote it.*output_dir"):
        trainer(tmp_path, max_steps=1).train()
    assert {*tmp_path.rglob("*")} == before
    assert weights.read_text() == "another trainer's"
