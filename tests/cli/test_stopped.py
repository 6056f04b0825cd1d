"""What the other commands say of a run that was stopped, and of its checkpoints."""

import json
import shutil
from pathlib import Path

import pytest

from bondlm.cli import main
from bondlm.runs.folder import run_of
from bondlm.runs.manifest import fault
from cli.helpers import write_job

FEW = ("--num_samples", "2", "--num_reference_samples", "4")


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a run that Ctrl-C ended after its second step: its files before the end."""
    folder = tmp_path_factory.mktemp("stopped")
    config = write_job(folder, max_steps=2, save_steps=1, eval_dataset=str(folder / "heldout.jsonl"))
    assert main(["train", "--config", str(config)]) == 0
    run = folder / "run"
    for name in ("adapter_model.safetensors", "adapter_config.json", "eval.json", "eval_samples.jsonl", "README.md"):
        (run / name).unlink()
    (run / "ending.json").write_text(json.dumps({"step": 2, "max_steps": 40, "is_interrupted": True}))
    return run


def test_a_stopped_run_holds_no_model_as_yet(stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (
        ["eval", "--model", str(stopped)],
        ["sample", "--model", str(stopped), "--prompt", "hello"],
        ["merge", str(stopped), str(stopped / "checkpoint-2"), "--output_dir", str(stopped.parent / "merged")],
    ):
        assert main(command) == 2
        said = capsys.readouterr().err
        assert f"'{stopped}' holds no trained model: its run was stopped" in said
        assert str(stopped / "checkpoint-2") in said
    assert main(["report", str(stopped)]) == 2
    assert "has no eval.json: its run was stopped" in capsys.readouterr().err


def test_a_checkpoint_is_asked_as_its_run(stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint, output = stopped / "checkpoint-1", stopped.parent / "out"
    rewards = ("--reward_funcs", f"{stopped.parent}/reward.py:letters")
    assert main(["eval", "--model", str(checkpoint), *rewards, *FEW]) == 2
    assert "is a checkpoint: files written into it" in capsys.readouterr().err
    assert main(["eval", "--model", str(checkpoint), *rewards, *FEW, "--output", str(output)]) == 0
    result = json.loads((output / "eval.json").read_text())
    assert (result["steps"], result["max_completion_length"]) == (1, 8)
    assert fault(checkpoint) is None
    rendering = stopped / "prompting.json"
    rendering.write_text(rendering.read_text().replace('"auto"', '"plain"'))
    capsys.readouterr()
    assert main(["sample", "--model", str(checkpoint), "--prompt", "hello"]) == 0
    assert "each plain prompt is given to this chat model" not in capsys.readouterr().err  # the run gives it as it is
    rendering.write_text(rendering.read_text().replace('"plain"', '"auto"'))
    assert main(["report", str(checkpoint)]) == 2
    assert f"name the run folder around it, '{stopped}'" in capsys.readouterr().err


def test_weights_of_an_earlier_end_are_not_said_to_be_of_the_last_step(
    stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(stopped, run)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        shutil.copy(run / "checkpoint-1" / name, run / name)
    assert main(["eval", "--model", str(run), "--reward_funcs", f"{stopped.parent}/reward.py:letters", *FEW]) == 0
    assert json.loads((run / "eval.json").read_text())["steps"] is None
    card = (run / "README.md").read_text()
    assert "weights: those that were saved last" in card
    assert "number of steps not recorded" in card


def test_what_is_no_run_is_not_merged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "one").mkdir()
    assert main(["merge", str(tmp_path / "one"), str(tmp_path), "--output_dir", str(tmp_path / "out")]) == 2
    assert f"'{tmp_path}/one' holds no trained model" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_called_checkpoint_elsewhere_is_its_own(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-3").mkdir()
    assert run_of(tmp_path / "checkpoint-3") == tmp_path / "checkpoint-3"
    assert run_of(tmp_path) == tmp_path
