"""A T5 that decodes with few kernels, for runs on a GPU: bondlm's loop with a different step of one token per row.

Launching a step's kernels takes far longer than running them (1.3 ms per layer of transformers' T5 on an H200's
machine), and that limits a queue of runs. Here a layer of a step takes some twenty kernels: projections are joined, and
keys and values of all rows share one buffer. The first steps are compared with transformers'; if the next-token
distributions differ, or anything fails, transformers' step is used from then on, and a line says so.

Shapes: B rows, P prompts, S prompt tokens, T tokens of a completion, H heads, D of a head, E of the model.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding, gelu, linear, pad, rms_norm, scaled_dot_product_attention

from bondlm.engines.local import decoding, engine

ROUND_TO = 8  # attention kernels need mask rows of a multiple of this length
PROBED_STEPS = 3
MOST_DIFFERENCE = 0.1  # total variation; bf16 stays below it, a wrong mask does not


class Layer(NamedTuple):
    """A decoder layer's weights: norms in fp32, products in the model's compute dtype."""

    norm: Tensor
    qkv: Tensor
    out: Tensor
    cross_norm: Tensor
    cross_q: Tensor
    cross_out: Tensor
    ff_norm: Tensor
    ff_in: Tensor
    ff_out: Tensor


class T5State:
    """`bondlm.engines.local.decoding.DecodingState` for a gated T5."""

    def __init__(self, model: Any, hidden_PSE: Tensor, mask_PS: Tensor, max_new_tokens: int) -> None:
        """Cast the weights and project the encoder's output once."""
        device = hidden_PSE.device
        autocast = torch.is_autocast_enabled(device.type)
        self._dtype = torch.get_autocast_dtype(device.type) if autocast else model.lm_head.weight.dtype
        config, decoder = model.config, model.get_decoder()
        self._heads, self._eps, self._scale = config.num_heads, config.layer_norm_epsilon, None
        if getattr(config, "scale_decoder_outputs", False):
            self._scale = config.d_model**-0.5
        self._device, self._t = device, 0
        with torch.autocast(device.type, enabled=False):
            self._layers = [self._layer(block) for block in decoder.block]
            self._final_norm = decoder.final_layer_norm.weight.float()
            self._head = model.lm_head.weight.to(self._dtype)
            self._embedding = decoder.embed_tokens.weight
            attention = decoder.block[0].layer[0].SelfAttention
            bias_HTT = attention.compute_bias(max_new_tokens, max_new_tokens, device=device)[0].float()
            ahead = torch.ones(max_new_tokens, max_new_tokens, dtype=torch.bool, device=device).triu(1)
            bias_HTT = bias_HTT.masked_fill(ahead, float("-inf"))
            room = -max_new_tokens % ROUND_TO
            self._bias_HTT = pad(bias_HTT, (0, room), value=float("-inf")).to(self._dtype)
            hidden_PSE = pad(hidden_PSE, (0, 0, 0, -hidden_PSE.shape[1] % ROUND_TO)).to(self._dtype)
            hidden_mask = pad(mask_PS.bool(), (0, -mask_PS.shape[1] % ROUND_TO))
            zeros = torch.zeros(hidden_mask.shape, dtype=self._dtype, device=device)
            self._mask_B11S = zeros.masked_fill(~hidden_mask, float("-inf"))[:, None, None]
            others = [block.layer[1].EncDecAttention for block in decoder.block]
            kv = [torch.cat([other.k.weight, other.v.weight]) for other in others]
            crossed = [self._split(linear(hidden_PSE, w.to(self._dtype)), 2) for w in kv]
            self._cross = torch.stack(crossed)  # layers, P, 2, H, S, D
            size = self._cross.shape[-1]
            shape = (len(kv), len(hidden_PSE), 2, self._heads, max_new_tokens + room, size)
            self._cache = torch.zeros(shape, dtype=self._dtype, device=device)

    def _layer(self, block: Any) -> Layer:
        own, cross, ff = block.layer[0], block.layer[1], block.layer[2]
        attention, other, dense = own.SelfAttention, cross.EncDecAttention, ff.DenseReluDense
        return Layer(
            own.layer_norm.weight.float(),
            torch.cat([attention.q.weight, attention.k.weight, attention.v.weight]).to(self._dtype),
            attention.o.weight.to(self._dtype),
            cross.layer_norm.weight.float(),
            other.q.weight.to(self._dtype),
            other.o.weight.to(self._dtype),
            ff.layer_norm.weight.float(),
            torch.cat([dense.wi_0.weight, dense.wi_1.weight]).to(self._dtype),
            dense.wo.weight.to(self._dtype),
        )

    def _split(self, joined: Tensor, parts: int) -> Tensor:
        """(P, S, parts * H * D) as (P, parts, H, S, D)."""
        rows, columns = joined.shape[:2]
        return joined.view(rows, columns, parts, self._heads, -1).permute(0, 2, 3, 1, 4).contiguous()

    def compact_below(self, num_rows: int) -> float:
        return decoding.COMPACT_BELOW

    def select(self, rows: Tensor) -> None:
        self._cross, self._cache = self._cross.index_select(1, rows), self._cache.index_select(1, rows)
        self._mask_B11S = self._mask_B11S.index_select(0, rows)

    def step(self, token_B: Tensor) -> Tensor:
        with torch.autocast(self._device.type, enabled=False):
            return self._step(token_B)

    def _step(self, token_B: Tensor) -> Tensor:
        rows, t = len(token_B), self._t
        x = embedding(token_B, self._embedding).float()
        bias = self._bias_HTT[None, :, t : t + 1].expand(rows, -1, -1, -1)
        mask = self._mask_B11S.expand(-1, self._heads, -1, -1)
        for layer, cache, cross in zip(self._layers, self._cache, self._cross, strict=True):
            qkv = linear(self._normed(x, layer.norm), layer.qkv).view(rows, 3, self._heads, 1, -1)
            cache[:, :, :, t : t + 1] = qkv[:, 1:]
            x = x + linear(self._attend(qkv[:, 0], cache, bias), layer.out)
            q = linear(self._normed(x, layer.cross_norm), layer.cross_q).view(rows, self._heads, 1, -1)
            x = x + linear(self._attend(q, cross, mask), layer.cross_out)
            gate, value = linear(self._normed(x, layer.ff_norm), layer.ff_in).chunk(2, dim=-1)
            x = x + linear(gelu(gate, approximate="tanh") * value, layer.ff_out)
        self._t += 1
        last = self._normed(x, self._final_norm)
        return linear(last if self._scale is None else last * self._scale, self._head)

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(x, weight.shape, weight, self._eps).to(self._dtype)

    def _attend(self, query: Tensor, states: Tensor, mask: Tensor) -> Tensor:
        out = scaled_dot_product_attention(query, states[:, 0], states[:, 1], attn_mask=mask, scale=1.0)
        return out.flatten(1)


