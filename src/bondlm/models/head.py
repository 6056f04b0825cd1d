"""Apply the language-model head only to the tokens that count, in pieces, so that logits stay within a fixed budget.

A head makes V numbers for every position, with a vocabulary of 50,000 to 250,000 by far the largest tensors of a step,
but a log-probability needs only two of them: the token's logit and the sum. So inside `chosen_tokens` the head returns
log-probabilities of given tokens instead of logits. This happens inside the model's own forward pass, so that wrappers
(adapters, DDP, FSDP) see an ordinary call.

Shapes: F tokens, S positions that the head is called with, D hidden size, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bondlm.models.facts import vocabulary_size

LOGITS_BUDGET = 2**28  # bytes of fp32 logits at a time


def positions_in_budget(vocab_size: int) -> int:
    """Number of positions whose logits fit into the budget, at least one."""
    return max(1, LOGITS_BUDGET // (4 * vocab_size))


def chosen_logprobs(logits: Tensor, ids: Tensor) -> Tensor:
    """Log-probability of `ids` under `logits`, without a tensor of all log-probabilities; fp32."""
    return logits.gather(-1, ids.unsqueeze(-1)).squeeze(-1).float() - logits.float().logsumexp(dim=-1)


@contextmanager
def chosen_tokens(head: nn.Module, position_F: Tensor, ids_F: Tensor) -> Iterator[None]:
    """Let `head` return the log-probabilities (F, 1) of the tokens `ids_F`, fp32.

    Token i is predicted at `position_F[i]` of the flattened positions (S) that the head is called with. With a gradient
    and more than one piece, the logits of a piece are recomputed in the backward pass instead of kept.
    """
    plain = head.forward
    size = positions_in_budget(cast(int, head.out_features))

    def piece(hidden_FD: Tensor, ids: Tensor) -> Tensor:
        return chosen_logprobs(plain(hidden_FD), ids)

    def forward(hidden: Tensor) -> Tensor:
        hidden_FD = hidden.flatten(0, -2)[position_F]
        if len(ids_F) <= size:
            return piece(hidden_FD, ids_F).unsqueeze(1)
        pieces = zip(hidden_FD.split(size), ids_F.split(size), strict=True)
        return torch.cat([checkpoint(piece, h, i, use_reentrant=False) for h, i in pieces]).unsqueeze(1)

    with _replaced(head, forward):
        yield


@torch.no_grad()
def exact_head(model: Any, device: torch.device) -> nn.Module | None:
    """The head of a model whose logits are what its head returns; None for one that alters them (caps, scales).

    This is tested on the model: it gets a head that returns known numbers, which must come out unchanged.
    """
    head = model.get_output_embeddings()
    if not hasattr(head, "out_features"):
        return None
    known = torch.tensor([[-1000.5], [-3.25], [0.125]], device=device)
    ids = torch.tensor([[1, 2, 3]], device=device) % vocabulary_size(model.config)
    inputs = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with _replaced(head, lambda hidden: known):
        try:
            seen = model(input_ids=ids, use_cache=False, **inputs).logits
        except (RuntimeError, IndexError):  # it does more with its logits than pass them on
            return None
    return head if seen.shape == known.shape and torch.equal(seen.float(), known) else None


@contextmanager
def _replaced(head: nn.Module, forward: Any) -> Iterator[None]:
    before = head.__dict__.get("forward")  # set by accelerate or an offloading hook, usually absent
    head.forward = forward
    try:
        yield
    finally:
        if before is None:
            del head.forward
        else:
            head.forward = before
