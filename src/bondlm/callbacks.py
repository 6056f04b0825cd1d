"""What happens around an optimizer step: the anchor moves, the run folder is written, the run stops in good order."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from bondlm.anchor import Anchor
from bondlm.checkpoint import ANCHOR_FILE, QUANTILE_FILE, load_tensors, require_space, save_tensors
from bondlm.clock import Clock
from bondlm.errors import NonFiniteError
from bondlm.manifest import seal
from bondlm.quantile_model import QuantileModel
from bondlm.rollout import Samples
from bondlm.runfolder import METRICS_FILE, SAMPLES_FILE, SKIPPED_FILE, append_jsonl, drop_after


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
        self.skipped = False
        self._skips_in_a_row = 0

    def restore_from(self, checkpoint: Path) -> None:
        """Continue from this checkpoint's anchor when training begins."""
        self._restore = checkpoint

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Load our part of the checkpoint, after Trainer has loaded the policy; see that there is room for more."""
        if args.should_save and str(args.save_strategy) != "no":
            kept = (args.save_total_limit or 1) + 1  # a new one is written before the oldest is removed
            require_space(Path(args.output_dir), self._anchor, num_checkpoints=kept)
        if self._restore is not None:
            load_tensors(self._restore / ANCHOR_FILE, self._anchor.load_state_dict)
            if self._quantile_model is not None:
                load_tensors(self._restore / QUANTILE_FILE, self._quantile_model.load_tensors)
            self._restore = None  # a second `train` goes on from where the first one ended

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Start timing the optimizer; take from it a gradient that is not finite."""
        self._clock.start("optimizer")
        self.skipped = not _finite_on_all_ranks(model, args)
        self._skips_in_a_row = self._skips_in_a_row + 1 if self.skipped else 0
        self._record({"skipped_steps": float(self.skipped)})
        if not self.skipped:
            return
        for parameter in model.parameters():
            parameter.grad = None  # an optimizer leaves a parameter without gradient as it is
        if self._skips_in_a_row > args.max_skipped_steps:
            raise NonFiniteError(
                f"step {state.global_step + 1}: the gradient is not finite, {self._skips_in_a_row} steps in a row "
                f"(max_skipped_steps={args.max_skipped_steps}). Neither policy nor anchor has moved; the prompts are "
                f"in {SKIPPED_FILE}. A smaller learning_rate or fp32 weights usually help."
            )

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Eq. 18: the anchor moves right after the policy has."""
        self._clock.stop()
        if self.skipped:
            return
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
        if args.world_size > 1:
            torch.distributed.barrier()  # every rank has written its part
        if args.should_save:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            save_tensors(self._anchor.state_dict(), folder / ANCHOR_FILE)
            if self._quantile_model is not None:
                save_tensors(self._quantile_model.tensors(), folder / QUANTILE_FILE)
            seal(folder)


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

    def note_skipped(self, step: int, loss_P: Tensor, logp_PL: Tensor) -> None:
        """Write which losses of a step are not finite, with the step's prompts and completions that are kept."""
        self._folder.mkdir(parents=True, exist_ok=True)
        row = {"step": step, "loss": loss_P.tolist(), "logp": logp_PL.tolist(), "samples": self._samples}
        append_jsonl(self._folder / SKIPPED_FILE, [row])

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
        self.save_requested = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After a signal: save, and stop if it was one to stop; on every rank if any rank got it."""
        wanted = torch.tensor([float(self.signal is not None), float(self.save_requested)], device=args.device)
        if args.world_size > 1:
            torch.distributed.all_reduce(wanted, op=torch.distributed.ReduceOp.MAX)
        stop, save = (flag > 0 for flag in wanted.tolist())
        self.save_requested = False
        if stop or save:
            control.should_save = True
        if stop:
            control.should_training_stop = True

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        """Compare with `target_n` and `kl_budget`."""
        n, kl = ((metrics or {}).get(f"eval_{name}_low") for name in ("effective_n", "kl"))
        reached = self._target_n is not None and n is not None and n >= self._target_n
        spent = self._kl_budget is not None and kl is not None and kl > self._kl_budget
        if reached or spent:
            control.should_training_stop = True


def _finite_on_all_ranks(model: Any, args: Any) -> bool:
    norms = torch._foreach_norm([p.grad for p in model.parameters() if p.grad is not None])
    bad = torch.tensor(float(not all(torch.isfinite(norm) for norm in norms)), device=args.device)
    if args.world_size > 1:
        torch.distributed.all_reduce(bad, op=torch.distributed.ReduceOp.MAX)
    return bad.item() == 0
