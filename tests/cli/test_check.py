"""`bondlm check` on a tiny model."""

import json
import shutil
import time
from types import SimpleNamespace

import pytest
import torch
from rewards.judge_stub import as_presented, by_scalar, judging
from trainer.helpers import trainer

from bondlm.cli import main
from bondlm.cli.check import _check_neighbours, batch_advice
from bondlm.errors import RewardError
from bondlm.runs.checkpoint import require_space
from cli.helpers import write_job


def test_check_takes_a_dry_step_and_changes_nothing(tmp_path, capsys):
    config = write_job(tmp_path)
    assert main(["check", "--config", str(config)]) == 0
    out = capsys.readouterr().out
    assert "check passed" in out
    assert f"torch {torch.__version__.split('+')[0]}" in out
    assert "bond/penalty_rate" in out
    assert not (tmp_path / "run").exists()
    assert main(["check", "--config", str(config), "--reward_funcs", f"{tmp_path}/reward.py:broken"]) == 4


def test_check_counts_steps_as_training_does_and_needs_no_logs_of_the_run(tmp_path, capsys):
    """18 prompts, 4 a step, and the last two are left out."""
    config = write_job(tmp_path, max_steps=-1, num_train_epochs=1, dataloader_drop_last=True, logging_strategy="no")
    path = tmp_path / "train.jsonl"
    path.write_text(path.read_text() + "".join(path.read_text().splitlines(keepends=True)[:2]))
    assert main(["check", "--config", str(config), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_steps"] == 4


@pytest.mark.parametrize(
    ("dtype", "rounds", "breaks"),
    [(torch.bfloat16, 0.04, 0.1), (torch.float16, 2e-3, 0.02), (torch.float32, 1e-4, 2e-3), (None, 1e-4, 2e-3)],
)
def test_a_reward_may_depend_on_its_batch_by_the_rounding_of_its_dtype(tmp_path, dtype, rounds, breaks):
    def beside(completions):
        return [10.0 * (1 + shift * (len(completions) > 1)) for _ in completions]

    if dtype is not None:
        beside.model = SimpleNamespace(dtype=dtype)
    made = trainer(tmp_path, reward=beside)
    shift = rounds
    _check_neighbours(made)
    shift = breaks
    with pytest.raises(RewardError, match=r"'beside' is 10\.0 when scored alone"):
        _check_neighbours(made)


def test_check_sees_what_a_dry_step_does_not(tmp_path, capsys):
    config = write_job(tmp_path, eval_strategy="steps", eval_steps=2, max_steps=4)
    assert main(["check", "--config", str(config), "--eval_dataset", "null"]) == 2
    assert "eval_strategy='steps'" in capsys.readouterr().err
    metric = ["--load_best_model_at_end", "true", "--metric_for_best_model"]
    assert main(["check", "--config", str(config), *metric, "eval_other_reward"]) == 2
    assert "metric_for_best_model='eval_other_reward'" in capsys.readouterr().err
    assert main(["check", "--config", str(config), *metric, "reward", "--warmup_steps", "100"]) == 0
    assert "warning: warmup_steps=100 of a run of 4 steps" in capsys.readouterr().out


def test_check_says_what_n_buys_and_what_the_run_costs(tmp_path, capsys):
    config = write_job(tmp_path, max_steps=7, eval_num_samples=2, eval_num_reference_samples=3)
    assert main(["check", "--config", str(config), "--json"]) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert (found["passed"], found["num_prompts"], found["num_steps"]) == (True, 16, 7)
    assert [row["n"] for row in found["best_of_n"]] == [1, 2, 4, 8]
    assert found["best_of_n"][0]["win_rate"]["value"] == 0.5
    assert found["metrics"]["reward"] > 0
    assert found["disk"]["free_bytes"] > found["disk"]["needed_bytes"] > 0
    out = " ".join(printed.err.split())
    assert "6 prompts, 9 answers each" in out
    assert "7 steps about" in out
    assert "6 x 2 answers; the first one also draws 6 x 3" in out
    assert "GiB" in out


def test_check_asks_for_the_disk_space_that_train_asks_for(tmp_path, capsys, monkeypatch):
    asked = []

    def asking(folder, **space):
        asked.append(space.copy())
        return require_space(folder, **space)

    monkeypatch.setattr("bondlm.training.callbacks.require_space", asking)
    monkeypatch.setattr("bondlm.runs.checkpoint.require_space", asking)
    config = write_job(tmp_path, max_steps=2, save_total_limit=3, average_weights=0.5)
    assert main(["check", "--config", str(config)]) == 0
    size = asked[-1].pop("model_bytes")
    assert main(["train", "--config", str(config)]) == 0
    assert asked[0]["num_checkpoints"] == 0  # the dry step saves nothing
    assert asked[1] == asked[2]
    assert (asked[2]["num_checkpoints"], asked[2]["averaged"]) == (4, True)
    needed = 4 * 5 * asked[2]["anchor_bytes"] + size
    usage = shutil.disk_usage(tmp_path)
    for free, code in ((needed + 5000, 0), (needed - 5000, 7)):  # the logs in the folder vary by some bytes
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: usage._replace(free=free))
        assert main(["check", "--config", str(config), "--output_dir", str(tmp_path / "new")]) == code
    assert "4 checkpoints and the model need about" in capsys.readouterr().err
    assert main(["check", "--config", str(config), "--output_dir", str(tmp_path / "new"), "--save_strategy", "no"]) == 0


def test_it_says_what_the_noise_of_the_gradient_means_for_the_batch(tmp_path, capsys):
    """Measured in the dry step where that accumulates; otherwise it says how to have it measured."""
    config = write_job(tmp_path)
    assert main(["check", "--config", str(config), "--json"]) == 0
    printed = capsys.readouterr()
    assert "noise_scale" not in json.loads(printed.out)
    assert "advice on their number needs gradient_accumulation_steps" in " ".join(printed.err.split())
    assert main(["check", "--config", str(config), "--gradient_accumulation_steps", "2", "--json"]) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert found["metrics"]["noise/trace"] > 0
    assert found["noise_scale"] == found["metrics"].get("noise/scale")
    assert "prompts per step" in " ".join(printed.err.split())


def test_ties_are_warned_of_by_what_the_objective_learns_from(tmp_path, capsys):
    """Rewards of 0 and 1: two of eight samples are always alike, but rarely all of them."""
    config = write_job(tmp_path, report_to="none")
    (tmp_path / "ties.py").write_text(
        "def half(prompts, completions, **columns):\n    return [float(i % 2) for i in range(len(completions))]\n"
        "def flat(prompts, completions, **columns):\n    return [1.0] * len(completions)\n"
    )
    for objective, name, expected in (("jbond", "half", [False]), ("grpo", "half", []), ("grpo", "flat", [True])):
        told = ["--objective", objective, "--reward_funcs", f"{tmp_path}/ties.py:{name}", "--json"]
        assert main(["check", "--config", str(config), *told]) == 0
        texts = json.loads(capsys.readouterr().out)["warnings"]
        assert ["bond/frac_no_signal" in text for text in texts if "% of the p" in text] == expected


def test_a_batch_is_judged_by_the_noise_scale():
    assert "more than a third of the steps" in batch_advice(130.0, 24)
    assert "fewer would do" in batch_advice(5.0, 24)
    assert "a good size" in batch_advice(40.0, 24)
    assert "more would probably help" in batch_advice(None, 24)


def test_it_says_how_often_a_ranking_agrees_with_itself(tmp_path, capsys):
    config = write_job(tmp_path)
    (tmp_path / "ranks.py").write_text(
        "def steady(prompt, completions):\n"
        "    return {'ranking': sorted(range(len(completions)), key=lambda i: completions[i][-1]['content'])}\n"
        "def first(prompt, completions):\n    return {'ranking': list(range(len(completions)))}\n"
        "def half(prompt, completions):\n    return {'ranking': [0]}\n"
    )
    codes = {}
    for name in ("steady", "first", "half"):
        codes[name] = main(["check", "--config", str(config), "--reward_funcs", f"rank:{tmp_path}/ranks.py:{name}"])
        shown = " ".join(capsys.readouterr().out.split())
        assert (f"{name} ranks 100% of the pairs" in shown) == (name == "steady")
        assert ("first goes by the order in which answers are shown" in shown) == (name == "first")
    assert codes == {"steady": 0, "first": 0, "half": 4}


def test_a_judge_that_goes_by_place_is_found_out_whatever_its_rounds(tmp_path, capsys):
    """It shuffles what it shows in a run, so the two orders must be made without."""
    config = write_job(tmp_path)
    for says, share in ((by_scalar, "100%"), (as_presented, "0%")):
        with judging(says) as server:
            assert main(["check", "--config", str(config), "--reward_funcs", server.spec(rounds=2)]) == 0
        shown = " ".join(capsys.readouterr().out.split())
        assert f"small ranks {share} of the pairs of answers alike" in shown
        assert ("warning: small goes by the order in which answers are shown" in shown) == (says is as_presented)


def test_check_does_not_wait_long_for_a_server_that_is_down(tmp_path, capsys, monkeypatch):
    """It waited for reward_outage_s, ten minutes."""
    monkeypatch.setattr("bondlm.cli.check.OUTAGE_S", 0.5)
    begun = time.monotonic()
    config = write_job(tmp_path, max_steps=1, reward_funcs="http://127.0.0.1:9/score", eval_dataset=None)
    assert main(["check", "--config", str(config)]) == 4
    assert time.monotonic() - begun < 60
    assert "has not answered" in capsys.readouterr().err


def test_check_of_a_stream_needs_max_steps_as_the_run_does(tmp_path, capsys):
    config = write_job(tmp_path, max_steps=-1, streaming=True)
    assert main(["check", "--config", str(config)]) == 2
    assert "max_steps=-1: a streamed train_dataset" in capsys.readouterr().err


def test_a_reward_that_wants_a_column_that_is_not_there_is_named_before_any_work(tmp_path, capsys):
    (tmp_path / "needs.py").write_text("def right(completions, answer):\n    return [0.0] * len(completions)\n")
    config = write_job(tmp_path, max_steps=1, reward_funcs=f"{tmp_path}/needs.py:right")
    for command in ("train", "check"):
        assert main([command, "--config", str(config)]) == 2
        assert "reward 'right' has the signature (completions, answer): missing" in capsys.readouterr().err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_check_refuses_the_folder_that_train_refuses_and_leaves_it_as_it_is(tmp_path, capsys):
    config = write_job(tmp_path, max_steps=1, eval_dataset=None, save_steps=1)
    run = tmp_path / "run"

    def both(*arguments):
        """The exit code and the message of `check`, which are those of `train`."""
        before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} if run.is_dir() else {}
        codes, said = [], []
        for command in ("check", "train"):
            codes.append(main([command, "--config", str(config), *arguments]))
            said.append(capsys.readouterr().err)
            assert {path: path.read_bytes() for path in before} == before
        assert codes[0] == codes[1] != 0
        assert said[0].splitlines()[-1] == said[1].splitlines()[-1]
        return said[0]

    run.mkdir()
    (run / "README.md").write_text("mine")
    assert "README.md already exists" in both()
    (run / "README.md").unlink()
    assert main(["train", "--config", str(config)]) == 0
    assert "learning_rate cannot change" in both("--learning_rate", "0.5")
    assert "gamma: None -> 0.5" in both("--gamma", "0.5")
    assert "already holds a run" in both("--resume", "never")
    assert "is not a checkpoint folder" in both("--resume", str(tmp_path / "nowhere"))
    assert "peft_config.r: 4 -> 8" in both("--lora_r", "8", "--allow_config_change")
    assert "prompts per step" in both("--per_device_train_batch_size", "2", "--max_steps", "2")
    data = tmp_path / "train.jsonl"
    kept = data.read_text()
    data.write_text("".join(reversed(kept.splitlines(keepends=True))))
    assert "train_dataset has changed" in both("--max_steps", "2")
    data.write_text(kept)
    capsys.readouterr()
    assert main(["check", "--config", str(config), "--max_steps", "2"]) == 0
    assert f"train continues from {run / 'checkpoint-1'}" in capsys.readouterr().out.replace("\n", "")
    (tmp_path / "file").write_text("")
    assert "cannot be written" in both("--output_dir", str(tmp_path / "file" / "run"))


def test_check_leaves_a_save_that_was_cut_short_to_train(tmp_path, capsys):
    config = write_job(tmp_path, max_steps=1, eval_dataset=None)
    assert main(["train", "--config", str(config), "--save_strategy", "no"]) == 0
    for weights in (tmp_path / "run").glob("*.safetensors"):  # as if killed in its first save
        weights.unlink()
    stale = tmp_path / "run" / "checkpoint-3"
    stale.mkdir()
    assert main(["check", "--config", str(config)]) == 0
    assert stale.is_dir()
    assert main(["train", "--config", str(config)]) == 0
    assert not stale.is_dir()
