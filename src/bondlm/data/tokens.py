"""Between text and token ids: end-of-sequence ids, chat templates, prompt lengths, and completions as text.

Prompts are tokenised here once, and never truncated unless asked for. Completions are only ever decoded: the trainer
learns on the sampled ids themselves. Masks follow from lengths, so the padding id may be equal to an EOS id.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bondlm.data.chat_templates import render_chat, strings
from bondlm.data.context import check_completion_length, context_length
from bondlm.errors import ConfigError, DataError, listed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger(__name__)

Message = Mapping[str, Any]
Prompt = str | Sequence[Message]

# Rows tokenised in one call: enough for the tokenizer's threads, few enough to keep memory flat.
_CHUNK = 1024
# Markers that some templates write as plain text: <|user|>, [INST], <<SYS>>. They have no id of their own, yet a
# model reads them as structure, so a prompt must not be able to write them either.
_PLAIN_MARKER = re.compile(r"<\|[^<>|\s]+\|>|\[/?[A-Z_]{3,}\]|<</?[A-Z]+>>")
# What a template can raise beside Jinja's own errors: those of the Python operators that it uses.
_TEMPLATE_ERRORS = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)
# What separates a template's own tokens (<think>, [INST]) from added words and runs of spaces.
_BRACKETED = re.compile(r"[<\[].+[>\]]")


@dataclass(frozen=True, kw_only=True, slots=True)
class TextInfo:
    """What the sampler and the trainer need to know about a tokenizer."""

    eos_ids: tuple[int, ...]
    """Ids that end a completion: those of the generation config first, then the tokenizer's own. Never empty."""
    pad_id: int
    """Fills the unused cells of a batch. It may be one of `eos_ids`, so no mask is ever made from it."""


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, generation_eos_ids: int | Sequence[int] | None) -> TextInfo:
    """Find the ids that end a completion and the id that fills a batch.

    Args:
        tokenizer: The policy's.
        generation_eos_ids: `eos_token_id` of the policy's generation config: one id, several, or None.

    Returns:
        All EOS ids, each once, and the padding id (the first EOS id where the tokenizer has no padding token).

    Raises:
        ConfigError: If there is no EOS id at all, or one that is not a token id.
    """
    listed = list(generation_eos_ids) if isinstance(generation_eos_ids, Sequence) else [generation_eos_ids]
    eos_ids = tuple(dict.fromkeys(i for i in [*listed, tokenizer.eos_token_id] if i is not None))
    if not eos_ids:
        raise ConfigError(
            "no end-of-sequence token: neither the tokenizer nor the generation config names one, so the model could "
            "never learn to stop. Set `tokenizer.eos_token` to the token that ends an answer."
        )
    for token_id in eos_ids:
        if isinstance(token_id, bool) or not isinstance(token_id, int) or token_id < 0:
            raise ConfigError(
                f"end-of-sequence id {token_id!r} is not a token id (whole number >= 0). "
                "Correct `eos_token_id` in the generation config."
            )
    pad_id = tokenizer.pad_token_id
    return TextInfo(eos_ids=eos_ids, pad_id=eos_ids[0] if pad_id is None else pad_id)


def length_limits(
    config: Any, max_prompt_length: int | None, max_completion_length: int, truncate_prompt: str = "never"
) -> dict[str, Any]:
    """What `encode_prompts` must know of the model with this config, as its keyword arguments.

    Raises:
        ConfigError: the model cannot write completions of that length.
    """
    check_completion_length(config, max_completion_length)
    return {
        "max_prompt_length": max_prompt_length,
        "max_completion_length": max_completion_length,
        "context_length": context_length(config),
        "is_encoder_decoder": bool(config.is_encoder_decoder),
        "truncate_prompt": truncate_prompt,
    }


