"""The memory of a batch that is being decoded, against the cache that a model really makes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_causal, tiny_gpt2, tiny_t5, tiny_tokenizer
from torch.profiler import ProfilerActivity, profile
from transformers import DynamicCache

from bondlm.engines.local.batch_size import (
    CPU_ROWS,
    MOST_ROWS,
    SAMPLER_BYTES,
    automatic_rows,
    cache_bytes,
    host_memory,
    rows_that_fit,
)
from bondlm.engines.local.engine import sample_tokens
from bondlm.models.facts import decoder_config

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


def test_rows_fill_half_of_the_memory_with_twice_their_cache_and_their_next_token() -> None:
    config = tiny_causal(TOKENIZER).config
    row = 2 * 100 * cache_bytes(config, 4) + 24 * config.vocab_size
    assert rows_that_fit(config, 4, 100, free_bytes=2 * 10 * row) == 10
    assert rows_that_fit(config, 4, 100, free_bytes=2 * 11 * row - 1) == 10
    assert rows_that_fit(config, 4, 100, free_bytes=1) == 1
    assert rows_that_fit(config, 4, 100, free_bytes=2**60) == MOST_ROWS


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_next_token_needs_no_more_than_is_reckoned(temperature: float) -> None:
    """All that one draw allocates, as if nothing of it were freed before its end."""
    logits = torch.randn(4, 5000)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        sample_tokens(logits, torch.rand(4, dtype=torch.float64), temperature)
    allocated = sum(max(0, event.self_cpu_memory_usage) for event in seen.events())
    assert allocated > 12 * logits.numel()  # the profiler saw it
    assert allocated + logits.nbytes <= SAMPLER_BYTES * logits.numel() + 4096


@pytest.mark.parametrize("build", [tiny_causal, tiny_t5])
def test_a_cpu_has_a_fixed_number_unless_memory_is_short(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(TOKENIZER)
    row = 2 * 10_000 * cache_bytes(decoder_config(model), 4) + SAMPLER_BYTES * model.config.vocab_size
    monkeypatch.setattr("bondlm.engines.local.batch_size.host_memory", lambda: 4 * 1000 * row)
    assert automatic_rows(model, 10_000) == CPU_ROWS
    monkeypatch.setattr("bondlm.engines.local.batch_size.host_memory", lambda: 4 * 7 * row)
    assert automatic_rows(model, 10_000) == 7


def test_a_container_may_have_less_than_the_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    limit = tmp_path / "memory.max"
    monkeypatch.setattr("bondlm.engines.local.batch_size.CGROUP_LIMIT", limit)
    whole = host_memory()
    assert whole > 2**28
    limit.write_text("max\n")
    assert host_memory() == whole
    limit.write_text("100000000\n")
    assert host_memory() == 100_000_000
