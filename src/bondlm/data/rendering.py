"""What a prompt is to a model: text as it is, a user's message, messages, or what a template has rendered already."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from bondlm.data.chat_templates import render_chat, without_none
from bondlm.data.columns import TEMPLATE_VARIABLES, TOOLS
from bondlm.errors import ConfigError

FORMATS = ("auto", "chat", "plain", "rendered")
# Variables of a template that are not the user's.
_OWN = ("messages", "tools", "add_generation_prompt", "continue_final_message", "tokenize", "chat_template")
# What a template can raise beside Jinja's own errors: those of the Python operators that it uses.
TEMPLATE_ERRORS = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)


@dataclass(frozen=True, kw_only=True)
class Rendering:
    """How prompts become the text that a model reads; the same in every command."""

    prompt_format: str = "auto"
    variables: Mapping[str, Any] = field(default_factory=dict)  # chat_template_kwargs
    now: datetime | None = None  # what templates are told of the time; None: the time that it is
    leaves_text: bool = False  # "auto" leaves text as it is, as bondlm 0.1 did

    def kind_of(self, prompt: Any, tokenizer: Any) -> str:
        """What is done with prompts like this one: "chat", "plain", "rendered" or "ids".

        Raises:
            ConfigError: the prompt format, or the tokenizer, does not allow it.
        """
        asked = self.prompt_format
        if not isinstance(prompt, str):
            is_ids = is_token_ids(prompt)
            if is_ids and asked != "rendered":
                raise ConfigError(f"the prompts are token ids, and prompt_format={asked!r}: set it to 'rendered'")
            if not is_ids and asked in ("plain", "rendered"):
                raise ConfigError(
                    f"prompt_format={asked!r}: the prompts are conversations, which only a chat template turns into "
                    "text. Remove the setting, or give text"
                )
            return "ids" if is_ids else "chat"
        if asked in ("plain", "rendered"):
            return asked
        if asked == "chat":
            return "chat"
        return "plain" if self.leaves_text or not has_template(tokenizer) else "chat"

    def render(self, chat: Sequence[Mapping[str, Any]], tokenizer: Any, row: "Beside", place: str) -> str:
        """A conversation up to where the assistant is to speak, or to go on with what its last message begins."""
        continues = chat[-1]["role"] == "assistant"
        return render_chat(
            chat,
            tokenizer,
            add_generation_prompt=not continues,
            continue_last=continues,
            tools=row.tools,
            variables={**self.variables, **row.variables},
            now=self.now,
            place=place,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Beside:
    """What a row says of its prompt beside it, in columns named as TRL names them."""

    tools: list[Any] | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of_row(cls, row: Mapping[str, Any]) -> "Beside":
        """Columns `tools` and `chat_template_kwargs`, each as values or as JSON text.

        Raises:
            ValueError: a column holds something else.
        """
        tools, variables = (_value(row, name) for name in (TOOLS, TEMPLATE_VARIABLES))
        if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, Mapping) for tool in tools)):
            raise ValueError(f"`{TOOLS}` must be a list of JSON schemas, not {tools!r:.60}")
        if variables is not None and not isinstance(variables, Mapping):
            raise ValueError(f"`{TEMPLATE_VARIABLES}` must be an object, not {variables!r:.60}")
        return cls(tools=tools or None, variables=variables or {})

    def __bool__(self) -> bool:
        return bool(self.tools or self.variables)


def _value(row: Mapping[str, Any], name: str) -> Any:
    value = row.get(name)
    try:
        return without_none(json.loads(value) if isinstance(value, str) else value)
    except ValueError as error:
        raise ValueError(f"`{name}` is not JSON: {error}") from error


def has_template(tokenizer: Any) -> bool:
    """Whether the tokenizer is a chat model's."""
    return getattr(tokenizer, "chat_template", None) is not None


def is_token_ids(prompt: Any) -> bool:
    """Whether a prompt is given as token ids."""
    return isinstance(prompt, list | tuple) and len(prompt) > 0 and all(type(item) is int for item in prompt)


def as_chat(prompt: Any) -> list[Mapping[str, Any]]:
    """Text as one message of the user; messages as they are."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)


def template_source(tokenizer: Any, tools: Any = None) -> str:
    """The source of the chat template that conversations are rendered with.

    Raises:
        ConfigError: there is none.
    """
    try:
        return str(tokenizer.get_chat_template(tools=tools))
    except ValueError as error:
        raise ConfigError(
            "the prompts are conversations, but the tokenizer has no chat template (or several and no `default`). "
            "Set `tokenizer.chat_template`, use an instruction-tuned model, or give prompts as plain text "
            "(prompt_format 'auto' or 'plain')."
        ) from error


def unknown_variable(template: str, row: Beside) -> str | None:
    """What a row asks of a template that does not look at it; a setting that does nothing is a mistake."""
    if row.tools and not _mentions(template, "tools"):
        return f"`{TOOLS}`: the chat template does not look at tools. Remove the column, or rename it"
    for name in row.variables:
        if name in _OWN or not _mentions(template, name):
            return f"{TEMPLATE_VARIABLES}: the chat template does not look at {name!r}. Remove it"
    return None


def _mentions(template: str, name: str) -> bool:
    return re.search(rf"\b{re.escape(name)}\b", template) is not None


def turn_end(tokenizer: Any, control: Mapping[int, str], eos_ids: Sequence[int], rendering: Rendering) -> int | None:
    """The token that the chat template writes where an assistant's turn ends; None where it writes none.

    Some templates write nothing there, and what begins the next turn ends this one (GLM): that counts if it is an end
    token of the model.
    """
    from jinja2 import TemplateError

    question, answer = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "bondlm"}
    for chat, allowed in (([question, answer], control), ([question, answer, question], set(eos_ids))):
        try:
            text = render_chat(chat, tokenizer, variables=rendering.variables, now=rendering.now)
        except (*TEMPLATE_ERRORS, TemplateError):  # it does not take such a conversation; prompts will say why
            return None
        _, found, tail = text.rpartition(answer["content"])
        ids = tokenizer(tail, add_special_tokens=False, verbose=False)["input_ids"] if found else []
        end = next((token_id for token_id in ids if token_id in control), None)
        if end is not None and end in allowed:
            return int(end)
    return None
