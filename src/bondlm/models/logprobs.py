"""Log-probabilities of given completions, under the policy for learning, and under the anchor and the reference.

Shapes: P prompts, L completions of each, S columns of a row, T tokens of a completion, F completion tokens in all.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from bondlm.models.facts import takes_argument, vocabulary_size
from bondlm.models.head import chosen_logprobs, chosen_tokens, exact_head, positions_in_budget
from bondlm.models.memory import try_or_halve
from bondlm.models.prefix import prefill_prefix, repeated, shared_prefix
from bondlm.models.ways import ways_of

Group = tuple[Sequence[int], Sequence[Sequence[int]]]  # (prompt ids, the ids of its completions)


def collate(
    groups: Sequence[Group], pad_id: int, *, start_id: int | None = None, multiple: int = 1
) -> dict[str, Tensor]:
    """Tensors of one forward pass; every mask comes from lengths, since `pad_id` may be an end-of-sequence id.

    A causal row is [prompt | completion 1 | ... | completion L], padded right. Each completion sees only the prompt and
    itself, so that the prompt is computed once for all of them. For encoder-decoder models `start_id` is given, and
    prompts (P rows) and completions (P * L rows) are separate. The number of columns of a causal row is a multiple of
    `multiple`.

    Returns:
        The model's inputs, `completion_ids` and `completion_mask` (P, L, T), and for causal models `predictor`
        (P, L, T), the column whose logits predict each token, and `logits_to_keep`, the columns from the first of them.
    """
    length = max(len(c) for _, completions in groups for c in completions)
    ids_PLT = torch.tensor([[list(c) + [pad_id] * (length - len(c)) for c in completions] for _, completions in groups])
    mask_PLT = torch.tensor(
        [[[1.0] * len(c) + [0.0] * (length - len(c)) for c in completions] for _, completions in groups]
    )
    batch = {"completion_ids": ids_PLT, "completion_mask": mask_PLT}
    if start_id is not None:
        flat = ids_PLT.flatten(0, 1)
        decoder_ids = torch.cat([torch.full((len(flat), 1), start_id), flat[:, :-1]], dim=1)
        prompt_ids, prompt_mask = _padded([list(prompt) for prompt, _ in groups], pad_id)
        return batch | {"input_ids": prompt_ids, "attention_mask": prompt_mask, "decoder_input_ids": decoder_ids}
    rows = [[*prompt, *(token for c in completions for token in c)] for prompt, completions in groups]
    input_ids, mask_PS = _padded(rows, pad_id, multiple)
    prompt_P1 = torch.tensor([[len(prompt)] for prompt, _ in groups])
    # A completion comes after the prompt and the previous completions, but its positions continue from the prompt.
    lengths_PL = mask_PLT.sum(dim=2).long()
    begins_PL = prompt_P1 + lengths_PL.cumsum(dim=1) - lengths_PL
    steps_T = torch.arange(length)
    predictor = torch.where(steps_T == 0, prompt_P1.unsqueeze(2) - 1, begins_PL.unsqueeze(2) + steps_T - 1)
    column_S = torch.arange(input_ids.shape[1])
    block_PS = (column_S >= begins_PL.unsqueeze(2)).sum(dim=1)  # 0 in the prompt, l in completion l
    shift_PS = (begins_PL - prompt_P1).gather(1, (block_PS - 1).clamp(min=0)) * (block_PS > 0)
    last = int((prompt_P1 + lengths_PL).max()) - 1  # keeps padding inside the model's position table
    num_completions = ids_PLT.shape[1]
    return batch | {
        "input_ids": input_ids,
        "position_ids": (column_S - shift_PS).clamp(max=last),
        "attention_mask": mask_PS if num_completions == 1 else _shared_prompt_mask(block_PS),
        "predictor": predictor,
        "logits_to_keep": column_S[int(prompt_P1.min()) - 1 :],
    }


def by_length(groups: Sequence[Group]) -> list[int]:
    """Indices in order of length, so that a batch of neighbours has little padding."""
    return sorted(range(len(groups)), key=lambda i: len(groups[i][0]) + sum(map(len, groups[i][1])))


def _padded(rows: Sequence[Sequence[int]], pad_id: int, multiple: int = 1) -> tuple[Tensor, Tensor]:
    """Ids and mask (P, S), padded right."""
    width = multiple * math.ceil(max(map(len, rows)) / multiple)
    ids = torch.tensor([[*row, *[pad_id] * (width - len(row))] for row in rows])
    return ids, torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])


def _shared_prompt_mask(block_PS: Tensor) -> Tensor:
    """The attention mask (P, 1, S, S): causal, with the prompt visible to all, and no completion to another.

    Padding comes last, so that no real column sees it. It sees itself, because softmax over nothing would be NaN.
    """
    size = block_PS.shape[1]
    causal = torch.ones(size, size, dtype=torch.bool).tril()
    related = (block_PS.unsqueeze(1) == 0) | (block_PS.unsqueeze(1) == block_PS.unsqueeze(2))
    return (causal & related).unsqueeze(1)


def sequence_logprobs(
    model: Any, batch: Mapping[str, Tensor], cache: DynamicCache | None = None, head: nn.Module | None = None
) -> Tensor:
    """Log pi(completion | prompt) in nats, (P, L) fp32: the sum of `token_logprobs` over the completion's tokens."""
    return token_logprobs(model, batch, cache, head).sum(dim=2)


