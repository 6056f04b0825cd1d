"""Generation with a transformers model in this process: any causal or encoder-decoder model, any device.

Unlike `model.generate(num_return_sequences=n)`, it prefills a prompt once and shares its key-value cache among the
samples, drops rows that have ended, and draws policy and anchor in one batch if both are adapters. A sample does not
depend on the batch it is drawn in, since its random numbers belong to its row (but in bf16 the rounding of a product
depends on the shape of the batch, which can change a token). The distribution is the model's own: no top-k, no top-p,
no penalties.

Shapes: P prompts, B rows that still run, S prompt tokens, V vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bondlm.engines.base import Completion, Role
from bondlm.engines.local.batch_size import automatic_rows
from bondlm.engines.local.cache import gaps_filled
from bondlm.engines.local.cuda_graph import CudaGraphs
from bondlm.engines.local.decoding import start_decoding
from bondlm.errors import NonFiniteError
from bondlm.models.memory import try_or_halve
from bondlm.models.row_adapters import RowAdapters, RowsNotKnownError
from bondlm.models.ways import ways_of

Row = tuple[int, int]  # index into the wanted prompts, number of the sample
UseTogether = Callable[[Sequence[Role]], AbstractContextManager[tuple[Any, RowAdapters]] | None]


class _Wanted(NamedTuple):
    """What to draw for one prompt and one role."""

    prompt: Sequence[int]
    num_samples: int
    seed: int
    adapter: int = 0  # the role's number, if several are drawn in one batch


class TransformersEngine:
    """Samples from `use(role)`, a context manager that yields the model of that role in eval mode.

    `use_together(roles)` lends one model for several roles (`bondlm.models.roles`); None if that is not possible.
    """

    exact = True  # the same weights, the same process

    def __init__(
        self,
        use: Callable[[Role], AbstractContextManager[Any]],
        *,
        eos_ids: Sequence[int],
        pad_id: int,
        max_rows: int | None = None,
        use_together: UseTogether | None = None,
        cuda_graphs: bool = True,
    ) -> None:
        """`eos_ids` end a completion; `pad_id` is only a filler; at most `max_rows` rows are decoded together.

        None decodes as many as fit into memory. After an out-of-memory error half as many are tried; the samples are
        the same, since a sample does not depend on its batch.
        """
        self._use, self._use_together = use, use_together
        self._eos_ids = list(eos_ids)
        self._pad_id = pad_id
        self._max_rows = max_rows
        self._graphs = CudaGraphs(wanted=cuda_graphs)
        self.on_prompts_done: Callable[[int], object] | None = None  # called with the number of newly finished prompts

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
        """Draw `num_samples` completions of each prompt from one role; see `Engine.generate_roles`.

        Raises:
            NonFiniteError: a log-probability that is not finite.
        """
        wanted = [_Wanted(prompt, num_samples, seed) for prompt, seed in zip(prompts, seeds, strict=True)]
        with self._use(role) as model:
            return self._draw(model, wanted, None, max_new_tokens, temperature)

    @torch.no_grad()
    def generate_roles(
        self,
        prompts: Sequence[Sequence[int]],
        wanted: Mapping[Role, tuple[int, Sequence[int]]],
        *,
        max_new_tokens: int,
        temperature: float = 1.0,
    ) -> dict[Role, list[list[Completion]]]:
        """See `Engine.generate_roles`: in one batch if the roles are adapters of one model, otherwise one by one.

        Raises:
            NonFiniteError: a log-probability that is not finite.
        """
        together = self._use_together(tuple(wanted)) if self._use_together is not None and len(wanted) > 1 else None
        if together is not None:
            rows = [
                _Wanted(prompt, count, seed, adapter)
                for adapter, (count, seeds) in enumerate(wanted.values())
                for prompt, seed in zip(prompts, seeds, strict=True)
            ]
            try:
                with together as (model, adapters):
                    drawn = self._draw(model, rows, adapters, max_new_tokens, temperature)
                return {role: drawn[k * len(prompts) : (k + 1) * len(prompts)] for k, role in enumerate(wanted)}
            except RowsNotKnownError:  # layers that see tokens instead of rows (experts): role by role from now on
                self._use_together = None
        how: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature}
        return {role: self.generate(prompts, k, role=role, seeds=s, **how) for role, (k, s) in wanted.items()}

    def close(self) -> None:
        """Nothing to end."""

    def _draw(
        self,
        model: Any,
        wanted: Sequence[_Wanted],
        adapters: RowAdapters | None,
        max_new_tokens: int,
        temperature: float,
    ) -> list[list[Completion]]:
        drawn: list[list[Completion | None]] = [[None] * each.num_samples for each in wanted]
        # Longest first, so that running out of memory happens at once.
        order = sorted(range(len(wanted)), key=lambda i: len(wanted[i].prompt), reverse=True)
        pending = [(i, j) for i in order for j in range(wanted[i].num_samples)]
        while pending:
            size = self._rows_at_a_time(model, len(wanted[pending[0][0]].prompt) + max_new_tokens)
            if not ways_of(model).padded:
                size = min(size, _of_one_length(wanted, pending))
            chunk, rest = _whole_prompts(pending, size)
            uniforms = np.stack([row_uniforms(wanted[i].seed, j, max_new_tokens) for i, j in chunk])
            longest = len(wanted[chunk[0][0]].prompt)
            rows, size = try_or_halve(
                partial(self._decode, model, wanted, chunk, torch.from_numpy(uniforms), temperature, adapters),
                len(chunk),
                "rows",
                doing="drawing",
                advice=f"its prompt has {longest} tokens, and {max_new_tokens} may follow: use a smaller model or "
                "dtype, or a smaller max_completion_length",
            )
            if rows is None:
                self._max_rows = size
                continue
            for (i, j), completion in zip(chunk, rows, strict=True):
                drawn[i][j] = completion
            pending = rest
            if self.on_prompts_done is not None:
                self.on_prompts_done(sum(j == wanted[i].num_samples - 1 for i, j in chunk))
        return [[c for c in row if c is not None] for row in drawn]

    def _rows_at_a_time(self, model: Any, num_tokens: int) -> int:
        return self._max_rows if self._max_rows is not None else automatic_rows(model, num_tokens)

    def _decode(
        self,
        model: Any,
        wanted: Sequence[_Wanted],
        chunk: list[Row],
        uniforms: Tensor,
        temperature: float,
        adapters: RowAdapters | None,
    ) -> list[Completion]:
        owners = list(dict.fromkeys(i for i, _ in chunk))
        prompts, adapter_P = [wanted[i].prompt for i in owners], [wanted[i].adapter for i in owners]
        num_rows, max_new_tokens = uniforms.shape
        state, logits_PV = start_decoding(
            model, prompts, self._pad_id, adapters, adapter_P, max_new_tokens=max_new_tokens, graphs=self._graphs
        )
        device = logits_PV.device
        place = {i: position for position, i in enumerate(owners)}
        alive = torch.tensor([place[i] for i, _ in chunk], device=device)
        state.select(alive)  # all samples of a prompt continue from the same prefill
        logits_BV = logits_PV[alive]

        uniforms = uniforms.to(device, torch.float32 if device.type == "mps" else torch.float64)
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
            if num_alive < len(rows) and num_alive <= state.compact_below(len(rows)) * len(rows):
                keep = gaps_filled(~ended)
                state.select(keep)
                rows, token_B, ended = rows[keep], token_B[keep], ended[keep]
            logits_BV = state.step(token_B)
        return self._completions(tokens.cpu(), logprobs.cpu())

    def _completions(self, tokens: Tensor, logprobs: Tensor) -> list[Completion]:
        if not torch.isfinite(logprobs[tokens >= 0]).all():
            raise NonFiniteError(
                "a log-probability of a token that was drawn is not finite: the model's logits are NaN or infinite. "
                "Try dtype=float32, or go back to a checkpoint whose samples are sound"
            )
        lengths = (tokens >= 0).sum(dim=1).tolist()
        eos_ids = set(self._eos_ids)
        rows = []
        for ids, logps, length in zip(tokens.tolist(), logprobs.tolist(), lengths, strict=True):
            rows.append(Completion(ids[:length], logps[:length], finished=ids[length - 1] in eos_ids))
        return rows


def _of_one_length(wanted: Sequence[_Wanted], pending: list[Row]) -> int:
    """How many of the first rows have prompts of the same length."""
    lengths = [len(wanted[i].prompt) for i, _ in pending]
    return next((n for n, length in enumerate(lengths) if length != lengths[0]), len(lengths))


def _whole_prompts(pending: list[Row], size: int) -> tuple[list[Row], list[Row]]:
    """The first rows, at most `size`, and the rest; cut between prompts if possible, so that each is prefilled once."""
    if size < len(pending):
        into_prompt = pending[size][1]  # the number of the next sample
        size = size - into_prompt if size > into_prompt else size
    return pending[:size], pending[size:]


def row_uniforms(seed: int, sample: int, count: int) -> np.ndarray:
    """`count` uniform numbers in [0, 1) that belong to one sample of one prompt, float64."""
    return np.random.default_rng([seed, sample]).random(count)


def sample_tokens(logits_BV: Tensor, uniforms_B: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Draw a token for each row by inverting its distribution function at one uniform number.

    One random number per row: `torch.multinomial` draws one for every entry of B x V, serially on a CPU. The sums are
    float64, so that a token of probability 1e-9 keeps its share. Temperature 0 takes the most probable token.

    Returns:
        Tokens (B,) and their log-probabilities (B,) under the distribution they were drawn from.
    """
    if temperature == 0:
        logprobs_BV = logits_BV.float().log_softmax(dim=-1)
        logprob_B, token_B = logprobs_BV.max(dim=-1)
        return token_B, logprob_B
    probs_BV = (logits_BV.float() / temperature).softmax(dim=-1)
    exact_BV = probs_BV.cpu() if probs_BV.device.type == "mps" else probs_BV  # MPS has no float64
    sums_BV = exact_BV.cumsum(dim=-1, dtype=torch.float64)
    # Scaled to the last sum, so that rounding cannot leave a uniform number beyond it. `right=True` takes the first
    # token whose sum exceeds the number: a token of probability 0 adds nothing to the sum and is never taken.
    targets_B1 = uniforms_B.unsqueeze(1).to(sums_BV) * sums_BV[:, -1:]
    token_B = torch.searchsorted(sums_BV, targets_B1, right=True).squeeze(1).to(logits_BV.device)
    token_B = token_B.clamp(max=logits_BV.shape[1] - 1)
    return token_B, probs_BV.gather(1, token_B.unsqueeze(1)).squeeze(1).log()
