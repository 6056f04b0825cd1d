"""What happens around an optimizer step: the anchor moves, the run folder is written, the run stops in good order."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from bondlm.anchor import Anchor
from bondlm.checkpoint import ANCHOR_FILE, load_anchor, save_anchor
from bondlm.clock import Clock
from bondlm.errors import CheckpointError
from bondlm.rollout import Samples
from bondlm.runfolder import METRICS_FILE, SAMPLES_FILE, append_jsonl, drop_after


class AnchorCallback(TrainerCallback):
    """Moves the anchor after every optimizer step and keeps it in every checkpoint."""

    def __init__(self, anchor: Anchor, clock: Clock, record: Callable[[Mapping[str, float]], None]) -> None:
        """`record` takes the metrics of a step."""
        self._anchor, self._clock, self._record = anchor, clock, record
        self._restore: Path | None = None

    def restore_from(self, checkpoint: Path) -> None:
        """Continue from this checkpoint's anchor when training begins; refuse one that has none at once."""
        if not (checkpoint / ANCHOR_FILE).is_file():
            raise CheckpointError(
                f"{checkpoint} has no {ANCHOR_FILE}: without its anchor a run cannot be continued. Resume from an "
                "older checkpoint, or start a new run from these weights."
            )
        self._restore = checkpoint

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Load the anchor, after Trainer has loaded the policy."""
        if self._restore is not None:
            load_anchor(self._anchor, self._restore)
            self._restore = None  # a second `train` goes on from where the first one ended

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start timing the optimizer."""
        self._clock.start("optimizer")

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Eq. 18: the anchor moves right after the policy has."""
        self._clock.stop()
        with self._clock("anchor"):
            metrics = self._anchor.update(state.global_step + 1)
        self._record(metrics)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the step's books: every second of it belongs to one phase."""
        self._clock.stop()
        phases = self._clock.drain()
        self._record(
            {f"time/{phase}": seconds for phase, seconds in phases.items()} | {"step_time": sum(phases.values())}
        )

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Complete the checkpoint that Trainer has just written."""
        if args.should_save:
            save_anchor(self._anchor, Path(args.output_dir) / f"checkpoint-{state.global_step}")


class RunFolderCallback(TrainerCallback):
    """Writes metrics.jsonl and samples.jsonl as the run goes."""

    def __init__(self, folder: Path) -> None:
        """`folder` is the run's output_dir."""
        self._folder = folder
        self._samples: list[dict[str, Any]] = []

    def note_samples(self, rows: Sequence[Mapping[str, Any]], samples: Samples, num_policy: int, limit: int) -> None:
        """Remember the completions of the first prompts of a step, in case the step is logged."""
        self._samples = [
            {
                "prompt": row["prompt"],
                "policy": [
                    {"text": t, "reward": r} for t, r in zip(texts[:num_policy], rewards[:num_policy], strict=True)
                ],
                "anchor": [
                    {"text": t, "reward": r} for t, r in zip(texts[num_policy:], rewards[num_policy:], strict=True)
                ],
            }
            for row, texts, rewards in list(zip(rows, samples.texts, samples.rewards_PM.tolist(), strict=True))[:limit]
        ]

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Forget what was logged beyond the step that the run starts from."""
        if state.is_world_process_zero:
            self._folder.mkdir(parents=True, exist_ok=True)
            for name in (METRICS_FILE, SAMPLES_FILE):
                drop_after(self._folder / name, state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """One object per logged step."""
        if not state.is_world_process_zero or not logs:
            return
        append_jsonl(self._folder / METRICS_FILE, [{"step": state.global_step, **logs}])
        if "loss" in logs:
            append_jsonl(self._folder / SAMPLES_FILE, [{"step": state.global_step, **row} for row in self._samples])


class StopCallback(TrainerCallback):
    """Stops on a signal (the step is finished and saved) or once the effective N that was asked for is reached."""

    def __init__(self, target_n: float | None) -> None:
        """`target_n`: stop when the lower end of an evaluation's effective N is at least this."""
        self._target_n = target_n
        self.signal: int | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After a signal: save and stop, on every rank if any rank got it."""
        wanted = torch.tensor(float(self.signal is not None), device=args.device)
        if args.world_size > 1:
            torch.distributed.all_reduce(wanted, op=torch.distributed.ReduceOp.MAX)
        if wanted.item() > 0:
            control.should_save = control.should_training_stop = True

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        """Compare with `target_n`."""
        low = (metrics or {}).get("eval_effective_n_low")
        if self._target_n is not None and low is not None and low >= self._target_n:
            control.should_training_stop = True
