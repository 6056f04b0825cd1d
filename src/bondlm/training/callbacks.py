"""Work around an optimizer step: moving the anchor, writing the run folder, stopping the run in good order."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import TrainerCallback

from bondlm.data.columns import LOGGED_IDS
from bondlm.data.fingerprints import data_digest
from bondlm.data.rendering import Rendering
from bondlm.data.stream import PromptStream
from bondlm.engines.together import together
from bondlm.errors import (
    BondError,
    CheckpointError,
    ConfigError,
    NonFiniteError,
)
from bondlm.models.anchor import Anchor
from bondlm.models.average import WeightAverage
from bondlm.models.deepspeed import step_was_skipped, zero_stage
from bondlm.models.learned_quantile import QuantileModel
from bondlm.models.sharding import local
from bondlm.runs.checkpoint import (
    ANCHOR_FILE,
    AVERAGE_FILE,
    DATA_FILE,
    MEANS_FILE,
    QUANTILE_FILE,
    load_tensors,
    prompts_per_step,
    refuse_other_data,
    require_space,
    save_tensors,
    streamed_to,
    writing_to,
)
from bondlm.runs.folder import DROPPED_FILE, METRICS_FILE, SAMPLES_FILE, SKIPPED_FILE, drop_after
from bondlm.runs.manifest import remove_older, seal
from bondlm.training.clock import Clock, StepMeans
from bondlm.training.logs import append, append_by_each, first_failure, unwritable
from bondlm.training.processes import World, require_same_weights
from bondlm.training.prompting import note_rendering
from bondlm.training.rollout import Rollout
from bondlm.training.stopping import StopCallback


class HasState(Protocol):
    """An object with numbers that a checkpoint stores as JSON."""

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint."""


