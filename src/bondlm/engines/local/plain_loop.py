"""Decoding without a cache: the whole text at every token. Slow, but correct for every model that can process a text.

Shapes: B rows that still run, S tokens of a row, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bondlm.data.context import start_id
from bondlm.models.row_adapters import RowAdapters


class PlainState:
    """Rows of one length that are being decoded; see `bondlm.engines.local.decoding.DecodingState`."""

    def __init__(self, model: Any, ids_BS: Tensor, prompt_BS: Tensor | None, adapters: RowAdapters | None) -> None:
        """`ids_BS` are continued; `prompt_BS` is the encoder's input, None for a decoder-only model."""
        self._model, self._ids_BS, self._prompt_BS, self._adapters = model, ids_BS, prompt_BS, adapters

    @classmethod
    def start(
        cls, model: Any, prompts: Sequence[Sequence[int]], adapters: RowAdapters | None
    ) -> tuple["PlainState", Tensor]:
        """The first logits of prompts of one length; no mask and no padding anywhere."""
        ids_PS = torch.tensor([list(prompt) for prompt in prompts], device=model.device)
        first = start_id(model)
        if first is None:
            state = cls(model, ids_PS, None, adapters)
        else:
            state = cls(model, torch.full((len(ids_PS), 1), first, device=model.device), ids_PS, adapters)
        return state, state._logits()

    def compact_below(self, num_rows: int) -> float:
        """All rows cost the same: drop them as they end."""
        return 1.0

    def select(self, rows: Tensor) -> None:
        """Keep or repeat rows (long indices)."""
        if self._adapters is not None:
            self._adapters.select(rows)
        self._ids_BS = self._ids_BS[rows]
        self._prompt_BS = None if self._prompt_BS is None else self._prompt_BS[rows]

    def step(self, token_B: Tensor) -> Tensor:
        """Feed one token per row; returns the next logits (B, V)."""
        self._ids_BS = torch.cat([self._ids_BS, token_B.unsqueeze(1)], dim=1)
        return self._logits()

    def _logits(self) -> Tensor:
        if self._prompt_BS is None:
            out = self._model(input_ids=self._ids_BS, use_cache=False)
        else:
            out = self._model(input_ids=self._prompt_BS, decoder_input_ids=self._ids_BS, use_cache=False)
        logits: Tensor = out.logits[:, -1]
        return logits
