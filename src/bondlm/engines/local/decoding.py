"""The key-value cache of a batch that is being decoded, for causal and for encoder-decoder models.

Both kinds work the same way: prefill P prompts once, `select` rows (to share a prompt among its samples, later to drop
rows that have ended), and `step` by one token per row. A common beginning of all prompts (a system prompt, a chat
template) is prefilled once. On a CPU, prompts of similar length are prefilled together. Many long prompts are prefilled
in several parts.
"""

import copy
import math
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, EncoderDecoderCache

from bondlm.data.context import start_id
from bondlm.engines.local.cache import growing_cache, grows, moves_rows_in_place, prompt_cache, select_rows, stacked
from bondlm.engines.local.cuda_graph import PROBED_STEPS, CudaGraphs, GraphedSeq2SeqState, GraphedState, Step
from bondlm.engines.local.plain_loop import PlainState
from bondlm.models.facts import decoder_config, has_full_attention, takes_argument
from bondlm.models.prefix import prefill_prefix, shared_prefix
from bondlm.models.row_adapters import RowAdapters
from bondlm.models.ways import ways_of

# If dropping a row moves at most one other, rows are dropped as they end. If it copies the whole cache, that costs
# about as much as one step of the rows that it drops, so wait until a quarter has ended.
COMPACT_BELOW_IN_PLACE, COMPACT_BELOW = 1.0, 0.75
# A separate forward pass costs about as much as this many tokens of padding, because the weights are read again.
PADDING_WORTH_A_PASS = 64
# Tokens of a forward pass over prompts: more do not keep a device busier and only take memory, about ten vectors per
# token.
PREFILL_TOKENS = 16_384
STATES_ALONE = "cache_params"  # the cache's name in models that have no attention (Mamba)


class DecodingState(Protocol):
    """Rows that are being decoded."""

    def select(self, rows: Tensor) -> None:
        """Keep or repeat rows (long indices)."""

    def step(self, token_B: Tensor) -> Tensor:
        """Feed one token per row; returns the next logits (B, V), which are valid until the next step."""

    def compact_below(self, num_rows: int) -> float:
        """The share of running rows, out of `num_rows`, below which a `select` pays off."""


def start_decoding(
    model: Any,
    prompts: Sequence[Sequence[int]],
    pad_id: int,
    adapters: RowAdapters | None,
    adapter_P: Sequence[int],
    *,
    max_new_tokens: int,
    graphs: CudaGraphs,
) -> tuple[DecodingState, Tensor]:
    """Prefill `prompts`; returns the state of P rows and the first logits (P, V).

    With `adapters`, prompt i is computed with adapter number `adapter_P[i]`. `ways_of` decides what is computed
    together; if it does not allow padding, all prompts must have the same length.
    """
    if not ways_of(model).cached:
        if adapters is not None:
            adapters.set(adapter_P)
        return PlainState.start(model, prompts, adapters)
    if not model.config.is_encoder_decoder:
        state, logits = _CausalState.start(model, prompts, pad_id, adapters, adapter_P, room=max_new_tokens)
        return _fastest(state, logits, model, max_new_tokens, graphs), logits
    if adapters is not None:
        adapters.set(adapter_P)
    # Padded right: an encoder with absolute positions (Bart) counts from the first column, padding or not.
    inputs = padded(prompts, pad_id, model.device, left=False)
    both, logits = _Seq2SeqState.start(model, *inputs, adapters, room=max_new_tokens)
    return _fastest(both, logits, model, max_new_tokens, graphs), logits


def _fastest(
    state: "_CausalState | _Seq2SeqState", logits_PV: Tensor, model: Any, room: int, graphs: CudaGraphs
) -> DecodingState:
    """The state, or one that continues it with CUDA graphs if these are usable and give the same distributions."""

    def copies() -> tuple[Step, Step]:
        return state.copied().step, state.copied().graphed(room, graphs).step

    can = graphs.usable(model) and grows(state.growing)
    return state.graphed(room, graphs) if can and graphs.agrees(copies, logits_PV.argmax(-1)) else state


def padded(prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device, *, left: bool) -> tuple[Tensor, Tensor]:
    """Ids and mask (P, S); the mask comes from the lengths, since the padding id may be the end-of-sequence id."""
    side = "left" if left else "right"
    rows = [torch.tensor(prompt, dtype=torch.long) for prompt in prompts]
    ids_PS = pad_sequence(rows, batch_first=True, padding_value=pad_id, padding_side=side)
    mask_PS = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side=side)
    return ids_PS.to(device), mask_PS.to(device)


