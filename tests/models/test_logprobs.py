"""Batched log-probabilities against one plain forward pass a completion.

Shapes: P prompts, L completions of each in one row (L = 1: a completion a row; L = 2: they share their prompt).
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import PROMPTS, tiny_causal, tiny_gpt2, tiny_t5
from torch import Tensor
from transformers import MistralConfig, MistralForCausalLM

from bondlm.models.logprobs import Group, collate, group_logprobs, row_logprobs, sequence_logprobs
from bondlm.models.prefix import shared_prefix
from bondlm.models.probe import check_model
from models.helpers import CPU, MODELS, ROWS, SHARED, SINGLE, TOKENIZER, batched, every_layout, plain_logprobs, start_id


@every_layout
@torch.no_grad()
def test_equal_to_a_plain_forward_of_each_completion(kind: str, groups: list[Group]) -> None:
    model = MODELS[kind](TOKENIZER)
    logprobs = batched(model, groups)
    assert logprobs.dtype == torch.float32
    torch.testing.assert_close(logprobs, plain_logprobs(model, groups), atol=5e-5, rtol=1e-6)


@every_layout
@torch.no_grad()
def test_batches_of_one_and_of_eight_agree(kind: str, groups: list[Group]) -> None:
    model = MODELS[kind](TOKENIZER)
    alone = torch.cat([batched(model, [group]) for group in groups])
    per_token = torch.tensor([[len(c) for c in completions] for _, completions in groups])
    assert float(((batched(model, groups) - alone) / per_token).abs().max()) < 1e-5


@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_row_logprobs_do_not_depend_on_batch_or_order(kind: str) -> None:
    model = MODELS[kind](TOKENIZER)
    alone = torch.cat([batched(model, [group]) for group in SINGLE])[:, 0]
    per_token = torch.tensor([len(completion) for _, completion in ROWS])
    for size in (1, 3, 8):
        logprobs = row_logprobs(model, ROWS, 0, start_id=start_id(model), device=CPU, batch_rows=size)
        assert float(((logprobs - alone) / per_token).abs().max()) < 1e-5
    order = [5, 2, 7, 0, 1, 6, 3, 4]
    shuffled = row_logprobs(model, [ROWS[i] for i in order], 0, start_id=start_id(model), device=CPU, batch_rows=3)
    assert float((shuffled - alone[order]).abs().max()) < 1e-4


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("prefix", [0, 9])
def test_groups_that_share_a_prompt_score_as_plain_forwards_do(kind: str, prefix: int) -> None:
    model = MODELS[kind](TOKENIZER)
    common = TOKENIZER.encode(PROMPTS[9])[:prefix]
    groups: list[Group] = [([*common, *prompt], completions) for prompt, completions in SHARED]
    assert bool(shared_prefix(model.config, [p for p, _ in groups])) == (prefix > 0 and kind != "t5")
    logprobs = group_logprobs(model, groups, 0, start_id=start_id(model), device=CPU, batch_rows=6)
    assert logprobs == pytest.approx(plain_logprobs(model, groups).detach(), abs=1e-4)


def test_row_logprobs_need_no_gradient() -> None:
    assert not row_logprobs(tiny_causal(TOKENIZER), ROWS, 0, start_id=None, device=CPU).requires_grad


@every_layout
@torch.no_grad()
def test_the_padding_id_changes_nothing(kind: str, groups: list[Group]) -> None:
    """Not even when it is the end-of-sequence id, or a token of the completions."""
    model = MODELS[kind](TOKENIZER)
    expected = batched(model, groups, pad_id=0)
    for pad_id in (2, ROWS[0][1][0]):
        torch.testing.assert_close(batched(model, groups, pad_id=pad_id), expected, atol=1e-5, rtol=1e-6)


@every_layout
def test_gradient_equals_the_sum_of_the_completions_gradients(kind: str, groups: list[Group]) -> None:
    model = MODELS[kind](TOKENIZER)
    weights = torch.linspace(-1, 1, 8 * len(groups[0][1])).view(8, -1)
    parameters = list(model.parameters())
    together = torch.autograd.grad((weights * batched(model, groups)).sum(), parameters)
    apart = torch.autograd.grad((weights * plain_logprobs(model, groups)).sum(), parameters)
    for a, b in zip(together, apart, strict=True):
        assert float(b.abs().max()) > 0
        torch.testing.assert_close(a, b, atol=1e-4 * float(b.abs().max()), rtol=1e-3)


def as_lists(batch: dict[str, Tensor]) -> dict[str, Any]:
    return {name: tensor.tolist() for name, tensor in batch.items()}


def test_collate_by_hand() -> None:
    groups: list[Group] = [([5, 6], [[7]]), ([8], [[9, 2, 2]])]
    completions = {
        "completion_ids": [[[7, 2, 2]], [[9, 2, 2]]],
        "completion_mask": [[[1.0, 0.0, 0.0]], [[1.0, 1.0, 1.0]]],
    }
    assert as_lists(collate(groups, 2)) == completions | {
        "input_ids": [[5, 6, 7, 2], [8, 9, 2, 2]],
        "attention_mask": [[1, 1, 1, 0], [1, 1, 1, 1]],
        "position_ids": [[0, 1, 2, 3], [0, 1, 2, 3]],
        "predictor": [[[1, 2, 3]], [[0, 1, 2]]],
        "logits_to_keep": [0, 1, 2, 3],
    }
    assert as_lists(collate(groups, 2, start_id=1)) == completions | {
        "input_ids": [[5, 6], [8, 2]],
        "attention_mask": [[1, 1], [1, 0]],
        "decoder_input_ids": [[1, 7, 2], [1, 9, 2]],
    }


def test_rows_are_padded_to_a_multiple_and_no_position_lies_beyond_the_last_real_one() -> None:
    groups: list[Group] = [([5, 6], [[7]]), ([8], [[9, 2, 2]])]
    plain, wide = (as_lists(collate(groups, 2, multiple=multiple)) for multiple in (1, 3))
    assert wide["input_ids"] == [[5, 6, 7, 2, 2, 2], [8, 9, 2, 2, 2, 2]]
    assert wide["attention_mask"] == [[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0]]
    assert wide["position_ids"] == [[0, 1, 2, 3, 3, 3]] * 2
    assert [wide[name] for name in ("completion_ids", "predictor")] == [plain["completion_ids"], plain["predictor"]]


@pytest.mark.parametrize("multiple", [1, 7])
@torch.no_grad()
def test_padding_stays_in_a_table_of_positions(multiple: int) -> None:
    """Beside a row of many long completions a short one's padding would count on from its last completion."""
    model = tiny_gpt2(TOKENIZER)
    longest = model.config.n_positions
    groups: list[Group] = [([5] * (longest - 20), [[6] * 20, [7] * 9, [8] * 20]), ([9, 4], [[6, 3], [7], [8, 5]])]
    logprobs = group_logprobs(model, groups, 0, start_id=None, device=CPU, multiple=multiple)
    torch.testing.assert_close(logprobs, plain_logprobs(model, groups), atol=1e-4, rtol=1e-6)


