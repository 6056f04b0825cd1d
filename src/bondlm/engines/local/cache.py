"""A key-value cache with room to grow: a new token is written in place, without copying the tokens before it.

`DynamicCache` concatenates the old and the new keys at every token and indexes them whenever a row leaves. Each time
this copies the whole cache into freshly allocated memory (`benchmarks/tricks.py`).
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, EncoderDecoderCache
from transformers.cache_utils import DynamicLayer

ROOM = 64  # spare tokens of a buffer that had to be enlarged


class GrowingLayer(DynamicLayer):
    """Keys and values (B, H, S, D), views of longer buffers. Without gradient: it writes in place."""

    _buffers: tuple[Tensor, Tensor] | None = None

    def __init__(self, room: int = ROOM) -> None:
        """Selected rows get room for this many more tokens."""
        super().__init__()
        self._room = room

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add the new keys and values; returns all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        old = self.get_seq_length()
        if old == 0:
            self.keys, self.values = key_states, value_states
            return key_states, value_states
        new = old + key_states.shape[2]
        if not self._is_buffered() or new > self._held_by_buffers()[0].shape[2]:
            everything = torch.arange(len(key_states), device=key_states.device)
            self._take(everything, new - old + ROOM)
        for buffer, states in zip(self._held_by_buffers(), (key_states, value_states), strict=True):
            buffer[: len(states), :, old:new] = states
        return self._show(len(key_states), new)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep or repeat rows. On a CPU, where new memory is expensive, rows that only fill gaps are moved in place."""
        if self.get_seq_length() == 0:
            return
        if self.moves_in_place() and _fills_gaps(rows := indices.tolist()):
            for held in (cast(Tensor, self.keys), cast(Tensor, self.values)):
                for i, row in enumerate(rows):
                    if i != row:
                        held[i] = held[row]
            self._show(len(rows), self.get_seq_length())
        else:
            self._take(indices, self._room)

    def _take(self, indices: Tensor, room: int) -> None:
        """Move these rows to new buffers, with room for more tokens."""
        length = self.get_seq_length()
        buffers = []
        for held in (cast(Tensor, self.keys), cast(Tensor, self.values)):
            _, heads, _, size = held.shape
            buffer = held.new_empty(len(indices), heads, length + room, size)
            if held.device.type == "cpu":  # copied straight to its place
                torch.index_select(held, 0, indices, out=buffer[:, :, :length])
            else:
                buffer[:, :, :length] = held[indices]
            buffers.append(buffer)
        self._buffers = (buffers[0], buffers[1])
        self._show(len(indices), length)

    def _show(self, rows: int, length: int) -> tuple[Tensor, Tensor]:
        self.keys, self.values = (buffer[:rows, :, :length] for buffer in self._held_by_buffers())
        return self.keys, self.values

    def moves_in_place(self) -> bool:
        """Whether rows can be dropped without new memory."""
        return self._is_buffered() and cast(Tensor, self.keys).device.type == "cpu"

    def _is_buffered(self) -> bool:
        """Whether keys and values are still views of the buffers: other classes may have made new tensors of them."""
        return self._buffers is not None and _is_view(cast(Tensor, self.keys), self._buffers[0])

    def _held_by_buffers(self) -> tuple[Tensor, Tensor]:
        return cast(tuple[Tensor, Tensor], self._buffers)


def _fills_gaps(rows: Sequence[int]) -> bool:
    """Whether each row stays or comes from behind all that stay, so that no row overwrites one that is still needed."""
    return all(row == i or row >= len(rows) for i, row in enumerate(rows)) and len(set(rows)) == len(rows)


def gaps_filled(keep_B: Tensor) -> Tensor:
    """Indices of the rows to keep (a mask), with rows from the end moved into the gaps of the dropped rows."""
    count = int(keep_B.sum())
    rows = torch.arange(count, device=keep_B.device)
    rows[~keep_B[:count]] = keep_B[count:].nonzero().squeeze(1) + count
    return rows


def _is_view(held: Tensor, buffer: Tensor) -> bool:
    """Whether `held` is still a part of the buffer: selecting or repeating rows makes new tensors."""
    return held.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()


def growing_cache(config: Any, room: int = ROOM) -> DynamicCache:
    """A `DynamicCache` whose full-attention layers grow in place; other kinds of layers are unchanged.

    `room` is the number of tokens that selected rows get memory for at once.
    """
    cache = DynamicCache(config=config)
    cache.layers = [GrowingLayer(room) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def prompt_cache(config: Any) -> DynamicCache:
    """A cache for the encoder's output: all of it, even in layers that see only a window of the decoder's tokens."""
    cache = DynamicCache(config=config)
    cache.layers = [GrowingLayer(room=0) for _ in cache.layers]  # it does not grow
    return cache


def select_rows(cache: Cache, rows: Tensor) -> None:
    """Keep or repeat rows (long indices) of everything that the layers hold: keys, values, and recurrent states.

    Every layer that holds more than keys and values has `reorder_cache`.
    """
    if isinstance(cache, EncoderDecoderCache):
        select_rows(cache.self_attention_cache, rows)
        select_rows(cache.cross_attention_cache, rows)
        return
    for layer in cache.layers:
        if isinstance(layer, GrowingLayer):
            layer.batch_select_indices(rows)
        else:
            layer.reorder_cache(cast(torch.LongTensor, rows))


def grows(cache: DynamicCache) -> bool:
    """Whether every layer is a separate `GrowingLayer`."""
    return all(isinstance(layer, GrowingLayer) for layer in cache.layers)


def moves_rows_in_place(cache: DynamicCache) -> bool:
    """Whether dropping a few rows costs no more than moving the same number of other rows."""
    return all(isinstance(layer, GrowingLayer) and layer.moves_in_place() for layer in cache.layers)


def stacked(caches: Sequence[DynamicCache]) -> DynamicCache:
    """The rows of all caches, stacked in the first one; shorter caches are padded with zeros on the left."""
    for layers in zip(*(cache.layers for cache in caches), strict=True):
        width = max(layer.keys.shape[2] for layer in layers)
        for name in ("keys", "values"):
            held = [getattr(layer, name) for layer in layers]
            filled = [nn.functional.pad(states, (0, 0, width - states.shape[2], 0)) for states in held]
            setattr(layers[0], name, torch.cat(filled))
    return caches[0]
