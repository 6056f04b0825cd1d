"""The growing cache against the one that is joined anew at every token."""

from typing import Any

import pytest
import torch
from tiny import tiny_causal, tiny_gpt2, tiny_tokenizer
from torch import Tensor
from transformers import DynamicCache, MistralConfig

from bondlm.engines.local.cache import ROOM, GrowingLayer, gaps_filled, growing_cache, moves_rows_in_place

TOKENIZER = tiny_tokenizer()


def held(cache: Any) -> list[Tensor]:
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


def feed(model: Any, cache: Any, ids: Tensor) -> Tensor:
    return model(input_ids=ids, past_key_values=cache, use_cache=True).logits


@pytest.mark.parametrize("build", [tiny_causal, tiny_gpt2])
@torch.no_grad()
def test_it_holds_what_a_joined_cache_holds_whatever_happens_to_its_rows(build: Any) -> None:
    """Bit for bit: after a prefill, tokens beyond the room, rows repeated and rows dropped."""
    model, generator = build(TOKENIZER), torch.Generator().manual_seed(0)
    growing, joined = growing_cache(model.config), DynamicCache(config=model.config)
    plan = ["feed", "repeat", *["feed"] * 3, "select", *["feed"] * (ROOM + 2), "select", "feed"]
    rows, width = 2, 5
    for what in plan:
        if what == "feed":
            ids = torch.randint(3, 300, (rows, width), generator=generator)
            assert torch.equal(feed(model, growing, ids), feed(model, joined, ids))
            width = 1
        elif what == "repeat":
            growing.batch_repeat_interleave(3)
            joined.batch_repeat_interleave(3)
            rows = 6
        else:
            keep = torch.arange(rows)[1:]
            growing.batch_select_indices(keep)
            joined.batch_select_indices(keep)
            rows -= 1
        for a, b in zip(held(growing), held(joined), strict=True):
            assert torch.equal(a, b)


@torch.no_grad()
def test_tokens_are_written_in_place_until_the_room_is_used_up() -> None:
    model = tiny_causal(TOKENIZER)
    cache: Any = growing_cache(model.config)
    feed(model, cache, torch.full((2, 4), 7))
    cache.batch_select_indices(torch.tensor([0, 1, 1]))
    addresses = []
    for _ in range(ROOM + 1):
        feed(model, cache, torch.full((3, 1), 7))
        addresses.append(cache.layers[0].keys.data_ptr())
    assert len(set(addresses[:ROOM])) == 1
    assert addresses[-1] != addresses[0]


@torch.no_grad()
def test_rows_that_go_leave_gaps_that_others_fill_in_place() -> None:
    model, generator = tiny_causal(TOKENIZER), torch.Generator().manual_seed(0)
    cache: Any = growing_cache(model.config, room=2)
    feed(model, cache, torch.randint(3, 300, (9, 4), generator=generator))
    cache.batch_select_indices(torch.arange(9))
    address = cache.layers[0].keys.data_ptr()
    for keep in ([1, 0, 1, 1, 0, 1, 1, 0, 1], [1, 1, 1, 1, 1, 0], [0, 1, 1, 1, 1], [0, 0, 0, 1]):
        before = [tensor.clone() for tensor in held(cache)]
        rows = gaps_filled(torch.tensor(keep, dtype=torch.bool))
        assert sorted(rows.tolist()) == [i for i, kept in enumerate(keep) if kept]
        cache.batch_select_indices(rows)
        for was, now in zip(before, held(cache), strict=True):
            assert torch.equal(now, was[rows])
        assert cache.layers[0].keys.data_ptr() == address
    assert moves_rows_in_place(cache)


@torch.no_grad()
@pytest.mark.parametrize("rows", [[1, 0], [0, 0], [1, 2], [2, 2], [2, 1]])
def test_rows_in_an_order_that_would_overwrite_others_are_copied(rows: list[int]) -> None:
    model, generator = tiny_causal(TOKENIZER), torch.Generator().manual_seed(0)
    cache: Any = growing_cache(model.config)
    feed(model, cache, torch.randint(3, 300, (3, 4), generator=generator))
    cache.batch_select_indices(torch.arange(3))
    before = [tensor.clone() for tensor in held(cache)]
    cache.batch_select_indices(torch.tensor(rows))
    for was, now in zip(before, held(cache), strict=True):
        assert torch.equal(now, was[rows])


def test_a_sliding_window_keeps_its_own_layer() -> None:
    config = MistralConfig(num_hidden_layers=2, sliding_window=8)
    assert not any(isinstance(layer, GrowingLayer) for layer in growing_cache(config).layers)