def token_logprobs(
    model: Any, batch: Mapping[str, Tensor], cache: DynamicCache | None = None, head: nn.Module | None = None
) -> Tensor:
    """Log pi of each token of the completions in nats, (P, L, T) fp32, 0 at padding.

    `cache` holds what comes before the batch's first column (`row_logprobs`). With `head` (`exact_head`), logits are
    made only for the completions' tokens, within a fixed memory budget; without it, for all columns from the first of
    these.
    """
    ids_PLT, mask_PLT = batch["completion_ids"], batch["completion_mask"]
    real_PLT = mask_PLT.bool()
    call, position_PLT = _model_call(model, batch, cache)
    position_F, ids_F = position_PLT[real_PLT], ids_PLT[real_PLT]
    if head is not None:
        with chosen_tokens(head, position_F, ids_F):
            logp_F = model(**call).logits.squeeze(-1)
    else:
        logp_F = chosen_logprobs(model(**call).logits.flatten(0, 1)[position_F], ids_F)
    return torch.zeros_like(mask_PLT).masked_scatter(real_PLT, logp_F)


def completion_logits(model: Any, batch: Mapping[str, Tensor], cache: DynamicCache | None = None) -> Tensor:
    """Logits of each token of the completions (P, L, T, V); values at padding are meaningless.

    Mask and positions may be missing; the model then makes its own.
    """
    call, position_PLT = _model_call(model, batch, cache)
    flat = model(**call).logits.flatten(0, 1)
    return flat[position_PLT.clamp(max=len(flat) - 1)]


def _model_call(model: Any, batch: Mapping[str, Tensor], cache: DynamicCache | None) -> tuple[dict[str, Any], Tensor]:
    """The model's arguments, and the index in its flattened logits that predicts each token (P, L, T)."""
    ids_PLT = batch["completion_ids"]
    if "decoder_input_ids" in batch:
        return _decoder_inputs(model, batch), torch.arange(ids_PLT.numel(), device=ids_PLT.device).view(ids_PLT.shape)
    names = ("input_ids", "attention_mask", "position_ids")
    call: dict[str, Any] = {name: batch[name] for name in names if name in batch}
    call["use_cache"] = cache is not None
    if cache is not None:
        call["past_key_values"] = cache
    columns, width = batch["logits_to_keep"], batch["input_ids"].shape[1]
    if takes_argument(model, "logits_to_keep"):
        call["logits_to_keep"] = columns
    else:  # it makes logits for all columns
        columns = torch.arange(width, device=columns.device)
    row_P11 = torch.arange(len(ids_PLT), device=ids_PLT.device).view(-1, 1, 1)
    return call, row_P11 * len(columns) + batch["predictor"] - columns[0]


def _decoder_inputs(model: Any, batch: Mapping[str, Tensor]) -> dict[str, Any]:
    """The inputs of an encoder-decoder model; each prompt is encoded once."""
    num_completions, mask = batch["completion_ids"].shape[1], batch.get("attention_mask")
    if mask is None:
        return {"decoder_input_ids": batch["decoder_input_ids"], "input_ids": batch["input_ids"], "use_cache": False}
    inputs = {"decoder_input_ids": batch["decoder_input_ids"], "attention_mask": mask, "use_cache": False}
    if num_completions == 1:
        return inputs | {"input_ids": batch["input_ids"]}
    out = model.get_encoder()(input_ids=batch["input_ids"], attention_mask=mask)
    encoded = type(out)(last_hidden_state=out.last_hidden_state.repeat_interleave(num_completions, dim=0))
    return inputs | {"encoder_outputs": encoded, "attention_mask": mask.repeat_interleave(num_completions, dim=0)}


