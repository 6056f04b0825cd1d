"""Tokenizer, embedding, head and config: what does not fit is refused before anything is sampled."""

from collections.abc import Callable
from typing import Any

import pytest
from tiny import tiny_causal, tiny_t5, tiny_tokenizer
from torch import nn

from bondlm.data.prompt_encoder import PromptEncoder
from bondlm.data.vocabulary import Sizes
from bondlm.errors import ConfigError, DataError


def encoder(model: Any, tokenizer: Any) -> PromptEncoder:
    return PromptEncoder.of_model(model, tokenizer, max_completion_length=8)


@pytest.mark.parametrize("build", [tiny_causal, tiny_t5])
def test_a_model_of_the_tokenizers_size_or_a_larger_one_fits(build: Callable[..., Any]) -> None:
    tokenizer = tiny_tokenizer()
    model = build(tokenizer)
    assert encoder(model, tokenizer).sizes == Sizes(prompt=300, completion=300, head=300)
    model.resize_token_embeddings(320)
    assert encoder(model, tokenizer).sizes == Sizes(prompt=320, completion=320, head=320)


def test_tokens_that_the_model_lacks_are_refused_where_a_row_has_them() -> None:
    """Gemma's tokenizer has a token for images that its text models lack: texts without it are fine."""
    tokenizer = tiny_tokenizer()
    model = tiny_causal(tokenizer)
    tokenizer.add_tokens(["<think>"])
    made = encoder(model, tokenizer)
    assert made.encode(["fine"])
    with pytest.raises(DataError, match=r"resize_token_embeddings\(301\).*\nrow 1: '<think>' \(id 300\)"):
        made.encode(["fine", "not <think>"])
    with pytest.raises(DataError, match=r"answers .*\nrow 0: '<think>'"):
        made.encode_answers(["<think>"], ["fine"])
    model.resize_token_embeddings(len(tokenizer))
    assert 300 in encoder(model, tokenizer).encode(["<think>"])[0]


def test_padding_that_the_model_lacks_is_replaced_since_nothing_looks_at_it() -> None:
    tokenizer = tiny_tokenizer(pad=None)
    model = tiny_causal(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "<new>"})
    assert tokenizer.pad_token_id == 300
    assert encoder(model, tokenizer).pad_id == 2


def beyond() -> tuple[Any, Any]:
    tokenizer = tiny_tokenizer()
    model = tiny_causal(tokenizer)
    tokenizer.add_special_tokens({"eos_token": "<end>"})
    return model, tokenizer


def wide_head() -> tuple[Any, Any]:
    tokenizer = tiny_tokenizer()
    model = tiny_causal(tokenizer)
    model.lm_head = nn.Linear(32, 310, bias=False)
    return model, tokenizer


def old_config() -> tuple[Any, Any]:
    model, tokenizer = wide_head()
    model.set_input_embeddings(nn.Embedding(310, 32))
    return model, tokenizer


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (beyond, r"'<end>' \(id 300\).* 300 tokens.*resize"),
        (wide_head, "310.*300.*read back"),
        (old_config, "=300.*310"),
    ],
)
def test_a_model_that_could_not_end_read_back_or_be_loaded_is_refused(
    make: Callable[[], tuple[Any, Any]], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        encoder(*make())
