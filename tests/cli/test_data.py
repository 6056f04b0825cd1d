"""The data of a command: several eval sets of one run, files of other kinds."""

import gzip
import json
from pathlib import Path

import pytest

from bondlm.cli import main
from bondlm.cli.eval import complete
from cli.helpers import write_job
from cli.test_train import rows


def test_a_run_with_several_eval_sets_has_a_result_of_each(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bondlm.cli.train.write_page", lambda folder, console: None)
    settings = {"max_steps": 1, "save_steps": 1, "eval_steps": 1, "eval_strategy": "steps", "main_eval": "b"}
    config = write_job(tmp_path, max_completion_length=4, **settings)
    packed = tmp_path / "a.jsonl.gz"
    packed.write_bytes(gzip.compress(b'{"prompt": [{"role": "user", "content": "What is rain?"}]}\n' * 3))
    sets = {"a": str(packed), "b": str(tmp_path / "held*.jsonl")}
    assert main(["train", "--config", str(config), "--eval_dataset", json.dumps(sets)]) == 0
    run = tmp_path / "run"
    result, other = (json.loads((run / name).read_text()) for name in ("eval.json", "eval-a/eval.json"))
    assert [(each["held_out"], each["num_prompts"]) for each in (result, other)] == [("b", 6), ("a", 3)]
    assert [each["dataset"] for each in (result, other)] == [sets["b"], sets["a"]]
    assert f"held out: b `{sets['b']}`" in (run / "README.md").read_text()
    assert not (run / "eval-a" / "README.md").exists()
    logged = [row for row in rows(run / "metrics.jsonl") if "eval_effective_n" in row]
    assert [row["step"] for row in logged] == [1]
    out = capsys.readouterr().out
    assert out.count("step 1: held-out prompts of a") == out.count("step 1: held-out prompts of b") == 1
    asked, _ = complete({"model": str(run), "reward_funcs": "x"})
    assert asked["dataset"] == sets["b"]
    assert main(["check", "--config", str(config), "--main_eval", "c", "--eval_dataset", json.dumps(sets)]) == 2
    assert "main_eval='c'" in capsys.readouterr().err