def similar_lengths(lengths: Sequence[int], *, worth_a_pass: float, most_tokens: float = math.inf) -> Iterator[range]:
    """Cut rows, given longest first, into groups that are prefilled together.

    A group ends before its padding has more tokens than a forward pass is worth, or the whole group more than
    `most_tokens`.
    """
    begin, padding = 0, 0
    for i, length in enumerate(lengths):
        padding += lengths[begin] - length
        if padding > worth_a_pass or (i > begin and (i - begin + 1) * lengths[begin] > most_tokens):
            yield range(begin, i)
            begin, padding = i, 0
    yield range(begin, len(lengths))


class _CausalState:
    def __init__(
        self, model: Any, cache: DynamicCache, mask_BS: Tensor, position_B1: Tensor, adapters: RowAdapters | None
    ) -> None:
        self._model, self.cache, self._mask_BS, self._position_B1 = model, cache, mask_BS, position_B1
        self._adapters, self._cache_name = adapters, _cache_name(model)

    @classmethod
    def start(
        cls,
        model: Any,
        prompts: Sequence[Sequence[int]],
        pad_id: int,
        adapters: RowAdapters | None,
        adapter_P: Sequence[int],
        *,
        room: int,
    ) -> tuple["_CausalState", Tensor]:
        """Prefill the common beginning, then group by group; `room` is the number of tokens that may follow."""
        prefix = shared_prefix(model.config, prompts) if ways_of(model).prefix else []
        kinds = sorted(set(adapter_P))  # a common beginning is computed once per adapter
        if adapters is not None:
            adapters.set(kinds)
        cache_of_prefix = prefill_prefix(model, prefix, growing_cache(model.config, room), rows=len(kinds))
        # Layers that see only part of the tokens cannot be joined. On an accelerator a pass costs only its launch.
        joins = has_full_attention(model.config) and grows(cache_of_prefix)
        limits = {"most_tokens": PREFILL_TOKENS if joins else math.inf}
        limits["worth_a_pass"] = PADDING_WORTH_A_PASS if joins and model.device.type == "cpu" else math.inf
        rests, prefills, logits = [p[len(prefix) :] for p in prompts], [], []
        for group in similar_lengths([len(rest) for rest in rests], **limits):
            kind_of_row = [adapter_P[i] for i in group]
            if adapters is not None:
                adapters.set(kind_of_row)
            cache = copy.deepcopy(cache_of_prefix)
            if prefix:
                select_rows(cache, torch.tensor([kinds.index(k) for k in kind_of_row], device=model.device))
            prefill, logits_GV = cls._prefill(model, [rests[i] for i in group], pad_id, cache, len(prefix), adapters)
            prefills.append(prefill)
            logits.append(logits_GV)
        if adapters is not None:
            adapters.set(adapter_P)
        return cls._joined(prefills), torch.cat(logits)

    @classmethod
    def _prefill(
        cls,
        model: Any,
        prompts: Sequence[Sequence[int]],
        pad_id: int,
        cache: DynamicCache,
        seen: int,
        adapters: RowAdapters | None,
    ) -> tuple["_CausalState", Tensor]:
        """Prefill the rest of the prompts, after the `seen` tokens that the cache holds."""
        ids_PS, mask_PS = padded(prompts, pad_id, model.device, left=True)
        mask_PS = torch.cat([mask_PS.new_ones(len(prompts), seen), mask_PS], dim=1)
        positions_PS = (mask_PS.cumsum(dim=1) - 1).clamp(min=0)[:, seen:]  # padding is masked
        out = model(
            input_ids=ids_PS,
            attention_mask=mask_PS,
            position_ids=positions_PS,
            use_cache=True,
            **{_cache_name(model): cache},
            # An index rather than a slice for the last column: its result is contiguous. A slice of rows is not, and
            # PyTorch then copies the whole head once per row (CPU; 1.7 of 9 seconds of a rollout of SmolLM2-135M).
            logits_to_keep=torch.tensor([ids_PS.shape[1] - 1], device=ids_PS.device),
        )
        return cls(model, cache, mask_PS, positions_PS[:, -1:], adapters), out.logits[:, -1]

    @classmethod
    def _joined(cls, parts: Sequence["_CausalState"]) -> "_CausalState":
        """All rows in one state, padded left to the longest."""
        first, width = parts[0], max(part._mask_BS.shape[1] for part in parts)
        if len(parts) == 1:
            return first
        masks = [nn.functional.pad(part._mask_BS, (width - part._mask_BS.shape[1], 0)) for part in parts]
        positions = torch.cat([part._position_B1 for part in parts])
        cache = stacked([part.cache for part in parts])
        return cls(first._model, cache, torch.cat(masks), positions, first._adapters)

    @property
    def growing(self) -> DynamicCache:
        """What gets a token longer with each step."""
        return self.cache

    def copied(self) -> "_CausalState":
        """The same rows, to be stepped without a trace in this state; the adapters are shared."""
        return _CausalState(self._model, copy.deepcopy(self.cache), self._mask_BS, self._position_B1, self._adapters)

    def graphed(self, room: int, graphs: CudaGraphs) -> GraphedState:
        """This state, to be stepped by CUDA graphs from now on."""
        return GraphedState(
            self._model,
            self.cache,
            self._mask_BS,
            self._position_B1,
            self._adapters,
            room=max(room, PROBED_STEPS),
            graphs=graphs,
        )

    def compact_below(self, num_rows: int) -> float:
        return COMPACT_BELOW_IN_PLACE if moves_rows_in_place(self.cache) else COMPACT_BELOW

    def select(self, rows: Tensor) -> None:
        if self._adapters is not None:
            self._adapters.select(rows)
        select_rows(self.cache, rows)
        self._mask_BS, self._position_B1 = self._mask_BS[rows], self._position_B1[rows]

    def step(self, token_B: Tensor) -> Tensor:
        self._mask_BS = torch.cat([self._mask_BS, self._mask_BS.new_ones(len(token_B), 1)], dim=1)
        self._position_B1 = self._position_B1 + 1
        out = self._model(
            input_ids=token_B.unsqueeze(1),
            # A model without keys would apply the mask to its single new token, which is never padding.
            attention_mask=None if self._cache_name == STATES_ALONE else self._mask_BS,
            position_ids=self._position_B1,
            use_cache=True,
            logits_to_keep=1,
            **{self._cache_name: self.cache},
        )
        return out.logits[:, -1]


