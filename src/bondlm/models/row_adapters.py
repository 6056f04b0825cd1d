"""Several values of a LoRA adapter in one batch: each row is computed with the values of its role.

Decoding a few rows takes nearly as long as decoding many, so policy and anchor are drawn together. Their factors are
concatenated, A as (K*r, in) and B as (out, K*r), and between the two each row keeps only the r numbers of its own
adapter. For a layer this is one adapter of rank K*r and one multiplication. (PEFT's `adapter_names` splits the batch in
every layer instead, which on a CPU costs as much as the common batch saves.)

Shapes: B rows, K adapters, r their rank.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from bondlm.models.sharding import whole


class RowsNotKnownError(RuntimeError):
    """A layer was called with something other than the batch's rows (for example experts that take tokens)."""


class RowAdapters:
    """Which of the K adapters each row of the batch computes with."""

    def __init__(self, num_adapters: int, device: torch.device) -> None:
        """Start with one row, of the first adapter."""
        self._num_adapters, self._device = num_adapters, device
        self.set([0])

    def set(self, adapter_of_row: Sequence[int]) -> None:
        """Set the adapter of each row."""
        self._adapter_B = torch.tensor(list(adapter_of_row), device=self._device)
        self._masks: dict[tuple[int, torch.dtype], Tensor] = {}

    def select(self, rows: Tensor) -> None:
        """Keep or repeat rows (long indices), as the cache does."""
        self._adapter_B = self._adapter_B[rows]
        self._masks = {}

    def mask(self, rank: int, hidden: Tensor) -> Tensor:
        """1 at the row's own factor, else 0: (B, 1, K*r), with the dtype of `hidden`."""
        if hidden.dim() != 3 or len(hidden) != len(self._adapter_B):
            raise RowsNotKnownError(f"{len(self._adapter_B)} rows, but a layer was called with {tuple(hidden.shape)}")
        key = (rank, hidden.dtype)
        if key not in self._masks:
            one_hot_BK = nn.functional.one_hot(self._adapter_B, self._num_adapters).to(hidden.dtype)
            self._masks[key] = one_hot_BK.repeat_interleave(rank, dim=1).unsqueeze(1)
        return self._masks[key]


class _Factors(nn.Linear):
    """The A factors of K adapters, stacked; each row keeps its own adapter's numbers."""

    def __init__(self, weight: Tensor, rank: int, rows: RowAdapters) -> None:
        super().__init__(weight.shape[1], weight.shape[0], bias=False, device="meta")
        self.weight = nn.Parameter(weight, requires_grad=False)
        self._rank, self._rows = rank, rows

    def forward(self, input: Tensor) -> Tensor:
        hidden = super().forward(input)
        return hidden * self._rows.mask(self._rank, hidden)


def can_join(model: Any) -> bool:
    """Whether all trained weights are factors of plain LoRA on linear layers: no DoRA, biases or trained modules."""
    layers: list[Any] = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
    if any(isinstance(m, AuxiliaryTrainingWrapper) for m in model.modules()):
        return False
    name = model.active_adapter
    if not layers or not all(isinstance(layer, LoraLinear) and _is_plain(layer, name) for layer in layers):
        return False
    factors = {id(part[name].weight) for layer in layers for part in (layer.lora_A, layer.lora_B) if name in part}
    return {id(p) for p in model.parameters() if p.requires_grad} <= factors


def _is_plain(layer: Any, name: str) -> bool:
    if layer.merged or layer.active_adapters != [name]:
        return False
    return name not in layer.lora_A or (name not in layer.lora_variant and layer.lora_B[name].bias is None)


def _linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


@contextmanager
def joined(model: Any, others: Sequence[Mapping[str, Tensor]], rows: RowAdapters) -> Iterator[None]:
    """Give the active adapter several values: its own for rows of number 0, then those of `others`, by name."""
    first = model.active_adapter
    layers: list[tuple[str, Any]] = [
        (name, m) for name, m in model.named_modules() if isinstance(m, LoraLinear) and first in m.lora_A
    ]
    own = [(layer.lora_A[first], layer.lora_B[first]) for _, layer in layers]
    try:
        for name, layer in layers:
            rank = layer.lora_A[first].out_features
            a = _side_by_side(layer.lora_A[first].weight, others, f"{name}.lora_A.{first}.weight", dim=0)
            b = _side_by_side(layer.lora_B[first].weight, others, f"{name}.lora_B.{first}.weight", dim=1)
            layer.lora_A[first], layer.lora_B[first] = _Factors(a, rank, rows), _linear(b)
        yield
    finally:
        for (_, layer), (a, b) in zip(layers, own, strict=True):
            layer.lora_A[first], layer.lora_B[first] = a, b


def _side_by_side(own: Tensor, others: Sequence[Mapping[str, Tensor]], name: str, *, dim: int) -> Tensor:
    return torch.cat([own.detach(), *(whole(values[name], own.device).to(own.dtype) for values in others)], dim=dim)
