"""The gradient's noise scale: the number of prompts a step at which noise and signal are even.

McCandlish et al. 2018 (arXiv 1812.06162), the simple noise scale tr(S) / |G|^2: G is the mean gradient, S the
covariance of one prompt's. Well below it twice the prompts per step are worth nearly twice the steps, well above it
nearly nothing.
"""

import math
from typing import Any

import torch
from torch import nn

from bondlm.models.deepspeed import zero_stage
from bondlm.models.sharding import shards_weights
from bondlm.training.clock import StepMeans

EVERY = (
    10  # optimizer steps: the first micro-batch of a measured one is a random part, and so has a little more padding
)
TRACE, SQUARE, SCALE = "noise/trace", "noise/gradient_sq", "noise/scale"


class NoiseScale:
    """Compares the gradient of a step's first micro-batch with that of the whole step, where both come anyway."""

    def __init__(self, args: Any, accelerator: Any, means: StepMeans) -> None:
        """`means` takes what is measured. Sharded gradients, and those of a loss scaler, are left alone."""
        self._means, self._world_size = means, args.world_size
        together = args.world_size > 1 and accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False)
        is_whole = not shards_weights(args) and zero_stage(args) == 0 and not args.fp16
        self._is_free = args.gradient_accumulation_steps > 1 and is_whole and not together
        self.every = EVERY
        self.is_measured = False  # the step at hand
        self._small: tuple[float, float] | None = None  # |gradient|^2 of the first micro-batch, and its prompts

    def starts(self, step: int, num_micro_batches: int) -> bool:
        """Whether step number `step` is measured: its first micro-batch must then be a random part of its prompts."""
        self._small = None
        self.is_measured = self._is_free and step % self.every == 0 and num_micro_batches > 1
        return self.is_measured

    def note(self, model: nn.Module, prompts: float, total: float, *, is_last: bool) -> None:
        """Look at the gradients behind a micro-batch's backward pass, before they are clipped.

        Args:
            model: with the sum so far of this process's gradients, and behind the last the mean of all processes'.
            prompts: those of this micro-batch that count.
            total: those of the step, on all processes: what each prompt's gradient was divided by.
            is_last: whether it is the step's last.
        """
        if total <= prompts:
            return
        if self._small is None:
            # The loss carries the number of processes, whose gradients are to be averaged.
            rescale = total / (self._world_size * prompts) if prompts else math.nan
            self._small = (_square(model) * rescale**2, prompts)
        elif is_last:
            (small, b), big = self._small, _square(model)
            if b and math.isfinite(small + big):
                trace = (small - big) / (1 / b - 1 / total)
                self._means.record({TRACE: trace, SQUARE: (total * big - b * small) / (total - b)})


def with_noise_scale(logs: dict[str, float]) -> dict[str, float]:
    """`logs` with the noise scale, a ratio of means, if its parts are there and the gradient stands out of noise."""
    if logs.get(SQUARE, 0.0) > 0:
        return logs | {SCALE: max(0.0, logs[TRACE]) / logs[SQUARE]}
    return logs


def _square(model: nn.Module) -> float:
    norms = torch._foreach_norm([p.grad for p in model.parameters() if p.grad is not None])
    return float(torch.stack([norm.double().cpu() for norm in norms]).square().sum()) if norms else 0.0
