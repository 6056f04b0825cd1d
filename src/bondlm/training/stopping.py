"""Stop a run early or at once, because of a signal, a goal or a fault, and report why."""

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from bondlm.engines.together import together
from bondlm.errors import ConfigError, EngineError, ResourceError, RewardError
from bondlm.runs.checkpoint import writing_to
from bondlm.runs.ending import ENDING_FILE, Ending, best_step, read_ending, write_ending
from bondlm.runs.manifest import fault, seal_changed
from bondlm.training.processes import World, decided_by_main, ends_epoch

_log = logging.getLogger(__name__)

# Faults of a reward, a server or a disk, or lack of memory: the weights are those of the last step, and worth a
# checkpoint.
PAUSING = (RewardError, EngineError, ResourceError, ConfigError)
_STOPS = ("should_training_stop", "should_epoch_stop")


class StopCallback(TrainerCallback):
    """Stops on a signal (after finishing and saving the step), at the target effective N, or when the KL is spent."""

    def __init__(self, target_n: float | None, kl_budget: float | None = None) -> None:
        """Stop when the lower end of an evaluation's effective N reaches `target_n`, or its KL passes `kl_budget`.

        A goal must be reached with certainty; a budget must not wait until it is overspent with certainty.
        """
        self._target_n, self._kl_budget = target_n, kl_budget
        self.signal: int | None = None
        self.save_requested = False
        self._failure: Exception | None = None
        self.stopped = False  # stopped by a signal on all ranks, and saved
        self.finished = False  # all is saved, so a signal need not wait
        self.is_finished = False  # nothing was left to train
        self._reason: str | None = None  # why a goal ended the run
        self._is_training = False
        self._saved: int | None = None  # the step of the last checkpoint

    @contextmanager
    def training(self, trainer: Any) -> Iterator[None]:
        """Mark a run of `train`: after it, errors are no longer kept for later."""
        last = _LastCallback(self)
        trainer.add_callback(last)
        logger = logging.getLogger("transformers.trainer")
        logger.addFilter(self._is_true)
        try:
            yield
        finally:
            self._is_training, self._saved = False, None
            trainer.remove_callback(last)
            logger.removeFilter(self._is_true)

    def _is_true(self, record: logging.LogRecord) -> bool:
        """Trainer says of a pause in an epoch's first step that there were no samples."""
        return not (self.is_paused and "not to be a single sample" in record.getMessage())

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End a run that is resumed at its last step or at its goal, since Trainer would take one more step."""
        self._is_training = True
        folder, world = Path(args.output_dir), World.of(args)
        before = decided_by_main(lambda: read_ending(folder), world, wait_s=args.ddp_timeout)
        self._reason = before.reason if before is not None and self._is_where(before, state.global_step) else None
        self.is_finished = self._reason is not None or state.global_step >= state.max_steps
        if self.is_finished:
            control.should_training_stop = True
            if world.is_main:
                _log.warning("%s", self._nothing_to_train(folder, state))
        elif world.is_main:
            (folder / ENDING_FILE).unlink(missing_ok=True)

    def _is_where(self, before: Ending, step: int) -> bool:
        """Whether the run stopped by a goal at this step, and still has the same goals."""
        goals = (before.target_n, before.kl_budget)
        return before.reason is not None and before.step == step and goals == (self._target_n, self._kl_budget)

    def _nothing_to_train(self, folder: Path, state: Any) -> str:
        why = "" if self._reason is None else f" ({self._reason})"
        more = "max_steps or num_train_epochs" if self._reason is None else "that goal, or remove it,"
        return (
            f"the run in {folder} is finished: {state.global_step} of {state.max_steps} steps{why}. Nothing is "
            f"trained: raise {more} to continue, or choose another output_dir for a new run"
        )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Store how far the run has come, and why it ended."""
        if state.is_world_process_zero:
            ending = Ending(
                step=state.global_step,
                max_steps=state.max_steps,
                reason=self._reason,
                target_n=self._target_n,
                kl_budget=self._kl_budget,
                best_step=best_step(args, state),
                is_interrupted=self.stopped or self.is_paused,
            )
            write_ending(Path(args.output_dir), ending)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After a signal on any rank, save on every rank, and stop if the signal asks for it."""
        stop, save = self.agree(args)
        self.save_requested = False
        if stop or save:
            control.should_save = True
        if stop:
            control.should_training_stop = self.stopped = True
            control.should_evaluate = False  # who sends a signal may not wait for it

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Handle a signal that came during the save, which has done what it asks for."""
        self._saved = state.global_step
        stop, _ = self.agree(args)
        self.save_requested = False
        if stop:
            control.should_training_stop = self.stopped = True

    def agree(self, args: Any) -> tuple[bool, bool]:
        """Whether to stop, and whether to save, if any rank was asked to."""
        wanted = World.of(args).max(torch.tensor([float(self.signal or 0), float(self.save_requested)]))
        stop, save = (int(flag) for flag in wanted.tolist())
        if stop:
            self.signal = stop  # known to all ranks from here on
        return stop > 0, save > 0

    def pause(self, error: Exception, args: Any, state: Any, control: Any) -> None:
        """Save and stop without a further step; `raise_failure` raises `error` when all is saved.

        With several processes, all must raise the same error. Any other error ends the run at its last checkpoint,
        since the other processes cannot know of it.
        """
        is_known = World.of(args).is_alone or getattr(error, "known_to_all", False)
        if not (is_known and self._is_training):
            raise error
        self._failure = error
        control.should_training_stop = True
        self._save_alone(args, state, control)

    @property
    def is_paused(self) -> bool:
        """Whether the run ends because of an error that all processes know."""
        return self._failure is not None

    def unmeasured(self, args: Any) -> dict[str, float]:
        """The metrics of an evaluation that paused the run: none, but for the one that Trainer looks up.

        That is NaN: not a new best value, and a schedule takes no step for it (`skip_unmeasured`).
        """
        metric = args.metric_for_best_model
        return {} if metric is None else {f"eval_{metric.removeprefix('eval_')}": math.nan}

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After the last step: do not evaluate what a pause has cut short, and save what a user's callback has ended.

        An evaluation would run into the fault of the pause again.
        """
        _ask_everywhere(args, control)
        if self.is_paused:
            self._save_alone(args, state, control)
        elif self.stopped:
            control.should_evaluate = False
        elif self.is_finished:
            control.should_evaluate = control.should_log = False
        self.save_ended(args, state, control)

    def save_ended(self, args: Any, state: Any, control: Any) -> None:
        """Save a run that a user's callback ends here; every process must call this."""
        if self.is_ended_by_callback(state, control) and _strategy(args) in ("steps", "epoch"):
            control.should_save = control.should_save or not self.has_checkpoint(args, state)

    def is_ended_by_callback(self, state: Any, control: Any) -> bool:
        """Whether the run ends here because a callback of the user's says so."""
        ours = self.is_paused or self.stopped or self._reason is not None or state.global_step >= state.max_steps
        return bool(control.should_training_stop) and not ours

    def _save_alone(self, args: Any, state: Any, control: Any) -> None:
        control.should_evaluate = False
        control.should_save = state.global_step > 0 and not self.has_checkpoint(args, state)

    def has_checkpoint(self, args: Any, state: Any) -> bool:
        """Whether this step has a checkpoint that verifies; every process must call this."""
        if self._saved == state.global_step:  # by this run: not read again, which may take minutes
            return True
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        return decided_by_main(lambda: fault(folder) is None, World.of(args), wait_s=args.ddp_timeout)

    def raise_failure(self, args: Any, state: Any, save: Callable[[], None]) -> None:
        """Raise the error that paused the run, if any; the next call of `train` is a new attempt.

        A run that was paused after its last save has no checkpoint of its last step, so `save` saves the weights.
        """
        failure, self._failure = self._failure, None
        if failure is None:
            return
        if state.global_step > 0 and not self.has_checkpoint(args, state):
            save()
        raise failure

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        """Compare with `target_n` and `kl_budget`; after the end of training, evaluations decide nothing."""
        if not self._is_training:
            return
        if (missing := _missing_best(args, metrics or {})) is not None:
            self.pause(missing, args, state, control)
            return
        n, kl = ((metrics or {}).get(f"eval_{name}") for name in ("effective_n_low", "kl"))
        reasons = []
        if self._target_n is not None and n is not None and n >= self._target_n:
            reasons.append(f"the lower end of effective N, {n:.2f}, reached target_n={self._target_n:g}")
        if self._kl_budget is not None and kl is not None and kl > self._kl_budget:
            reasons.append(f"the KL, {kl:.3g} nats, passed kl_budget={self._kl_budget:g}")
        if reasons:
            self._reason = f"at step {state.global_step} {' and '.join(reasons)}"
            control.should_training_stop = True
            control.should_save = _strategy(args) != "no"
            if state.is_world_process_zero:
                _log.warning("the run stops: %s", self._reason)


