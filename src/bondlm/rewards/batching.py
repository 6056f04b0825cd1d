"""Length-sorted micro-batches for reward models: less padding, bounded memory, and results in the order of the rows.

Shapes: B rows, T tokens (padded).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

TokenRows = Mapping[str, Sequence[Sequence[int]]]
"""A tokenizer's answer without padding: `input_ids` and perhaps `token_type_ids`, each B rows of ids."""

# Families of transformers whose convolutions, Fourier transforms or pooled keys do not mask padding, or whose head
# reads the last position even if it is padding.
_PADDING_MATTERS = {
    "canine",
    "convbert",
    "fnet",
    "funnel",
    "mobilebert",
    "nystromformer",
    "reformer",
    "xlnet",
    "yoso",
}


def micro_batches(
    lengths: Sequence[int], *, max_rows: int, max_tokens: int, kinds: Sequence[int] | None = None
) -> list[list[int]]:
    """Split row numbers into batches of similar length, the longest rows first.

    The longest come first, so that a batch that does not fit into memory fails at once and not after an hour.

    Args:
        lengths: tokens of each of the B rows.
        max_rows: maximum rows in a batch, at least 1.
        max_tokens: maximum tokens in a batch, padding included. A longer row gets a batch of its own.
        kinds: only rows with the same value share a batch; None means that any may.

    Returns:
        Lists of row numbers; every row occurs once.
    """
    batches: list[list[int]] = []
    kind = [0] * len(lengths) if kinds is None else kinds
    for row in sorted(range(len(lengths)), key=lambda row: (kind[row], -lengths[row])):
        rows = batches[-1] if batches and kind[batches[-1][0]] == kind[row] else None
        if rows is not None and len(rows) < max_rows and (len(rows) + 1) * lengths[rows[0]] <= max_tokens:
            rows.append(row)
        else:
            batches.append([row])
    return sorted(batches, key=lambda rows: -lengths[rows[0]])


def padding_matters(model: Any) -> bool:
    """Whether padding changes what a model of this family computes for the tokens before it."""
    return model.config.model_type in _PADDING_MATTERS


def batch_kinds(model: Any, rows_B: Sequence[Sequence[int]]) -> list[int]:
    """A number for each row; only rows with the same one may share a batch.

    It is the row's length if the model must not be given padding. Otherwise it is the row's count of end-of-sequence
    tokens, which heads like BART's and T5's want equal within a batch.
    """
    if padding_matters(model):
        return [len(ids) for ids in rows_B]
    end = model.config.eos_token_id if model.config.is_encoder_decoder else None
    return [0 if end is None else list(ids).count(end) for ids in rows_B]


def map_micro_batches(
    lengths: Sequence[int],
    run: Callable[[list[int]], Tensor],
    *,
    max_rows: int,
    max_tokens: int,
    kinds: Sequence[int] | None = None,
) -> Tensor:
    """Apply `run` to each micro-batch and put the results back in the order of the rows.

    Args:
        lengths: tokens of each of the B rows, B >= 1.
        run: row numbers (b,) -> tensor (b, ...).
        max_rows: maximum rows in a batch.
        max_tokens: maximum tokens in a batch, padding included.
        kinds: only rows with the same value share a batch; None means that any may.

    Returns:
        Tensor (B, ...).
    """
    batches = micro_batches(lengths, max_rows=max_rows, max_tokens=max_tokens, kinds=kinds)
    results = torch.cat([run(rows) for rows in batches])
    order = torch.tensor([row for rows in batches for row in rows], device=results.device)
    restored = torch.empty_like(results)
    restored[order] = results
    return restored


def pad_right(encoded: TokenRows, rows: Sequence[int], pad_id: int, device: torch.device | str) -> dict[str, Tensor]:
    """Pad the given rows on the right to the longest of them; the mask comes from lengths, never from token ids.

    Returns:
        Tensors (b, T): every entry of `encoded`, and `attention_mask`.
    """
    width = max(len(encoded["input_ids"][row]) for row in rows)
    fill = {"input_ids": pad_id}
    tensors = {
        key: torch.tensor([[*ids[row], *[fill.get(key, 0)] * (width - len(ids[row]))] for row in rows])
        for key, ids in encoded.items()
    }
    lengths = torch.tensor([len(encoded["input_ids"][row]) for row in rows])
    tensors["attention_mask"] = (torch.arange(width) < lengths[:, None]).long()
    return {key: tensor.to(device) for key, tensor in tensors.items()}


def head_pad_id(model: Any, tokenizer: Any) -> int | None:
    """Pad id by which a classification head finds each row's last token; None means that rows are scored one by one.

    Decoder-type classifiers of transformers read the logit at the last token that differs from `config.pad_token_id`.
    The config's value is the one that the model was trained with. If there is none, the tokenizer's is written into the
    config, unless it is the end-of-sequence token: a final end-of-sequence token would then be skipped in a batch but
    read for a single row.
    """
    config = model.config.get_text_config()
    if config.pad_token_id is None and tokenizer.pad_token_id not in (None, tokenizer.eos_token_id):
        config.pad_token_id = tokenizer.pad_token_id
    pad_id: int | None = config.pad_token_id
    return None if pad_id is None or pad_id < 0 else pad_id  # -1 (old LLaMA checkpoints) is no token