class AnchorCallback(TrainerCallback):
    """Moves anchor and averaged weights after every step; checkpoints store these and all other states."""

    def __init__(
        self,
        anchor: Anchor,
        quantile_model: QuantileModel | None,
        clock: Clock,
        means: StepMeans,
        run_folder: "RunFolderCallback",
        average: WeightAverage,
        states: Mapping[str, HasState],
    ) -> None:
        """`means` takes the metrics of a step, `run_folder` the prompts of a skipped step.

        `states` maps file names to the objects whose state they store.
        """
        self._states = states
        self._anchor, self._quantile_model, self._clock, self._average = anchor, quantile_model, clock, average
        self._means, self._record, self._run_folder = means, means.record, run_folder
        self._restore: Path | None = None
        self._keep: int | None = None
        self._data: dict[str, Any] = {}
        self._stream: PromptStream | None = None
        self.skipped = False
        self._skips_in_a_row = 0

    def restore_from(self, checkpoint: str | None) -> None:
        """Continue from this checkpoint's anchor when training begins; with None the anchor is not changed."""
        self._restore = None if checkpoint is None else Path(checkpoint)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Load our part of the checkpoint, after Trainer has loaded the policy; check that there is room for more."""
        # How often the run logs, saves and evaluates: a checkpoint restores the values of the run that wrote it.
        state.compute_steps(args, state.max_steps)
        # Trainer would remove the oldest checkpoint before the newest is sealed, so we do it afterwards.
        self._keep, args.save_total_limit = args.save_total_limit or self._keep, None
        if (loader := kwargs.get("train_dataloader")) is not None:
            self._stream = loader.dataset if isinstance(loader.dataset, PromptStream) else None
            self._data = prompts_per_step(args) | {"streamed": self._stream is not None}
            self._data |= data_digest(loader.dataset) if self._stream is None else {}
        with together(World.of(args)), writing_to(Path(args.output_dir)):
            if args.should_save:
                require_space(Path(args.output_dir), **self.space(args, self._keep))
        if self._restore is not None:
            self.compare_data(self._restore)
            load_tensors(self._restore / ANCHOR_FILE, self._anchor.load_state_dict)
            if self._average.fraction:
                load_tensors(self._restore / AVERAGE_FILE, self._average.load_state_dict)
            if self._quantile_model is not None:
                load_tensors(self._restore / QUANTILE_FILE, self._quantile_model.load_tensors)
            means = json.loads((self._restore / MEANS_FILE).read_text(encoding="utf-8"))
            self._means.load_state(means, World.of(args))
            for name, part in self._states.items():
                if (path := self._restore / name).is_file():  # a changed objective may need what the old one lacked
                    part.load_state(json.loads(path.read_text(encoding="utf-8")))
            self._restore = None

    def space(self, args: Any, keep: int | None) -> dict[str, Any]:
        """What `require_space` takes for a run with these settings that keeps the newest `keep` checkpoints."""
        number = 0 if args.save_strategy == "no" else (keep or 1) + 1  # a new one is written before the oldest goes
        how = {"by_deepspeed": zero_stage(args) > 0, "averaged": bool(args.average_weights)}
        return {"anchor_bytes": self._anchor.num_bytes, "num_checkpoints": number, **how}

    def compare_data(self, checkpoint: Path) -> None:
        """Compare the prompts with a checkpoint's record; for a stream, once it has been read again up to there.

        Raises:
            DataError: the prompts differ.
            ConfigError: their tokens, their order or their number per step differ.
            CheckpointError: the checkpoint has no record.
        """
        if not self._data:
            return
        path = checkpoint / DATA_FILE
        before = streamed_to(path)
        if (before is None) != (self._stream is None):
            raise ConfigError(
                f"streaming: {path.parent.name} was saved with {'a whole' if before is None else 'a streamed'} "
                "train_dataset, whose prompts come in another order. Read it as before"
            )
        if before is None or self._stream is None:
            refuse_other_data(path, self._data)
            return
        refuse_other_data(path, before | self._data)  # the number of prompts per step, before any is read
        self._stream.check_at(before["rows"], lambda digest: refuse_other_data(path, self._data | dict(digest)))

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Start timing the optimizer; remove a gradient that is not finite."""
        self._clock.start("optimizer")
        # DeepSpeed has already stepped, within `backward`, unless it found the same.
        self.skipped = step_was_skipped(optimizer) if zero_stage(args) else not _finite_on_all_ranks(model, args)
        self._record({"skipped_steps": float(self.skipped)})
        if not self.skipped:
            self._skips_in_a_row = 0
            return
        scaler = getattr(optimizer, "scaler", None)
        is_empty = self._run_folder.is_left_with_nothing(args)  # a mean over no prompts
        if not is_empty and _finds_its_scale(scaler) and not self._run_folder.has_bad_loss(args):
            return  # the scaler does not step either
        self._skips_in_a_row += 1
        if scaler is None:
            for parameter in model.parameters():
                parameter.grad = None  # an optimizer does not change a parameter without gradient
        if not is_empty:
            self._run_folder.write_skipped(args, state, control)
        if self._skips_in_a_row <= args.max_skipped_steps:
            return
        step, steps = state.global_step + 1, self._skips_in_a_row
        error = _nothing_left(step, steps, args) if is_empty else _no_finite_gradient(step, steps, args)
        error.known_to_all = True
        if not self._run_folder.stop.is_paused:  # what was learned before is saved first
            self._run_folder.stop.pause(error, args, state, control)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Eq. 18: the anchor moves right after the policy has; a copy that is due is also made after a skipped step."""
        self._clock.stop()
        step = state.global_step + 1
        if self.skipped and not self._anchor.is_copied_at(step):
            return
        with self._clock("anchor"):
            metrics = self._anchor.update(step)
            if not self.skipped:
                self._average.update(step)
        self._record(metrics)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Record the step's times: every second of it belongs to one phase."""
        self._clock.stop()
        phases = self._clock.drain()
        self._record(
            {f"time/{phase}": seconds for phase, seconds in phases.items()} | {"step_time": sum(phases.values())}
        )

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Complete the checkpoint that Trainer has just written."""
        world = World.of(args)
        world.barrier()  # every rank has written its part
        require_same_weights(kwargs["model"], self._anchor.weights, world, step=state.global_step)
        anchor = self._anchor.state_dict(is_main=args.should_save)  # gathered from all ranks if sharded
        average = self._average.state_dict(is_main=args.should_save)
        means = world.gather_objects([self._means.state()])
        with together(world), writing_to(Path(args.output_dir)):
            if args.should_save:
                folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
                save_tensors(anchor, folder / ANCHOR_FILE)
                if self._average.fraction:  # empty if every step so far was skipped
                    save_tensors(average, folder / AVERAGE_FILE)
                if self._quantile_model is not None:
                    save_tensors(self._quantile_model.tensors(), folder / QUANTILE_FILE)
                data = self._data
                if self._stream is not None:
                    data = data | self._stream.digest_at(state.global_step * data["prompts_per_step"])
                (folder / DATA_FILE).write_text(json.dumps(data), encoding="utf-8")
                (folder / MEANS_FILE).write_text(json.dumps(means), encoding="utf-8")
                for name, part in self._states.items():
                    (folder / name).write_text(json.dumps(part.state()), encoding="utf-8")
                seal(folder)
                if self._keep is not None:
                    remove_older(
                        folder.parent, keep=self._keep, best=state.best_model_checkpoint, step=state.global_step
                    )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Remove checkpoints that a run killed at its end could not remove; restore the setting."""
        if args.should_save and self._keep is not None:
            remove_older(
                Path(args.output_dir), keep=self._keep, best=state.best_model_checkpoint, step=state.global_step
            )
        args.save_total_limit, self._keep = self._keep, None


