"""Logits are made of the completions' tokens alone, a few at a time, and of no other model than the head's own."""

from typing import Any

import pytest
import torch
from torch import Tensor

from bondlm.models.head import chosen_tokens, exact_head
from bondlm.models.logprobs import Group, collate, sequence_logprobs
from models.helpers import CPU, MODELS, SINGLE, TOKENIZER, batched, capped, every_layout, plain_logprobs, start_id


def counting(head: Any) -> list[int]:
    """Notes how many positions the head makes logits of, call by call."""
    seen: list[int] = []
    plain = head.forward

    def forward(hidden: Tensor) -> Tensor:
        seen.append(hidden.numel() // hidden.shape[-1])
        return plain(hidden)

    head.forward = forward
    return seen


@every_layout
@pytest.mark.parametrize("tokens_at_a_time", [1, 7, 10_000])
def test_the_head_makes_logits_of_the_completions_tokens_alone_a_few_at_a_time(
    kind: str, groups: list[Group], tokens_at_a_time: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Same numbers, same gradients, whatever the budget: and no padding, no prompt, no more than the budget at once."""
    model = MODELS[kind](TOKENIZER)
    expected = batched(model, groups)
    weights = torch.linspace(-1, 1, expected.numel()).view(expected.shape)
    gradients = torch.autograd.grad((weights * expected).sum(), list(model.parameters()))

    monkeypatch.setattr("bondlm.models.head.LOGITS_BUDGET", 4 * model.config.vocab_size * tokens_at_a_time)
    seen = counting(model.lm_head)
    head = exact_head(model, CPU)
    seen.clear()
    logps = sequence_logprobs(model, collate(groups, 0, start_id=start_id(model)), head=head)
    num_tokens = sum(len(c) for _, completions in groups for c in completions)
    assert sum(seen) == num_tokens
    assert max(seen) == min(tokens_at_a_time, num_tokens)
    torch.testing.assert_close(logps, expected, atol=2e-5, rtol=1e-6)
    for a, b in zip(torch.autograd.grad((weights * logps).sum(), list(model.parameters())), gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4 * float(b.abs().max()), rtol=1e-3)


def test_a_model_that_alters_its_logits_keeps_its_own_way() -> None:
    """Gemma 2 caps its logits after the head: log-probabilities made inside the head would be wrong."""
    model = capped()
    assert exact_head(model, CPU) is None
    with torch.no_grad():
        torch.testing.assert_close(batched(model, SINGLE), plain_logprobs(model, SINGLE), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("kind", MODELS)
def test_the_head_is_itself_again_afterwards(kind: str) -> None:
    model = MODELS[kind](TOKENIZER)
    head = exact_head(model, CPU)
    assert head is model.get_output_embeddings()
    assert "forward" not in vars(model.lm_head)
    with pytest.raises(IndexError), chosen_tokens(model.lm_head, torch.tensor([99]), torch.tensor([0])):
        model.lm_head(torch.zeros(1, 2, model.lm_head.in_features))
    assert "forward" not in vars(model.lm_head)