def _cache_name(model: Any) -> str:
    """The name of the model's cache argument."""
    return STATES_ALONE if takes_argument(model, STATES_ALONE) else "past_key_values"


class _Seq2SeqState:
    def __init__(
        self,
        model: Any,
        cache: EncoderDecoderCache,
        encoded: Any,
        mask_BS: Tensor,
        adapters: RowAdapters | None,
    ) -> None:
        self._model, self._cache, self._mask_BS = model, cache, mask_BS
        self._hidden_BSD, self._output_class = encoded.last_hidden_state, type(encoded)
        self._adapters = adapters

    @classmethod
    def start(
        cls, model: Any, ids_PS: Tensor, mask_PS: Tensor, adapters: RowAdapters | None, *, room: int
    ) -> tuple["_Seq2SeqState", Tensor]:
        """Encode the prompts and feed the decoder's start token."""
        encoded = model.get_encoder()(input_ids=ids_PS, attention_mask=mask_PS)
        config = decoder_config(model)
        cache = EncoderDecoderCache(growing_cache(config, room), prompt_cache(config))
        state = cls(model, cache, encoded, mask_PS, adapters)
        start_P = torch.full((len(ids_PS),), cast(int, start_id(model)), device=ids_PS.device)
        return state, state.step(start_P)

    @property
    def growing(self) -> DynamicCache:
        """What gets a token longer with each step."""
        return self._cache.self_attention_cache

    def copied(self) -> "_Seq2SeqState":
        """The same rows, to be stepped without a trace in this state; the adapters are shared."""
        return _Seq2SeqState(self._model, copy.deepcopy(self._cache), self._encoded(), self._mask_BS, self._adapters)

    def graphed(self, room: int, graphs: CudaGraphs) -> GraphedSeq2SeqState:
        """This state, to be stepped by CUDA graphs from now on."""
        return GraphedSeq2SeqState(
            *(self._model, self._cache, self._encoded(), self._mask_BS, self._adapters),
            room=max(room, PROBED_STEPS),
            graphs=graphs,
        )

    def _encoded(self) -> Any:
        return self._output_class(last_hidden_state=self._hidden_BSD)

    def compact_below(self, num_rows: int) -> float:
        return COMPACT_BELOW

    def select(self, rows: Tensor) -> None:
        if self._adapters is not None:
            self._adapters.select(rows)
        select_rows(self._cache, rows)
        self._hidden_BSD, self._mask_BS = self._hidden_BSD[rows], self._mask_BS[rows]

    def step(self, token_B: Tensor) -> Tensor:
        out = self._model(
            encoder_outputs=self._encoded(),
            attention_mask=self._mask_BS,
            decoder_input_ids=token_B.unsqueeze(1),
            past_key_values=self._cache,
            use_cache=True,
        )
        return out.logits[:, -1]
