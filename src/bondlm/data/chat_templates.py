"""Chat templates come with a model and are programs: rendered in transformers' sandbox, and within limits.

The sandbox keeps a template from reaching outside, not from running on: its ranges end at 100,000, but loops nest.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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
    place: str = "a conversation",
) -> str:
    """The text that the tokenizer's chat template makes of messages.

    Args:
        chat: The messages.
        tokenizer: Its `chat_template` is used.
        add_generation_prompt: Whether the text ends where the assistant is to speak.
        place: Where the conversation stands, for messages.

    Raises:
        ConfigError: The template writes more than 1 MB around the messages, or takes more than 5 s of CPU time. What it
            raises itself is passed on.
    """
    # `datasets` fills message keys that other rows have with None, and templates print None as text.
    clean = [{k: v for k, v in message.items() if v is not None} for message in chat]
    try:
        text = _within_time(
            lambda: tokenizer.apply_chat_template(clean, add_generation_prompt=add_generation_prompt, tokenize=False)
        )
    except _OutOfTimeError:
        reason = f"took more than {MAX_SECONDS:g} s of CPU time"
    except MemoryError:
        reason = "asked for more memory than there is"
    else:
        own = sum(len(piece) for message in clean for piece in strings(message))
        if len(text) <= own + MAX_ADDED:
            return str(text)
        reason = f"wrote {len(text)} characters around messages of {own}, more than {MAX_ADDED}"
    raise ConfigError(
        f"the tokenizer's chat template {reason}, for {place}: no template needs that. Correct "
        "`tokenizer.chat_template`, or take the model from a source that you trust"
    )


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
