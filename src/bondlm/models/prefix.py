"""Compute the common beginning of a batch's prompts once: a system prompt, or the head of a chat template."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache

from bondlm.models.facts import has_full_attention

# A shorter prefix is not worth a separate forward pass.
LEAST_SHARED = 8


def shared_prefix(config: Any, prompts: Sequence[Sequence[int]]) -> list[int]:
    """The tokens that all prompts begin with; empty if there are few, or if the model cannot use them.

    At least one token of each prompt remains outside.
    """
    if len(prompts) < 2 or not has_full_attention(config):
        return []
    in_order = sorted(list(prompt) for prompt in prompts)
    first, last = in_order[0], in_order[-1]  # in lexicographic order, all share what these two share
    most = min(map(len, prompts)) - 1
    length = 0
    while length < most and first[length] == last[length]:
        length += 1
    return first[:length] if length >= LEAST_SHARED else []


def prefill_prefix(model: Any, prefix: Sequence[int], cache: DynamicCache, *, rows: int = 1) -> DynamicCache:
    """Put the keys and values of the prefix into `cache`: one row, or one per adapter."""
    if prefix:
        ids = torch.tensor([list(prefix)] * rows, device=model.device)
        last = torch.tensor([len(prefix) - 1], device=model.device)  # an index: see `engines.decoding`
        model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=last)
    return cache


def repeated(cache: DynamicCache, rows: int) -> DynamicCache:
    """A copy of a one-row cache for `rows` rows; a forward pass adds only to the copy."""
    cache = copy.deepcopy(cache)
    cache.batch_repeat_interleave(rows)
    return cache
