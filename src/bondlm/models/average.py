"""The average of the weights over a run: near a fixed point steps are mostly noise, which averaging reduces."""

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
    """A running average of the trained weights, valid at every step, so the last step need not be known in advance.

    After step t, from 1: average += (p + 1) / (t + p) * (weights - average) with p = 2 / fraction - 2, so that step s
    has a weight proportional to about s^p (polynomial-decay averaging, Shamir and Zhang 2013, arXiv 1212.1824). The
    mean age of the weights is that of a plain average over the last `fraction` of the steps so far; `fraction` 1 is the
    plain average of all steps.

    With LoRA the factors A and B are averaged separately, as in the anchor. With sharded weights each process averages
    its own part. The average is fp32, on the same device as the weights.
    """

    def __init__(self, model: nn.Module, fraction: float) -> None:
        """Average the trained weights of `model`; `fraction` in [0, 1], where 0 averages nothing."""
        self._model, self.fraction = model, fraction
        self._values: dict[str, Tensor] = {}  # by name; empty before the first step and after `settle`
        self._is_in_place = False

    def _trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in named_weights(self._model).items() if p.requires_grad}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Add the weights after optimizer step number `step` (from 1) to the average."""
        if not self.fraction:
            return
        power = 2 / self.fraction - 2
        rate = (power + 1) / (step + power)  # 1 at the first step: a restarted run forgets the previous one
        for name, parameter in self._trained().items():
            if name in self._values:
                mine = local(self._values[name])
                mine.lerp_(local(parameter).detach().to(mine.device, mine.dtype), rate)
            else:
                self._values[name] = copied(parameter, torch.float32)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Put the average in place of the weights, restored exactly afterwards; no effect without an average."""
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
        """Put the average into the model permanently, as the result of the run."""
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
        torch.clear_autocast_cache()  # its keys are parameters, not values

    def state_dict(self, *, is_main: bool = True) -> dict[str, Tensor]:
        """The average, by parameter name; sharded weights are gathered as in `Anchor.state_dict`."""
        if any(is_sharded(tensor) for tensor in self._values.values()):
            return gather_to_main(self._values, is_main=is_main)
        return {name: tensor.contiguous() for name, tensor in self._values.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from the average in a checkpoint, which may be empty; names and shapes must match exactly."""
        if not state:
            self._values = {}
            return
        values = {name: copied(parameter, torch.float32) for name, parameter in self._trained().items()}
        refuse_other_tensors("the average", state, values)
        for name, value in values.items():
            assign(value, state[name])
        self._values = values
