"""Learning-rate schedules that follow a metric, for evaluations that a fault may cut short."""

import math
from typing import Any

from torch.optim.lr_scheduler import ReduceLROnPlateau
from transformers.optimization import GreedyLR


class _Measured:
    """Takes no step for a metric that was not measured: it would stay in a running mean, or count as no progress."""

    def step(self, metrics: Any, epoch: Any = None) -> None:
        if not math.isnan(metrics):
            super().step(metrics, epoch)  # type: ignore[misc]


class _MeasuredPlateau(_Measured, ReduceLROnPlateau):  # type: ignore[misc]
    pass


class _MeasuredGreedy(_Measured, GreedyLR):
    pass


def skip_unmeasured(scheduler: Any) -> Any:
    """Let a schedule that follows a metric skip evaluations that gave none; its checkpoints stay as they are."""
    kinds = {ReduceLROnPlateau: _MeasuredPlateau, GreedyLR: _MeasuredGreedy}
    scheduler.__class__ = kinds.get(type(scheduler), type(scheduler))
    return scheduler