class Starter:
    """`start_decoding`, with `T5State` once the comparison has shown that it agrees."""

    def __init__(self) -> None:
        """The comparison runs on the first call."""
        self.agrees: bool | None = None
        self._plain = decoding.start_decoding

    def __call__(
        self, model: Any, prompts: Sequence[Sequence[int]], pad_id: int, adapters: Any, adapter_P: Any, **how: Any
    ) -> tuple[Any, Tensor]:
        """See `bondlm.engines.local.decoding.start_decoding`."""
        if self.agrees is None:
            try:
                self.agrees = self._compare(model, prompts, pad_id, how)
            except (RuntimeError, AttributeError, ValueError, TypeError, IndexError) as error:
                self.agrees = False
                print(f"t5_decoding: not used: {type(error).__name__}: {error}", flush=True)
        if not self.agrees:
            return self._plain(model, prompts, pad_id, adapters, adapter_P, **how)
        return self._start(model, prompts, pad_id, how["max_new_tokens"])

    def _start(self, model: Any, prompts: Any, pad_id: int, max_new_tokens: int) -> tuple[T5State, Tensor]:
        ids_PS, mask_PS = decoding.padded(prompts, pad_id, model.device, left=False)
        hidden = model.get_encoder()(input_ids=ids_PS, attention_mask=mask_PS).last_hidden_state
        state = T5State(model, hidden, mask_PS, max_new_tokens)
        start_P = torch.full((len(ids_PS),), model.config.decoder_start_token_id, device=ids_PS.device)
        return state, state.step(start_P)

    def _compare(self, model: Any, prompts: Any, pad_id: int, how: Any) -> bool:
        prompts = prompts[:16]
        theirs, their_logits = self._plain(model, prompts, pad_id, None, [0] * len(prompts), **how)
        mine, my_logits = self._start(model, prompts, pad_id, how["max_new_tokens"])
        worst = 0.0
        for _ in range(PROBED_STEPS):
            laws = [logits.float().softmax(dim=-1) for logits in (their_logits, my_logits)]
            worst = max(worst, float((laws[0] - laws[1]).abs().sum(dim=-1).max() / 2))
            token_P = laws[0].argmax(dim=-1)
            their_logits, my_logits = theirs.step(token_P), mine.step(token_P)
        agrees = worst <= MOST_DIFFERENCE  # False for NaN
        print(f"t5_decoding: {'used' if agrees else 'NOT USED'}, total variation {worst:.2g}", flush=True)
        return agrees


def install() -> Starter:
    """Make bondlm's engine use `T5State` in this process from now on."""
    starter = Starter()
    engine.start_decoding = starter
    return starter
