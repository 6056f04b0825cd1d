"""What happens around an optimizer step: the anchor moves, the run folder is written, the run stops in good order."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from bondlm.anchor import Anchor
from bondlm.checkpoint import ANCHOR_FILE, QUANTILE_FILE, load_tensors, require_file, save_tensors
from bondlm.clock import Clock
from bondlm.quantile_model import QuantileModel
from bondlm.rollout import Samples
from bondlm.runfolder import METRICS_FILE, SAMPLES_FILE, append_jsonl, drop_after


class AnchorCallback(TrainerCallback):
    """Moves the anchor after every optimizer step; keeps it, and the learned quantile, in every checkpoint."""

    def __init__(
        self,
        anchor: Anchor,
        quantile_model: QuantileModel | None,
        clock: Clock,
        record: Callable[[Mapping[str, float]], None],
    ) -> None:
        """`record` takes the metrics of a step."""
        self._anchor, self._quantile_model, self._clock, self._record = anchor, quantile_model, clock, record
        self._restore: Path | None = None

    def restore_from(self, checkpoint: Path) -> None:
        """Continue from this checkpoint's anchor when training begins; refuse an incomplete one at once."""
        require_file(checkpoint / ANCHOR_FILE)
        if self._quantile_model is not None:
            require_file(checkpoint / QUANTILE_FILE)
        self._restore = checkpoint

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Load our part of the checkpoint, after Trainer has loaded the policy."""
        if self._restore is not None:
            load_tensors(self._restore / ANCHOR_FILE, self._anchor.load_state_dict)
            if self._quantile_model is not None:
                load_tensors(self._restore / QUANTILE_FILE, self._quantile_model.load_tensors)
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
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            save_tensors(self._anchor.state_dict(), folder / ANCHOR_FILE)
            if self._quantile_model is not None:
                save_tensors(self._quantile_model.tensors(), folder / QUANTILE_FILE)


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
    """Stops on a signal (the step is finished and saved), at the effective N asked for, or when the KL is spent."""

    def __init__(self, target_n: float | None, kl_budget: float | None = None) -> None:
        """Stop when the lower end of an evaluation's effective N reaches `target_n`, or its KL's passes `kl_budget`."""
        self._target_n, self._kl_budget = target_n, kl_budget
        self.signal: int | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After a signal: save and stop, on every rank if any rank got it."""
        wanted = torch.tensor(float(self.signal is not None), device=args.device)
        if args.world_size > 1:
            torch.distributed.all_reduce(wanted, op=torch.distributed.ReduceOp.MAX)
        if wanted.item() > 0:
            control.should_save = control.should_training_stop = True

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        """Compare with `target_n` and `kl_budget`."""
        n, kl = ((metrics or {}).get(f"eval_{name}_low") for name in ("effective_n", "kl"))
        reached = self._target_n is not None and n is not None and n >= self._target_n
        spent = self._kl_budget is not None and kl is not None and kl > self._kl_budget
        if reached or spent:
            control.should_training_stop = True
