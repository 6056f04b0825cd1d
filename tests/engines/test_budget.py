"""The memory of a batch that is being decoded, against the cache that a model really makes."""

from typing import Any

import pytest
import torch
from tiny import tiny_causal, tiny_gpt2, tiny_t5, tiny_tokenizer
from transformers import DynamicCache

from bondlm.engines.budget import CPU_ROWS, MOST_ROWS, automatic_rows, cache_bytes, rows_that_fit
from bondlm.engines.cache import decoder_config

TOKENIZER = tiny_tokenizer()


@pytest.mark.parametrize("build", [tiny_causal, tiny_gpt2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_cache_bytes_are_those_of_a_real_cache(build: Any, dtype: torch.dtype) -> None:
    model = build(TOKENIZER, dtype=dtype)
    cache: Any = DynamicCache(config=model.config)
    model(input_ids=torch.ones(3, 7, dtype=torch.long), past_key_values=cache, use_cache=True)
    real = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert 3 * 7 * cache_bytes(model.config, dtype.itemsize) == real


@torch.no_grad()
def test_a_decoder_counts_its_own_layers() -> None:
    model = tiny_t5(TOKENIZER, decoder_layers=4)
    ids = torch.ones(3, 7, dtype=torch.long)
    cache: Any = model(input_ids=ids, decoder_input_ids=ids, use_cache=True).past_key_values.self_attention_cache
    real = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert 3 * 7 * cache_bytes(decoder_config(model), 4) == real


def test_rows_fill_half_of_the_memory_with_twice_their_cache() -> None:
    config = tiny_causal(TOKENIZER).config
    row = 100 * cache_bytes(config, 4)
    assert rows_that_fit(config, 4, 100, free_bytes=4 * 10 * row) == 10
    assert rows_that_fit(config, 4, 100, free_bytes=4 * 11 * row - 1) == 10
    assert rows_that_fit(config, 4, 100, free_bytes=1) == 1
    assert rows_that_fit(config, 4, 100, free_bytes=2**60) == MOST_ROWS


@pytest.mark.parametrize("build", [tiny_causal, tiny_t5])
def test_a_cpu_has_a_fixed_number(build: Any) -> None:
    assert automatic_rows(build(TOKENIZER), 10_000) == CPU_ROWS