def encode_prompts(
    prompts: Sequence[Prompt],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_prompt_length: int | None,
    context_length: int | None,
    max_completion_length: int,
    is_encoder_decoder: bool = False,
    truncate_prompt: str = "never",
    allow_special_tokens_in_text: bool = False,
) -> list[list[int]]:
    """Turn prompts into token ids, whole: a prompt that does not fit is refused, or cut only where that is asked for.

    Text gets the tokenizer's usual special tokens, except that a decoder-only model gets no EOS behind its prompt.
    Messages are rendered with the chat template and its generation prompt; the template alone decides on BOS. Two BOS
    at the start become one in both cases.

    Args:
        prompts: All text, or all lists of messages (`{"role", "content"}`).
        tokenizer: Tokenizer of the policy.
        max_prompt_length: Longest prompt wanted, in tokens; None for no limit.
        context_length: Positions of the model, in tokens; None for no limit (T5). A decoder-only model must fit the
            prompt and the completion into it, an encoder-decoder model only the prompt.
        max_completion_length: Longest completion, in tokens.
        is_encoder_decoder: Whether the prompt goes into an encoder, and so keeps the EOS that its tokenizer adds.
        truncate_prompt: What is done with a text that does not fit: "never" refuses it, "left" leaves out its beginning
            (but BOS) and warns with the number of such texts.
        allow_special_tokens_in_text: Let text such as `<|im_end|>` inside a prompt become the control token. With
            False such prompts are refused: data could otherwise write system messages.

    Returns:
        The ids of each prompt, in order.

    Raises:
        ConfigError: If messages are given and the tokenizer has no chat template, or one that is not valid Jinja or
            takes too long or writes too much. If conversations are to be truncated.
        DataError: If rows are too long, empty, hold special tokens or are refused by the template. Up to 10 are named.
    """
    if not prompts:
        return []
    conversational = not isinstance(prompts[0], str)
    if conversational and truncate_prompt != "never":
        raise ConfigError(
            f"truncate_prompt={truncate_prompt!r}: the prompts are conversations, and cutting their token ids would "
            "cut the template's markers and roles with them. Leave out whole messages in the data instead"
        )
    template = _chat_template(tokenizer) if conversational else ""
    if not allow_special_tokens_in_text:
        _refuse_special_tokens(prompts, tokenizer, template)
    ids: list[list[int]] = []
    refused: list[str] = []
    for start in range(0, len(prompts), _CHUNK):
        chunk = prompts[start : start + _CHUNK]
        if conversational:
            ids += _encode_chats(chunk, tokenizer, start, refused)
        else:
            ids += _encode_texts(chunk, tokenizer, keep_eos=is_encoder_decoder)
    _raise_if_any(refused, "the chat template refuses these prompts. Change the messages or the template:")
    ids = [_single_bos(row, tokenizer.bos_token_id) for row in ids]
    beside = 0 if is_encoder_decoder else max_completion_length
    if truncate_prompt == "left":
        ids = _cut_left(ids, _longest(max_prompt_length, context_length, beside), tokenizer.bos_token_id)
    _refuse_bad_lengths(ids, max_prompt_length, context_length, beside)
    return ids


def strip_after_eos(ids: Sequence[int], eos_ids: Iterable[int]) -> tuple[list[int], bool]:
    """Return `ids` up to and including the first EOS, and whether there was one (a finished completion)."""
    ends = set(eos_ids)
    for position, token_id in enumerate(ids):
        if token_id in ends:
            return list(ids[: position + 1]), True
    return list(ids), False


