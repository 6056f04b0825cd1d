"""The key-value cache of a batch that is being decoded, for causal and for encoder-decoder models.

Both kinds have the same life: prefill P prompts once, `select` rows (to share a prompt among its samples, later to drop
the rows that ended), and `step` by one token a row. What all prompts begin with (a system prompt, a chat template) is
prefilled once for all of them.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from bondlm.adapters import RowAdapters
from bondlm.engines.cache import decoder_config, growing_cache
from bondlm.prefix import prefill_prefix, shared_prefix


class DecodingState(Protocol):
    """Rows that are being decoded."""

    def select(self, rows: Tensor) -> None:
        """Keep or repeat rows (long indices)."""

    def step(self, token_B: Tensor) -> Tensor:
        """Feed one token a row; returns the next logits (B, V)."""


def start_decoding(
    model: Any, prompts: Sequence[Sequence[int]], pad_id: int, adapters: RowAdapters | None, adapter_P: Sequence[int]
) -> tuple[DecodingState, Tensor]:
    """Prefill `prompts`; returns the state of P rows and the first logits (P, V).

    With `adapters` prompt i is computed with adapter number `adapter_P[i]`.
    """
    if not model.config.is_encoder_decoder:
        return _CausalState.start(model, prompts, pad_id, adapters, adapter_P)
    if adapters is not None:
        adapters.set(adapter_P)
    # Padded right: an encoder with absolute positions (Bart) counts from the first column, padding or not.
    return _Seq2SeqState.start(model, *padded(prompts, pad_id, model.device, left=False), adapters)


def padded(prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device, *, left: bool) -> tuple[Tensor, Tensor]:
    """Ids and mask (P, S); the mask comes from the lengths, since the padding id may be the end-of-sequence id."""
    width = max(len(prompt) for prompt in prompts)
    fills = [[pad_id] * (width - len(p)) for p in prompts]
    masks = [([0] * len(fill), [1] * len(p)) for fill, p in zip(fills, prompts, strict=True)]
    ids = [fill + list(p) if left else list(p) + fill for fill, p in zip(fills, prompts, strict=True)]
    mask = [hidden + real if left else real + hidden for hidden, real in masks]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


class _CausalState:
    def __init__(
        self, model: Any, cache: DynamicCache, mask_BS: Tensor, position_B1: Tensor, adapters: RowAdapters | None
    ) -> None:
        self._model, self._cache, self._mask_BS, self._position_B1 = model, cache, mask_BS, position_B1
        self._adapters = adapters

    @classmethod
    def start(
        cls,
        model: Any,
        prompts: Sequence[Sequence[int]],
        pad_id: int,
        adapters: RowAdapters | None,
        adapter_P: Sequence[int],
    ) -> tuple["_CausalState", Tensor]:
        prefix = shared_prefix(model.config, prompts)
        kinds = sorted(set(adapter_P))  # a common beginning is computed once an adapter
        if adapters is not None:
            adapters.set(kinds)
        cache = prefill_prefix(model, prefix, growing_cache(model.config), rows=len(kinds))
        if prefix:
            cache.batch_select_indices(torch.tensor([kinds.index(kind) for kind in adapter_P], device=model.device))
        if adapters is not None:
            adapters.set(adapter_P)
        ids_PS, mask_PS = padded([p[len(prefix) :] for p in prompts], pad_id, model.device, left=True)
        mask_PS = torch.cat([mask_PS.new_ones(len(prompts), len(prefix)), mask_PS], dim=1)
        positions_PS = (mask_PS.cumsum(dim=1) - 1).clamp(min=0)[:, len(prefix) :]  # padding is masked
        out = model(
            input_ids=ids_PS,
            attention_mask=mask_PS,
            position_ids=positions_PS,
            past_key_values=cache,
            use_cache=True,
            # An index and not "the last one": its result is contiguous. A slice of rows is not, and then PyTorch copies
            # the whole head once a row (CPU; 1.7 of 9 seconds of a rollout of SmolLM2-135M).
            logits_to_keep=torch.tensor([ids_PS.shape[1] - 1], device=ids_PS.device),
        )
        return cls(model, cache, mask_PS, positions_PS[:, -1:], adapters), out.logits[:, -1]

    def select(self, rows: Tensor) -> None:
        if self._adapters is not None:
            self._adapters.select(rows)
        self._cache.batch_select_indices(rows)
        self._mask_BS, self._position_B1 = self._mask_BS[rows], self._position_B1[rows]

    def step(self, token_B: Tensor) -> Tensor:
        self._mask_BS = torch.cat([self._mask_BS, self._mask_BS.new_ones(len(token_B), 1)], dim=1)
        self._position_B1 = self._position_B1 + 1
        out = self._model(
            input_ids=token_B.unsqueeze(1),
            attention_mask=self._mask_BS,
            position_ids=self._position_B1,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return out.logits[:, -1]


class _Seq2SeqState:
    def __init__(
        self,
        model: Any,
        cache: EncoderDecoderCache,
        hidden_BSD: Tensor,
        mask_BS: Tensor,
        adapters: RowAdapters | None,
    ) -> None:
        self._model, self._cache, self._hidden_BSD, self._mask_BS = model, cache, hidden_BSD, mask_BS
        self._adapters = adapters

    @classmethod
    def start(
        cls, model: Any, ids_PS: Tensor, mask_PS: Tensor, adapters: RowAdapters | None
    ) -> tuple["_Seq2SeqState", Tensor]:
        hidden = model.get_encoder()(input_ids=ids_PS, attention_mask=mask_PS).last_hidden_state
        config = decoder_config(model)
        cache = EncoderDecoderCache(growing_cache(config), DynamicCache(config=config))  # the prompt does not grow
        state = cls(model, cache, hidden, mask_PS, adapters)
        start_P = torch.full((len(ids_PS),), model.config.decoder_start_token_id, device=ids_PS.device)
        return state, state.step(start_P)

    def select(self, rows: Tensor) -> None:
        if self._adapters is not None:
            self._adapters.select(rows)
        self._cache.batch_select_indices(rows)
        self._hidden_BSD, self._mask_BS = self._hidden_BSD[rows], self._mask_BS[rows]

    def step(self, token_B: Tensor) -> Tensor:
        out = self._model(
            encoder_outputs=BaseModelOutput(last_hidden_state=self._hidden_BSD),
            attention_mask=self._mask_BS,
            decoder_input_ids=token_B.unsqueeze(1),
            past_key_values=self._cache,
            use_cache=True,
        )
        return out.logits[:, -1]
