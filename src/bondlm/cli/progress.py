"""Progress of a run: a bar with ETA on a terminal, and one plain line per logged step everywhere."""

import time
from collections.abc import Mapping, Sized
from typing import Any

from rich.console import Console
from transformers import TrainerCallback

from bondlm.cli.console import Counter, elapsed_and_eta, make_progress, say
from bondlm.evaluation.table import print_evaluation

LINE = (
    ("reward", "reward", "{:.3f}"),
    ("anchor", "anchor/reward", "{:.3f}"),
    ("kl", "kl", "{:.2f}"),
    ("penalty", "bond/penalty_rate", "{:.2f}"),
    ("clipped", "completions/clipped_ratio", "{:.2f}"),
    ("s/step", "step_time", "{:.1f}"),
)


class ProgressReporter(TrainerCallback):
    """Shows training steps, and any other counted work through `counting`."""

    def __init__(self, console: Console, trainer: Any) -> None:
        """Listen to `trainer`."""
        self.console = console
        self._trainer = trainer
        self._progress = make_progress(console)
        self._training: Any = None
        self._began, self.first_step = time.monotonic(), 0
        self._evaluation: Counter | None = None
        self.reference_drawn = False
        self.phases: dict[str, float] = {}
        self.tokens: dict[str, float] = {}
        self.evaluation_seconds = 0.0
        self.training_seconds = 0.0
        self._logged_steps = 0
        trainer.add_callback(self)

    def __enter__(self) -> "ProgressReporter":
        """Show the bars."""
        self._progress.start()
        return self

    def __exit__(self, *details: object) -> None:
        """Remove the bars."""
        self._progress.stop()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the bar, at the step that a resumed run starts from."""
        self._training = self._progress.add_task("train", total=state.max_steps, completed=state.global_step)
        self._began, self.first_step = time.monotonic(), state.global_step
        if control.should_training_stop:  # `StopCallback` has found the run to be finished
            return
        world = f", {args.world_size} processes" if args.world_size > 1 else ""
        prompts = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        if isinstance(rows := self._trainer.train_dataset, Sized):  # a stream has no length
            prompts = min(prompts, len(rows))
        self.console.print(
            f"training from step {state.global_step} to {state.max_steps}: {prompts} prompts per step{world}"
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Advance the bar."""
        self._progress.update(self._training, completed=state.global_step)
        if control.should_evaluate and (held_out := self._trainer.eval_dataset) is not None:
            # The reference does not change, so its samples are drawn once.
            prompts = sum(map(len, held_out.values())) if isinstance(held_out, dict) else len(held_out)
            total = prompts if self.reference_drawn else 2 * prompts
            self._evaluation = Counter(self._progress, "held-out samples", total)
            self._trainer.engine.on_prompts_done = self._evaluation

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        """Remove the evaluation's bar; with several data sets, after the last one."""
        sets = self._trainer.eval_dataset
        if isinstance(sets, dict) and f"eval_{list(sets)[-1]}_runtime" not in (metrics or {}):
            return
        self.reference_drawn = True
        if self._evaluation is not None:
            self._trainer.engine.on_prompts_done = None
            self._evaluation.close()
            self._evaluation = None

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Print one line, and update the sums for the phase table."""
        logs = logs or {}
        if "loss" in logs:
            parts = [f"{label} {shape.format(logs[name])}" for label, name, shape in LINE if name in logs]
            if not self.console.is_terminal:  # the bar shows it on a terminal
                steps, all_steps = state.global_step - self.first_step, state.max_steps - self.first_step
                parts.append(elapsed_and_eta(time.monotonic() - self._began, steps, all_steps))
            say(self.console, f"step {state.global_step}/{state.max_steps}  " + "  ".join(parts))
            self._sum(logs)
        for prefix in [name.removesuffix("_effective_n") for name in logs if name.endswith("_effective_n")][-1:]:
            self.evaluation_seconds += logs.get(f"{prefix}_runtime", 0.0)
            print_evaluation(self.console, state.global_step, logs, args.eval_num_reference_samples, prefix)

    def _sum(self, logs: Mapping[str, float]) -> None:
        self._logged_steps += 1
        for name, value in logs.items():
            if name.startswith("time/"):
                self.phases[name[5:]] = self.phases.get(name[5:], 0.0) + value
            elif name.startswith("num_tokens"):
                self.tokens[name] = self.tokens.get(name, 0.0) + value

    def mean_phases(self) -> tuple[dict[str, float], dict[str, float]]:
        """Mean seconds per step by phase, and completion tokens sampled, compared and learned from."""
        steps = max(self._logged_steps, 1)
        phases = {name: seconds / steps for name, seconds in self.phases.items()}
        return phases, {name: count / steps for name, count in self.tokens.items()}

    def close_training(self) -> None:
        """Remove the training bar."""
        self.training_seconds = time.monotonic() - self._began
        self._progress.remove_task(self._training)

    def counting(self, description: str, total: int) -> Counter:
        """A bar for `total` prompts; call the result with the number done."""
        return Counter(self._progress, description, total)
