"""How a model gets a prompt: as plain text, as a user's message, as messages, or as already rendered text."""

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
# Template variables that the user cannot set.
_OWN = ("messages", "tools", "add_generation_prompt", "continue_final_message", "tokenize", "chat_template")
# Errors of a template in addition to Jinja's own: those of the Python operators that it uses.
TEMPLATE_ERRORS = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)


@dataclass(frozen=True, kw_only=True)
class Rendering:
    """How prompts become the text that a model reads, in the same way for every command."""

    prompt_format: str = "auto"
    variables: Mapping[str, Any] = field(default_factory=dict)  # chat_template_kwargs
    now: datetime | None = None  # the time that templates get; None: the current time

    def kind_of(self, prompt: Any, tokenizer: Any) -> str:
        """How prompts like this one are treated: "chat", "plain", "rendered" or "ids".

        Raises:
            ConfigError: the prompt format, or the tokenizer, does not allow it.
        """
        asked = self.prompt_format
        if not isinstance(prompt, str):
            is_ids = is_token_ids(prompt)
            if is_ids and asked != "rendered":
                raise ConfigError(f"the prompts are token ids, but prompt_format={asked!r}: set it to 'rendered'")
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
        return "chat" if has_template(tokenizer) else "plain"

    def render(self, chat: Sequence[Mapping[str, Any]], tokenizer: Any, row: "TemplateInputs", place: str) -> str:
        """Render a conversation up to the assistant's next message, or to the end of its last one, to be continued."""
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
class TemplateInputs:
    """Further columns of a row that concern its prompt, with TRL's names."""

    tools: list[Any] | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of_row(cls, row: Mapping[str, Any]) -> "TemplateInputs":
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
        return json.loads(value) if isinstance(value, str) else without_none(value)  # text has no keys of other rows
    except ValueError as error:
        raise ValueError(f"`{name}` is not JSON: {error}") from error


def has_template(tokenizer: Any) -> bool:
    """Whether the tokenizer belongs to a chat model."""
    return getattr(tokenizer, "chat_template", None) is not None


def is_token_ids(prompt: Any) -> bool:
    """Whether a prompt is given as token ids."""
    return isinstance(prompt, list | tuple) and len(prompt) > 0 and all(type(item) is int for item in prompt)


def as_chat(prompt: Any) -> list[Mapping[str, Any]]:
    """Text as one user message; messages are unchanged."""
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


def unknown_variable(template: str, row: TemplateInputs) -> str | None:
    """A variable of the row that the template does not use, which is a mistake; None if there is none."""
    if row.tools and not _mentions(template, "tools"):
        return f"`{TOOLS}`: the chat template does not look at tools. Remove the column, or rename it"
    for name in row.variables:
        if name in _OWN or not _mentions(template, name):
            return f"{TEMPLATE_VARIABLES}: the chat template does not look at {name!r}. Remove it"
    return None


def _mentions(template: str, name: str) -> bool:
    return re.search(rf"\b{re.escape(name)}\b", template) is not None


def turn_end(tokenizer: Any, control: Mapping[int, str], eos_ids: Sequence[int], rendering: Rendering) -> int | None:
    """The token that the chat template writes at the end of an assistant's turn; None if it writes none.

    Some templates write nothing there, and the start of the next turn ends this one (GLM); it counts if it is an end
    token of the model.
    """
    from jinja2 import TemplateError

    question, answer = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "bondlm"}
    for chat, allowed in (([question, answer], control), ([question, answer, question], set(eos_ids))):
        try:
            text = render_chat(chat, tokenizer, variables=rendering.variables, now=rendering.now)
        except (*TEMPLATE_ERRORS, TemplateError):  # it refuses such a conversation; prompts will show why
            return None
        _, found, tail = text.rpartition(answer["content"])
        ids = tokenizer(tail, add_special_tokens=False, verbose=False)["input_ids"] if found else []
        end = next((token_id for token_id in ids if token_id in control), None)
        if end is not None and end in allowed:
            return int(end)
    return None
