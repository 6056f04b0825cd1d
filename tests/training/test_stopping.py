"""A run stops at the effective N that was asked for, by the lower end of its interval, and past the KL that
was allowed, by its estimate."""

import json
import logging
import signal
from types import SimpleNamespace

import pytest
import torch
from tiny import prompt_rows
from trainer.helpers import logged, same, trainer, weights
from transformers import EarlyStoppingCallback, TrainerCallback, TrainerControl

from bondlm.errors import ConfigError, EngineError
from bondlm.runs.ending import Ending, read_ending, step_of_weights
from bondlm.training.stopping import StopCallback


def stops(callback, metrics, folder):
    args = SimpleNamespace(
        output_dir=str(folder),
        world_size=1,
        process_index=0,
        device=torch.device("cpu"),
        ddp_timeout=1,
        save_strategy="steps",
        metric_for_best_model=None,
    )
    control = TrainerControl()
    state = SimpleNamespace(global_step=3, max_steps=9, is_world_process_zero=True)
    callback.on_train_begin(args, state, control)
    callback.on_evaluate(args, state, control, metrics=metrics)
    assert control.should_save is control.should_training_stop
    return control.should_training_stop


@pytest.mark.parametrize(
    ("target_n", "kl_budget", "n_low", "kl", "expected"),
    [
        (4.0, None, 3.9, 99.0, False),
        (4.0, None, 4.0, 0.0, True),
        (None, 2.0, 99.0, 2.0, False),
        (None, 2.0, 1.0, 2.1, True),
        (4.0, 2.0, 1.0, 1.0, False),
        (4.0, 2.0, 5.0, 1.0, True),
        (4.0, 2.0, 1.0, 3.0, True),
        (None, None, 99.0, 99.0, False),
    ],
)
def test_a_goal_is_reached_for_certain_and_a_budget_is_not_overspent(
    target_n, kl_budget, n_low, kl, expected, tmp_path
):
    others = {"eval_effective_n_high": 99.0, "eval_effective_n": 99.0, "eval_kl_high": 99.0, "eval_kl_low": 0.0}
    metrics = others | {"eval_effective_n_low": n_low, "eval_kl": kl}
    assert stops(StopCallback(target_n, kl_budget), metrics, tmp_path) is expected


def test_nothing_stops_without_numbers(tmp_path):
    assert not stops(StopCallback(4.0), {"eval_effective_n_low": 3.0}, tmp_path)
    assert not stops(StopCallback(4.0, 1.0), None, tmp_path)


GOAL = {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 6, "logging_steps": 100, "save_strategy": "steps"}


def test_a_stop_by_a_goal_is_said_kept_and_not_passed_over_by_the_same_command(tmp_path, caplog):
    settings = GOAL | {"save_steps": 100, "kl_budget": 1e-9, "eval_dataset": prompt_rows(12)[8:]}
    with caplog.at_level(logging.WARNING):
        trainer(tmp_path, **settings).train()
    step = read_ending(tmp_path).step
    assert step in (2, 4)
    assert read_ending(tmp_path) == Ending(
        step=step, max_steps=6, reason=read_ending(tmp_path).reason, target_n=None, kl_budget=1e-9
    )
    assert f"at step {step} the KL" in read_ending(tmp_path).reason
    assert "kl_budget=1e-09" in caplog.text
    assert [row["step"] for row in logged(tmp_path) if "loss" in row] == list(range(2, step + 1, 2))

    caplog.clear()
    again = trainer(tmp_path, **settings)
    with caplog.at_level(logging.WARNING):
        again.train(resume_from_checkpoint=True)
    assert again.state.global_step == step
    assert f"is finished: {step} of 6 steps (at step {step} the KL" in caplog.text
    assert read_ending(tmp_path).reason is not None

    more = trainer(tmp_path, **settings | {"kl_budget": 1e9})
    more.train(resume_from_checkpoint=True)
    assert more.state.global_step == 6
    assert read_ending(tmp_path) == Ending(step=6, max_steps=6, kl_budget=1e9)


