"""Generation with a transformers model in this process: any causal or encoder-decoder model, any device.

What it does that `model.generate(num_return_sequences=n)` does not: a prompt is prefilled once and its key-value cache
shared by its samples, rows that have ended leave the batch, and a sample does not depend on the batch it was drawn in
(its random numbers belong to its row). The law is the model's own: no top-k, no top-p, no penalties.

Shapes: P prompts, B rows that still run, S prompt tokens, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bondlm.engines.base import Completion, Role
from bondlm.engines.decoding import start_decoding

# Copying the cache costs about as much as one step of the rows that it drops: wait until a quarter has ended.
COMPACT_BELOW = 0.75


class TransformersEngine:
    """Samples from `use(role)`, a context manager that yields the model of that role in eval mode."""

    def __init__(
        self,
        use: Callable[[Role], AbstractContextManager[Any]],
        *,
        eos_ids: Sequence[int],
        pad_id: int,
        max_rows: int = 96,
    ) -> None:
        """`eos_ids` end a completion; `pad_id` only fills; at most `max_rows` rows are decoded together."""
        self._use = use
        self._eos_ids = list(eos_ids)
        self._pad_id = pad_id
        self._max_rows = max_rows
        self.on_prompts_done: Callable[[int], object] | None = None  # told how many more prompts are finished

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        num_samples: int,
        *,
        role: Role,
        max_new_tokens: int,
        seeds: Sequence[int],
        temperature: float = 1.0,
    ) -> list[list[Completion]]:
        """See `Engine.generate`."""
        completions: list[list[Completion]] = [[] for _ in prompts]
        with self._use(role) as model:
            for chunk, numbers in self._chunks(prompts, num_samples):
                uniforms = np.stack([row_uniforms(seeds[i], j, max_new_tokens) for i in chunk for j in numbers])
                rows = self._decode(
                    model, [prompts[i] for i in chunk], len(numbers), torch.from_numpy(uniforms), temperature
                )
                for position, i in enumerate(chunk):
                    completions[i] += rows[position * len(numbers) : (position + 1) * len(numbers)]
                if self.on_prompts_done is not None and numbers.stop == num_samples:
                    self.on_prompts_done(len(chunk))
        return completions

    def _chunks(self, prompts: Sequence[Sequence[int]], num_samples: int) -> Iterator[tuple[list[int], range]]:
        """Indices of prompts of similar length and their samples' numbers, as many as fit into `max_rows` rows."""
        by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        size = max(1, self._max_rows // num_samples)
        for start in range(0, len(by_length), size):
            for first in range(0, num_samples, self._max_rows):
                yield by_length[start : start + size], range(first, min(first + self._max_rows, num_samples))

    def _decode(
        self, model: Any, prompts: list[Sequence[int]], num_samples: int, uniforms: Tensor, temperature: float
    ) -> list[Completion]:
        state, logits_PV = start_decoding(model, prompts, self._pad_id)
        device = logits_PV.device
        alive = torch.arange(len(prompts), device=device).repeat_interleave(num_samples)
        state.select(alive)  # every sample of a prompt continues from the same prefill
        logits_BV = logits_PV[alive]

        num_rows, max_new_tokens = uniforms.shape
        uniforms = uniforms.to(device)
        tokens = torch.full((num_rows, max_new_tokens), -1, dtype=torch.long, device=device)
        logprobs = torch.zeros(num_rows, max_new_tokens, dtype=torch.float32, device=device)
        eos_ids = torch.tensor(self._eos_ids, device=device)
        rows = torch.arange(num_rows, device=device)
        ended = torch.zeros(num_rows, dtype=torch.bool, device=device)
        for t in range(max_new_tokens):
            token_B, logprob_B = sample_tokens(logits_BV, uniforms[rows, t], temperature)
            tokens[rows, t] = torch.where(ended, -1, token_B)
            logprobs[rows, t] = logprob_B
            ended = ended | torch.isin(token_B, eos_ids)
            num_alive = int((~ended).sum())
            if num_alive == 0 or t == max_new_tokens - 1:
                break
            if num_alive <= COMPACT_BELOW * len(rows):
                keep = (~ended).nonzero().squeeze(1)
                state.select(keep)
                rows, token_B, ended = rows[keep], token_B[keep], ended[keep]
            logits_BV = state.step(token_B)
        return self._completions(tokens.cpu(), logprobs.cpu())

    def _completions(self, tokens: Tensor, logprobs: Tensor) -> list[Completion]:
        lengths = (tokens >= 0).sum(dim=1).tolist()
        eos_ids = set(self._eos_ids)
        rows = []
        for ids, logps, length in zip(tokens.tolist(), logprobs.tolist(), lengths, strict=True):
            rows.append(Completion(ids[:length], logps[:length], finished=ids[length - 1] in eos_ids))
        return rows


def row_uniforms(seed: int, sample: int, count: int) -> np.ndarray:
    """`count` uniform numbers in [0, 1) that belong to one sample of one prompt, float64."""
    return np.random.default_rng([seed, sample]).random(count)


def sample_tokens(logits_BV: Tensor, uniforms_B: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Draw a token of each row by inverting its distribution function at one uniform number.

    One random number a row: `torch.multinomial` draws one for every entry of B x V, serially on CPU. The sums are
    float64, so that a token of probability 1e-9 keeps its share. Temperature 0 takes the most probable token.

    Returns:
        Tokens (B,) and their log-probabilities (B,) under the law they were drawn from.
    """
    if temperature == 0:
        logprobs_BV = logits_BV.float().log_softmax(dim=-1)
        logprob_B, token_B = logprobs_BV.max(dim=-1)
        return token_B, logprob_B
    probs_BV = (logits_BV.float() / temperature).softmax(dim=-1)
    sums_BV = probs_BV.cumsum(dim=-1, dtype=torch.float64)
    # Scaled to the last sum, so that rounding cannot leave a uniform number beyond it. `right=True` takes the first
    # token whose sum exceeds the number: a token of probability 0 adds nothing to the sum and is never taken.
    targets_B1 = uniforms_B.unsqueeze(1).to(torch.float64) * sums_BV[:, -1:]
    token_B = torch.searchsorted(sums_BV, targets_B1, right=True).squeeze(1)
    token_B = token_B.clamp(max=logits_BV.shape[1] - 1)
    return token_B, probs_BV.gather(1, token_B.unsqueeze(1)).squeeze(1).log()