class RunFolderCallback(TrainerCallback):
    """Writes metrics.jsonl and samples.jsonl as the run goes."""

    def __init__(self, folder: Path, rendering: Rendering, stop: StopCallback) -> None:
        """`folder` is the run's output_dir, `rendering` what becomes of its prompts; `stop` ends what cannot log."""
        self._folder, self._rendering, self.stop = folder, rendering, stop
        self.rollout: Rollout | None = None  # of the step that is under way
        self._num_logged = 0
        self._bad: dict[int, float] = {}  # non-finite losses of this process's prompts, by place
        self._failure: str | None = None  # what could not be written; after that nothing more is written
        self.write_settings: Callable[[], None] = lambda: None

    def note_step(self, rollout: Rollout, num_logged: int) -> None:
        """Keep a step's samples; those of its first prompts are written if the step is logged and drew them itself."""
        self.rollout, self._bad = rollout, {}
        self._num_logged = 0 if LOGGED_IDS in rollout.rows[0] else num_logged

    def note_losses(self, row_P: Tensor, loss_P: Tensor) -> Tensor:
        """Note the prompts whose loss is not finite; returns which losses are finite, (P,) bool."""
        is_finite_P = torch.isfinite(loss_P)
        if not is_finite_P.all():
            losses = zip(row_P.tolist(), loss_P.tolist(), strict=True)
            self._bad |= {row: loss for row, loss in losses if not math.isfinite(loss)}
        return is_finite_P

    def has_bad_loss(self, args: Any) -> bool:
        """Whether the step's loss is not finite on any process; all processes must call this."""
        return World.of(args).any(bool(self._bad))

    def is_left_with_nothing(self, args: Any) -> bool:
        """Whether no prompt of the step counts on any process; all processes must call this."""
        counts = self.rollout is not None and bool(self.rollout.is_counted_P.any())
        return not World.of(args).any(counts)

    def write_skipped(self, args: Any, state: Any, control: Any) -> None:
        """Write the prompts whose loss is not finite; if only the gradient is not finite, all prompts of the step.

        Every process must call this, and writes its own prompts.
        """
        by_loss, step = self.has_bad_loss(args), state.global_step + 1
        which = sorted(self._bad) if by_loss else range(0 if self.rollout is None else len(self.rollout.rows))
        samples = [self._sampled(i) | ({"loss": str(self._bad[i])} if by_loss else {}) for i in which]
        row = {"step": step, "not_finite": "loss" if by_loss else "gradient", "samples": samples}
        failure = append_by_each(self._folder / SKIPPED_FILE, [row] if samples else [], World.of(args))
        if failure is not None and not self.stop.is_paused:
            self.stop.pause(unwritable(failure, step, state.max_steps), args, state, control)

    def samples(self) -> list[dict[str, Any]]:
        """The first prompts of the last step (as many as are logged) with their completions and rewards."""
        count = 0 if self.rollout is None else min(self._num_logged, len(self.rollout.rows))
        return [self._sampled(i) for i in range(count)]

    def _sampled(self, place: int) -> dict[str, Any]:
        """One prompt of the step with its completions and rewards."""
        assert self.rollout is not None  # noqa: S101  only called for its prompts
        samples, num_policy = self.rollout.samples, self.rollout.plan.policy
        rewards = samples.rewards_PM[place].tolist()
        scored: list[dict[str, Any]] = [
            {"text": t, "reward": r} for t, r in zip(samples.texts[place], rewards, strict=True)
        ]
        for j, sample in enumerate(scored if samples.extras else ()):
            sample["extra"] = {name: values[place][j] for name, values in samples.extras.items()}
        prompt = self.rollout.rows[place]["prompt"]
        return {"prompt": prompt, "policy": scored[:num_policy], "anchor": scored[num_policy:]}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Remove log rows beyond the step that the run starts from, and store the current rendering."""
        self._failure = None
        with together(World.of(args)), writing_to(self._folder):
            if state.is_world_process_zero:
                self._folder.mkdir(parents=True, exist_ok=True)
                for name in (METRICS_FILE, SAMPLES_FILE, DROPPED_FILE, SKIPPED_FILE):
                    drop_after(self._folder / name, state.global_step)
                note_rendering(self._folder, self._rendering)  # after `AnchorCallback` has compared the prompts
                self.write_settings()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """One object per logged step."""
        is_empty = self.stop.is_finished and "train_runtime" in (logs or {})  # of a call that took no step
        if state.is_world_process_zero and logs and self._failure is None and not is_empty:
            files = {METRICS_FILE: [{"step": state.global_step, **logs}]}
            if "loss" in logs:
                files[SAMPLES_FILE] = [{"step": state.global_step, **row} for row in self.samples()]
            for name, rows in files.items():
                self._failure = self._failure or append(self._folder / name, rows)
        if "loss" in (logs or {}):  # another row may belong to a single process
            self._pause_if_unwritten(args, state, control)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End a run whose evaluation could not be logged."""
        self._pause_if_unwritten(args, state, control)

    def _pause_if_unwritten(self, args: Any, state: Any, control: Any) -> None:
        """Pause the run after saving what was learned; every process must call this."""
        self._failure = first_failure(self._failure, World.of(args))
        if self._failure is not None and not self.stop.is_paused:
            self.stop.pause(unwritable(self._failure, state.global_step, state.max_steps), args, state, control)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Log the last steps too; raise an error if the folder is gone, since nobody would find a new one."""
        if logs_at(state.global_step, args, state):
            control.should_log = True
        if World.of(args).any(state.is_world_process_zero and not self._folder.is_dir()):
            raise CheckpointError(
                f"output_dir={str(self._folder)!r} is gone since step {state.global_step - 1}: restore it, then the "
                "same command continues from its last checkpoint"
            )

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Log the epoch's last step before it is evaluated, and one at which a callback ends the run."""
        if self.stop.is_ended_by_callback(state, control) and args.logging_strategy != "no":
            control.should_log = True  # Trainer does not log a step twice
        if control.should_evaluate and not control.should_training_stop:
            control.should_log = control.should_log or logs_at(state.global_step, args, state, ends_epoch=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check that the last row, the run's summary, was written."""
        self._pause_if_unwritten(args, state, control)
        self._failure = None


def logs_at(step: int, args: Any, state: Any, *, ends_epoch: bool = False) -> bool:
    """Whether a step is logged: as often as asked for, and where the run ends or an evaluation may end it."""
    if step == 1 and args.logging_first_step:
        return True
    if args.logging_strategy == "no":
        return False
    # Steps come from the state, in which shares of the run are numbers of steps.
    is_due = ends_epoch if args.logging_strategy == "epoch" else step % state.logging_steps == 0
    return bool(is_due or step >= state.max_steps or _may_end(step, args, state, ends_epoch=ends_epoch))


def _may_end(step: int, args: Any, state: Any, *, ends_epoch: bool) -> bool:
    """Whether an evaluation follows that may end the run by a goal or by an EarlyStoppingCallback."""
    if args.target_n is None and args.kl_budget is None and args.metric_for_best_model is None:
        return False
    if args.eval_strategy == "epoch":
        return ends_epoch
    return bool(args.eval_strategy == "steps" and step % state.eval_steps == 0)


def _no_finite_gradient(step: int, steps: int, args: Any) -> BondError:
    """That steps moved nothing, and what usually helps."""
    return NonFiniteError(
        f"step {step}: the gradient is not finite, {steps} steps in a row "
        f"(max_skipped_steps={args.max_skipped_steps}). Neither policy nor anchor has moved; the prompts are "
        f"in {SKIPPED_FILE}. A smaller learning_rate or fp32 weights usually help."
    )


def _nothing_left(step: int, steps: int, args: Any) -> BondError:
    """Why steps had no prompt to learn from, and what to set."""
    why, todo = "their rewards failed", "fix the rewards, or lower max_skipped_frac to see the first failure"
    if args.missing_eos == "drop":
        why = (
            "missing_eos='drop' leaves out prompts with a completion that does not end within max_completion_length="
            f"{args.max_completion_length}"
        )
        todo = "raise max_completion_length, or use missing_eos='worst' or 'keep'"
    return ConfigError(
        f"step {step}: no prompt was left to learn from, {steps} steps in a row (max_skipped_steps="
        f"{args.max_skipped_steps}): {why} ({DROPPED_FILE}). Neither policy nor anchor has moved; {todo}"
    )


def _finds_its_scale(scaler: Any) -> bool:
    """Whether a loss scaler (fp16) can still halve its scale: it finds the largest scale by overflowing gradients.

    From its initial value, 65,536, that takes at most sixteen steps; a gradient that is not finite at scale 1 is not
    its overflow.
    """
    return scaler is not None and scaler.is_enabled() and scaler.get_scale() > 1.0


def _finite_on_all_ranks(model: Any, args: Any) -> bool:
    # With a sharded gradient, each rank checks its part.
    grads = [g for p in model.parameters() if p.grad is not None and (g := local(p.grad)).numel()]
    norms = torch._foreach_norm(grads) if grads else ()
    return not World.of(args).any(not all(torch.isfinite(norm) for norm in norms))