@pytest.mark.parametrize("interrupted", [True, False])
def test_only_an_interrupted_run_has_weights_of_an_unknown_step(interrupted, tmp_path):
    """Early stopping ends a run in good order."""

    class Stops(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2 and interrupted:
                made.stop.signal = signal.SIGTERM
            control.should_training_stop = state.global_step == 2

    made = trainer(tmp_path, max_steps=6, callbacks=[Stops()])
    made.train()
    assert read_ending(tmp_path).is_interrupted is interrupted
    assert step_of_weights(tmp_path, 2) == (None if interrupted else 2)


@pytest.mark.parametrize(
    ("settings", "saved"),
    [
        ({"save_strategy": "steps", "save_steps": 2}, [2, 3]),
        ({"save_strategy": "steps", "save_steps": 3}, [3]),
        ({"save_strategy": "no"}, []),
    ],
)
def test_a_run_that_a_callback_ends_is_logged_and_saved(settings, saved, tmp_path):
    class Stops(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    trainer(tmp_path, max_steps=6, logging_steps=2, callbacks=[Stops()], **settings).train()
    assert [row["step"] for row in logged(tmp_path) if "loss" in row] == [2, 3]
    assert sorted(int(path.name.partition("-")[2]) for path in tmp_path.glob("checkpoint-*")) == saved


@pytest.mark.parametrize("event", ["on_step_begin", "on_substep_end"])
def test_a_wish_to_stop_inside_a_step_waits_for_its_end(event, tmp_path):
    """Trainer leaves inside it, and the step that was not taken was counted twice after the resume."""
    how = {"gradient_accumulation_steps": 2, "objective": "self_bond", "n": 2, "num_samples": 4, "logging_steps": 1}
    how |= {"adaptive_strength": True, "save_strategy": "steps", "save_steps": 100, "max_steps": 4, "eta": 0.02}

    def stop(args, state, control, **kwargs):
        control.should_training_stop = control.should_training_stop or state.global_step == 2

    callback = TrainerCallback()
    setattr(callback, event, stop)
    made = trainer(tmp_path / "stopped", callbacks=[callback], **how)
    made.train()
    assert made.state.global_step == 3
    assert (tmp_path / "stopped" / "checkpoint-3").is_dir()
    resumed = trainer(tmp_path / "stopped", **how)
    resumed.train(resume_from_checkpoint=True)
    whole = trainer(tmp_path / "whole", **how)
    whole.train()
    assert same(weights(resumed.roles.core), weights(whole.roles.core))
    assert (resumed.signal_factor.state(), resumed.drops.state()) == (whole.signal_factor.state(), whole.drops.state())


def test_a_checkpoint_holds_what_a_callback_has_written_into_it(tmp_path):
    """The manifest was written before callbacks that are added later had their turn."""

    class Writes(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            folder = tmp_path / f"checkpoint-{state.global_step}"
            (folder / "state_of_mine.json").write_text("{}")
            (folder / "generation_config.json").write_text('{"do_sample": true}')

    how = {"save_strategy": "steps", "save_steps": 1}
    made = trainer(tmp_path, **how)
    made.add_callback(Writes())
    made.train()
    longer = trainer(tmp_path, max_steps=3, **how)
    longer.train(resume_from_checkpoint=True)
    assert longer.state.global_step == 3


@pytest.mark.parametrize("strategy", [{"eval_strategy": "steps", "eval_steps": 1}, {"eval_strategy": "epoch"}])
def test_a_signal_does_not_wait_for_an_evaluation(strategy, tmp_path):
    class Signals(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            made.stop.signal = signal.SIGTERM

    trained = {"per_device_train_batch_size": 8, "eval_dataset": prompt_rows(12)[8:]} | strategy
    made = trainer(tmp_path, callbacks=[Signals()], **trained)
    made.train()
    assert not any("eval_reward" in row for row in logged(tmp_path))
    assert (tmp_path / "checkpoint-1").is_dir()


def test_a_run_that_a_callback_ends_at_an_epochs_evaluation_is_saved(tmp_path):
    class Stops(TrainerCallback):
        def on_evaluate(self, args, state, control, **kwargs):
            control.should_training_stop = True

    how = {"eval_dataset": prompt_rows(12)[8:], "eval_strategy": "epoch", "save_strategy": "steps", "save_steps": 100}
    made = trainer(tmp_path, rows=8, max_steps=6, callbacks=[Stops()], **how)
    made.train()
    assert made.state.global_step < 6
    assert (tmp_path / f"checkpoint-{made.state.global_step}").is_dir()


class Counts(TrainerCallback):
    """The steps of saves, and a signal at one step."""

    def __init__(self, signal_at=0):
        self.saves, self.signal_at, self.made = [], signal_at, None

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.signal_at:
            self.made.stop.signal = signal.SIGTERM

    def on_save(self, args, state, control, **kwargs):
        self.saves.append(state.global_step)


EPOCHS = {"rows": 8, "per_device_train_batch_size": 2, "save_strategy": "epoch"}  # four steps an epoch


def test_a_checkpoint_is_written_once(tmp_path):
    """At the end of the epoch that a signal, a goal or max_steps cut short it was written again, over the first."""
    counts = Counts(signal_at=3)
    counts.made = trainer(tmp_path / "signal", max_steps=8, callbacks=[counts], **EPOCHS)
    counts.made.train()
    assert counts.saves == [3]
    goal = {"eval_dataset": prompt_rows(10)[8:], "eval_strategy": "steps", "eval_steps": 2, "kl_budget": 1e-9}
    counts = Counts()
    trainer(tmp_path / "goal", max_steps=8, learning_rate=0.1, callbacks=[counts], **EPOCHS | goal).train()
    assert counts.saves == [2]


def test_a_finished_run_that_is_started_again_writes_and_measures_nothing(tmp_path):
    asked = []

    def reward(completions):
        asked.append(len(completions))
        return [float(len(text)) for text in completions]

    how = EPOCHS | {"max_steps": 3, "eval_dataset": prompt_rows(10)[8:], "eval_strategy": "epoch"}
    trainer(tmp_path, reward=reward, **how).train()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "checkpoint-3").iterdir()}
    rows, num_asked, counts = logged(tmp_path), len(asked), Counts()
    trainer(tmp_path, reward=reward, callbacks=[counts], **how).train(resume_from_checkpoint=True)
    assert (counts.saves, len(asked), logged(tmp_path)) == ([], num_asked, rows)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "checkpoint-3").iterdir()} == before


