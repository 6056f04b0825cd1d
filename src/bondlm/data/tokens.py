"""Conversion between text and token ids: end-of-sequence ids, chat templates, prompt lengths, completions as text.

Prompts are tokenised here once, and truncated only on request. Completions are only decoded: the trainer learns from
the sampled ids themselves. Masks come from lengths, so the padding id may equal an EOS id.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bondlm.data import control
from bondlm.data.context import check_completion_length, context_length
from bondlm.data.control import Problems, plain_ids, refuse_special_tokens
from bondlm.data.rendering import (
    TEMPLATE_ERRORS,
    Rendering,
    TemplateInputs,
    as_chat,
    template_source,
    unknown_variable,
)
from bondlm.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger(__name__)

Message = Mapping[str, Any]
Prompt = str | Sequence[Message] | Sequence[int]


@dataclass(frozen=True, kw_only=True, slots=True)
class TextInfo:
    """What the sampler and the trainer need to know about a tokenizer."""

    eos_ids: tuple[int, ...]
    """Ids that end a completion: those of the generation config first, then the tokenizer's own. Never empty."""
    pad_id: int
    """Fills the unused cells of a batch. It may be one of `eos_ids`, so no mask is ever made from it."""


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, generation_eos_ids: int | Sequence[int] | None) -> TextInfo:
    """Find the ids that end a completion and the padding id.

    Args:
        tokenizer: the policy's tokenizer.
        generation_eos_ids: `eos_token_id` of the policy's generation config: one id, several, or None.

    Returns:
        All EOS ids, each once, and the padding id (the first EOS id if the tokenizer has no padding token).

    Raises:
        ConfigError: if there is no EOS id at all, or one that is not a token id; or the tokenizer is only named.
    """
    if isinstance(tokenizer, str | Path):
        raise ConfigError(f"processing_class={str(tokenizer)!r}: give the tokenizer itself, not its name")
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
    """Keyword arguments of `encode_prompts` for the model with this config.

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
    rendering: Rendering = Rendering(),  # noqa: B008  it is frozen
    columns: Sequence[Mapping[str, Any]] | None = None,
    skipped: dict[int, str] | None = None,
    where: Callable[[int], str] = "row {}".format,
) -> list[list[int]]:
    """Turn whole prompts into token ids; a prompt that does not fit is refused, or truncated if requested.

    Text gets the tokenizer's usual special tokens, except that a decoder-only model gets no EOS after its prompt.
    Conversations are rendered with the chat template and its generation prompt, or up to the end of a last assistant
    message, which is continued; only the template decides on BOS. Two BOS at the start become one in both cases. A chat
    model gets text as one user message (see `Rendering`).

    Args:
        prompts: all text, all lists of messages (`{"role", "content"}`), or all token ids.
        tokenizer: tokenizer of the policy.
        max_prompt_length: maximum prompt length in tokens; None for no limit.
        context_length: positions of the model, in tokens; None for no limit (T5). A decoder-only model must fit the
            prompt and the completion into it, an encoder-decoder model only the prompt.
        max_completion_length: longest completion, in tokens.
        is_encoder_decoder: whether the prompt goes into an encoder, and so keeps the EOS that its tokenizer adds.
        truncate_prompt: how to treat a text that does not fit: "never" refuses it, "left" removes its beginning and
            warns with the number of such texts. What the tokenizer puts before every text (BOS, a language) is kept.
        allow_special_tokens_in_text: let text such as `<|im_end|>` inside a prompt become the control token. If False,
            such prompts are refused, because data could otherwise write system messages.
        rendering: how text is treated, and the variables of the template.
        columns: of each prompt's row, the columns that the template uses: `tools` and `chat_template_kwargs`.
        skipped: takes the reason for each unusable row, whose ids are then empty; None refuses such rows.
        where: the name of a row in messages, by its number.

    Returns:
        The ids of each prompt, in order.

    Raises:
        ConfigError: if a chat template is needed but missing, not valid Jinja, too slow, writes too much, or does not
            use its variables; or if conversations are to be truncated.
        DataError: if rows are too long, empty, hold special tokens or are refused by the template. Up to 10 are named.
    """
    if not prompts:
        return []
    kind = rendering.kind_of(prompts[0], tokenizer)
    if kind != "plain" and truncate_prompt != "never":
        raise ConfigError(
            f"truncate_prompt={truncate_prompt!r}: the prompts are rendered as conversations, and cutting their "
            "token ids would cut the template's markers and roles with them. Leave out whole messages in the data "
            "instead, or set prompt_format='plain' if they are text that this model is to continue"
        )
    problems = Problems(skipped, where)
    extras = _extras(columns, len(prompts), problems)
    template = ""
    if kind == "chat":
        template = template_source(tokenizer)
        _refuse_unread(tokenizer, rendering, extras, where)
    else:
        _refuse_unused(kind, rendering, extras, where)
    if not allow_special_tokens_in_text and kind in ("chat", "plain"):
        refuse_special_tokens(prompts, extras, tokenizer, template, problems)
    how: dict[str, Any] = {"keep_eos": is_encoder_decoder, "problems": problems, "where": where}
    ids = _encoded(kind, prompts, tokenizer, rendering, extras, **how)
    if kind != "ids":
        ids = [_single_bos(row, tokenizer.bos_token_id) for row in ids]
    room = 0 if is_encoder_decoder else max_completion_length
    if truncate_prompt == "left":
        ids = _cut_left(ids, _longest(max_prompt_length, context_length, room), tokenizer, where)
    _refuse_bad_lengths(ids, max_prompt_length, context_length, room, problems)
    return [[] if row in problems.skipped else own for row, own in enumerate(ids)]


def _extras(columns: Sequence[Mapping[str, Any]] | None, count: int, problems: Problems) -> list[TemplateInputs]:
    extras, bad = [TemplateInputs()] * count, {}
    for row, own in enumerate(columns or ()):
        try:
            extras[row] = TemplateInputs.of_row(own)
        except ValueError as error:
            bad[row] = str(error)
    problems.found(bad, "columns that the chat template is to look at cannot be read. Correct these rows:")
    return extras


def _refuse_unread(
    tokenizer: PreTrainedTokenizerBase,
    rendering: Rendering,
    extras: Sequence[TemplateInputs],
    where: Callable[[int], str],
) -> None:
    """Refuse variables that the template does not use."""
    for place, asked in (
        ("", TemplateInputs(variables=rendering.variables)),
        *((f"{where(i)}: ", e) for i, e in enumerate(extras) if e),
    ):
        problem = unknown_variable(template_source(tokenizer, asked.tools), asked) if asked else None
        if problem is not None:
            raise ConfigError(place + problem)


def _refuse_unused(
    kind: str, rendering: Rendering, extras: Sequence[TemplateInputs], where: Callable[[int], str]
) -> None:
    named = "chat_template_kwargs" if rendering.variables else None
    row = next((i for i, extra in enumerate(extras) if extra), None)
    if named is None and row is not None:
        named = f"{where(row)}: the column {'tools' if extras[row].tools else 'chat_template_kwargs'}"
    if named is not None:
        raise ConfigError(
            f"{named} is for a chat template, but these prompts are not rendered with one ({kind}): remove it, rename "
            "the column, or give a chat model messages"
        )


def _encoded(
    kind: str,
    prompts: Sequence[Any],
    tokenizer: PreTrainedTokenizerBase,
    rendering: Rendering,
    extras: Sequence[TemplateInputs],
    *,
    keep_eos: bool,
    problems: Problems,
    where: Callable[[int], str],
) -> list[list[int]]:
    """Token ids of prompts of one kind, before any check; rows that the template refuses have none."""
    if kind == "ids":
        return [list(prompt) for prompt in prompts]
    ids: list[list[int]] = []
    refused: dict[int, str] = {}
    for start in range(0, len(prompts), control.CHUNK):
        chunk = prompts[start : start + control.CHUNK]
        if kind == "plain":
            ids += _encode_texts(chunk, tokenizer, keep_eos=keep_eos)
            continue
        texts = list(chunk)
        if kind == "chat":
            rows = range(start, start + len(chunk))
            chats = {row: as_chat(prompts[row]) for row in rows}
            texts = [_rendered(chats[i], tokenizer, rendering, extras[i], i, refused, where) for i in rows]
        ids += plain_ids(texts, tokenizer, add_special_tokens=False)  # the template wrote them
    problems.found(refused, "the chat template refuses these prompts. Change the messages or the template:")
    return ids


def _rendered(
    chat: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    rendering: Rendering,
    extra: TemplateInputs,
    row: int,
    refused: dict[int, str],
    where: Callable[[int], str],
) -> str:
    """A conversation as text; if the template refuses it, the reason goes to `refused`."""
    from jinja2 import TemplateError, TemplateSyntaxError

    try:
        return rendering.render(chat, tokenizer, extra, where(row))
    except TemplateSyntaxError as error:
        raise ConfigError(
            f"the tokenizer's chat template is not valid Jinja (line {error.lineno}: {error.message}). "
            "Correct `tokenizer.chat_template`."
        ) from error
    except ConfigError:  # also a ValueError
        raise
    except (*TEMPLATE_ERRORS, TemplateError) as error:
        refused[row] = f"{type(error).__name__}: {error}"
        return ""


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
    """Decode completions to the text that rewards get: cut before the first EOS, without special tokens.

    Spaces are unchanged: the tokenizer's clean-up would change what the model wrote.
    """
    ends = frozenset(eos_ids)
    cut = (strip_after_eos(row, ends) for row in ids)
    rows = [kept[:-1] if finished else kept for kept, finished in cut]
    if not rows:
        # transformers 5 decodes an empty batch to one empty text.
        return []
    return tokenizer.batch_decode(rows, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def as_messages(texts: Iterable[str]) -> list[list[dict[str, str]]]:
    """Wrap completions for conversational rewards: one assistant message each."""
    return [[{"role": "assistant", "content": text}] for text in texts]


def _encode_texts(texts: Sequence[Any], tokenizer: PreTrainedTokenizerBase, *, keep_eos: bool) -> list[list[int]]:
    """Tokenise standard prompts; a text without tokens of its own becomes an empty list."""
    (nothing,) = plain_ids([""], tokenizer, add_special_tokens=True)
    drops_eos = not keep_eos and _appends_eos(tokenizer)
    rows = plain_ids(texts, tokenizer, add_special_tokens=True)
    return [[] if row == nothing else row[:-1] if drops_eos else row for row in rows]


def _appends_eos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer appends an EOS to every text; tested on a text that has none (an unknown word may)."""
    eos = tokenizer.eos_token_id
    if eos is None:
        return False
    words = ("a", "1", *(tokenizer.convert_tokens_to_string([token]) for token in tokenizer.get_vocab()))
    for word in words:
        (own,) = plain_ids([word], tokenizer, add_special_tokens=False)
        if own and eos not in own:
            (whole,) = plain_ids([word], tokenizer, add_special_tokens=True)
            return bool(whole[-1] == eos)
    return False


