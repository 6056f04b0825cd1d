"""A run made in Python: its folder is guarded as the command line guards it, and it evaluates and reports in a line."""

import json
from pathlib import Path

import pytest
import yaml
from tiny import prompt_rows

from bondlm.cli.eval import complete
from bondlm.cli.train import _weights_held
from bondlm.errors import CheckpointError, ConfigError
from bondlm.runs.folder import locked
from trainer.helpers import lora, trainer


def test_evaluate_prints_the_table_and_report_writes_the_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = trainer(tmp_path, eval_dataset=prompt_rows(12)[8:], max_steps=1, peft_config=lora(), beta=0.25)
    made.train()
    capsys.readouterr()
    logs = made.evaluate()
    out = capsys.readouterr().out
    assert "step 1: held-out prompts" in out
    assert f"{logs['eval_reward']:.3f} " in out
    other = made.evaluate(prompt_rows(16)[12:], metric_key_prefix="eval_other")
    assert set(other) == {name.replace("eval_", "eval_other_", 1) for name in logs}
    assert "held-out prompts of other" in capsys.readouterr().out
    page = made.report()
    assert page == tmp_path / "report.html"
    result = json.loads((tmp_path / "eval.json").read_text())
    assert result["effective_n"]["text"] in page.read_text()
    assert (result["steps"], result["planned_steps"]) == (1, 1)
    assert (result["reward_weights"], result["reward_aggregation"]) == ([1.0], "sum")
    assert "beta 0.25" in (tmp_path / "README.md").read_text()
    assert "One sample of the trained model" in capsys.readouterr().out


def test_a_report_of_the_best_model_says_its_step(tmp_path: Path) -> None:
    best = {
        "load_best_model_at_end": True,
        "metric_for_best_model": "kl",
        "eval_strategy": "steps",
        "eval_steps": 1,
    }
    made = trainer(
        tmp_path,
        eval_dataset=prompt_rows(12)[8:],
        save_strategy="steps",
        save_steps=1,
        learning_rate=0.05,
        max_steps=3,
        **best,
    )
    made.train()
    kls = [row["eval_kl"] for row in made.state.log_history if "eval_kl" in row]
    assert made.evaluate()["eval_kl"] == pytest.approx(min(kls), rel=1e-4)
    made.report()
    step = kls.index(min(kls)) + 1
    assert step < 3
    result = json.loads((tmp_path / "eval.json").read_text())
    assert (result["steps"], result["last_step"]) == (step, 3)
    card = (tmp_path / "README.md").read_text()
    assert f"- weights: those of step {step}, the best by `kl`" in card
    assert "- training: 3 steps, at most 5 tokens" in card
    assert "weights: of the best checkpoint by kl (load_best_model_at_end)" in _weights_held(made.args)


def test_a_report_needs_held_out_prompts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="eval_dataset"):
        trainer(tmp_path).report()


def test_a_used_folder_is_refused_unless_its_run_is_continued(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    trainer(tmp_path, **saving | {"max_steps": 2}).train()
    with pytest.raises(CheckpointError, match="already holds a run, up to checkpoint-2"):
        trainer(tmp_path, **saving).train()
    trainer(tmp_path, **saving | {"max_steps": 3}).train(resume_from_checkpoint=True)
    with locked(tmp_path):  # reentrant: a command holds the folder of its own trainer
        trainer(tmp_path, **saving | {"max_steps": 4}).train(resume_from_checkpoint=True)
    assert not (tmp_path / ".lock").exists()


def test_config_yaml_holds_what_was_given_and_is_enough_for_an_evaluation(tmp_path: Path) -> None:
    run = tmp_path / "run"
    made = trainer(run, beta=0.25, max_steps=1, hub_token="hf_secret")
    made.train()
    made.save_model()
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["beta"] == 0.25
    assert {"eta", "max_completion_length", "learning_rate"} <= set(config)
    assert {"gamma", "hub_token", "reward_funcs", "ddp_timeout"}.isdisjoint(config)
    given = {"model": str(run), "reference": "m", "dataset": "d.jsonl", "reward_funcs": "a:b"}
    assert complete(given)[0]["max_completion_length"] == 5
    trainer(run, beta=0.125, max_steps=1).train()  # nothing is saved to go on from: a new run
    assert yaml.safe_load((run / "config.yaml").read_text())["beta"] == 0.125
