"""The average of the weights along a run: near a fixed point a step is mostly noise, and the mean of many has less."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from bondlm.models.sharding import (
    assign,
    copied,
    gather_to_main,
    is_sharded,
    local,
    named_weights,
    refuse_other_tensors,
)


class WeightAverage:
    """A running average of what trains, right at every step and not only at a last one that must be known beforehand.

    After step t, from 1: average += (p + 1) / (t + p) * (weights - average) with p = 2 / fraction - 2, so that step s
    has a weight of about s^p (polynomial-decay averaging, Shamir and Zhang 2013, arXiv 1212.1824). It is as old, in the
    mean, as the plain average over the last `fraction` of the steps so far; `fraction` 1 is the plain average of all.

    With LoRA the factors A and B are averaged apart, as by the anchor. Of sharded weights each process averages its own
    part. It is fp32, and lies where the weights do.
    """

    def __init__(self, model: nn.Module, fraction: float) -> None:
        """Of the weights of `model` that train; `fraction` in [0, 1], 0 averages nothing."""
        self._model, self.fraction = model, fraction
        self._values: dict[str, Tensor] = {}  # by name; none before the first step, and when it is done
        self._is_in_place = False

    def _trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in named_weights(self._model).items() if p.requires_grad}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take the weights after optimizer step number `step` (from 1) into the average."""
        if not self.fraction:
            return
        power = 2 / self.fraction - 2
        rate = (power + 1) / (step + power)  # 1 at the first step: a run that begins again forgets the one before
        for name, parameter in self._trained().items():
            if name in self._values:
                mine = local(self._values[name])
                mine.lerp_(local(parameter).detach().to(mine.device, mine.dtype), rate)
            else:
                self._values[name] = copied(parameter, torch.float32)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Have the average in the place of the weights, bit by bit the same again afterwards; nothing without one."""
        if not self._values or self._is_in_place:
            yield
            return
        self._exchange()
        self._is_in_place = True
        try:
            yield
        finally:
            self._is_in_place = False
            self._exchange()

    def settle(self) -> None:
        """Leave the average in the model, for good: what the run has made."""
        if self._values:
            self._exchange()
            self._values = {}

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, parameter in self._trained().items():
            mine, theirs = local(self._values[name]), local(parameter)
            kept = theirs.clone()
            theirs.copy_(mine)
            mine.copy_(kept)
        torch.clear_autocast_cache()  # it knows a weight by its parameter

    def state_dict(self, *, is_main: bool = True) -> dict[str, Tensor]:
        """The average, by parameter name; of sharded weights as of `Anchor.state_dict`."""
        if any(is_sharded(tensor) for tensor in self._values.values()):
            return gather_to_main(self._values, is_main=is_main)
        return {name: tensor.contiguous() for name, tensor in self._values.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from the average of a checkpoint; names and shapes must match exactly. There may be none as yet."""
        if not state:
            self._values = {}
            return
        values = {name: copied(parameter, torch.float32) for name, parameter in self._trained().items()}
        refuse_other_tensors("the average", state, values)
        for name, value in values.items():
            assign(value, state[name])
        self._values = values
