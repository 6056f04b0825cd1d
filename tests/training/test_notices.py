"""What a run says at its start and at its first step, where its numbers would look well."""

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny import prompt_rows, tiny_causal
from trainer.helpers import TOKENIZER, config, logged, trainer

from bondlm.config import DEFAULTS
from bondlm.errors import ConfigError
from bondlm.objectives.make import OBJECTIVES, make_objective
from bondlm.objectives.self_bond import SelfBOND
from bondlm.training.callbacks import logs_at
from bondlm.training.notices import OutOfReachCallback, anchor_warning, needs_other_prompts, warmup_warning
from bondlm.training.signal_factor import MAX_FACTOR


def said(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(r.getMessage() for r in caplog.records if r.name.startswith("bondlm"))


def test_a_warmup_that_takes_the_run_is_said(tmp_path: Path) -> None:
    args = config(tmp_path, warmup_steps=100, learning_rate=3e-6)
    text = warmup_warning(args, 24)
    assert text is not None
    assert "warmup_steps=100 of a run of 24 steps: it ends at 24% of learning_rate=3e-06" in text
    assert "a tenth of the run (2)" in text
    assert "warmup_steps=100" in (warmup_warning(args, 200) or "")
    assert warmup_warning(args, 201) is None
    assert warmup_warning(args, 150, begun=100) is None  # a resumed run has it behind itself
    assert warmup_warning(config(tmp_path, warmup_steps=0), 1) is None
    assert warmup_warning(config(tmp_path, warmup_steps=0.6, lr_scheduler_type="linear"), 50) is not None
    assert warmup_warning(config(tmp_path, lr_scheduler_type="constant"), 24) is None


def test_an_anchor_that_is_never_copied_is_said(tmp_path: Path) -> None:
    args = config(tmp_path, anchor="periodic", anchor_update_every=50)
    assert "anchor_update_every=50 of a run of 40 steps: the anchor never moves" in (anchor_warning(args, 40) or "")
    assert anchor_warning(args, 50) is not None  # a copy after the last step
    assert anchor_warning(args, 51) is None
    assert anchor_warning(config(tmp_path, eta=0.1), 40) is None


def test_a_run_says_that_its_anchor_is_never_copied(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = trainer(tmp_path, max_steps=1, anchor="periodic", anchor_update_every=1)
    made.train()
    assert "anchor_update_every=1 of a run of 1 steps" in said(caplog)


def test_who_takes_the_baseline_from_other_prompts() -> None:
    found = {name for name in OBJECTIVES if needs_other_prompts(make_objective(name, DEFAULTS))}
    assert found == {"jbond", "bond", "reinforce", "vbon"}


@pytest.mark.parametrize(
    ("batch", "objective", "is_said"), [(1, "jbond", True), (1, "rloo", False), (2, "jbond", False)]
)
def test_one_prompt_a_step_is_said(tmp_path: Path, caplog: Any, batch: int, objective: str, is_said: bool) -> None:
    made = trainer(tmp_path, max_steps=1, per_device_train_batch_size=batch, objective=objective)
    with caplog.at_level(logging.WARNING):
        made.train()
    assert ("per_device_train_batch_size=1" in said(caplog)) is is_said


def constant(completions: list[Any]) -> list[float]:
    return [-float(len(c)) for c in completions]  # of conversations: one message each


def test_a_constant_reward_is_said_at_the_first_step_alone(tmp_path: Path, caplog: Any) -> None:
    rows = prompt_rows(8, chat=True)
    made = trainer(tmp_path, reward=constant, max_steps=2, train_dataset=rows)
    with caplog.at_level(logging.WARNING):
        made.train()
    assert said(caplog).count("the same for all 3 completions of 4 of 4 prompts (-1 for the first)") == 1
    assert 'completion[0]["content"]' in said(caplog)


def test_a_good_reward_and_its_settings_are_not_spoken_of(tmp_path: Path, caplog: Any) -> None:
    with caplog.at_level(logging.WARNING):
        trainer(tmp_path, max_steps=1).train()
    assert said(caplog) == ""


@pytest.mark.parametrize(
    "settings", [{"max_steps": 5}, {"max_steps": 12}, {"logging_strategy": "epoch", "max_steps": 3}]
)
def test_the_last_steps_are_logged_with_their_kl(tmp_path: Path, settings: dict[str, Any]) -> None:
    trainer(tmp_path, rows=32, per_device_train_batch_size=2, **{"logging_steps": 10} | settings).train()
    rows = [row for row in logged(tmp_path) if "loss" in row]
    assert [row["step"] for row in rows] == sorted({10, settings["max_steps"]} & set(range(settings["max_steps"] + 1)))
    assert all({"reward", "kl", "num_tokens"} <= set(row) for row in rows)


def test_a_step_that_may_end_the_run_is_logged() -> None:
    goals: dict[str, Any] = {"target_n": None, "kl_budget": None, "metric_for_best_model": None}
    args = SimpleNamespace(logging_first_step=False, logging_strategy="steps", eval_strategy="steps", **goals)
    state = SimpleNamespace(logging_steps=10, eval_steps=4, max_steps=18)
    assert [step for step in range(1, 19) if logs_at(step, args, state)] == [10, 18]
    args.kl_budget = 1.0
    assert [step for step in range(1, 19) if logs_at(step, args, state)] == [4, 8, 10, 12, 16, 18]
    args.logging_first_step = True
    assert logs_at(1, args, state)
    args.logging_strategy = "no"
    assert [step for step in range(1, 19) if logs_at(step, args, state)] == [1]


def test_a_resumed_run_logs_as_often_as_it_is_told_now(tmp_path: Path) -> None:
    trainer(tmp_path, save_strategy="steps", save_steps=2, max_steps=2).train()
    again = trainer(tmp_path, save_strategy="steps", save_steps=100, max_steps=6, logging_steps=3)
    again.train(resume_from_checkpoint=True)
    assert [row["step"] for row in logged(tmp_path) if "loss" in row] == [1, 2, 3, 6]
    assert not (tmp_path / "checkpoint-4").exists()


def test_steps_without_a_prompt_name_their_cause(tmp_path: Path) -> None:
    made = trainer(tmp_path, tiny_causal(TOKENIZER), max_steps=5, max_completion_length=1, missing_eos="drop")
    with pytest.raises(ConfigError, match=r"step 3: no prompt .*3 steps in a row.*missing_eos='drop'"):
        made.train()
    assert not (tmp_path / "skipped.jsonl").exists()  # nothing was not finite


def test_an_n_that_is_out_of_reach_is_said_once_and_not_at_once(caplog: pytest.LogCaptureFixture) -> None:
    """After fifty steps in a row at the largest factor."""
    callback = OutOfReachCallback(SelfBOND(n=8, adaptive_strength=True))
    state = SimpleNamespace(global_step=0, is_world_process_zero=True)
    callback.on_train_begin(None, state, None)
    with caplog.at_level(logging.WARNING):
        for step, factor in ((60, 3.9), (100, MAX_FACTOR), (110, 3.99), (150, MAX_FACTOR)):
            state.global_step = step
            callback.on_log(None, state, None, logs={"bond/signal_factor": factor, "bond/effective_n": 2.5})
        assert said(caplog) == ""
        for state.global_step in (160, 170):
            callback.on_log(None, state, None, logs={"bond/signal_factor": MAX_FACTOR, "bond/effective_n": 2.5})
    assert said(caplog).count("adaptive_strength") == 1
    assert "n=8" in said(caplog)
    assert "for 50 steps; the measured N is 2.5" in said(caplog)
