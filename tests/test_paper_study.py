"""The study's harness on tiny models: it resumes, measures all runs against the same samples, and judges by rule."""

import dataclasses
import itertools
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import prompt_rows, tiny_t5, tiny_tokenizer
from transformers import TrainerCallback

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks" / "paper"))

import dial  # noqa: E402
import directions  # noqa: E402
import frontier  # noqa: E402
import frontier_map  # noqa: E402
import frontier_results  # noqa: E402
import frontier_run  # noqa: E402
import frontier_speed  # noqa: E402
import plans  # noqa: E402
import run as study  # noqa: E402
import sharpened  # noqa: E402
import tasks  # noqa: E402
import verdicts  # noqa: E402
import verifiable  # noqa: E402
import write_up  # noqa: E402

from bondlm import BONDConfig, BONDTrainer  # noqa: E402
from bondlm.data.prompt_encoder import PromptEncoder  # noqa: E402
from bondlm.runs.folder import plain  # noqa: E402
from bondlm.training import dropped  # noqa: E402

REWARD = """
def letters(prompts, completions, **columns):
    return [text.count("e") + 0.01 * len(text) for text in completions]

def short(prompts, completions, **columns):
    return [-float(len(text)) for text in completions]
"""
BUDGET = [
    "--results",
    "none.jsonl",
    "--steps",
    "2",
    "--completions",
    "6",
    "--prompts",
    "3",
    "--samples",
    "2",
    "--reference-samples",
    "4",
]


