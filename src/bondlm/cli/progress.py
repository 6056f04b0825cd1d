"""What a person sees while a run goes: a bar with ETA on a terminal, one plain line a logged step everywhere."""

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback

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
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self._training: Any = None
        self.phases: dict[str, float] = {}
        self.tokens: dict[str, float] = {}
        self.evaluation_seconds = 0.0
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
        world = f", {args.world_size} processes" if args.world_size > 1 else ""
        prompts = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        self.console.print(
            f"training from step {state.global_step} to {state.max_steps}: {prompts} prompts a step{world}"
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Advance the bar."""
        self._progress.update(self._training, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """One line, and the sums for the phase table."""
        logs = logs or {}
        if "loss" in logs:
            parts = [f"{label} {shape.format(logs[name])}" for label, name, shape in LINE if name in logs]
            self.console.print(
                f"step {state.global_step}/{state.max_steps}  " + "  ".join(parts), highlight=False, soft_wrap=True
            )
            self._sum(logs)
        elif "eval_effective_n" in logs:
            self.evaluation_seconds += logs.get("eval_runtime", 0.0)
            self.console.print(
                f"step {state.global_step}  held-out: effective N {logs['eval_effective_n']:.2f} "
                f"[{logs['eval_effective_n_low']:.2f}, {logs['eval_effective_n_high']:.2f}]  "
                f"win rate {logs['eval_win_rate']:.3f}  kl {logs['eval_kl']:.2f}",
                highlight=False,
                soft_wrap=True,
            )

    def _sum(self, logs: Mapping[str, float]) -> None:
        self._logged_steps += 1
        for name, value in logs.items():
            if name.startswith("time/"):
                self.phases[name[5:]] = self.phases.get(name[5:], 0.0) + value
            elif name.startswith("num_tokens"):
                self.tokens[name] = self.tokens.get(name, 0.0) + value

    def mean_phases(self) -> tuple[dict[str, float], dict[str, float]]:
        """Seconds by phase, and completion tokens sampled, compared and learned on, of a mean step."""
        steps = max(self._logged_steps, 1)
        phases = {name: seconds / steps for name, seconds in self.phases.items()}
        return phases, {name: count / steps for name, count in self.tokens.items()}

    def close_training(self) -> None:
        """Remove the training bar."""
        self._progress.remove_task(self._training)

    def counting(self, description: str, total: int) -> "_Counter":
        """A bar for `total` things; call the result with the number done."""
        return _Counter(self._progress, description, total, self.console)


class _Counter:
    def __init__(self, progress: Progress, description: str, total: int, console: Console) -> None:
        self._progress, self._task = progress, progress.add_task(description, total=total)
        self._began, self._description, self._console = time.monotonic(), description, console

    def __call__(self, done: int) -> None:
        self._progress.advance(self._task, done)

    def close(self) -> None:
        self._progress.remove_task(self._task)
        seconds = time.monotonic() - self._began
        self._console.print(f"{self._description}: {seconds:.0f} s", highlight=False, soft_wrap=True)
