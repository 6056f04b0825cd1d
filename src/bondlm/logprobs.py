"""Log-probabilities of given completions: what is learned on, and what the anchor and the reference say of a sample.

Shapes: P prompts, L completions of each, W prompt columns, T completion columns, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutput

from bondlm.prefix import has_full_attention, prefill_prefix, repeated, shared_prefix

Group = tuple[Sequence[int], Sequence[Sequence[int]]]  # (prompt ids, the ids of its completions)
# Log-probabilities of the two layouts differ by rounding alone; a model that ignores the mask is off by whole nats.
PROBE_TOLERANCE = 0.02


def collate(groups: Sequence[Group], pad_id: int, *, start_id: int | None = None) -> dict[str, Tensor]:
    """Tensors of one forward pass; every mask comes from lengths, since `pad_id` may be an end-of-sequence id.

    A causal row is [prompt, padded left | completion 1, padded right | ... | completion L]. Each completion sees the
    prompt and itself alone, so that the prompt is computed once for all of them, and the head in the last L * T columns
    only. `start_id` is given for encoder-decoder models: the prompts' rows (P) and the completions' (P * L) part ways.

    Returns:
        The model's inputs, `completion_ids` (P, L, T) and `completion_mask` (P, L, T).
    """
    prompts = [list(prompt) for prompt, _ in groups]
    width, length = max(map(len, prompts)), max(len(c) for _, completions in groups for c in completions)
    ids_PLT = torch.tensor([[list(c) + [pad_id] * (length - len(c)) for c in completions] for _, completions in groups])
    mask_PLT = torch.tensor(
        [[[1.0] * len(c) + [0.0] * (length - len(c)) for c in completions] for _, completions in groups]
    )
    batch = {"completion_ids": ids_PLT, "completion_mask": mask_PLT}
    prompt_ids = torch.tensor([[pad_id] * (width - len(p)) + p for p in prompts])
    prompt_mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    if start_id is not None:
        flat = ids_PLT.flatten(0, 1)
        decoder_ids = torch.cat([torch.full((len(flat), 1), start_id), flat[:, :-1]], dim=1)
        return batch | {"input_ids": prompt_ids, "attention_mask": prompt_mask, "decoder_input_ids": decoder_ids}
    num_completions = ids_PLT.shape[1]
    prompt_positions = (prompt_mask.cumsum(dim=1) - 1).clamp(min=0)
    own_positions = prompt_mask.sum(dim=1, keepdim=True) + torch.arange(length)
    return batch | {
        "input_ids": torch.cat([prompt_ids, ids_PLT.flatten(1)], dim=1),
        "position_ids": torch.cat([prompt_positions, own_positions.repeat(1, num_completions)], dim=1),
        "attention_mask": (
            torch.cat([prompt_mask, mask_PLT[:, 0].long()], dim=1)
            if num_completions == 1
            else _shared_prompt_mask(prompt_mask, mask_PLT)
        ),
    }


def _shared_prompt_mask(prompt_mask_PW: Tensor, mask_PLT: Tensor) -> Tensor:
    """Who may attend to whom, (P, 1, S, S) with S = W + L * T: causal, and no completion sees another one."""
    num_completions, length = mask_PLT.shape[1:]
    width = prompt_mask_PW.shape[1]
    block = torch.cat([torch.zeros(width), torch.arange(1, num_completions + 1).repeat_interleave(length)])
    real = torch.cat([prompt_mask_PW.bool(), mask_PLT.flatten(1).bool()], dim=1)
    size = width + num_completions * length
    causal = torch.ones(size, size, dtype=torch.bool).tril()
    related = (block.unsqueeze(0) == 0) | (block.unsqueeze(0) == block.unsqueeze(1))
    allowed = (causal & related) & real.unsqueeze(1)
    # A padding column sees itself: softmax over nothing would be NaN, and NaN times a zero gradient is NaN.
    return (allowed | torch.eye(size, dtype=torch.bool)).unsqueeze(1)


def sequence_logprobs(model: Any, batch: Mapping[str, Tensor], cache: DynamicCache | None = None) -> Tensor:
    """Log pi(completion | prompt) in nats, (P, L) fp32: the sum over the completion's tokens, never over padding.

    `cache` holds what comes before the batch's first column (see `score_rows`).
    """
    ids_PLT, mask_PLT = batch["completion_ids"], batch["completion_mask"]
    if "decoder_input_ids" in batch:
        logits = _decoder_logits(model, batch, num_completions=ids_PLT.shape[1])
        chosen = _chosen(logits, ids_PLT.flatten(0, 1)) * mask_PLT.flatten(0, 1)
        return chosen.sum(dim=1).view(ids_PLT.shape[:2])
    num_prompts, num_completions, length = ids_PLT.shape
    logits = model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        position_ids=batch["position_ids"],
        past_key_values=cache,
        use_cache=cache is not None,
        logits_to_keep=num_completions * length + 1,
    ).logits
    # The prompt's last column predicts every completion's first token; a completion's column predicts its next one.
    first_PL = _chosen(logits[:, :1].expand(-1, num_completions, -1), ids_PLT[:, :, 0])
    following_PLT = ids_PLT.roll(-1, dims=2)  # the last column predicts nothing, and is masked
    rest_PLT = _chosen(logits[:, 1:], following_PLT.flatten(1)).view(num_prompts, num_completions, length)
    return first_PL + (rest_PLT[:, :, :-1] * mask_PLT[:, :, 1:]).sum(dim=2)


def _decoder_logits(model: Any, batch: Mapping[str, Tensor], num_completions: int) -> Tensor:
    """Logits (P * L, T, V) of an encoder-decoder model, which encodes each prompt once."""
    mask, decoder_ids = batch["attention_mask"], batch["decoder_input_ids"]
    if num_completions == 1:
        prompts: dict[str, Any] = {"input_ids": batch["input_ids"], "attention_mask": mask}
    else:
        hidden = model.get_encoder()(input_ids=batch["input_ids"], attention_mask=mask).last_hidden_state
        prompts = {
            "encoder_outputs": BaseModelOutput(last_hidden_state=hidden.repeat_interleave(num_completions, dim=0)),
            "attention_mask": mask.repeat_interleave(num_completions, dim=0),
        }
    return model(**prompts, decoder_input_ids=decoder_ids, use_cache=False).logits


def _chosen(logits: Tensor, ids: Tensor) -> Tensor:
    """Log-probability of `ids` under `logits`, without a tensor of all log-probabilities; fp32."""
    return logits.gather(-1, ids.unsqueeze(-1)).squeeze(-1).float() - logits.float().logsumexp(dim=-1)


@torch.no_grad()
def score_rows(
    model: Any,
    rows: Sequence[tuple[Sequence[int], Sequence[int]]],
    pad_id: int,
    *,
    start_id: int | None,
    device: torch.device,
    batch_rows: int = 16,
) -> Tensor:
    """`sequence_logprobs` of any number of (prompt, completion) rows without gradient, (B,) fp32 on CPU.

    What all prompts begin with is computed once.
    """
    prefix = shared_prefix(model.config, [prompt for prompt, _ in rows])
    n = len(prefix)
    before = prefill_prefix(model, prefix, DynamicCache(config=model.config)) if prefix else None
    by_length = sorted(range(len(rows)), key=lambda i: len(rows[i][0]) + len(rows[i][1]))
    result = torch.empty(len(rows), dtype=torch.float32)
    for begin in range(0, len(rows), batch_rows):
        chunk = by_length[begin : begin + batch_rows]
        batch = collate([(rows[i][0][n:], [rows[i][1]]) for i in chunk], pad_id, start_id=start_id)
        cache = None
        if before is not None:
            cache = repeated(before, len(chunk))
            mask = batch["attention_mask"]
            batch["attention_mask"] = torch.cat([mask.new_ones(len(chunk), n), mask], dim=1)
            batch["position_ids"] = batch["position_ids"] + n
        result[chunk] = sequence_logprobs(model, {k: v.to(device) for k, v in batch.items()}, cache).squeeze(1).cpu()
    return result


@torch.no_grad()
def can_share_prompts(model: Any, device: torch.device, *, distributed: bool = False) -> bool:
    """Whether the model gives completions that share a row the log-probabilities that they have alone.

    It must take a 4-dimensional boolean mask (SDPA does, eager attention does not) and explicit positions. Asked
    of the model itself with a small probe; a model with sliding windows or recurrent layers is refused, since a short
    probe would not show the difference. An encoder-decoder model can always encode a prompt once, but calls its encoder
    by itself then, which sharded engines do not expect.
    """
    if model.config.is_encoder_decoder:
        return not distributed
    if not has_full_attention(model.config):
        return False
    ids = [i % model.config.vocab_size for i in range(11, 31)]
    group: Group = (ids[:6], [ids[6:12], ids[12:20]])
    try:
        together = sequence_logprobs(model, {k: v.to(device) for k, v in collate([group], 0).items()})[0].cpu()
    except (ValueError, RuntimeError, TypeError):  # an attention kernel that takes no such mask
        return False
    alone = score_rows(model, [(group[0], c) for c in group[1]], 0, start_id=None, device=device)
    return bool(((together - alone).abs() <= PROBE_TOLERANCE * alone.abs()).all())