class _LastCallback(TrainerCallback):
    """Runs after the user's callbacks: what one of them requests on one process is done by all, after a whole step."""

    def __init__(self, stop: StopCallback) -> None:
        self._stop = stop
        self._held: set[str] = set()  # wishes made inside a step
        self._ends_epoch = self._saves_later = False

    def _share(self, args: Any, state: Any, control: Any) -> None:
        """Do on all processes what any requested; refuse to cut an epoch short, since a resume counts whole epochs."""
        _ask_everywhere(args, control)
        if control.should_epoch_stop and not control.should_training_stop and _strategy(args) != "no":
            error = ConfigError(
                f"step {state.global_step}: a callback has set should_epoch_stop, but a resumed run would learn from "
                "prompts twice: set should_training_stop, or save_strategy='no'"
            )
            error.known_to_all = True  # type: ignore[attr-defined]
            self._stop.pause(error, args, state, control)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Share the requests of the user's callbacks."""
        self._share(args, state, control)

    on_epoch_begin = on_train_begin

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Hold a wish to stop: Trainer would leave inside the step, whose samples are already counted."""
        for wish in _STOPS:
            if getattr(control, wish) and not self._stop.is_paused:
                self._held.add(wish)
                setattr(control, wish, False)

    on_substep_end = on_step_begin

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Share the requests made in this step or at its end; those of the epoch's end come before its save."""
        for wish in self._held:
            setattr(control, wish, True)
        self._held = set()
        self._share(args, state, control)
        self._ends_epoch = ends_epoch()
        comes_next = self._ends_epoch or control.should_training_stop
        is_early = comes_next and "epoch" in (args.eval_strategy, args.logging_strategy)
        is_early = is_early and _strategy(args) != "best"  # which saves after its evaluation, or not at all
        self._saves_later = control.should_save and is_early
        control.should_save = control.should_save and not is_early

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Share the requests; a complete checkpoint is not written again, since a kill would then destroy it."""
        control.should_save, self._saves_later = control.should_save or self._saves_later, False
        if self._stop.stopped and not self._ends_epoch:
            control.should_log = False  # the epoch's row comes when it is over
        self._share(args, state, control)
        control.should_save = control.should_save and not self._stop.has_checkpoint(args, state)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Share the requests; a checkpoint holds what the callbacks have written into it."""
        world, folder = World.of(args), Path(args.output_dir)
        with together(world), writing_to(folder):
            if args.should_save:
                seal_changed(folder / f"checkpoint-{state.global_step}")
        self._share(args, state, control)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Share the requests, with a row that all processes log."""
        if "loss" in (logs or {}):
            self._share(args, state, control)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Share the requests, and save a run that ends here: at an epoch's end nothing comes after the evaluation."""
        self._share(args, state, control)
        self._stop.save_ended(args, state, control)


