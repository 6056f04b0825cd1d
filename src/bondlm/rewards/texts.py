"""Texts and token limits, shared by the rewards that use models."""

import math
import numbers
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from bondlm.errors import ConfigError, DataError
from bondlm.rewards.answers import Failure

TABLES = ("position_embeddings", "embed_positions", "wpe")  # absolute positions, by the names of their modules


# How a text of the data is tokenized: "[SEP]" or "</s>" in it is text, and not the end of it.
AS_TEXT = {"verbose": False, "split_special_tokens": True}


def broken_up(text: str, tokenizer: Any) -> str:
    """`text` with a space in each of the tokenizer's special tokens that it spells, which then are text.

    `split_special_tokens` alone does not do it: Unigram vocabularies (DeBERTa-v3, XLM-R, T5) have "[SEP]" or "</s>" as
    an ordinary piece, too, with the id of the special token.
    """
    for token in sorted(tokenizer.all_special_tokens, key=len, reverse=True):
        if len(token) > 1:
            text = text.replace(token, f"{token[0]} {token[1:]}")
    return text


def prompt_text(prompt: Any) -> str:
    """Text of a prompt: the string itself, or the content of the last user message of a chat.

    Raises:
        DataError: a chat has no user message, or content that is not text.
    """
    if isinstance(prompt, str):
        return prompt
    for message in reversed(prompt):
        if message["role"] == "user":
            return _content(message)
    roles = [message["role"] for message in prompt]
    raise DataError(f"a conversational prompt has the roles {roles}: this reward needs a user message.")


def completion_text(completion: Any) -> str:
    """Text of a completion: the string itself, or the content of its last message.

    Raises:
        DataError: no message, or content that is not text.
    """
    if isinstance(completion, str):
        return completion
    if not completion:
        raise DataError("a conversational completion is an empty list: give one assistant message.")
    return _content(completion[-1])


def _content(message: Any) -> str:
    if not isinstance(message["content"], str):
        raise DataError(f"a message has content of type {type(message['content']).__name__}: text rewards need a str.")
    return message["content"]


def token_limit(model: Any, tokenizer: Any, max_length: int | None) -> int | None:
    """Maximum tokens of a row: `max_length`, or the smaller limit of tokenizer and model config (None: no limit).

    Raises:
        ConfigError: `max_length` is below 1, or beyond the model's table of positions.
    """
    rows = _table_rows(model)
    if max_length is not None:
        if max_length < 1:
            raise ConfigError(f"max_length is {max_length}: give at least 1 token.")
        if rows is not None and max_length > rows:
            raise ConfigError(f"max_length is {max_length}, but the model has {rows} positions: give at most {rows}.")
        return max_length
    config_limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    stated = (tokenizer.model_max_length, config_limit, rows)
    limit = min((limit for limit in stated if limit is not None and limit > 0), default=None)
    # Tokenizers without a limit state 10**30, XLNet's config -1.
    return None if limit is None or limit > 10**9 else int(limit)


def _table_rows(model: Any) -> int | None:
    """Rows of a position table that tokens can use: RoBERTa and related models start after the padding row."""
    for name, module in model.named_modules():
        if name.endswith(TABLES) and isinstance(module, nn.Embedding):
            unused = getattr(module, "offset", 0) if module.padding_idx is None else module.padding_idx + 1
            return int(module.num_embeddings - unused)
    return None


def column_text(column: str, value: Any) -> str | Failure:
    """The text of a row's column; numbers, such as answers to sums, become text."""
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool) and not math.isnan(value)
    if isinstance(value, str) or is_number:
        return str(value)
    return Failure(f"needs text in the column {column!r} and finds {reprlib.repr(value)} ({type(value).__name__})")


def bad_lengths(rows: Sequence[Sequence[int]], limit: int | None, advice: str) -> dict[int, Failure]:
    """The rows that have no token or more than `limit`."""
    failed = {}
    for row, ids in enumerate(rows):
        if not ids:
            failed[row] = Failure("has no token to score: the text is empty and the tokenizer adds nothing,")
        elif limit is not None and len(ids) > limit:
            failed[row] = Failure(f"takes {limit} tokens and has {len(ids)} tokens to score ({advice})")
    return failed


def with_failures(values: Sequence[float], failed: Mapping[int, Failure], count: int) -> list[Any]:
    """One entry for each of `count` rows: the next of the values, or the row's `Failure`."""
    rest = iter(values)
    return [failed[row] if row in failed else next(rest) for row in range(count)]


def check_batch_bounds(batch_size: int, batch_tokens: int) -> None:
    """Raise ConfigError unless both bounds of a micro-batch are at least 1."""
    if batch_size < 1 or batch_tokens < 1:
        raise ConfigError(f"batch_size is {batch_size} and batch_tokens {batch_tokens}: both must be at least 1.")


def check_choice(name: str, value: Any, allowed: Sequence[Any]) -> None:
    """Raise ConfigError unless `value` is one of `allowed`."""
    if not any(value is choice or (isinstance(value, str) and value == choice) for choice in allowed):
        raise ConfigError(f"{name} is {value!r}: choose one of {', '.join(map(repr, allowed))}.")
