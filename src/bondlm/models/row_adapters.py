"""Several LoRA adapters of one model in one batch: each row computes with the adapter that it belongs to.

Decoding a few rows takes nearly as long as decoding many, so policy and anchor are drawn together. Their factors stand
side by side, A as (K*r, in) and B as (out, K*r), and between the two each row keeps the r numbers of its own adapter:
to a layer this is one adapter of rank K*r and one multiplication. (PEFT's `adapter_names` cuts the batch in every layer
instead, which on a CPU costs what the common batch saves.)

Shapes: B rows, K adapters, r their rank.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn


class RowsNotKnownError(RuntimeError):
    """A layer was called with something else than the batch's rows (experts that take tokens, for instance)."""


class RowAdapters:
    """Which of the K adapters each row of the batch computes with."""

    def __init__(self, num_adapters: int, device: torch.device) -> None:
        """One row, of the first adapter."""
        self._num_adapters, self._device = num_adapters, device
        self.set([0])

    def set(self, adapter_of_row: Sequence[int]) -> None:
        """The rows are these from now on."""
        self._adapter_B = torch.tensor(list(adapter_of_row), device=self._device)
        self._masks: dict[tuple[int, torch.dtype], Tensor] = {}

    def select(self, rows: Tensor) -> None:
        """Keep or repeat rows (long indices), as the cache does."""
        self._adapter_B = self._adapter_B[rows]
        self._masks = {}

    def mask(self, rank: int, hidden: Tensor) -> Tensor:
        """1 where a row's own factor lies, else 0: (B, 1, K*r), of `hidden`'s dtype."""
        if hidden.dim() != 3 or len(hidden) != len(self._adapter_B):
            raise RowsNotKnownError(f"{len(self._adapter_B)} rows, but a layer was called with {tuple(hidden.shape)}")
        key = (rank, hidden.dtype)
        if key not in self._masks:
            one_hot_BK = nn.functional.one_hot(self._adapter_B, self._num_adapters).to(hidden.dtype)
            self._masks[key] = one_hot_BK.repeat_interleave(rank, dim=1).unsqueeze(1)
        return self._masks[key]


class _Factors(nn.Linear):
    """The A factors of K adapters, one below the other; each row keeps its own adapter's numbers."""

    def __init__(self, weight: Tensor, rank: int, rows: RowAdapters) -> None:
        super().__init__(weight.shape[1], weight.shape[0], bias=False, device="meta")
        self.weight = nn.Parameter(weight, requires_grad=False)
        self._rank, self._rows = rank, rows

    def forward(self, input: Tensor) -> Tensor:
        hidden = super().forward(input)
        return hidden * self._rows.mask(self._rank, hidden)


def can_join(model: nn.Module, names: Sequence[str]) -> bool:
    """Whether these adapters are plain LoRA on linear layers and nothing else: no DoRA, biases or trained modules."""
    layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
    if any(isinstance(m, ModulesToSaveWrapper) for m in model.modules()):
        return False
    return bool(layers) and all(isinstance(layer, LoraLinear) and _is_plain(layer, names) for layer in layers)


def _is_plain(layer: Any, names: Sequence[str]) -> bool:
    if any(name not in layer.lora_A or name in layer.lora_variant for name in names):
        return False
    if any(layer.lora_B[name].bias is not None for name in names) or layer.merged:
        return False
    kinds = {(layer.scaling[name], layer.lora_A[name].weight.shape, layer.lora_A[name].weight.dtype) for name in names}
    return len(kinds) == 1


def _linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


@contextmanager
def joined(model: nn.Module, names: Sequence[str], rows: RowAdapters) -> Iterator[None]:
    """Let the adapter `names[0]`, which must be active, be all of them: adapter k for the rows that `rows` says."""
    layers: list[Any] = [m for m in model.modules() if isinstance(m, LoraLinear)]
    first, own = names[0], [(layer.lora_A[names[0]], layer.lora_B[names[0]]) for layer in layers]
    try:
        for layer in layers:
            rank = layer.lora_A[first].out_features
            a = torch.cat([layer.lora_A[name].weight.detach() for name in names], dim=0)
            b = torch.cat([layer.lora_B[name].weight.detach() for name in names], dim=1)
            layer.lora_A[first], layer.lora_B[first] = _Factors(a, rank, rows), _linear(b)
        yield
    finally:
        for layer, (a, b) in zip(layers, own, strict=True):
            layer.lora_A[first], layer.lora_B[first] = a, b