def decode_completions(
    ids: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase, eos_ids: Iterable[int]
) -> list[str]:
    """Decode completions to the text that rewards see: cut before the first EOS, without special tokens.

    Spaces stay as they are: the tokenizer's clean-up would change what the model wrote.
    """
    ends = frozenset(eos_ids)
    cut = (strip_after_eos(row, ends) for row in ids)
    rows = [kept[:-1] if finished else kept for kept, finished in cut]
    if not rows:
        # transformers 5 decodes an empty batch to one empty text.
        return []
    return tokenizer.batch_decode(rows, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def as_messages(texts: Iterable[str]) -> list[list[dict[str, str]]]:
    """Wrap completions as conversational rewards expect them: one assistant message each."""
    return [[{"role": "assistant", "content": text}] for text in texts]


def _plain_ids(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, add_special_tokens: bool) -> Any:
    """Tokenise whole texts: no padding, no truncation, even where the tokenizer's file asks for them."""
    return tokenizer(
        list(texts),
        add_special_tokens=add_special_tokens,
        padding=False,
        truncation=False,
        return_attention_mask=False,
        verbose=False,
    )["input_ids"]


def _encode_texts(texts: Sequence[Any], tokenizer: PreTrainedTokenizerBase, *, keep_eos: bool) -> list[list[int]]:
    """Tokenise standard prompts; a text that gives no token of its own becomes an empty list."""
    nothing, probe = _plain_ids(["", "a"], tokenizer, add_special_tokens=True)
    drops_eos = not keep_eos and tokenizer.eos_token_id is not None and probe[-1] == tokenizer.eos_token_id
    rows = _plain_ids(texts, tokenizer, add_special_tokens=True)
    return [[] if row == nothing else row[:-1] if drops_eos else row for row in rows]


def _encode_chats(
    chats: Sequence[Any], tokenizer: PreTrainedTokenizerBase, first_row: int, refused: list[str]
) -> list[list[int]]:
    """Render and tokenise conversational prompts; add the rows that the template refuses to `refused`."""
    from jinja2 import TemplateError, TemplateSyntaxError

    texts: list[str] = []
    for row, chat in enumerate(chats, start=first_row):
        try:
            texts.append(render_chat(chat, tokenizer, add_generation_prompt=True, place=f"row {row}"))
        except TemplateSyntaxError as error:
            raise ConfigError(
                f"the tokenizer's chat template is not valid Jinja (line {error.lineno}: {error.message}). "
                "Correct `tokenizer.chat_template`."
            ) from error
        except ConfigError:  # a ValueError, too
            raise
        except (*_TEMPLATE_ERRORS, TemplateError) as error:
            refused.append(f"row {row}: {type(error).__name__}: {error}")
    return _plain_ids(texts, tokenizer, add_special_tokens=False) if texts else []  # the template has written them


def _chat_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the source of the chat template that `apply_chat_template` will use."""
    try:
        return tokenizer.get_chat_template()
    except ValueError as error:
        raise ConfigError(
            "the prompts are conversations, but the tokenizer has no chat template (or several and no `default`). "
            "Set `tokenizer.chat_template`, use an instruction-tuned model, or give prompts as plain text."
        ) from error


def _refuse_special_tokens(prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    """Refuse prompts whose own text would become control ids or structural markers of the template.

    The ids are looked at, not the characters: a tokenizer's normaliser may turn harmless-looking text into a token.
    """
    control = _control_ids(tokenizer, template)
    markers = set(_PLAIN_MARKER.findall(template))
    problems = []
    for start in range(0, len(prompts), _CHUNK):
        pieces = [
            (row, text) for row, prompt in enumerate(prompts[start : start + _CHUNK], start) for text in _texts(prompt)
        ]
        found: dict[int, str] = {}
        all_ids = _plain_ids([text for _, text in pieces], tokenizer, add_special_tokens=False)
        for (row, text), ids in zip(pieces, all_ids, strict=True):
            names = [control[token_id] for token_id in ids if token_id in control]
            names += [marker for marker in _PLAIN_MARKER.findall(text) if marker in markers]
            if names:
                found.setdefault(row, names[0])
        problems += [f"special token {name} in the text of row {row}" for row, name in found.items()]
    _raise_if_any(
        problems,
        "prompts contain text that the model reads as control tokens. Remove it, or give conversations as lists "
        "of messages:",
    )


def _control_ids(tokenizer: PreTrainedTokenizerBase, template: str) -> dict[int, str]:
    """Map each id that prompt text must not produce to its token.

    These are the special tokens, and the added tokens in brackets that the template writes (Qwen's `<tool_call>` is
    added, but not special) or builds from pieces (`<|user|>`). An unknown-token id only says that text was not known.
    """
    control = dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    for token_id, token in tokenizer.added_tokens_decoder.items():
        name = token.content
        if token.special or (name in template and _BRACKETED.fullmatch(name)) or _PLAIN_MARKER.fullmatch(name):
            control[token_id] = name
    if tokenizer.unk_token_id not in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        control.pop(tokenizer.unk_token_id, None)
    return control


def _texts(prompt: Prompt) -> list[str]:
    """List every text that a row brings, and for messages also all of them joined.

    The joined text shows a token that is cut into two messages, for templates that put nothing between them.
    """
    if isinstance(prompt, str):
        return [prompt]
    texts = [text for message in prompt for text in strings(message)]
    return [*texts, "".join(texts)] if len(texts) > 1 else texts


def _single_bos(ids: list[int], bos_id: int | None) -> list[int]:
    """Drop repeated BOS ids at the start: one from the text or the template, one from the tokenizer."""
    while bos_id is not None and ids[:2] == [bos_id, bos_id]:
        ids = ids[1:]
    return ids


def _longest(max_prompt_length: int | None, context_length: int | None, completion_length: int) -> int | None:
    """Most tokens of a prompt with `completion_length` tokens after it; None for no limit."""
    room = None if context_length is None else context_length - completion_length
    return min((limit for limit in (max_prompt_length, room) if limit is not None), default=None)


def _cut_left(ids: list[list[int]], limit: int | None, bos_id: int | None) -> list[list[int]]:
    """The last `limit` tokens of longer prompts; a BOS stays, because a model has seen no text without it."""
    too_long = [row for row, own in enumerate(ids) if limit is not None and 0 < limit < len(own)]
    if limit is None or not too_long:
        return ids
    ids, most = list(ids), max(len(own) for own in ids)
    for row in too_long:
        head = ids[row][:1] if ids[row][0] == bos_id else []
        ids[row] = [*head, *ids[row][len(ids[row]) - limit + len(head) :]]
    _log.warning(
        "%d of %d prompts are longer than %d tokens (the longest has %d): their beginning is left out "
        "(truncate_prompt='left'), the first is row %d",
        *(len(too_long), len(ids), limit, most, too_long[0]),
    )
    return ids


def _refuse_bad_lengths(
    ids: Sequence[Sequence[int]], max_prompt_length: int | None, context_length: int | None, completion_length: int
) -> None:
    """Raise for prompts without tokens, and for those that do not fit with `completion_length` tokens after them."""
    room = None if context_length is None else context_length - completion_length
    if room is not None and room < 1:
        raise ConfigError(
            f"no room for a prompt: max_completion_length = {completion_length} tokens fill the context of "
            f"{context_length} tokens. Lower `max_completion_length`."
        )
    _raise_if_any(
        [f"row {row}: no tokens" for row, own in enumerate(ids) if not own],
        "prompts that the tokenizer turns into nothing. Remove these rows:",
    )
    limit = _longest(max_prompt_length, context_length, completion_length)
    if limit is None:
        return
    if limit == max_prompt_length:
        reason = (
            f"max_prompt_length is {max_prompt_length}. Shorten or remove these rows, or raise `max_prompt_length`:"
        )
    elif completion_length:
        reason = (
            f"the context of {context_length} tokens leaves {limit} beside max_completion_length = {completion_length}."
            " Shorten or remove these rows, or lower `max_completion_length`:"
        )
    else:
        reason = f"the context holds {context_length} tokens. Shorten or remove these rows:"
    problems = [f"row {row}: {len(own)} tokens" for row, own in enumerate(ids) if len(own) > limit]
    _raise_if_any(problems, f"prompts are too long: {reason}")


def _raise_if_any(problems: Sequence[str], summary: str) -> None:
    """Raise one DataError that names the first rows and counts the rest."""
    if problems:
        raise DataError(f"{summary}\n{listed(problems, 'rows')}")