def _single_bos(ids: list[int], bos_id: int | None) -> list[int]:
    """Drop repeated BOS ids at the start: one from the text or the template, one from the tokenizer."""
    while bos_id is not None and ids[:2] == [bos_id, bos_id]:
        ids = ids[1:]
    return ids


def _longest(max_prompt_length: int | None, context_length: int | None, completion_length: int) -> int | None:
    """Maximum tokens of a prompt with `completion_length` tokens after it; None for no limit."""
    room = None if context_length is None else context_length - completion_length
    return min((limit for limit in (max_prompt_length, room) if limit is not None), default=None)


def _put_before(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that the tokenizer puts before every text: BOS, GLM's `[gMASK]<sop>`, NLLB's language."""
    nothing, some = plain_ids(["", "a"], tokenizer, add_special_tokens=True)
    parted = (i for i, (one, other) in enumerate(zip(nothing, some, strict=False)) if one != other)
    return nothing[: next(parted, len(nothing))]


def _cut_left(
    ids: list[list[int]], limit: int | None, tokenizer: PreTrainedTokenizerBase, where: Callable[[int], str]
) -> list[list[int]]:
    """The last `limit` tokens of longer prompts, behind what begins every text: the model has seen none without it."""
    too_long = [row for row, own in enumerate(ids) if limit is not None and 0 < limit < len(own)]
    if limit is None or not too_long:
        return ids
    ids, most = list(ids), max(len(own) for own in ids)
    heads = [head for head in (_put_before(tokenizer), [tokenizer.bos_token_id]) if head]  # a BOS may be in the text
    for row in too_long:
        head = next((head for head in heads if ids[row][: len(head)] == head), [])
        ids[row] = [*head, *ids[row][len(ids[row]) - limit + len(head) :]]
    _log.warning(
        "%d of %d prompts are longer than %d tokens (the longest has %d): their beginning is cut off "
        "(truncate_prompt='left'), the first is %s",
        len(too_long),
        len(ids),
        limit,
        most,
        where(too_long[0]),
    )
    return ids


def _refuse_bad_lengths(
    ids: Sequence[Sequence[int]],
    max_prompt_length: int | None,
    context_length: int | None,
    completion_length: int,
    problems: Problems,
) -> None:
    """Refuse prompts without tokens, and those that do not fit with `completion_length` tokens after them."""
    room = None if context_length is None else context_length - completion_length
    if room is not None and room < 1:
        raise ConfigError(
            f"no room for a prompt: max_completion_length = {completion_length} tokens fill the context of "
            f"{context_length} tokens. Lower `max_completion_length`."
        )
    problems.found(
        {row: "no tokens" for row, own in enumerate(ids) if not own},
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
            f"the context of {context_length} tokens leaves {limit} with max_completion_length = {completion_length}."
            " Shorten or remove these rows, or lower `max_completion_length`:"
        )
    else:
        reason = f"the context holds {context_length} tokens. Shorten or remove these rows:"
    long = {row: f"{len(own)} tokens" for row, own in enumerate(ids) if len(own) > limit}
    problems.found(long, f"prompts are too long: {reason}")
