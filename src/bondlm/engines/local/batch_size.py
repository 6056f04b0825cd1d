"""How many rows are decoded together: what the memory holds, and less after an out-of-memory error."""

import os
import sys
from pathlib import Path
from typing import Any

import torch

from bondlm.models.facts import decoder_config, hidden_size, layer_configs, vocabulary_size

CPU_ROWS = 96  # measured (benchmarks/roofline.py): a CPU is busy with fewer, more rows only cost memory
MOST_ROWS = 1024
# Of one row's next-token law, for each entry of the vocabulary: logits, their fp32 copy, tempered logits, probabilities
# (4 bytes each) and float64 sums.
SAMPLER_BYTES = 24
HOST_SHARE = 0.5  # of main memory: weights, optimizer and other programs have the rest
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
CACHE_SHARE = 0.5  # of the free memory: the rest is for activations, logits and fragmentation


def cache_bytes(config: Any, element_size: int) -> int:
    """Bytes of keys and values of one token of one row; `config` is what `decoder_config` gives.

    A recurrent layer counts as if it had keys and values: its state is larger, but does not grow.
    """
    layers = list(layer_configs(config))
    numbers = sum(_numbers_per_token(layer) for layer in layers)
    return int(2 * numbers * element_size * (config.num_hidden_layers if len(layers) == 1 else 1))


def _numbers_per_token(layer: Any) -> int:
    """Keys of one token in one layer."""
    heads = getattr(layer, "num_attention_heads", None)
    if not heads:  # no attention at all
        return hidden_size(layer)
    size = getattr(layer, "head_dim", None) or getattr(layer, "d_kv", None) or hidden_size(layer) // heads
    return int((getattr(layer, "num_key_value_heads", None) or heads) * size)


def rows_that_fit(config: Any, element_size: int, num_tokens: int, free_bytes: int) -> int:
    """Rows of `num_tokens` tokens whose cache and next-token law fill half of the free memory; 1 to 1024.

    The cache is copied when it grows and when rows leave it, so that twice its size is needed for a moment.
    """
    row = 2 * num_tokens * cache_bytes(config, element_size) + SAMPLER_BYTES * vocabulary_size(config)
    return max(1, min(MOST_ROWS, int(CACHE_SHARE * free_bytes) // row))


def automatic_rows(model: Any, num_tokens: int) -> int:
    """Rows of `num_tokens` tokens to decode together on the model's device as it is now."""
    config, size = decoder_config(model), model.dtype.itemsize
    if model.device.type != "cuda":
        return min(CPU_ROWS, rows_that_fit(config, size, num_tokens, int(HOST_SHARE * host_memory())))
    reserved = torch.cuda.memory_reserved(model.device) - torch.cuda.memory_allocated(model.device)
    free, _ = torch.cuda.mem_get_info(model.device)
    return rows_that_fit(config, size, num_tokens, free + reserved)


def host_memory() -> int:
    """Bytes of main memory that this process may have in all: what the machine has, or its container is given.

    Not what is free at the moment: the size of a batch, and with it the last bits of a log-probability, would depend on
    what else runs, and a resumed run would not be the run that it continues.
    """
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # no such question on this system
        return sys.maxsize
    try:
        return min(total, int(CGROUP_LIMIT.read_text()))
    except (OSError, ValueError):  # no container, or one without a limit ("max")
        return total