def _ask_everywhere(args: Any, control: Any) -> None:
    """Let each process do what a callback asks for on any of them, as otherwise they would wait for each other.

    Every process must call this.
    """
    flags = (*_STOPS, "should_save", "should_evaluate", "should_log")
    asked = World.of(args).max(torch.tensor([float(getattr(control, flag)) for flag in flags]))
    for flag, is_set in zip(flags, asked.tolist(), strict=True):
        setattr(control, flag, bool(is_set))


def _missing_best(args: Any, metrics: Mapping[str, float]) -> ConfigError | None:
    """The error of an evaluation that lacks its `metric_for_best_model`, of a reward that applies to no prompt."""
    best = f"eval_{(args.metric_for_best_model or '').removeprefix('eval_')}"
    start, is_of_reward, _ = best.partition("rewards/")
    if not is_of_reward or best in metrics or f"{start}reward" not in metrics:  # the last is another data set's
        return None
    error = ConfigError(
        f"metric_for_best_model={args.metric_for_best_model!r}: this reward was None for every held-out prompt, so "
        "nothing can be chosen by it: choose another metric, or add prompts to which it applies"
    )
    error.known_to_all = True  # type: ignore[attr-defined]
    return error


def _strategy(args: Any) -> str:
    return str(getattr(args.save_strategy, "value", args.save_strategy))
