"""Test at the start of a run how a model can be decoded: batched, one prompt length at a time, or without a cache."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bondlm.engines.local.cuda_graph import CudaGraphs
from bondlm.engines.local.decoding import start_decoding
from bondlm.errors import ConfigError
from bondlm.models.logprobs import Group
from bondlm.models.prefix import LEAST_SHARED
from bondlm.models.probe import (
    Logits,
    agrees,
    check_causal,
    check_decoder,
    in_eval_mode,
    is_low_precision,
    plain_logits,
    probe_ids,
    reach,
    sees_all,
)
from bondlm.models.ways import Ways, remember, ways_of

_LOGGER = logging.getLogger(__name__)
NUM_STEPS, MOST_PADDING, NUM_SHORT = 4, 40, 5
FASTEST_FIRST: tuple[tuple[dict[str, bool], str], ...] = (
    ({"padded": True, "cached": True}, ""),
    ({"padded": False, "cached": True}, "one prompt length at a time: padding would change its numbers"),
    (
        {"padded": False, "cached": False},
        "with the whole text at every token, which is slow: its cache changes numbers",
    ),
)


@torch.no_grad()
def find_decoding(model: Any) -> Ways:
    """Find the fastest way to decode that gives the plain distributions; log it if it is not the usual one.

    Raises:
        ConfigError: no way does.
    """
    check_decoder(model)
    with in_eval_mode(model):
        return _found(model)


def _found(model: Any) -> Ways:
    name, wanted = type(model).__name__, ways_of(model).prefix
    prompts = _prompts(model)
    tokens = [probe_ids(model, NUM_STEPS, seed=10 + i) for i in range(len(prompts))]
    groups: list[Group] = [(prompt, [row]) for prompt, row in zip(prompts, tokens, strict=True)]
    plain, is_low = plain_logits(model, groups, model.device), is_low_precision(model)
    for way, reason in FASTEST_FIRST:
        remember(model, prefix=False, **way)
        if agrees(lambda: _decoded(model, prompts, tokens), plain, is_low=is_low):
            if reason:
                _LOGGER.info(f"engine: {name} is decoded {reason}")
            break
    else:
        check_causal(model, groups, plain, model.device, name)
        raise ConfigError(
            f"{name}: no way of decoding gives what a plain pass over the whole text gives, not even without a cache: "
            "bondlm cannot sample from it"
        )
    if wanted and ways_of(model).padded and sees_all(model):
        remember(model, prefix=True)
        remember(model, prefix=agrees(lambda: _decoded(model, prompts, tokens), plain, is_low=is_low))
    return ways_of(model)


def _prompts(model: Any) -> list[list[int]]:
    """Prompts, longest first, with a common beginning; a CPU prefills some together and joins the others to them."""
    longest = reach(model)
    beginning = probe_ids(model, min(LEAST_SHARED, longest - 1))
    lengths = [longest, longest - min(MOST_PADDING, longest // 2), *[min(longest, len(beginning) + 2)] * NUM_SHORT]
    rests = [probe_ids(model, max(1, length - len(beginning)), seed=i) for i, length in enumerate(lengths)]
    return [[*beginning, *rest] for rest in rests]


def _decoded(model: Any, prompts: Sequence[list[int]], tokens: Sequence[list[int]]) -> Logits:
    """Logits (T, V) before each token, computed by the engine's own code; rows are repeated and dropped on the way."""
    lengths = [len(prompt) for prompt in prompts]
    together = (
        [range(len(prompts))] if ways_of(model).padded else [_indices(lengths, n) for n in dict.fromkeys(lengths)]
    )
    of_prompt: dict[int, Tensor] = {}
    for indices in together:
        fed = torch.tensor([tokens[i] for i in indices], device=model.device)
        state, logits = start_decoding(
            *(model, [prompts[i] for i in indices], 0, None, [0] * len(indices)),
            max_new_tokens=NUM_STEPS,
            graphs=CudaGraphs(wanted=False),
        )
        twice = torch.arange(len(indices), device=model.device).repeat_interleave(2)
        state.select(twice)
        rows = [logits, state.step(fed[twice, 0])[1::2]]
        state.select(torch.arange(1, 2 * len(indices), 2, device=model.device))
        rows += [state.step(fed[:, t]).clone() for t in range(1, NUM_STEPS - 1)]
        of_prompt |= dict(zip(indices, torch.stack(rows, dim=1), strict=True))
    return [of_prompt[i] for i in range(len(prompts))]


def _indices(lengths: Sequence[int], length: int) -> list[int]:
    return [i for i, each in enumerate(lengths) if each == length]
