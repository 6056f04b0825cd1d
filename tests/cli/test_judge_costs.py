"""`bondlm train` with a judge: its cost is said before the run, and right after it; its key is in no file."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rewards.judge_stub import by_scalar, judging

from bondlm.cli import main
from bondlm.cli.judge_costs import _evaluations
from cli.helpers import write_job

KEY = "sk-t3st-0123456789abcdef"


def numbers(text: str, pattern: str) -> list[int]:
    (found,) = re.findall(pattern, " ".join(text.split()))
    return [int(number) for number in found]


@pytest.mark.parametrize(
    ("streaming", "evaluations"), [(False, {"eval_steps": 3}), (True, {"eval_steps": 0.5, "eval_on_start": True})]
)
def test_the_cost_is_said_before_the_run_and_right_after_it(
    streaming: bool, evaluations: dict[str, Any], tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    options: dict[str, Any] = {"max_steps": 3, "per_device_train_batch_size": 6, "learning_rate": 1e-2}
    options |= {"eval_strategy": "steps"} | evaluations
    options |= {"eval_num_samples": 2, "eval_num_reference_samples": 4, "max_completion_length": 8}
    with judging(by_scalar) as server:
        spec = server.spec(rounds=2, key="MY_KEY", cache=tmp_path / "cache")
        config = write_job(tmp_path, **options, reward_funcs=spec, streaming=streaming)
        assert main(["train", "--config", str(config)]) == 0
        shown = capsys.readouterr().out
        calls, spent = len(server.requests), server.spent
    assert {request["headers"]["Authorization"] for request in server.requests} == {f"Bearer {KEY}"}
    assert numbers(shown, r"judge small: (\d+) calls, (\d+) tokens") == [calls, spent]
    expected = numbers(shown, r"judge small: this run needs about (\d+) calls and (\d+) tokens")
    assert expected[0] == pytest.approx(calls, rel=0.05)
    assert expected[1] == pytest.approx(spent, rel=0.05)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.name == "judges.sqlite" for path in files)
    assert not any(KEY.encode() in path.read_bytes() for path in files)


def test_a_prompt_that_the_judge_does_not_rank_is_left_to_the_run(tmp_path: Path, capsys: Any) -> None:
    def ranks_few(answers: dict[str, str]) -> str:
        return by_scalar(answers) if min(answers) < "8" else "Hm."

    with judging(ranks_few) as server:
        config = write_job(tmp_path, reward_funcs=server.spec(), max_steps=1, max_skipped_frac=1.0, eval_dataset=None)
        assert main(["train", "--config", str(config)]) == 0
    assert "this run needs about" in capsys.readouterr().out


def test_a_judge_that_cannot_be_asked_ends_the_run_before_its_first_step(tmp_path: Path, capsys: Any) -> None:
    with judging(by_scalar, model="large") as server:
        spec = server.spec().replace("model=large", "model=small")
        config = write_job(tmp_path, reward_funcs=spec)
        assert main(["train", "--config", str(config)]) == 4
    assert "`small` does not exist" in " ".join(capsys.readouterr().err.split())
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_the_evaluation_that_ends_a_run_asks_judges_pair_by_pair(tmp_path: Path, capsys: Any) -> None:
    with judging(by_scalar) as server:
        config = write_job(tmp_path, judges=server.spec(), max_steps=1, eval_num_reference_samples=4)
        assert main(["train", "--config", str(config)]) == 0
        calls = len(server.requests)
    shown = " ".join(capsys.readouterr().out.split())
    assert "Before the judge small" in shown
    assert f"judge small: {calls} calls" in shown
    result = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert result["pairwise"]["small"]["num_pairs"] == calls / 2
    assert set(result["pairwise"]["small"]["win_rate"]) == {f"reference{n}" for n in ("", ", best of 2", ", best of 4")}
    own = ["eval", "--model", str(tmp_path / "run"), "--reward_funcs", f"{tmp_path}/reward.py:letters"]
    assert main(own) == 2  # a run folder alone sends no prompts to a server
    assert "judge:" in capsys.readouterr().err


@pytest.mark.parametrize(("processes", "prompts"), [(1, 30), (4, 8)])
def test_each_process_counts_its_own_share_of_the_held_out_prompts(processes: int, prompts: int) -> None:
    """All of them were counted for each; and epochs were those of num_train_epochs, also where max_steps wins."""
    args = SimpleNamespace(
        **{"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "world_size": processes},
        **{"eval_strategy": "epoch", "eval_num_samples": 4, "eval_num_reference_samples": 8, "num_train_epochs": 3.0},
        **{"eval_on_start": False, "eval_delay": 0},
    )
    made = SimpleNamespace(args=args, eval_dataset=range(30), train_dataset=range(10 * 2 * processes))
    found = _evaluations(made, 0, 50, is_kept=False)  # five epochs of ten steps
    assert {count for count, _ in found} == {prompts}
    assert sum(size == 12 for _, size in found) == 5 + 1


@pytest.mark.parametrize(
    ("settings", "times"),
    [
        ({}, 10),  # after steps 10, 20, .., 100
        ({"eval_on_start": True}, 11),
        ({"eval_delay": 50}, 6),
        ({"eval_delay": 101}, 0),
        ({"eval_steps": 30}, 4),  # 30, 60, 90 and the last step
        ({"eval_strategy": "epoch"}, 10),
        ({"eval_strategy": "epoch", "eval_delay": 2.5}, 8),
        ({"eval_strategy": "no"}, 0),
    ],
)
def test_evaluations_are_counted_as_the_run_makes_them(settings: dict[str, Any], times: int) -> None:
    args: dict[str, Any] = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "world_size": 1}
    args |= {"eval_strategy": "steps", "eval_on_start": False, "eval_delay": 0, "eval_steps": 10} | settings
    args |= {"eval_num_samples": 4, "eval_num_reference_samples": 8}
    state = SimpleNamespace(eval_steps=args["eval_steps"])
    made = SimpleNamespace(args=SimpleNamespace(**args), state=state, eval_dataset=range(5), train_dataset=range(20))
    for is_kept in (False, True):  # an answer of the last step's evaluation is not paid for again
        found = _evaluations(made, 0, 100, is_kept=is_kept)
        assert sum(size == 12 for _, size in found) == times + 1 - (is_kept and times > 0)


def test_score_says_what_a_judge_has_cost_when_its_budget_is_spent(tmp_path: Path, capsys: Any) -> None:
    with judging(by_scalar) as server:
        write_job(tmp_path)
        arguments = ["score", "--model", f"{tmp_path}/model", "--dataset", f"{tmp_path}/heldout.jsonl"]
        arguments += ["--reward_funcs", server.spec(max_calls=2), "--output", f"{tmp_path}/scored.jsonl"]
        assert main([*arguments, "--num_samples", "2", "--max_completion_length", "8"]) == 4
    assert "judge small: 2 calls" in " ".join(capsys.readouterr().err.split())
