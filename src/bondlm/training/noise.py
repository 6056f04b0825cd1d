"""The gradient's noise scale: the number of prompts per step at which noise and signal are equal.

McCandlish et al. 2018 (arXiv 1812.06162), the simple noise scale tr(S) / |G|^2: G is the mean gradient, S the
covariance of a single prompt's gradient. Well below this scale, twice the prompts per step are worth nearly twice the
steps; well above it they gain almost nothing.
"""

import math
from typing import Any

import torch
from torch import nn

from bondlm.models.deepspeed import zero_stage
from bondlm.models.sharding import shards_weights
from bondlm.training.clock import StepMeans

# Optimizer steps: in a measured step the first micro-batch is a random part, which has a little more padding.
EVERY = 10
TRACE, SQUARE, SCALE = "noise/trace", "noise/gradient_sq", "noise/scale"


class NoiseScale:
    """Compares the gradient of a step's first micro-batch with that of the whole step, which both exist anyway."""

    def __init__(self, args: Any, accelerator: Any, means: StepMeans) -> None:
        """`means` records the results. Sharded gradients, and those with a loss scaler, are not measured."""
        self._means, self._world_size = means, args.world_size
        together = args.world_size > 1 and accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False)
        is_whole = not shards_weights(args) and zero_stage(args) == 0 and not args.fp16
        self._is_free = args.gradient_accumulation_steps > 1 and is_whole and not together
        self.every = EVERY
        self.is_measured = False  # whether the current step is
        self._small: tuple[float, float] | None = None  # |gradient|^2 of the first micro-batch, and its prompts

    def starts(self, step: int, num_micro_batches: int) -> bool:
        """Whether step number `step` is measured: its first micro-batch must then be a random part of its prompts."""
        self._small = None
        self.is_measured = self._is_free and step % self.every == 0 and num_micro_batches > 1
        return self.is_measured

    def note(self, model: nn.Module, prompts: float, total: float, *, is_last: bool) -> None:
        """Measure the gradients after a micro-batch's backward pass, before they are clipped.

        Args:
            model: has the sum of this process's gradients so far, and after the last micro-batch the mean over all
                processes.
            prompts: number of prompts of this micro-batch that count.
            total: the same for the step on all processes, by which each prompt's gradient was divided.
            is_last: whether it is the last micro-batch of the step.
        """
        if total <= prompts:
            return
        if self._small is None:
            # The loss has the number of processes as a factor, because their gradients are averaged.
            rescale = total / (self._world_size * prompts) if prompts else math.nan
            self._small = (_square(model) * rescale**2, prompts)
        elif is_last:
            (small, b), big = self._small, _square(model)
            if b and math.isfinite(small + big):
                trace = (small - big) / (1 / b - 1 / total)
                self._means.record({TRACE: trace, SQUARE: (total * big - b * small) / (total - b)})


def with_noise_scale(logs: dict[str, float]) -> dict[str, float]:
    """`logs` with the noise scale, a ratio of means, if its parts are there and the gradient exceeds the noise."""
    if logs.get(SQUARE, 0.0) > 0:
        return logs | {SCALE: max(0.0, logs[TRACE]) / logs[SQUARE]}
    return logs


def _square(model: nn.Module) -> float:
    norms = torch._foreach_norm([p.grad for p in model.parameters() if p.grad is not None])
    return float(torch.stack([norm.double().cpu() for norm in norms]).square().sum()) if norms else 0.0
