"""Call reward functions: pass each the arguments that it accepts, and await the asynchronous ones together."""

import asyncio
import inspect
import os
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any, TypeAlias

import torch

from bondlm.errors import BondError, ConfigError, ResourceError, RewardError, RewardOutageError

RewardFunction: TypeAlias = Callable[..., Any]
"""TRL's signature: `f(prompts, completions, **columns) -> list[float]`, sync or async."""


def call_all(
    named: Sequence[tuple[str, RewardFunction]],
    offered: Mapping[str, list[Any]],
    limits: Mapping[str, float | None] | None = None,
    extras: Mapping[str, Any] | None = None,
) -> list[Any]:
    """Call every function once with the arguments that it accepts and return the answers in order.

    Plain functions run one after the other, in the caller's thread. Asynchronous ones are then awaited together.

    Args:
        named: (name, function) pairs.
        offered: `prompts`, `completions` and the columns, each a list of B.
        extras: further arguments that are not lists of B.
        limits: seconds that an asynchronous function may take, by name; a plain function cannot be interrupted.

    Raises:
        ConfigError: a function wants an argument that is not offered.
        RewardOutageError: an asynchronous function took longer than its limit.
        RewardError: a function raised; its own exception is the `__cause__`.
        ResourceError: a function ran out of memory.
    """
    answers: dict[int, Any] = {}
    pending: dict[int, Awaitable[Any]] = {}
    try:
        for index, (name, function) in enumerate(named):
            arguments = accepted_arguments(name, function, offered, extras)
            answer = _call(name, function, arguments, _hint(offered))
            if inspect.isawaitable(answer):
                pending[index] = answer
            else:
                answers[index] = answer
    except BaseException:
        for awaitable in pending.values():
            if inspect.iscoroutine(awaitable):
                awaitable.close()  # otherwise Python also warns that it was never awaited, on top of the real error
        raise
    if pending:
        names = {index: named[index][0] for index in pending}
        limits = limits or {}
        awaited = _await_all(
            [_named_await(names[i], pending[i], limits.get(names[i]), _hint(offered)) for i in pending]
        )
        answers.update(zip(pending, awaited, strict=True))
    return [answers[index] for index in range(len(named))]


def accepted_arguments(
    name: str, function: RewardFunction, offered: Mapping[str, list[Any]], extras: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Keep the offered arguments that the function's signature accepts; with `**kwargs` that is all of them.

    Lists and dicts are copied for each row, including nested ones (messages), so a function that changes its arguments
    cannot affect the next function or another row.

    Raises:
        ConfigError: the signature demands an argument that is not offered, or takes arguments by position only.
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some callables written in C have no signature
        return {key: _copied(value) for key, value in offered.items()}
    kinds = {parameter.name: parameter.kind for parameter in signature.parameters.values()}
    takes_all = inspect.Parameter.VAR_KEYWORD in kinds.values()
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    arguments: dict[str, Any] = {
        key: _copied(value) for key, value in offered.items() if takes_all or kinds.get(key) in by_name
    }
    arguments |= {
        key: _copied(value) for key, value in (extras or {}).items() if takes_all or kinds.get(key) in by_name
    }
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise ConfigError(
            f"reward {name!r} has the signature {signature}: {error}. The arguments are passed by name and these are "
            f"available: {', '.join({**offered, **(extras or {})})}. Rename the parameter, give it a default, or add "
            "the dataset column."
        ) from error
    return arguments


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copied(inner) for key, inner in value.items()}
    if not isinstance(value, list):
        return value
    is_flat = {dict, list}.isdisjoint(map(type, value))  # token ids, of which there are millions
    return list(value) if is_flat else [_copied(inner) for inner in value]


def _hint(offered: Mapping[str, list[Any]]) -> str:
    """A hint for functions that expect text but get conversations."""
    if not offered.get("completions") or isinstance(offered["completions"][0], str):
        return ""
    return (
        ' The prompts are conversations, so a completion is a list of messages: its text is completion[0]["content"].'
    )


def _call(name: str, function: RewardFunction, arguments: Mapping[str, list[Any]], hint: str = "") -> Any:
    try:
        return exhausted(function(**arguments))
    except (Exception, SystemExit) as error:  # sys.exit(0) would end the command as if it had succeeded
        raise _failure(name, error, hint) from error


def exhausted(answer: Any) -> Any:
    """What a generator or another iterator yields, as a list: it runs the user's code. Other answers as they are."""
    return list(answer) if isinstance(answer, Iterator) and not inspect.isawaitable(answer) else answer


async def _named_await(name: str, awaitable: Awaitable[Any], limit: float | None, hint: str = "") -> Any:
    try:
        async with asyncio.timeout(limit) as watch:
            return exhausted(await awaitable)
    except TimeoutError as error:
        if not watch.expired():  # a timeout of the function itself
            raise _failure(name, error, hint) from error
        raise RewardOutageError(
            f"reward {name!r} did not answer within {limit:g} s (reward_timeout_s): see what it waits for, or raise "
            "the limit; the same command continues the run"
        ) from None
    except (Exception, SystemExit) as error:  # SystemExit would end the loop's thread and leave the caller waiting
        raise _failure(name, error, hint) from error


def _failure(name: str, error: BaseException, hint: str = "") -> BondError:
    """Say which reward failed; keep our own classes (their exit code is right) and tell memory errors from bugs."""
    if isinstance(error, BondError):
        return type(error)(f"reward {name!r}: {error}")
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return ResourceError(f"reward {name!r} ran out of memory ({error}). Lower its batch_size or batch_tokens.")
    text = str(error)[:500]
    return RewardError(
        f"reward {name!r} raised {type(error).__name__}: {text}."
        f"{hint if isinstance(error, (TypeError, AttributeError)) else ''} The traceback above is the function's own: "
        "fix it there, or let it return a low finite number for completions that it cannot judge."
    )


def _await_all(awaitables: Sequence[Awaitable[Any]]) -> list[Any]:
    """Await all together in a separate thread for rewards, so that it also works inside a notebook's running loop."""
    future = asyncio.run_coroutine_threadsafe(await_together(awaitables), _event_loop(os.getpid()))
    try:
        return future.result()
    except BaseException:  # Ctrl-C while waiting: do not leave requests running behind the user's back
        future.cancel()
        raise


async def await_together(awaitables: Sequence[Awaitable[Any]]) -> list[Any]:
    """All answers in order; the first failure cancels the others."""
    tasks = [asyncio.ensure_future(awaitable) for awaitable in awaitables]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        raise


@cache
def _event_loop(process_id: int) -> asyncio.AbstractEventLoop:
    """Start an event loop that lives as long as the process (a forked child, with another id, starts its own).

    There is one loop for all calls, because an HTTP client that the user keeps between calls is bound to the loop that
    first used it: with `asyncio.run` its second use fails with "Event loop is closed".
    """
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name=f"bondlm-rewards-{process_id}", daemon=True).start()
    return loop