@pytest.mark.parametrize("signal_at", [3, 4])
def test_a_resume_logs_an_epoch_as_if_it_had_never_stopped(signal_at, tmp_path):
    """The row of an epoch that a signal cut short held its first steps, and the next row held them again."""
    how = EPOCHS | {"max_steps": 8, "logging_strategy": "epoch", "logging_first_step": False}
    whole = trainer(tmp_path / "whole", **how)
    whole.train()
    counts = Counts(signal_at=signal_at)
    counts.made = trainer(tmp_path / "stopped", callbacks=[counts], **how)
    counts.made.train()
    trainer(tmp_path / "stopped", **how).train(resume_from_checkpoint=True)
    rows = [[(r["step"], r["loss"]) for r in logged(tmp_path / name) if "loss" in r] for name in ("whole", "stopped")]
    assert rows[0] == rows[1]
    assert [step for step, _ in rows[0]] == [4, 8]


def test_a_checkpoint_of_an_epochs_last_step_knows_the_epochs_evaluation(tmp_path):
    """It was saved before, and a schedule that looks at the evaluation forgot it at the resume."""
    how = EPOCHS | {"max_steps": 12, "save_strategy": "steps", "save_steps": 4, "eval_strategy": "epoch"}
    how |= {"eval_dataset": prompt_rows(10)[8:], "metric_for_best_model": "kl", "learning_rate": 0.05}
    how |= {"lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": {"patience": 0, "factor": 0.5}}

    class Dies(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 10:
                raise KeyboardInterrupt

    whole = trainer(tmp_path / "whole", **how)
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path / "killed", callbacks=[Dies()], **how).train()
    resumed = trainer(tmp_path / "killed", **how)
    resumed.train(resume_from_checkpoint=True)
    rates = [[r["learning_rate"] for r in logged(tmp_path / n) if "learning_rate" in r] for n in ("whole", "killed")]
    assert rates[0] == rates[1]
    assert len(set(rates[0])) > 1  # the schedule has looked at it
    assert same(weights(resumed.roles.core), weights(whole.roles.core))


