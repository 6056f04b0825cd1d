"""Scoring stays within memory: fewer rows after an error, and few logits at a time where all of them must be made."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import tiny_causal
from transformers import BartConfig, BartForConditionalGeneration, CohereConfig, CohereForCausalLM

from bondlm.errors import ResourceError
from bondlm.models.head import exact_head
from bondlm.models.logprobs import group_logprobs
from models.helpers import CPU, MODELS, SHARED, SINGLE, TOKENIZER, capped, plain_logprobs, start_id

VOCABULARY = 300


def rows_seen(model: Any, most: int = 10**9) -> list[int]:
    """The rows of each forward pass; more than `most` fail as on a GPU that is full."""
    seen: list[int] = []

    def check(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        rows = len(kwargs.get("decoder_input_ids", kwargs["input_ids"]))
        if rows > most:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        seen.append(rows)

    model.register_forward_pre_hook(check, with_kwargs=True)
    return seen


@pytest.mark.parametrize("kind", MODELS)
def test_out_of_memory_while_scoring_halves_the_rows_and_changes_no_logprob(kind: str) -> None:
    model = MODELS[kind](TOKENIZER)
    seen = rows_seen(model, most=3)
    with pytest.warns(UserWarning, match=r"out of memory.*\b8 completions.*\b4\b"):
        logprobs = group_logprobs(model, SINGLE, 0, start_id=start_id(model), device=CPU)
    assert logprobs == pytest.approx(plain_logprobs(model, SINGLE).detach(), abs=1e-4)
    assert max(seen) == 2


@pytest.mark.filterwarnings("ignore:bondlm. out of memory")
def test_out_of_memory_while_one_prompt_is_scored_says_what_to_do() -> None:
    model = tiny_causal(TOKENIZER)
    rows_seen(model, most=1)
    assert group_logprobs(model, SHARED, 0, start_id=None, device=CPU).isfinite().all()
    model = tiny_causal(TOKENIZER)
    rows_seen(model, most=0)
    with pytest.raises(ResourceError, match=r"out of memory.* tokens.*max_completion_length"):
        group_logprobs(model, SINGLE[:3], 0, start_id=None, device=CPU)


@pytest.mark.filterwarnings("ignore:bondlm. out of memory")
def test_completions_of_a_prompt_that_does_not_fit_are_scored_in_rows_of_their_own() -> None:
    model = tiny_causal(TOKENIZER)
    expected, seen = plain_logprobs(model, SHARED).detach(), list[torch.Size]()
    most = max(len(prompt) + len(c) for prompt, cs in SHARED for c in cs)  # less than a row of two

    def check(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        seen.append(kwargs["input_ids"].shape)
        if seen[-1].numel() > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    model.register_forward_pre_hook(check, with_kwargs=True)
    logprobs = group_logprobs(model, SHARED, 0, start_id=None, device=CPU)
    assert logprobs == pytest.approx(expected, abs=1e-4)
    assert any(shape.numel() > most and shape[0] == 1 for shape in seen)


def logits_seen(model: Any) -> list[int]:
    """The numbers in each tensor of logits that the head makes."""
    seen: list[int] = []
    model.get_output_embeddings().register_forward_hook(lambda module, args, out: seen.append(out.numel()))
    return seen


def scaled() -> Any:
    """Cohere scales its logits after the head; all of its layers see all tokens, so prompts can be shared."""
    torch.manual_seed(0)
    config = CohereConfig(
        **{"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "logit_scale": 0.5, "initializer_range": 0.3},
        **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    )
    return CohereForCausalLM(config).eval()


def biased() -> Any:
    """Bart adds a bias to its logits after the head."""
    torch.manual_seed(0)
    config = BartConfig(
        **{"vocab_size": VOCABULARY, "d_model": 32, "max_position_embeddings": 64, "init_std": 0.3},
        **{"encoder_layers": 1, "encoder_attention_heads": 4, "encoder_ffn_dim": 64},
        **{"decoder_layers": 1, "decoder_attention_heads": 4, "decoder_ffn_dim": 64},
    )
    model = BartForConditionalGeneration(config).eval()
    model.final_logits_bias.normal_()
    return model


@pytest.mark.parametrize(
    ("build", "groups"),
    [(capped, SINGLE), (scaled, SINGLE), (scaled, SHARED), (biased, SHARED)],
    ids=["gemma 2", "cohere", "cohere, shared prompts", "bart"],
)
def test_logprobs_of_a_model_that_alters_its_logits_stay_within_the_budget(
    build: Callable[[], Any], groups: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build()
    assert exact_head(model, CPU) is None
    seen = logits_seen(model)
    how: dict[str, Any] = {"start_id": start_id(model), "device": CPU}
    expected = group_logprobs(model, groups, 0, **how)
    budget = 60 * VOCABULARY
    assert max(seen) > budget  # without one it makes more
    seen.clear()
    monkeypatch.setattr("bondlm.models.head.LOGITS_BUDGET", 4 * budget)
    torch.testing.assert_close(group_logprobs(model, groups, 0, **how), expected, atol=1e-4, rtol=1e-5)
    assert budget / 4 < max(seen) <= budget
