"""A key-value cache with room to grow: a token is written into place instead of copying all that came before it.

`DynamicCache` joins the old and the new keys at every token, which copies the whole cache each time: a fifth of the
decoding time of a small model with as many key as query heads (`benchmarks/tricks.py`).
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

ROOM = 64  # tokens that the buffers are longer than what they hold when they are made


class GrowingLayer(DynamicLayer):
    """Keys and values (B, H, S, D), views of longer buffers. Without gradient: it writes in place."""

    _buffers: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add the new keys and values; returns all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values = cast(Tensor, self.keys), cast(Tensor, self.values)
        old = self.get_seq_length()
        new = old + key_states.shape[2]
        if self._buffers is None or not _is_view(keys, self._buffers[0]) or new > self._buffers[0].shape[2]:
            self._buffers = (_longer(keys, key_states, new), _longer(values, value_states, new))
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, old:new] = states
        self.keys, self.values = (buffer[:, :, :new] for buffer in self._buffers)
        return self.keys, self.values


def _is_view(held: Tensor, buffer: Tensor) -> bool:
    """Whether `held` is still a part of the buffer: selecting or repeating rows makes new tensors."""
    return held.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()


def _longer(held: Tensor, states: Tensor, length: int) -> Tensor:
    rows, heads, _, size = states.shape
    buffer = torch.empty(rows, heads, length + ROOM, size, dtype=states.dtype, device=states.device)
    if held.numel():
        buffer[:, :, : held.shape[2]] = held
    return buffer


def decoder_config(model: Any) -> Any:
    """The config of what decodes: of an encoder-decoder model the decoder's own, which may have other layers.

    T5's own config counts the encoder's layers, and a cache made from it would be too short for a deeper decoder.
    """
    config = model.get_decoder().config if model.config.is_encoder_decoder else model.config
    return config.get_text_config(decoder=True)


def growing_cache(config: Any) -> DynamicCache:
    """A `DynamicCache` whose full-attention layers grow in place; other kinds of layers are as they are."""
    cache = DynamicCache(config=config)
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def stacked(caches: Sequence[DynamicCache]) -> DynamicCache:
    """The rows of all caches, one below the other, in the first; shorter ones are filled up with zeros on the left."""
    for layers in zip(*(cache.layers for cache in caches), strict=True):
        width = max(layer.keys.shape[2] for layer in layers)
        for name in ("keys", "values"):
            held = [getattr(layer, name) for layer in layers]
            filled = [nn.functional.pad(states, (0, 0, width - states.shape[2], 0)) for states in held]
            setattr(layers[0], name, torch.cat(filled))
    return caches[0]