@pytest.fixture
def tiny_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The summarization task with a tiny T5, in a scratch folder."""
    monkeypatch.chdir(tmp_path)
    tokenizer = tiny_tokenizer(chat=False)
    tiny_t5(tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [row | {"reference": "the sky"} for row in prompt_rows(12)]
    for name, part in (("train", rows[:8]), ("heldout", rows[8:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    (tmp_path / "reward.py").write_text(REWARD)
    task = dataclasses.replace(
        tasks.SUMMARIZATION,
        model="model",
        reward_funcs=["reward.py:letters"],
        judges=["reward.py:short"],
        train="train.jsonl",
        held_out="heldout.jsonl",
        settings={"max_completion_length": 5, "learning_rate": 1e-3, "warmup_steps": 0, "use_cpu": True},
    )
    for name in ("summarization", "hackable"):
        monkeypatch.setitem(tasks.TASKS, name, task)
    return tmp_path


def test_an_experiment_runs_resumes_and_is_reported(tiny_study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["x1", *BUDGET, "--seeds", "0", "--points", "2", "--only", "n4-beta0.5", "n4-beta0.0"]
    study.main(command)
    folder = tiny_study / "runs/paper/x1/n4-beta0.5-s0"
    curve = [json.loads(line) for line in (folder / "curve.jsonl").read_bytes().splitlines()]
    assert [row["step"] for row in curve] == [1, 2]
    assert 0 < curve[0]["tokens"] < curve[1]["tokens"]
    assert set(curve[0]["judges"]) == {"short", "rouge_l"}
    assert curve[1]["against_best_of"][1]["forward_kl"]["value"] > 0
    references = list((tiny_study / "runs/paper/reference").iterdir())
    assert len(references) == 1  # both runs were measured against one draw
    before = (folder / "done.json").stat().st_mtime_ns
    (tiny_study / "runs/paper/x1/n4-beta0.0-s0/done.json").unlink()  # as if it had been cut
    study.main(command)
    assert (folder / "done.json").stat().st_mtime_ns == before
    assert capsys.readouterr().out.count("s0: done") == 1
    results = tiny_study / "results" / "here"
    write_up.main(["--results", str(results), "--page", str(tiny_study / "results.md")])
    page = (tiny_study / "results.md").read_text()
    assert "| n4-beta0.5 | 1 |" in page
    assert "Not run yet: `python benchmarks/paper/run.py x9`" in page
    assert "(1 of 3 seeds)" in (results.parent / "claims.md").read_text()
    assert (results / "x1.png").stat().st_size > 10_000
    assert len((results / "runs.jsonl").read_text().splitlines()) == 4
    shutil.rmtree(folder)  # as on another machine: what is in the results stays done
    study.main([*command, "--results", str(results / "runs.jsonl")])
    assert not folder.exists()
    assert capsys.readouterr().out.count("s0: done") == 2
    write_up.main(["--results", str(results), "--page", str(tiny_study / "results.md")])
    assert "| n4-beta0.5 | 1 |" in (tiny_study / "results.md").read_text()
    assert len((results / "runs.jsonl").read_text().splitlines()) == 4


def test_a_run_of_two_experiments_is_made_once(tiny_study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    budget = [*BUDGET, "--seeds", "0", "--points", "1", "--only"]
    study.main(["x2", *budget, "fixed-n8"])
    study.main(["x1", *budget, "n8-beta0.5"])  # the same settings, but x2 has not measured both KLs
    assert "the same run" not in capsys.readouterr().out
    study.main(["x3", *budget, "monte-carlo"])
    assert "monte-carlo-s0: the same run as runs/paper/x1/n8-beta0.5-s0" in capsys.readouterr().out
    done = json.loads((tiny_study / "runs/paper/x3/monte-carlo-s0/done.json").read_text())
    assert (done["run"], done["seed"]) == ("monte-carlo", 0)


def test_the_reference_at_lower_temperatures_is_a_rival(tiny_study: Path) -> None:
    file = tiny_study / "sharpened.json"
    sharpened.main(["summarization", *BUDGET, "--file", str(file)])
    points = json.loads(file.read_text())["summarization"]["points"]
    assert [each["temperature"] for each in points] == [0.9, 0.8, 0.7, 0.6, 0.5]
    assert points[0]["kl"] < points[-1]["kl"]  # the further from T = 1, the more it costs
    assert all(0 <= each["win_rate"] <= 1 for each in points)


def test_a_change_of_weights_is_taken_apart(tiny_study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    signal = 9.0 * torch.outer(torch.ones(40), torch.linspace(1, 2, 30))
    noise = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    assert (directions.leading(signal + noise) - signal).norm() < 0.5 * noise.norm()
    kept = directions.largest({"a": torch.tensor([1.0, -4.0]), "b": torch.tensor([3.0, -2.0])}, 0.5)
    assert (kept["a"].tolist(), kept["b"].tolist()) == ([0.0, -4.0], [3.0, 0.0])
    directions.main([*BUDGET, "--seed", "0"])
    lines = [line for line in capsys.readouterr().out.splitlines() if "win rate" in line]
    assert len(lines) == 8
    assert float(lines[0].rsplit(maxsplit=1)[1]) != float(lines[2].rsplit(maxsplit=1)[1])  # less change, another KL


def test_a_run_may_stop_by_its_own_evaluation(tiny_study: Path) -> None:
    study.main(["over", *BUDGET, "--seeds", "1", "--points", "2", "--only", "kl-budget1"])
    done = json.loads((tiny_study / "runs/paper/over/kl-budget1-s1/done.json").read_text())
    assert 1 <= done["steps"] <= 6


def test_a_run_is_measured_at_the_weights_that_it_saves(tiny_study: Path) -> None:
    """With a fixed point and a constant learning rate these are averaged weights; the last step's were measured."""
    settings = {"objective": "self_bond", "n": 2, "num_samples": 3, "lr_scheduler_type": "constant"}
    own = plans.Run(name="own", settings=settings | {"learning_rate": 0.02})
    task, args = tasks.TASKS["summarization"], study.arguments(["x1", *BUDGET, "--steps", "3"])
    config = study.config_of(task, own, 0, tiny_study / "run", args)
    trainer, bench = study.prepare(task, config, None, args)
    assert trainer.args.average_weights > 0
    found = []

    class Measure(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            found.append(bench.measure(4, both_kls=True))

    trainer.add_callback(Measure())
    trainer.train()
    assert len(found) == 3
    assert plain(found[-1]) == plain(bench.measure(4, both_kls=True))


def test_every_run_of_every_experiment_is_a_valid_config(tmp_path: Path) -> None:
    args = study.arguments(["x1"])
    for name, experiment, run in plans.runs(list(plans.EXPERIMENTS)):
        task = tasks.TASKS[experiment.task]
        config = study.config_of(task, run, 0, tmp_path, args)
        drawn = config["per_device_train_batch_size"] * study.plan_total(run.settings)
        assert 0.7 * task.completions <= drawn <= 1.4 * task.completions, (name, run.name)
    names = [(name, run.name) for name, _, run in plans.runs(list(plans.EXPERIMENTS))]
    assert len(set(names)) == len(names)


def test_every_run_of_the_queue_for_a_gpu_is_a_valid_config(tmp_path: Path) -> None:
    objectives = set()
    for name in frontier_map.RUNS:
        args = BONDConfig(**frontier_run.settings_of(frontier.arguments([]), name, 0, tmp_path))
        drawn = args.per_device_train_batch_size * study.plan_total(frontier_map.RUNS[name].settings)
        assert 0.9 * frontier_map.COMPLETIONS <= drawn <= frontier_map.COMPLETIONS, name
        objectives.add((args.objective, args.gamma_ref > 0))
    assert {("grpo", False), ("jbond", False), ("jbond", True), ("bond", False), ("self_bond", False)} <= objectives


def test_missing_files_are_named_with_the_commands_that_make_them(
    tiny_study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        study.main(["x5"])
    assert "models/films-reward" in str(caught.value)
    assert "bondlm reward-model --config examples/dialogue/reward_model.yaml" in str(caught.value)


def table(first: list[float], second: list[float]) -> verdicts.Table:
    return {"a": {i: {"kl": x} for i, x in enumerate(first)}, "b": {i: {"kl": x} for i, x in enumerate(second)}}


@pytest.mark.parametrize(
    ("first", "second", "tolerance", "word"),
    [
        ([2.0, 2.1, 2.2], [1.0, 1.2, 1.1], None, "holds"),
        ([1.0, 1.2, 1.1], [2.0, 2.1, 2.2], None, "does not hold"),
        ([1.0, 3.0, 2.0], [2.0, 1.0, 3.0], None, "not decided"),
        ([2.0, 2.1], [1.0, 1.2], None, "not tested here"),
        ([], [1.0], None, "not tested here"),
        ([1.0, 1.1, 1.2], [1.01, 1.09, 1.2], 0.05, "holds"),
        ([1.0, 1.1, 1.2], [2.0, 2.1, 2.2], 0.05, "does not hold"),
    ],
)
def test_a_verdict_needs_three_seeds_and_an_interval_on_one_side(
    first: list[float], second: list[float], tolerance: float | None, word: str
) -> None:
    assert verdicts.compare(table(first, second), "a", "b", "kl", "claim", tolerance=tolerance).word == word


def test_the_t_interval_is_that_of_scipy_tables() -> None:
    middle, low, high = verdicts.interval([1.0, 2.0, 3.0])
    assert (middle, high - middle, middle - low) == pytest.approx((2.0, 4.303 / 3**0.5, 4.303 / 3**0.5))


def test_the_cost_of_a_win_rate_is_read_between_measurements() -> None:
    points: list[dict[str, Any]] = [{"win_rate": 0.7, "kl": 1.0}, {"win_rate": 0.9, "kl": 3.0}]
    assert write_up.at_win_rate(points, 0.8, "kl") == pytest.approx(2.0)
    assert write_up.at_win_rate(points, 0.6, "kl") == pytest.approx(0.5)
    assert write_up.at_win_rate(points, 0.95, "kl") is None


@pytest.mark.parametrize("k", [1, 2, 4])
def test_pass_at_k_is_the_share_of_draws_with_a_right_answer(k: int) -> None:
    rewards_PM = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]], dtype=torch.float64)
    drawn = [max(some) for row in rewards_PM.tolist() for some in itertools.combinations(row, k)]
    assert verifiable.pass_at(rewards_PM, k) == pytest.approx(sum(drawn) / len(drawn))


