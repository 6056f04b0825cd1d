"""Chat templates come with a model and are programs: rendered in transformers' sandbox, and within limits.

The sandbox keeps a template from reaching outside, not from running on: its ranges end at 100,000, but loops nest.
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
LINES_A_LOOK = 64  # the clock costs more than a line


class _OutOfTimeError(BaseException):
    """No `Exception`: Jinja's filters catch those, and the template would go on."""


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
    """The text that the tokenizer's chat template makes of messages.

    Args:
        chat: The messages.
        tokenizer: Its `chat_template` is used.
        add_generation_prompt: Whether the text ends where the assistant is to speak.
        continue_last: Whether it ends within the last message, which the assistant is to go on with.
        tools: What the assistant may call, as JSON schemas.
        variables: What else the template looks at (`chat_template_kwargs`).
        now: What the template is told of the time; None for the time that it is.
        place: Where the conversation stands, for messages.

    Raises:
        ConfigError: The template writes more than 1 MB around the messages, or takes more than 5 s of CPU time. What it
            raises itself is passed on.
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
    """The messages as a template of text expects them.

    `datasets` fills keys that other rows have with None, and templates print None as text. Parts of text become one
    text. `developer` is OpenAI's newer name of `system`, which most templates alone know.
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
    """`value` without the keys of dictionaries, however deep, that are None."""
    if isinstance(value, Mapping):
        return {key: without_none(item) for key, item in value.items() if item is not None}
    return [without_none(item) for item in value] if isinstance(value, list | tuple) else value


# What a template may ask of the time, by the directive of strftime.
_DIRECTIVE = re.compile("%-?[A-Za-z]")


def pinned(template: str, now: datetime | None) -> str:
    """The template with `strftime_now` answering for `now`: another day's prompts would be other tokens.

    transformers lends templates the function and no way to set it; a macro of that name comes first.
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
    """Call `render` and look at the clock every few of its lines.

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
