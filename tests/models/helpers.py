"""Groups of prompts and completions, and their log-probabilities by plain forward passes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import PROMPTS, tiny_causal, tiny_gpt2, tiny_t5, tiny_tokenizer
from torch import Tensor
from transformers import Gemma2Config, Gemma2ForCausalLM

from bondlm.models.logprobs import Group, collate, sequence_logprobs

TOKENIZER = tiny_tokenizer()
MODELS: dict[str, Callable[..., Any]] = {"llama": tiny_causal, "gpt2": tiny_gpt2, "t5": tiny_t5}
CPU = torch.device("cpu")
Row = tuple[list[int], list[int]]


def rows_of_many_lengths() -> list[Row]:
    """Prompts and completions of different lengths; two completions are an EOS (2) alone or hold the padding id (0)."""
    generator = torch.Generator().manual_seed(0)
    prompts = [TOKENIZER.encode(text)[: 3 + 4 * i] for i, text in enumerate(PROMPTS[:8])]
    lengths = [7, 1, 12, 3, 5, 2, 9, 4]
    completions = [torch.randint(3, 300, (n,), generator=generator).tolist() for n in lengths]
    completions[1], completions[5] = [2], [0, 0]
    return list(zip(prompts, completions, strict=True))


ROWS = rows_of_many_lengths()
SINGLE: list[Group] = [(prompt, [completion]) for prompt, completion in ROWS]

# Each prompt with its own completion and the next prompt's.
SHARED: list[Group] = [(prompt, [completion, ROWS[i - 1][1]]) for i, (prompt, completion) in enumerate(ROWS)]
LAYOUTS = [("llama", SINGLE), ("gpt2", SINGLE), ("t5", SINGLE), ("llama", SHARED), ("gpt2", SHARED)]
LAYOUT_IDS = ["llama", "gpt2", "t5", "llama, shared prompts", "gpt2, shared prompts"]
every_layout = pytest.mark.parametrize(("kind", "groups"), LAYOUTS, ids=LAYOUT_IDS)


def start_id(model: Any) -> int | None:
    return int(model.config.decoder_start_token_id) if model.config.is_encoder_decoder else None


def plain_logprob(model: Any, prompt: list[int], completion: list[int]) -> Tensor:
    """One completion, no padding, all logits."""
    if model.config.is_encoder_decoder:
        decoder = [model.config.decoder_start_token_id, *completion[:-1]]
        logits_TV = model(input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([decoder])).logits[0]
    else:
        logits_TV = model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
    return logits_TV.log_softmax(-1)[torch.arange(len(completion)), completion].sum()


def plain_logprobs(model: Any, groups: list[Group]) -> Tensor:
    return torch.stack(
        [torch.stack([plain_logprob(model, list(prompt), list(c)) for c in cs]) for prompt, cs in groups]
    )


def batched(model: Any, groups: list[Group], pad_id: int = 0) -> Tensor:
    return sequence_logprobs(model, collate(groups, pad_id, start_id=start_id(model)))


def capped() -> Gemma2ForCausalLM:
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        final_logit_softcapping=30.0,
    )
    return Gemma2ForCausalLM(config).eval()
