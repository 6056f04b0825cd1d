"""Decoding on CUDA: a step is recorded once as a CUDA graph and then replayed.

A step of one token per row is some hundred small kernels, and launching them one by one from Python takes longer than
running them. A graph needs every tensor at a fixed address with a fixed shape: the cache has its final length from the
start, a mask says which part of it is valid, and the position of the next token is a number on the device.

Only a model that declares that it can be compiled as a whole, and in which every layer sees every earlier token, is
recorded; among encoder-decoder models only the T5 family. The first rollout compares the recorded step with the
ordinary one. If they differ, it warns and uses the ordinary step.

Shapes: B rows, S columns of the cache, V vocabulary.
"""

import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any, cast

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache
from transformers.cache_utils import DynamicLayer

from bondlm.engines.local.cache import select_rows
from bondlm.models.facts import has_full_attention
from bondlm.models.row_adapters import RowAdapters

ROUND_TO = 8  # attention kernels want mask rows whose length is a multiple of this
FEW_ROWS = 256  # dropping some of 192 rows saved less than the new recording cost (H200)
# Encoder-decoder models whose decoders see every earlier token and take positions from a number on the device.
COUNT_ON_DEVICE = ("t5", "mt5", "umt5")
PROBED_STEPS = 3  # one not recorded, one recorded, one replayed
# Total variation between two ways to compute a distribution; bf16 stays below it, a wrong mask does not.
MOST_DIFFERENCE = 0.1
Step = Callable[[Tensor], Tensor]
Recording = tuple[torch.cuda.CUDAGraph, Tensor]  # the graph, and the logits that a replay writes
FAILURES = (RuntimeError, ValueError, TypeError, IndexError, AttributeError)


class CudaGraphs:
    """Whether an engine records its steps: if wanted, possible, and found to give the model's own distribution."""

    def __init__(self, *, wanted: bool = True) -> None:
        """Nothing has been probed yet."""
        self.wanted = wanted
        self._probed = False
        self._stream: torch.cuda.Stream | None = None  # one for all recordings: each stream keeps its own workspaces

    def usable(self, model: Any) -> bool:
        """Whether `model` can be recorded at all; `agrees` tells whether it should be."""
        return (
            self.wanted
            and model.device.type == "cuda"
            and getattr(model, "hf_device_map", None) is None  # layers on several devices
            and (has_full_attention(model.config) or model.config.model_type in COUNT_ON_DEVICE)
            and model.config._attn_implementation == "sdpa"
            and bool(getattr(model, "_can_compile_fullgraph", False))
        )

    @torch.no_grad()
    def agrees(self, copies: Callable[[], tuple[Step, Step]], token_B: Tensor) -> bool:
        """Whether both kinds of step give the same distributions; tested once, then kept. Out of memory is raised.

        `copies` makes the ordinary and the recorded step, of states that are used for nothing else.
        """
        if self._probed:
            return self.wanted
        try:
            ways = copies()
            for _ in range(PROBED_STEPS):
                theirs, mine = (step(token_B).float().softmax(dim=-1) for step in ways)
                difference = float((mine - theirs).abs().sum(dim=-1).max() / 2)
                if not difference <= MOST_DIFFERENCE:  # also true for NaN
                    return self.refuse(
                        f"the distributions of the next token differ by {difference:.2f} in total variation"
                    )
                token_B = theirs.argmax(dim=-1)
        except FAILURES as error:
            if isinstance(error, RuntimeError) and should_reduce_batch_size(error):
                raise
            return self.refuse(error)
        self._probed = True
        return True

    def refuse(self, reason: object) -> bool:
        """Stop recording, and log why."""
        self._probed, self.wanted = True, False
        text = (str(reason).splitlines() or [type(reason).__name__])[0]
        warnings.warn(f"bondlm: this model decodes without CUDA graphs, which is slower ({text})", stacklevel=2)
        return False

    def record(self, work: Callable[[], Tensor], device: torch.device) -> Recording | None:
        """Record what `work` launches without running it; returns graph and output tensor, or None if that fails."""
        if not self.wanted or device.type != "cuda":
            return None
        for attempt in range(2):
            try:
                with torch.cuda.device(device):
                    self._stream = self._stream or torch.cuda.Stream()
                    return _recorded(work, self._stream)
            except RuntimeError as error:
                if not should_reduce_batch_size(error):
                    self.refuse(error)
                    return None
                if attempt:
                    raise
                torch.cuda.empty_cache()  # a recording cannot use memory that the allocator keeps
        return None


def _recorded(work: Callable[[], Tensor], stream: torch.cuda.Stream) -> Recording:
    """Record without `torch.cuda.graph`, which empties the allocator's cache: every rollout would have to refill it."""
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            result = work()
            graph.capture_end()
        except RuntimeError:
            _abandon(graph, pool)
            raise
    torch.cuda.current_stream().wait_stream(stream)
    return graph, result


def _abandon(graph: torch.cuda.CUDAGraph, pool: Any) -> None:
    """End a failed recording; PyTorch itself leaves its allocator and its generator in recording mode."""
    with suppress(RuntimeError):
        graph.capture_end()
    with suppress(RuntimeError):  # it has ended
        torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
    again = torch.cuda.CUDAGraph()  # only a successful recording takes the generator out of recording mode
    again.capture_begin(capture_error_mode="thread_local")
    torch.zeros(1, device="cuda").add_(1)
    again.capture_end()