def test_a_save_that_ends_a_run_inside_an_epoch_knows_the_evaluation_that_follows(tmp_path):
    """A limit of time, for example: the best evaluation is of the step that it saves."""

    class Limits(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_save = control.should_training_stop = state.global_step == 6

        def on_evaluate(self, args, state, control, metrics, **kwargs):
            metrics["eval_reward"] = float(state.global_step)

    best = {"eval_strategy": "epoch", "load_best_model_at_end": True, "metric_for_best_model": "reward"}
    counts = Counts()
    how = EPOCHS | best | {"max_steps": 8, "eval_dataset": prompt_rows(10)[8:], "callbacks": [Limits(), counts]}
    made = trainer(tmp_path, **how)
    made.train()
    assert counts.saves == [4, 6]
    assert made.state.best_model_checkpoint.endswith("checkpoint-6")


def test_a_callback_that_cuts_an_epoch_short_is_refused(tmp_path):
    """A resume counts whole epochs, and learned from the same prompts again."""

    class Cuts(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_epoch_stop = state.global_step == 2

    with pytest.raises(ConfigError, match="step 2: a callback has set should_epoch_stop"):
        trainer(tmp_path / "saved", max_steps=6, callbacks=[Cuts()], **EPOCHS).train()
    assert (tmp_path / "saved" / "checkpoint-2").is_dir()
    kept = trainer(tmp_path / "unsaved", max_steps=6, callbacks=[Cuts()], **EPOCHS | {"save_strategy": "no"})
    kept.train()
    assert kept.state.global_step == 6


def test_a_finished_run_says_so_and_takes_no_step(tmp_path, caplog):
    trainer(tmp_path, save_strategy="steps", save_steps=2).train()
    again = trainer(tmp_path, save_strategy="steps", save_steps=2)
    with caplog.at_level(logging.WARNING):
        again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 2
    assert "is finished: 2 of 2 steps. Nothing is trained" in caplog.text
    assert json.loads((tmp_path / "ending.json").read_text())["reason"] is None


def test_an_evaluation_after_a_run_stops_nothing(tmp_path, caplog):
    made = trainer(tmp_path, eval_dataset=prompt_rows(12)[8:], **GOAL | {"max_steps": 1, "kl_budget": 1e-9})
    made.train()
    before, had = weights(made.roles.core), read_ending(tmp_path)
    caplog.clear()
    made.evaluate()
    assert "the run stops" not in caplog.text
    assert read_ending(tmp_path) == had
    assert same(weights(made.roles.core), before)


def test_what_ended_one_call_of_train_does_not_end_the_next(tmp_path):
    made = trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
    made.stop._failure = EngineError("the server was down")
    with pytest.raises(EngineError):
        made.train()
    made.train(resume_from_checkpoint=True)
    assert made.state.global_step == 2


@pytest.mark.parametrize("how", ["goal", "early"])
@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_a_run_that_ends_by_an_evaluation_has_logged_its_last_step(how, strategy, tmp_path):
    """Two steps an epoch; the policy hardly moves, so the second evaluation is no better than the first."""
    settings = {"max_steps": 20, "logging_steps": 100, "eval_strategy": strategy, "learning_rate": 1e-12}
    settings |= {"eval_steps": 2} if strategy == "steps" else {}
    if how == "goal":
        settings |= {"kl_budget": 1e-12, "learning_rate": 1e-3}
    else:
        settings |= {"metric_for_best_model": "eval_win_rate", "greater_is_better": True}
        settings["callbacks"] = [EarlyStoppingCallback(early_stopping_patience=1)]
    made = trainer(tmp_path, eval_dataset=prompt_rows(12)[8:], **settings)
    made.train()
    last = made.state.global_step
    assert last in (2, 4)
    rows = [row for row in logged(tmp_path) if "loss" in row]
    assert [row["step"] for row in rows] == list(range(2, last + 1, 2))
    assert rows[-1]["kl"] is not None
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert samples[-1]["step"] == last