def test_collate_of_shared_prompts_by_hand() -> None:
    batch = as_lists(collate([([5, 6], [[7, 8], [9]]), ([3], [[4], [1]])], 0))
    assert batch["input_ids"] == [[5, 6, 7, 8, 9], [3, 4, 1, 0, 0]]
    assert batch["position_ids"] == [[0, 1, 2, 3, 2], [0, 1, 1, 2, 3]]
    assert batch["predictor"] == [[[1, 2], [1, 4]], [[0, 1], [0, 2]]]  # of the padding: anything inside the row
    assert batch["logits_to_keep"] == [0, 1, 2, 3, 4]
    # Rows attend to columns.
    assert [[int(x) for x in row] for row in batch["attention_mask"][0][0]] == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 0, 0, 1],
    ]
    assert [[int(x) for x in row[:3]] for row in batch["attention_mask"][1][0][:3]] == [[1, 0, 0], [1, 1, 0], [1, 0, 1]]


def tiny_mistral(**settings: Any) -> MistralForCausalLM:
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        **settings,
    )
    return MistralForCausalLM(config).eval()


def eager(model: Any) -> Any:
    model.set_attn_implementation("eager")
    return model


SHARING: dict[str, tuple[Callable[[], Any], bool]] = {
    "llama": (lambda: tiny_causal(TOKENIZER), True),
    "llama in bf16": (lambda: tiny_causal(TOKENIZER, dtype=torch.bfloat16), True),
    "gpt2": (lambda: tiny_gpt2(TOKENIZER), True),
    "mistral": (lambda: tiny_mistral(sliding_window=None), True),
    "t5": (lambda: tiny_t5(TOKENIZER), True),
    "eager llama": (lambda: eager(tiny_causal(TOKENIZER)), False),
    "eager gpt2": (lambda: eager(tiny_gpt2(TOKENIZER)), False),
    "sliding window": (lambda: tiny_mistral(sliding_window=4096), False),
}