class FixedLayer(DynamicLayer):
    """Keys and values (B, H, S, D) for the full final length; those of a step are written to `column` (1,)."""

    def __init__(self, layer: Any, length: int, column: Tensor) -> None:
        """Take over what `layer` holds, with room up to `length`; the rest is zeros, since a masked NaN stays NaN."""
        super().__init__()
        self._column = column
        self.dtype, self.device, self.is_initialized = layer.dtype, layer.device, True
        self.keys, self.values = (_longer(held, length) for held in (layer.keys, layer.values))

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write one token of each row to its place; returns the whole buffer, whose unused part is masked."""
        keys, values = cast(Tensor, self.keys), cast(Tensor, self.values)
        keys.index_copy_(2, self._column, key_states)
        values.index_copy_(2, self._column, value_states)
        return keys, values


def _longer(held: Tensor, length: int) -> Tensor:
    rows, heads, width, size = held.shape
    longer = held.new_zeros(rows, heads, length, size)
    longer[:, :, :width] = held
    return longer


class CountedLayer(FixedLayer):
    """A layer that reports its number of tokens on the device, for models that compute positions from it."""

    def get_seq_length(self) -> Any:
        """The number of tokens held (1,), not the capacity."""
        return self._column


class GraphedState:
    """Rows that are being decoded; see `engines.decoding.DecodingState`."""

    layer = FixedLayer

    def __init__(
        self,
        model: Any,
        cache: DynamicCache,
        mask_BS: Tensor,
        position_B1: Tensor,
        adapters: RowAdapters | None,
        *,
        room: int,
        graphs: CudaGraphs,
    ) -> None:
        """Continue from a cache of S tokens per row, with room for `room` more."""
        width = mask_BS.shape[1]
        length = -(-(width + room) // ROUND_TO) * ROUND_TO
        self._model, self._cache, self._adapters, self._graphs = model, cache, adapters, graphs
        self._column = torch.tensor([width], device=mask_BS.device)
        cache.layers = [self.layer(layer, length, self._column) for layer in cache.layers]
        self._mask_BS = torch.nn.functional.pad(mask_BS.bool(), (0, length - width))
        self._position_B1 = position_B1.clone()
        self._forget()

    def _forget(self) -> None:
        self._token_B1 = torch.zeros_like(self._position_B1)
        self._graph: Recording | None = None
        self._is_warm = False

    def compact_below(self, num_rows: int) -> float:
        """Rows are dropped when at most this share of them still runs: a new recording costs two ordinary steps."""
        return 0.5 if num_rows > FEW_ROWS else 0.0

    def select(self, rows: Tensor) -> None:
        """Keep or repeat rows (long indices); the new shapes need a new recording."""
        if self._adapters is not None:
            self._adapters.select(rows)
        self._cache.batch_select_indices(rows)
        self._mask_BS, self._position_B1 = self._mask_BS[rows], self._position_B1[rows]
        self._forget()

    def step(self, token_B: Tensor) -> Tensor:
        """Feed one token per row; the logits (B, V) are valid until the next step."""
        self._token_B1.copy_(token_B.unsqueeze(1))
        if self._graph is None and self._is_warm:
            self._graph = self._graphs.record(self._forward, self._token_B1.device)
        if self._graph is None:
            # The first step of a shape is not recorded: it creates the adapters' masks, which a recording may not do.
            self._is_warm = True
            return self._forward()
        graph, logits_BV = self._graph
        graph.replay()
        return logits_BV

    def _forward(self) -> Tensor:
        """One step, all of it in place."""
        self._mask_BS.index_fill_(1, self._column, True)
        self._position_B1.add_(1)
        out = self._model(
            input_ids=self._token_B1,
            attention_mask=self._mask_BS[:, None, None],
            position_ids=self._position_B1,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self._column.add_(1)
        logits: Tensor = out.logits[:, -1]
        return logits


class GraphedSeq2SeqState(GraphedState):
    """The same for an encoder-decoder model: the encoded prompts stay where they are."""

    layer = CountedLayer

    def __init__(
        self,
        model: Any,
        cache: EncoderDecoderCache,
        encoded: Any,
        prompt_mask_BS: Tensor,
        adapters: RowAdapters | None,
        *,
        room: int,
        graphs: CudaGraphs,
    ) -> None:
        """Continue from a cache of a few tokens per row; `encoded` is the encoder's output for the prompts."""
        rows, seen = len(prompt_mask_BS), cache.get_seq_length()
        mask_BS, position_B1 = prompt_mask_BS.new_ones(rows, seen), prompt_mask_BS.new_zeros(rows, 1)
        super().__init__(model, cache.self_attention_cache, mask_BS, position_B1, adapters, room=room, graphs=graphs)
        self._both, self._hidden_BSD, self._output_class = cache, encoded.last_hidden_state, type(encoded)
        self._prompt_mask_BS = prompt_mask_BS.bool()

    def select(self, rows: Tensor) -> None:
        """Keep or repeat rows (long indices); the new shapes need a new recording."""
        super().select(rows)
        select_rows(self._both.cross_attention_cache, rows)
        self._hidden_BSD, self._prompt_mask_BS = self._hidden_BSD[rows], self._prompt_mask_BS[rows]

    def _forward(self) -> Tensor:
        self._mask_BS.index_fill_(1, self._column, True)
        out = self._model(
            encoder_outputs=self._output_class(last_hidden_state=self._hidden_BSD),
            attention_mask=self._prompt_mask_BS[:, None, None],
            decoder_input_ids=self._token_B1,
            decoder_attention_mask=self._mask_BS[:, None, None],
            past_key_values=self._both,
            use_cache=True,
        )
        self._column.add_(1)
        logits: Tensor = out.logits[:, -1]
        return logits
