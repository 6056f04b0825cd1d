"""The ladder in docs/scaling.md: its sums are what `vllm_server: auto` computes for these models and cards."""

from pathlib import Path

import pytest
from transformers import LlamaConfig

from bondlm.engines.local.batch_size import cache_bytes
from bondlm.engines.vllm.memory import (
    GIB,
    OVERHEAD,
    TWO_MOMENTS,
    activation_bytes,
    growth,
    server_needs,
    share_card,
)

PAGE = (Path(__file__).parents[3] / "docs" / "scaling.md").read_text(encoding="utf-8")
SHAPES = {  # layers, hidden, inner, heads, heads of keys, tied
    "Qwen3-1.7B": (28, 2048, 6144, 16, 8, True),
    "Qwen3-8B": (36, 4096, 12288, 32, 8, False),
}
RANK, HEAD, VOCABULARY, ROWS = 16, 128, 151936, 64
TAKEN = 0.6  # GiB of a card, by its driver and PyTorch


def numbers(name: str) -> tuple[LlamaConfig, int, int]:
    """Of a model: its config, weights, and those of a LoRA adapter on all linear layers."""
    layers, width, inner, heads, keys, tied = SHAPES[name]
    q, kv = heads * HEAD, keys * HEAD
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=keys,
        head_dim=HEAD,
    )
    weights = layers * (2 * width * q + 2 * width * kv + 3 * width * inner) + VOCABULARY * width * (1 if tied else 2)
    return config, weights, layers * RANK * (2 * (width + q) + 2 * (width + kv) + 3 * (width + inner))


@pytest.mark.parametrize(
    ("model", "card", "bandwidth", "longest", "shards"),
    [
        ("Qwen3-1.7B", 24, 1.008e12, 1024, None),
        ("Qwen3-8B", 80, 3.35e12, 2048, None),
        ("Qwen3-8B", 80, 3.35e12, 2048, 8),
        ("Qwen3-8B", 80, 3.35e12, 2048, 16),
    ],
)
def test_sums_of_the_ladder(model: str, card: int, bandwidth: float, longest: int, shards: int | None) -> None:
    """LoRA on one card (each of several processes alike), or full fine-tuning sharded over so many."""
    config, weights, adapter = numbers(model)
    prompts = 8 if shards is None else 4
    activations = activation_bytes(config, prompts * 2 * longest, 2, checkpointing=True)
    if shards is None:
        placed, visiting, staying, gradients = 2 * weights + 8 * adapter, 0, TWO_MOMENTS * adapter, 8 * adapter
    else:  # weights, anchor and reference are placed when they are sharded, after the server's start
        placed, visiting, gradients = 0, 2 * weights, 8 * weights // shards
        staying = (4 + 4 + 4 + TWO_MOMENTS) * weights // shards
    needs = growth(
        staying=staying,
        gradients=gradients,
        activations=activations,
        least_activations=activations,
        visiting=visiting,
    )
    free = card * GIB - placed - int(TAKEN * GIB)
    least = server_needs(config, weights, 2, longest)
    share = share_card(total=card * GIB, free=free, growth=needs, least=least, sleeps=True)
    cache = share.server - 2 * weights - OVERHEAD
    roof = ROWS / ((2 * weights + ROWS * cache_bytes(config, 2) * 0.75 * longest) / bandwidth)
    sums = [f"{size / GIB:.1f}" for size in (placed, needs.resting, needs.learning, share.server, cache)]
    sums += [f"{cache // cache_bytes(config, 2) // longest}", f"{roof / 10:,.0f}", f"{0.4 * roof:,.0f}"]
    assert f"| {' | '.join(sums)} |" in PAGE