@pytest.mark.parametrize(("build", "shares"), SHARING.values(), ids=SHARING.keys())
def test_prompts_are_shared_only_by_models_that_honour_the_mask(build: Callable[[], Any], shares: bool) -> None:
    model = build()
    assert check_model(model, CPU, is_noise_allowed=True) == shares
    assert check_model(model, CPU, is_noise_allowed=True, distributed=True) == (
        shares and not model.config.is_encoder_decoder
    )


@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_bf16_logits_are_summed_up_in_fp32(kind: str) -> None:
    """The sum over tokens of bf16 numbers would be off by whole percents; what is left is the logits' own rounding."""
    model = MODELS[kind](TOKENIZER, dtype=torch.bfloat16)
    captured: list[Tensor] = []
    model.register_forward_hook(lambda module, args, out: captured.append(out.logits))
    batch = collate(SINGLE, 0, start_id=start_id(model))
    logprobs = sequence_logprobs(model, batch)[:, 0]
    ids, mask = batch["completion_ids"][:, 0], batch["completion_mask"][:, 0]
    assert captured[0].dtype == torch.bfloat16
    logits = captured[0]
    if kind != "t5":
        columns = (batch["predictor"][:, 0] - batch["logits_to_keep"][0]).clamp(max=logits.shape[1] - 1)
        logits = logits.gather(1, columns.unsqueeze(2).expand(-1, -1, logits.shape[2]))
    exact = logits.double().log_softmax(-1).gather(2, ids[:, :, None])[:, :, 0]
    torch.testing.assert_close(logprobs.double(), (exact * mask).sum(1), atol=1e-4, rtol=1e-6)


@pytest.mark.parametrize(("length", "num_passes"), [(9, 1), (60, 2), (200, 3)])
def test_short_rows_are_scored_together_and_long_ones_sixteen_at_a_time(length: int, num_passes: int) -> None:
    """48 rows without a common beginning: at most 2,048 tokens a pass, or 16 rows; no number depends on it."""
    model = tiny_causal(TOKENIZER)
    groups: list[Group] = [([10 + i] * (length - 3), [[6, 7, 8]]) for i in range(48)]
    expected = group_logprobs(model, groups, 0, start_id=None, device=CPU, batch_rows=1)
    passes = list[int]()
    hook = model.model.register_forward_hook(lambda module, args, out: passes.append(len(out.last_hidden_state)))
    logprobs = group_logprobs(model, groups, 0, start_id=None, device=CPU)
    hook.remove()
    assert passes[0] == 1  # `exact_head` asks the model
    assert len(passes[1:]) == num_passes
    assert sum(passes[1:]) == 48
    torch.testing.assert_close(logprobs, expected, atol=1e-5, rtol=1e-6)
