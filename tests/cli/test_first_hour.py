"""What a first hour brings: a run given again, an edited reward, another folder to work from, slips of the pen."""

import json
import shutil
import signal
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

import bondlm
from bondlm.cli import main
from bondlm.cli.train import _stop_on_signals
from cli.helpers import write_job

QUICK = ("--eval_dataset", "null")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose paths are relative, with a run of one step."""
    folder = tmp_path_factory.mktemp("project")
    config = write_job(folder, max_steps=1, save_steps=1, eval_num_samples=1)
    config.write_text(config.read_text().replace(f"{folder}/", ""))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["train", "--config", "run.yaml"]) == 0
    return folder


@pytest.fixture
def here(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, to work in."""
    shutil.copytree(project, tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    return tmp_path / "project"


def test_a_finished_run_given_again_says_so(
    here: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert main(["train", "--config", "run.yaml", *QUICK]) == 0
    assert "is finished: 1 of 1 steps" in caplog.text
    assert "training from step" not in capsys.readouterr().out


def test_an_edited_reward_is_not_taken_for_the_runs_own(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = here / "reward.py"
    path.write_text(path.read_text() + "\n# another reward\n")
    assert main(["train", "--config", "run.yaml", "--max_steps", "2"]) == 2
    assert "reward.py:letters has been edited" in capsys.readouterr().err
    assert main(["train", "--config", "run.yaml", "--max_steps", "2", "--allow_config_change", *QUICK]) == 0
    assert json.loads((here / "run" / "env.json").read_text())["config_changes"] == [
        "reward_funcs: reward.py:letters has been edited"
    ]


def test_another_learning_rate_is_refused_without_a_way_that_leads_nowhere(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--config", "run.yaml", "--learning_rate", "0.5"]) == 2
    error = capsys.readouterr().err
    assert "learning_rate cannot change in a run (learning_rate: 0.001 -> 0.5)" in error
    assert "--allow_config_change" not in error


def test_the_same_prompts_under_another_name_may_be_named_and_others_not(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The offer says so: with other rows it led to a second refusal, after the models were loaded."""
    shutil.copy("train.jsonl", "renamed.jsonl")
    command = ["train", "--config", "run.yaml", "--train_dataset", "renamed.jsonl", "--max_steps", "2", *QUICK]
    assert main(command) == 2
    assert "--allow_config_change, which accepts the same rows under another name" in capsys.readouterr().err
    assert main([*command, "--allow_config_change"]) == 0
    assert "training from step 1 to 2: 4 prompts per step" in capsys.readouterr().out


def test_a_step_has_no_more_prompts_than_there_are(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("few.jsonl").write_text("".join(Path("train.jsonl").read_text().splitlines(keepends=True)[:3]))
    few = ["--train_dataset", "few.jsonl", "--output_dir", "few", "--per_device_train_batch_size", "8"]
    assert main(["train", "--config", "run.yaml", *few, *QUICK]) == 0
    assert "training from step 0 to 1: 3 prompts per step" in capsys.readouterr().out


def test_no_command_prints_warnings_for_programmers(monkeypatch: pytest.MonkeyPatch) -> None:
    def warn(options: dict[str, Any]) -> int:
        warnings.warn_explicit("old", FutureWarning, "modeling_utils.py", 1, module="transformers.modeling_utils")
        return 0

    monkeypatch.setattr("bondlm.cli.sample.run", warn)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert main(["sample", "--model", "m"]) == 0
    assert seen == []


def test_a_run_folder_works_from_anywhere(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "moved"
    shutil.copytree(project / "run", run)
    monkeypatch.chdir(tmp_path)
    adapter = json.loads((run / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(project / "model")
    assert yaml.safe_load((run / "config.yaml").read_text())["model"] == "model"  # as it was given
    (run / "report.html").write_text("old")
    assert main(["eval", "--model", "moved"]) == 2  # code is named by the user, not by a folder
    assert f"{project}/reward.py:letters" in capsys.readouterr().err
    counts = ["--num_samples", "1", "--num_reference_samples", "2"]
    assert main(["eval", "--model", "moved", "--reward_funcs", f"{project}/reward.py:letters", *counts]) == 0
    assert json.loads((run / "eval.json").read_text())["planned_steps"] == 1
    assert "Best-of-" in (run / "report.html").read_text()
    assert main(["sample", "--model", "moved", "--prompt", "hello"]) == 0


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--eta", "abc"], "eta='abc'"),
        (["--max_steps", "many"], "max_steps='many'"),
        (["--warmup_steps", "[1]"], "warmup_steps=[1]"),
        (["--gamma", "abc"], "gamma='abc'"),
        (["--bf16", "maybe"], "bf16='maybe'"),
        (["--learning_rate", "fast"], "learning_rate='fast'"),
        (["--save_steps", "true"], "save_steps=True"),
    ],
)
def test_a_value_of_another_kind_is_named(
    words: list[str], named: str, project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(project)
    assert main(["check", "--config", "run.yaml", *words]) == 2
    assert named in capsys.readouterr().err


def test_a_run_that_is_not_there_is_said_to_be_missing(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(project)
    (project / "runs").mkdir(exist_ok=True)
    assert main(["eval", "--model", "runs/nope"]) == 2
    assert "there is no folder" in capsys.readouterr().err
    assert main(["eval", "--model", "nope"]) == 2
    assert "there is no folder 'nope'" in capsys.readouterr().err


def test_the_first_ctrl_c_is_answered_at_once(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Also where there is no SIGUSR1, on Windows."""
    monkeypatch.delattr(signal, "SIGUSR1")
    stop = SimpleNamespace(finished=False, signal=None)
    with _stop_on_signals() as watched:
        watched.append(stop)
        signal.raise_signal(signal.SIGINT)
        assert stop.signal == signal.SIGINT
        assert "stopping: the step under way is finished and saved" in capfd.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_the_package_lists_its_names() -> None:
    assert set(bondlm.__all__) <= set(dir(bondlm))


def test_sample_and_score_say_when_rewards_choose_nothing(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (here / "length.py").write_text("def f(completions, **rest):\n    return [-len(c) for c in completions]\n")
    rows = ['{"prompt": [{"role": "user", "content": "' + word + '"}]}\n' for word in ("one", "two")]
    (here / "chat.jsonl").write_text("".join(rows))
    common = ["--model", "run", "--reward_funcs", "length.py:f", "--max_completion_length", "4"]
    assert main(["sample", "--dataset", "chat.jsonl", "--best_of", "3", *common]) == 0
    assert "the same for all 3 completions of 2 of 2 prompts (-1 for the first)" in capfd.readouterr().err
    assert main(["score", "--dataset", "chat.jsonl", "--output", "s.jsonl", "--num_samples", "2", *common]) == 0
    assert 'completion[0]["content"]' in capfd.readouterr().err


def test_answers_of_a_run_are_as_long_as_it_was_trained(here: Path) -> None:
    """8 tokens; of 256, the default, there would be no room for a prompt in this model."""
    common = ["--model", "run", "--reward_funcs", "reward.py:letters", "--dataset", "heldout.jsonl"]
    for more, longest in (([], 8), (["--max_completion_length", "3"], 3)):
        name = f"{longest}.jsonl"
        assert main(["score", *common, "--output", name, "--num_samples", "4", *more]) == 0
        lengths = [len(json.loads(line)["token_ids"]) for line in Path(name).read_bytes().splitlines()]
        assert max(lengths) == longest
        assert json.loads(Path(f"{name}.meta.json").read_text())["max_completion_length"] == longest