@torch.no_grad()
def group_logprobs(
    model: Any,
    groups: Sequence[Group],
    pad_id: int,
    *,
    start_id: int | None,
    device: torch.device,
    batch_rows: int | None = None,
    multiple: int = 1,
) -> Tensor:
    """`sequence_logprobs` of any number of prompts with L completions each, without gradient, (P, L) fp32 on CPU.

    A common beginning of all prompts is computed once. At most `batch_rows` completions go through the model together
    (None: 16, or more if they are short); fewer after an out-of-memory error, or if a model that alters its logits
    would make too many of them. With L > 1, completions share their prompt's row (see `bondlm.models.probe`) as long as
    that fits into memory. Rows are padded to a `multiple` (`collate`).

    Raises:
        ResourceError: not even one completion fits into the memory.
    """
    prefix = shared_prefix(model.config, [prompt for prompt, _ in groups]) if ways_of(model).prefix else []
    n = len(prefix)
    before = prefill_prefix(model, prefix, DynamicCache(config=model.config)) if prefix else None
    head = exact_head(model, device)
    whole, groups = groups, [(prompt[n:], completions) for prompt, completions in groups]
    num_completions = len(groups[0][1])
    result = torch.empty(len(groups), num_completions, dtype=torch.float32)
    collated = partial(collate, pad_id=pad_id, start_id=start_id, multiple=multiple)
    pending = by_length(groups)[::-1]  # longest first, so that running out of memory happens at once
    size = max(1, (batch_rows or _rows_together(n, groups[pending[0]])) // num_completions)
    while pending:
        chunk = pending[:size]
        if head is None:
            chunk = chunk[: within_budget(model, [groups[i] for i in chunk], multiple)]
        scored = [groups[i] for i in chunk]
        scores, fitting = try_or_halve(
            partial(_chunk_logprobs, model, scored, collated, device, n, before, head),
            len(chunk) * num_completions,
            "completions",
            doing="scoring",
            advice=f"its prompt has {len(scored[0][0])} tokens and it has up to {max(map(len, scored[0][1]))}: use a "
            "smaller model or dtype, or a smaller max_completion_length",
        )
        if scores is not None:
            result[chunk], pending = scores, pending[len(chunk) :]
            continue
        size = fitting // num_completions
        if size == 0:  # not even one prompt fits: put each completion into its own row
            apart: list[Group] = [(whole[i][0], [completion]) for i in pending for completion in whole[i][1]]
            how: dict[str, Any] = {"start_id": start_id, "device": device, "multiple": multiple}
            logp = group_logprobs(model, apart, pad_id, batch_rows=fitting, **how)
            result[pending], pending = logp.view(-1, num_completions), []
    return result


def _rows_together(num_before: int, longest: Group) -> int:
    """Rows per pass: with rows so short that overhead dominates, up to 256 rows with 2,048 tokens in total."""
    prompt, completions = longest
    return min(256, max(16, 2048 // (num_before + len(prompt) + max(map(len, completions)))))


def _chunk_logprobs(
    model: Any,
    groups: Sequence[Group],
    collated: Callable[[Sequence[Group]], dict[str, Tensor]],
    device: torch.device,
    num_before: int,
    before: DynamicCache | None,
    head: nn.Module | None,
) -> Tensor:
    """One forward pass."""
    batch, cache = collated(groups), None
    if before is not None:
        cache = repeated(before, len(groups))
        batch = batch_behind_prefix(batch, num_before)
    return sequence_logprobs(model, {k: v.to(device) for k, v in batch.items()}, cache, head).cpu()


def within_budget(model: Any, groups: Sequence[Group], multiple: int = 1) -> int:
    """How many of these groups, at least one, fit into the budget of a model that makes all logits."""
    num_positions = positions_in_budget(vocabulary_size(model.config))
    fitting = (n for n in range(len(groups), 1, -1) if logit_positions(model, groups[:n], multiple) <= num_positions)
    return next(fitting, 1)


def padded_tokens(groups: Sequence[Group], *, is_encoder_decoder: bool, multiple: int = 1) -> int:
    """Tokens of a forward pass over these rows (`collate`), padding included."""
    if is_encoder_decoder:
        longest = max(len(c) for _, completions in groups for c in completions)
        return len(groups) * (max(len(prompt) for prompt, _ in groups) + len(groups[0][1]) * longest)
    return len(groups) * _width(groups, multiple)


def logit_positions(model: Any, groups: Sequence[Group], multiple: int = 1) -> int:
    """Positions for which a forward pass over these rows makes logits, without a head for only the chosen tokens."""
    if model.config.is_encoder_decoder:
        return sum(len(cs) for _, cs in groups) * max(len(c) for _, cs in groups for c in cs)
    columns = _width(groups, multiple)
    if takes_argument(model, "logits_to_keep"):  # from the last token of the shortest prompt on
        columns -= min(len(prompt) for prompt, _ in groups) - 1
    return len(groups) * columns


def _width(groups: Sequence[Group], multiple: int) -> int:
    return multiple * math.ceil(max(len(prompt) + sum(map(len, cs)) for prompt, cs in groups) / multiple)


def batch_behind_prefix(batch: dict[str, Tensor], n: int) -> dict[str, Tensor]:
    """The batch after `n` tokens that all may attend to; columns count from the end of these and are unchanged."""
    mask = batch["attention_mask"]
    if mask.dim() == 2:
        mask = torch.cat([mask.new_ones(len(mask), n), mask], dim=1)
    else:
        mask = torch.cat([mask.new_ones(*mask.shape[:3], n), mask], dim=3)
    return batch | {"attention_mask": mask, "position_ids": batch["position_ids"] + n}


def row_logprobs(model: Any, rows: Sequence[tuple[Sequence[int], Sequence[int]]], pad_id: int, **how: Any) -> Tensor:
    """`group_logprobs` of (prompt, completion) rows, (B,)."""
    return group_logprobs(model, [(prompt, [completion]) for prompt, completion in rows], pad_id, **how).squeeze(1)
