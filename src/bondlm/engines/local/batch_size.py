"""How many rows are decoded together: as many as fit into memory, and fewer after an out-of-memory error."""

import os
import sys
from pathlib import Path
from typing import Any

import torch

from bondlm.models.facts import decoder_config, hidden_size, layer_configs, vocabulary_size

CPU_ROWS = 96  # measured (benchmarks/roofline.py): this many rows keep a CPU busy; more only cost memory
MOST_ROWS = 1024
# Bytes for one row's next token, for each vocabulary entry: logits, their fp32 copy, tempered logits, probabilities (4
# bytes each) and float64 sums.
SAMPLER_BYTES = 24
HOST_SHARE = 0.5  # of main memory: weights, optimizer and other programs use the rest
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
CACHE_SHARE = 0.5  # of the free memory: the rest is for activations, logits and fragmentation


def cache_bytes(config: Any, element_size: int) -> int:
    """Bytes of keys and values for one token of one row; `config` comes from `decoder_config`.

    A recurrent layer is counted as if it had keys and values: its state is larger but does not grow.
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
    """Rows of `num_tokens` tokens whose cache and next-token distribution fill half of the free memory; 1 to 1024.

    The cache is copied when it grows and when rows leave it, which briefly needs twice its size.
    """
    row = 2 * num_tokens * cache_bytes(config, element_size) + SAMPLER_BYTES * vocabulary_size(config)
    return max(1, min(MOST_ROWS, int(CACHE_SHARE * free_bytes) // row))


def automatic_rows(model: Any, num_tokens: int) -> int:
    """Rows of `num_tokens` tokens to decode together on the model's current device."""
    config, size = decoder_config(model), model.dtype.itemsize
    if model.device.type != "cuda":
        return min(CPU_ROWS, rows_that_fit(config, size, num_tokens, int(HOST_SHARE * host_memory())))
    reserved = torch.cuda.memory_reserved(model.device) - torch.cuda.memory_allocated(model.device)
    free, _ = torch.cuda.mem_get_info(model.device)
    return rows_that_fit(config, size, num_tokens, free + reserved)


def host_memory() -> int:
    """Total bytes of main memory that this process may use: those of the machine, or the limit of its container.

    Not the memory that is currently free: the batch size, and with it the last bits of a log-probability, would then
    depend on other programs, and a resumed run would differ from the run that it continues.
    """
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not available on this system
        return sys.maxsize
    try:
        return min(total, int(CGROUP_LIMIT.read_text()))
    except (OSError, ValueError):  # no container, or a container without a limit ("max")
        return total
