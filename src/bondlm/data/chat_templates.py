"""Render chat templates, which are programs that come with a model, in transformers' sandbox and within limits.

The sandbox keeps a template from reaching outside, but not from running forever: ranges end at 100,000, but loops nest.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from types import FrameType
from typing import TYPE_CHECKING, Any

from bondlm.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_ADDED = 1 << 20  # characters beyond those of the messages, which may be long themselves
MAX_SECONDS = 5.0
LINES_A_LOOK = 64  # reading the clock costs more than a line


class _OutOfTimeError(BaseException):
    """Not an `Exception`, which Jinja's filters would catch, so that the template would continue."""


def render_chat(
    chat: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    add_generation_prompt: bool = False,
    continue_last: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
    variables: Mapping[str, Any] | None = None,
    now: datetime | None = None,
    place: str = "a conversation",
) -> str:
    """Render messages as text with the tokenizer's chat template.

    Args:
        chat: the messages.
        tokenizer: its `chat_template` is used.
        add_generation_prompt: whether the text ends where the assistant's answer begins.
        continue_last: whether it ends inside the last message, for the assistant to continue.
        tools: the tools that the assistant may call, as JSON schemas.
        variables: other variables of the template (`chat_template_kwargs`).
        now: the time that the template gets; None for the current time.
        place: the place of the conversation, for messages.

    Raises:
        ConfigError: the template writes more than 1 MB around the messages, or takes more than 5 s of CPU time. Errors
            that it raises itself are passed on.
    """
    template = str(tokenizer.get_chat_template(tools=tools))  # type: ignore[arg-type]
    clean = messages_for(template, chat)
    given: dict[str, Any] = {"tools": tools or None, **(variables or {})}
    try:
        text = _within_time(
            lambda: tokenizer.apply_chat_template(
                clean,
                chat_template=pinned(template, now),
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_last,
                tokenize=False,
                **given,
            )
        )
    except _OutOfTimeError:
        reason = f"took more than {MAX_SECONDS:g} s of CPU time"
    except MemoryError:
        reason = "asked for more memory than there is"
    else:
        own = sum(len(piece) for part in (clean, given) for piece in strings(part))
        if len(text) <= own + MAX_ADDED:
            return str(text)
        reason = f"wrote {len(text)} characters around messages of {own}, more than {MAX_ADDED}"
    raise ConfigError(
        f"the tokenizer's chat template {reason}, for {place}: no template needs that. Correct "
        "`tokenizer.chat_template`, or take the model from a source that you trust"
    )


def messages_for(template: str, chat: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages in the form that templates for text expect.

    `datasets` fills keys that only other rows have with None, which templates would print as text. Parts of text are
    joined. `developer` is OpenAI's newer name for `system`; most templates know only `system`.
    """
    clean = [without_none(message) for message in chat]
    for message in clean:
        if isinstance(message.get("content"), list):
            message["content"] = joined_text(message["content"])
        if message.get("role") == "developer" and "developer" not in template:
            message["role"] = "system"
    return clean


def joined_text(parts: Sequence[Any]) -> str:
    """The text of a message's content given as parts, `[{"type": "text", "text": ...}]`."""
    return "".join(part if isinstance(part, str) else part["text"] for part in parts)


def without_none(value: Any) -> Any:
    """`value` without dictionary entries that are None, at any depth."""
    if isinstance(value, Mapping):
        return {key: without_none(item) for key, item in value.items() if item is not None}
    return [without_none(item) for item in value] if isinstance(value, list | tuple) else value


# The parts of the time that a template may ask for, by strftime directive.
_DIRECTIVE = re.compile("%-?[A-Za-z]")


def pinned(template: str, now: datetime | None) -> str:
    """The template with `strftime_now` fixed to `now`: prompts of another day would have different tokens.

    transformers gives templates the function but no way to set it; a macro of that name takes precedence.
    """
    if now is None or "strftime_now" not in template:
        return template
    asked = sorted(set(_DIRECTIVE.findall(template)))
    steps = "".join(f".replace({each!r}, {now.strftime(each)!r})" for each in asked)
    return f"{{%- macro strftime_now(format) -%}}{{{{ format{steps} }}}}{{%- endmacro -%}}{template}"


def strings(value: Any) -> Iterator[str]:
    """Walk the strings in a message; its role is one of four words, and dictionary keys are not rendered."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if key != "role":
                yield from strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from strings(item)


def _within_time(render: Callable[[], Any]) -> Any:
    """Call `render` and check the clock every few of its lines.

    A trace function works on every thread, and what it raises leaves the template at once; a signal would need the main
    thread. The clock is that of the thread, so neither a busy nor a suspended machine makes a template slow.
    """
    end, lines = time.thread_time() + MAX_SECONDS, 0

    def look(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal lines
        lines += 1
        if lines % LINES_A_LOOK == 0 and time.thread_time() > end:
            raise _OutOfTimeError
        return look

    before = sys.gettrace()
    sys.settrace(look)
    try:
        return render()
    finally:
        sys.settrace(before)