def test_the_queue_on_a_gpu_encodes_prompts_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It puts its own in the place of what the trainer calls, whose arguments it must take."""
    for owner, name in ((PromptEncoder, "encoded"), (dropped, "load_prompts")):
        monkeypatch.setattr(owner, name, getattr(owner, name))  # to be put back
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None  # as T5's
    folder = tmp_path / "models" / "flan-t5-small-title"
    tiny_t5(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for part in ("train", "sft"):
        rows = "".join(json.dumps(row) + "\n" for row in prompt_rows(4))
        (tmp_path / f"{part}.jsonl").write_text(rows)
    frontier_speed.encode_once(SimpleNamespace(models=tmp_path / "models", data=tmp_path, length=4))
    args = BONDConfig(output_dir=str(tmp_path / "run"), max_steps=1, per_device_train_batch_size=2, use_cpu=True)
    given = {"train_dataset": str(tmp_path / "prompts.jsonl"), "eval_dataset": prompt_rows(3)}
    made = BONDTrainer(
        tiny_t5(tokenizer), lambda completions: [0.0] * len(completions), args, processing_class=tokenizer, **given
    )
    assert len(made.train_dataset) == 8
    assert len(made.eval_dataset) == 3


def test_a_run_of_another_size_is_not_done(tmp_path: Path) -> None:
    """A small run in the results file made the queue on a GPU skip the large one of the same name."""
    file = tmp_path / "results.jsonl"

    def asked(*more: str) -> Any:
        return frontier.arguments(["rloo-0.3", "--results", str(file), *more])

    small = asked("--steps", "4", "--completions", "12")
    row = {"run": "rloo-0.3", "seed": 0, "step": 4, "is_last": True}
    frontier_results.append(small, row | frontier_results.size_of(small))
    assert frontier.done_runs(small) == {("rloo-0.3", 0)}
    for other in (("--held-out", "9"), ("--length", "5"), ("--sft-steps", "1"), ("--steps", "5")):
        assert not frontier.done_runs(asked("--steps", "4", "--completions", "12", *other))
    assert not frontier.done_runs(asked())
    assert {("own-n16", 0), ("rloo-0.45-fall", 0)} <= frontier.done_runs(frontier.arguments([]))  # rows without a size
    assert not frontier.done_runs(frontier.arguments(["--steps", "120"]))


def test_a_line_of_the_results_that_was_cut_costs_its_run_alone(tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    args = frontier.arguments(["--results", str(file)])
    for seed in (0, 1):
        frontier_results.append(args, {"run": "rloo-0.3", "seed": seed, "is_last": True})
    file.write_bytes(file.read_bytes()[:-9])
    assert frontier.done_runs(args) == {("rloo-0.3", 0)}
    frontier_results.append(args, {"run": "rloo-0.3", "seed": 2, "is_last": True})
    assert frontier.done_runs(args) == {("rloo-0.3", 0), ("rloo-0.3", 2)}


def test_the_table_of_the_dial_passes_over_ratios_that_are_not_there() -> None:
    rows: list[dict[str, Any]] = [{"kl_ratio": 2.0}, {"kl_ratio": None}]
    assert [dial.mean_of(rows, "kl_ratio"), dial.mean_of(rows[1:], "kl_ratio")] == ["2.000 (1 of 2)", "-"]
    assert dial.mean_of([{"kl": 1.0}, {"kl": 2.0}], "kl") == "1.500"
