"""Measure the time of a step's phases."""

import math
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from bondlm.training.processes import World


class Clock:
    """Sums seconds by phase until `drain`; time in a nested phase counts only for the inner one."""

    def __init__(self) -> None:
        """Start with no time in any phase."""
        self._seconds: dict[str, float] = defaultdict(float)
        self._stack: list[str] = []
        self._since = 0.0
        self._is_apart = False

    def _charge(self) -> None:
        now = time.perf_counter()
        if self._stack:
            self._seconds[self._stack[-1]] += now - self._since
        self._since = now

    def start(self, phase: str) -> None:
        """Enter `phase`."""
        self._charge()
        self._stack.append(phase)

    def stop(self) -> None:
        """Leave the phase that was entered last."""
        self._charge()
        self._stack.pop()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Count the time of the body for `phase`."""
        self.start(phase)
        try:
            yield
        finally:
            self.stop()

    @contextmanager
    def apart(self) -> Iterator[dict[str, float]]:
        """Yield the seconds by phase of the body only; neither outer phases nor the next `drain` count them.

        Within another `apart`, they are that one's.
        """
        if self._is_apart:
            yield self._seconds
            return
        self._charge()
        outside = self._seconds, self._stack
        self._seconds, self._stack, self._is_apart = defaultdict(float), [], True
        try:
            yield self._seconds
        finally:
            self._charge()
            self._seconds, self._stack = outside
            self._is_apart = False

    def drain(self) -> dict[str, float]:
        """Seconds by phase since the last call."""
        self._charge()
        seconds, self._seconds = dict(self._seconds), defaultdict(float)
        return seconds


class StepMeans:
    """The metrics of the steps since the last log, as weighted means over what was recorded by all processes."""

    def __init__(self) -> None:
        """Start empty."""
        self._sums: dict[str, tuple[float, float]] = defaultdict(lambda: (0.0, 0.0))

    def record(self, metrics: Mapping[str, float], *, weight: float = 1.0) -> None:
        """Record metrics that are means of `weight` things; if one is NaN or the weight is 0, only its name is kept."""
        for name, value in metrics.items():
            total, weights = self._sums[name]
            defined = weight > 0 and not math.isnan(value)
            self._sums[name] = (total + value * weight, weights + weight) if defined else (total, weights)

    def record_of_each(self, metrics: Mapping[str, torch.Tensor], counted_P: torch.Tensor) -> None:
        """Record metrics with a value (or a row of values) per prompt; only `counted_P` prompts count."""
        for name, values_P in metrics.items():
            of_each = values_P[counted_P]
            of_each = of_each if of_each.dim() == 1 else of_each.flatten(1).mean(dim=1)
            defined = of_each[~of_each.isnan()]
            self.record({name: float(defined.mean())}, weight=float(len(defined)))

    def state(self) -> dict[str, tuple[float, float]]:
        """What this process has recorded since the last log, for a checkpoint."""
        return dict(self._sums)

    def load_state(self, of_ranks: Sequence[Mapping[str, Sequence[float]]], world: World) -> None:
        """Continue from the records of all ranks; if the number of ranks has changed, the first rank takes all."""
        self._sums.clear()
        taken = [of_ranks[world.rank]] if len(of_ranks) == world.size else of_ranks if world.rank == 0 else []
        for state in taken:
            for name, (total, weight) in state.items():
                before = self._sums[name]
                self._sums[name] = (before[0] + total, before[1] + weight)

    def drain(self, world: World) -> dict[str, float]:
        """The means since the last call, for all names on any process; every process must call this."""
        names = sorted(set(world.gather_objects(list(self._sums))))
        sums = torch.tensor([self._sums[n] for n in names], dtype=torch.float64).reshape(-1, 2)
        self._sums.clear()
        totals, weights = world.sum(sums).unbind(dim=1)
        return dict(zip(names, (totals / weights).tolist(), strict=True))
