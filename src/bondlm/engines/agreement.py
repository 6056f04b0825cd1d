"""The gap between the sampler's and the learner's log-probabilities: beyond rounding, their weights differ.

Shapes: P prompts, L completions of each, C of them compared, T tokens.
"""

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from bondlm.engines.base import Completion
from bondlm.errors import EngineError

GAP_METRIC = "sampling/sampling_logp_difference/mean"  # TRL's name
GAP_WARNS, GAP_RAISES = 0.1, 0.5  # nats per token


def padded_logprobs(completions: Sequence[Sequence[Completion]], length: int) -> Tensor:
    """The sampler's log-probabilities (P, C, T), NaN where a completion has no token."""
    nan = float("nan")
    rows = [[c.logprobs + [nan] * (length - len(c.logprobs)) for c in cs] for cs in completions]
    return torch.tensor(rows, dtype=torch.float32).view(len(rows), len(completions[0]), length)


def logprob_gap(logp_PLT: Tensor, sampled_PCT: Tensor, step: int, *, strict: bool) -> float:
    """Mean absolute difference between learner and sampler over completion tokens, nats.

    A gap above 0.1 warns; above 0.5 it raises if `strict`. A learner with dropout is noisy by itself, so do not be
    strict then.

    Raises:
        EngineError: the samples come from other weights than those that are trained.
    """
    real = sampled_PCT.isfinite()
    gap = float((logp_PLT[:, : sampled_PCT.shape[1]].detach() - sampled_PCT)[real].abs().mean())
    if gap > GAP_RAISES and strict:
        raise EngineError(
            f"step {step}: the sampler's log-probabilities differ by {gap:.2f} nats per token from the learner's "
            f"(limit {GAP_RAISES}): the samples are stale or come from another model. Check that the server, its dtype "
            "and its adapters are this run's, then resume from the last checkpoint"
        )
    if gap > GAP_WARNS and strict:
        warnings.warn(
            f"bondlm: the sampler's log-probabilities differ by about {gap:.1f} nats per token from the learner's "
            f"({GAP_METRIC}; {GAP_RAISES} ends the run): a lower precision on one side, or a stale sampler",
            stacklevel=2,
        )
    return gap
