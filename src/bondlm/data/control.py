"""Text that a prompt must not contain: control tokens, and the markers of a chat template."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from bondlm.data.chat_templates import strings
from bondlm.data.rendering import TemplateInputs
from bondlm.errors import DataError, listed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Rows tokenised in one call: enough for the tokenizer's threads, few enough to keep memory flat.
CHUNK = 1024
# Markers that some templates write as plain text: <|user|>, [INST], <<SYS>>. They have no id of their own, but a model
# reads them as structure, so a prompt must not contain them either.
_PLAIN_MARKER = re.compile(r"<\|[^<>|\s]+\|>|\[/?[A-Z_]{3,}\]|<</?[A-Z]+>>")
# Distinguishes a template's own tokens (<think>, [INST]) from added words and runs of spaces.
_BRACKETED = re.compile(r"[<\[].+[>\]]")


class Problems:
    """Rows that cannot be used: refused together, or noted and left out."""

    def __init__(self, skipped: dict[int, str] | None, where: Callable[[int], str]) -> None:
        self._noted, self._where = skipped, where
        self.skipped = {} if skipped is None else skipped

    def found(self, reasons: Mapping[int, str], summary: str) -> None:
        """Note the reasons, by row, or raise one DataError that names the first rows and counts the rest."""
        new = {row: reason for row, reason in reasons.items() if row not in self.skipped}
        if self._noted is not None:
            self.skipped |= {row: f"{reason} ({summary.partition('.')[0]})" for row, reason in new.items()}
        elif new:
            raise DataError(f"{summary}\n{listed(_placed(new, self._where), 'rows')}")


def _placed(reasons: Mapping[int, str], where: Callable[[int], str]) -> list[str]:
    return [f"{where(row)}: {reason}" for row, reason in reasons.items()]


def refuse_special_tokens(
    prompts: Sequence[Any],
    extras: Sequence[TemplateInputs],
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    problems: Problems,
) -> None:
    """Refuse prompts whose text would become control ids or structural markers of the template.

    Ids are checked rather than characters: a tokenizer's normaliser may turn harmless-looking text into a token.
    """
    control = control_ids(tokenizer, template)
    markers = set(_PLAIN_MARKER.findall(template))
    found: dict[int, str] = {}
    for start in range(0, len(prompts), CHUNK):
        pieces = [
            (row, text)
            for row, prompt in enumerate(prompts[start : start + CHUNK], start)
            for text in [*_texts(prompt), *strings(extras[row].tools), *strings(extras[row].variables)]
        ]
        all_ids = plain_ids([text for _, text in pieces], tokenizer, add_special_tokens=False)
        for (row, text), ids in zip(pieces, all_ids, strict=True):
            names = [control[token_id] for token_id in ids if token_id in control]
            names += [marker for marker in _PLAIN_MARKER.findall(text) if marker in markers]
            if names:
                found.setdefault(row, f"special token {names[0]} in its text")
    problems.found(
        found,
        "prompts contain text that the model reads as control tokens. Remove it, give conversations as lists of "
        "messages, or set prompt_format='rendered' if a template has written it:",
    )


def control_ids(tokenizer: PreTrainedTokenizerBase, template: str) -> dict[int, str]:
    """Map each id that prompt text must not produce to its token.

    These are the special tokens, and the added tokens in brackets that the template writes (Qwen's `<tool_call>` is
    added, but not special) or builds from pieces (`<|user|>`). The unknown-token id is allowed, since it only means
    unknown text.
    """
    control = dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    for token_id, token in tokenizer.added_tokens_decoder.items():
        name = token.content
        if token.special or (name in template and _BRACKETED.fullmatch(name)) or _PLAIN_MARKER.fullmatch(name):
            control[token_id] = name
    if tokenizer.unk_token_id not in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        control.pop(tokenizer.unk_token_id, None)
    return control


def plain_ids(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, add_special_tokens: bool) -> Any:
    """Tokenise whole texts: no padding, no truncation, even where the tokenizer's file asks for them."""
    return tokenizer(
        list(texts),
        add_special_tokens=add_special_tokens,
        padding=False,
        truncation=False,
        return_attention_mask=False,
        verbose=False,
    )["input_ids"]


def _texts(prompt: Any) -> list[str]:
    """List every text of a row, and for messages also all of them joined.

    The joined text reveals a token split between two messages, for templates that put nothing between them.
    """
    if isinstance(prompt, str):
        return [prompt]
    texts = [text for message in prompt for text in strings(message)]
    return [*texts, "".join(texts)] if len(texts) > 1 else texts
