"""`bondlm merge` on two tiny runs: a run folder like any other, its curve, and what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from rewards.judge_stub import by_scalar, judging
from safetensors.torch import load_file, save_file

from bondlm.cli import main
from bondlm.cli.training import fresh_folder
from bondlm.errors import CheckpointError
from cli.helpers import write_job
from cli.test_eval_ranks import RANKS

GOAL = """
def short(prompts, completions, **columns):
    return [-float(len(c[-1]["content"])) for c in completions]
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a job and two runs of it, which no test may change; the second is the first, moved."""
    folder = tmp_path_factory.mktemp("merge")
    config = write_job(folder, max_steps=1, save_steps=1)
    options = yaml.safe_load(config.read_text())
    heldout = options.pop("eval_dataset")
    config.write_text(yaml.safe_dump(options))
    run = folder / "run1"
    assert main(["train", "--config", str(config), "--output_dir", str(run)]) == 0
    with (run / "config.yaml").open("a") as file:
        file.write(f"eval_dataset: {heldout}\n")  # as if it had been evaluated: that would take longer than the run
    path = shutil.copytree(run, folder / "run2") / "adapter_model.safetensors"
    torch.manual_seed(0)
    weights = {name: tensor + 0.05 * torch.randn_like(tensor) for name, tensor in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})
    return folder


def command(folder: Path, out: Path, *more: str) -> list[str]:
    return ["merge", f"{folder}/run1", f"{folder}/run2", "--output_dir", str(out), *more]


def rewards(folder: Path) -> list[str]:
    return ["--reward_funcs", f"{folder}/reward.py:letters", "--num_samples", "2", "--num_reference_samples", "4"]


def test_a_merge_is_a_run_folder_for_eval_sample_and_report(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(command(runs, out, "--toward-reference", "0.25", "--rank", "4")) == 0
    assert "LoRA of rank 4 (exact: 8), relative error" in capsys.readouterr().out
    facts = json.loads((out / "merge.json").read_text())
    assert 0 < facts["rank_error"] < 1
    assert (len(facts["norms"]), facts["method"], facts["toward_reference"]) == (2, "slerp", 0.25)
    assert main(["eval", "--model", str(out), *rewards(runs)]) == 0
    result = json.loads((out / "eval.json").read_text())
    assert result["objective"] == {"name": "slerp of 2 jbond runs", "toward_reference": 0.25, "rank": 4}
    assert result["reference"] == f"{runs}/model"
    assert "slerp of 2 jbond runs" in (out / "README.md").read_text()
    assert main(["sample", "--model", str(out), "--prompt", "Hello", "--max_completion_length", "4"]) == 0
    assert main(["report", str(out)]) == 0
    assert main(command(runs, out)) == 6  # it holds a model already


def test_the_curve_goes_from_the_merge_to_the_reference(runs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(command(runs, out, "--curve", "[0.999, 0]")) == 2  # a reward that only the runs name does not start
    arguments = command(runs, out, "--curve", "[0.999, 0]", *rewards(runs))
    assert main(arguments) == 0  # the same merge goes on
    first, last = json.loads((out / "curve.json").read_text())
    assert (first["toward_reference"], last["toward_reference"]) == (0.0, 0.999)
    assert abs(last["kl"]["value"]) < 1e-2 * abs(first["kl"]["value"])
    assert {"win_rate", "effective_n", "kl_of_best_of_n", "reward"} <= set(first)
    drawn = {path: path.read_bytes() for path in (out / "curve").glob("*.jsonl")}
    assert main(command(runs, out, "--curve", "[0, 0.5]", *rewards(runs))) == 0
    assert {path: path.read_bytes() for path in drawn} == drawn  # what is there is not drawn again
    assert [row["toward_reference"] for row in json.loads((out / "curve.json").read_text())] == [0.0, 0.5]
    # The samples of the merge itself are those that an evaluation of its folder would score.
    shutil.rmtree(out / "curve")
    assert main(["eval", "--model", str(out), *rewards(runs)]) == 0
    evaluated = json.loads((out / "eval.json").read_text())
    assert evaluated["win_rate"]["value"] == pytest.approx(first["win_rate"]["value"])
    assert evaluated["kl"]["value"] == pytest.approx(first["kl"]["value"], abs=1e-4)


def test_the_curve_counts_rewards_that_rank_and_goals_among_the_references_as_eval_does(
    runs: Path, tmp_path: Path
) -> None:
    (tmp_path / "ranks.py").write_text(RANKS + GOAL)
    out, sizes = tmp_path / "out", ["--num_samples", "2", "--num_reference_samples", "4"]
    goals = json.dumps([f"{runs}/reward.py:letters", f"{tmp_path}/ranks.py:short"])
    with judging(by_scalar) as server:
        for reward in ([goals, "--reward_aggregation", "quantile"], [f"rank:{tmp_path}/ranks.py:letters"]):
            more = ["--reward_funcs", *reward, *sizes, "--judge", server.spec()]
            assert main(command(runs, out, "--curve", "[0]", *more)) == 0
            assert main(["eval", "--model", str(out), *more, "--output", str(tmp_path / "evaluated")]) == 0
            (point,) = json.loads((out / "curve.json").read_text())
            evaluated = json.loads((tmp_path / "evaluated" / "eval.json").read_text())
            for name in ("win_rate", "effective_n", "reward", "pairwise"):
                assert point[name] == evaluated[name], name
            assert point["win_rate"]["value"] != 0.5
            shutil.rmtree(out)
            shutil.rmtree(tmp_path / "evaluated")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--toward_reference", "1"], "toward_reference=1"),
        (["--toward_reference", "-0.1"], "toward_reference=-0.1"),
        (["--method", "ties"], "method='ties'"),
        (["--rank", "0"], "rank=0"),
        (["--rank", "9"], "rank=9"),
        (["--num_samples", "4"], "num_samples is set"),
        (["--curve", "[0, 2]"], "toward_reference=2"),
        (["--reference", "no/such/folder"], "no/such/folder"),
    ],
)
def test_options_out_of_their_range(
    runs: Path, tmp_path: Path, more: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(runs, tmp_path / "out", *more)) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_relative_names_of_runs_hold_from_anywhere_and_are_compared_by_what_they_mean(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {"model": "model", "eval_dataset": "heldout.jsonl", "reward_funcs": "reward.py:letters"}
    for run, directory in (("run1", runs), ("run2", tmp_path)):
        shutil.copytree(runs / run, tmp_path / run)
        config = yaml.safe_load((runs / run / "config.yaml").read_text())
        relative = names if directory == runs else {name: f"{runs}/{value}" for name, value in names.items()}
        other = {"train_dataset": "train.jsonl"}  # of two directories, as are its rows
        (tmp_path / run / "config.yaml").write_text(yaml.safe_dump(config | relative | other))
        (tmp_path / run / "env.json").write_text(json.dumps({"directory": str(directory)}))
    shutil.copy(runs / "heldout.jsonl", tmp_path / "train.jsonl")
    monkeypatch.chdir(tmp_path)
    assert main(command(tmp_path, Path("out"))) == 0
    config = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())
    assert {name: config[name] for name in names} == {name: f"{runs}/{value}" for name, value in names.items()}
    assert "train_dataset" not in config
    assert json.loads((tmp_path / "out" / "env.json").read_text())["directory"] == str(tmp_path)


def test_runs_that_do_not_fit(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = f"{tmp_path}/out"
    for words, said in (
        ([], "at least 2"),
        ([f"{runs}/run1"], "at least 2"),
        ([f"{runs}/run1", f"{runs}/run1"], "same weights"),
        ([f"{runs}/run1", f"{runs}/no-run"], "no-run"),
    ):
        assert main(["merge", *words, "--output_dir", out]) == 2
        assert said in capsys.readouterr().err
    assert main(["merge", f"{runs}/run1", f"{runs}/run2"]) == 2
    assert "output_dir is required" in capsys.readouterr().err
    other = shutil.copytree(runs / "run2", tmp_path / "other")
    prompting = json.loads((other / "prompting.json").read_text()) | {"prompt_format": "plain"}
    (other / "prompting.json").write_text(json.dumps(prompting))
    assert main(["merge", f"{runs}/run1", str(other), "--output_dir", out]) == 2
    assert "prompt_format" in capsys.readouterr().err


def test_files_of_the_user_and_an_unfinished_run_are_not_replaced(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine, begun = tmp_path / "mine", tmp_path / "begun"
    for folder, names in ((mine, ["config.yaml"]), (begun, ["config.yaml", "prompting.json"])):
        folder.mkdir()
        for name in names:
            (folder / name).write_text("{}")
    assert main(command(runs, mine)) == 2
    assert f"{mine / 'config.yaml'} would be replaced by the merge" in capsys.readouterr().err
    assert main(command(runs, begun)) == 6
    assert "holds a run that has not saved its model" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match="holds a run"):  # so do sft and reward-model
        fresh_folder({"output_dir": str(begun)}, "")
    assert [path.read_text() for path in tmp_path.glob("*/*")] == ["{}"] * 3
