"""A reward that a server computes: JSON over HTTP, answers matched by id, every wait bounded.

The protocol is in docs/rewards.md, a server of twenty lines in examples/reward_server.py. A fault that may pass (no
connection, 429, 5xx, half an answer) is tried again, with growing random pauses, until `outage` seconds have gone by
without any answer; one that cannot (401, 404, a wrong answer) is not. While the server is down one call at a time asks
whether it is back.
"""

import asyncio
import ipaddress
import json
import os
import random
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NoReturn
from urllib.parse import urlsplit

import httpx
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type

from bondlm.errors import ConfigError, RewardError, RewardOutageError
from bondlm.rewards.calls import await_together
from bondlm.rewards.extras import NAMES as EXTRAS

TOKEN_VARIABLE = "BONDLM_REWARD_TOKEN"  # noqa: S105 (the name of a variable, not a token)
PLAIN_VARIABLE = "BONDLM_REWARD_PLAIN_HTTP"
VERSION = 1
TRANSIENT = (408, 425, 429, 500, 502, 503, 504)
MAX_REQUESTS = 8  # in flight together
LONGEST_CONNECT, LONGEST_PAUSE = 10.0, 30.0  # seconds
BYTES_AN_ITEM, LEAST_BYTES = 4096, 65_536  # of an answer: more is not what we asked for


class _TransientError(Exception):
    """A fault that may pass; `after` seconds if the server says so."""

    def __init__(self, message: str, after: float = 0.0) -> None:
        super().__init__(message)
        self.after = after


def _fault(state: RetryCallState) -> BaseException | None:
    return None if state.outcome is None else state.outcome.exception()


class HTTPReward:
    """An asynchronous reward function that asks the server at `url`."""

    def __init__(self, url: str, *, timeout: float = 60.0, outage: float = 600.0, batch_size: int = 32) -> None:
        """A request carries at most `batch_size` completions and takes at most `timeout` seconds.

        The bearer token comes from the environment variable BONDLM_REWARD_TOKEN.

        Raises:
            ConfigError: the address is not one, holds a password, or would send prompts over a network in clear; or
                the token cannot be sent.
        """
        self._url, self.name = url, _checked_name(url)
        self._timeout, self._outage, self._batch_size = timeout, outage, batch_size
        self._headers = _headers()
        self._client: httpx.AsyncClient | None = None
        self._slots = asyncio.Semaphore(MAX_REQUESTS)
        self._failing_since: float | None = None  # shared by all requests: this is the breaker
        self._probing = asyncio.Lock()
        self._random = random.Random()  # noqa: S311 (spreads retries; the run's own generators must not move)

    async def __call__(self, prompts: list[Any], completions: list[Any], **columns: list[Any]) -> list[Any]:
        """One reward a completion, in order; what is not a number is for the door to judge.

        Raises:
            ConfigError: a column cannot be sent as JSON.
            RewardError: the server refuses us or answers something else.
            RewardOutageError: it did not answer for `outage` seconds.
        """
        if self._client is None:  # made here, where the event loop of all later calls runs
            self._client = httpx.AsyncClient(
                timeout=httpx.Timeout(self._timeout, connect=min(LONGEST_CONNECT, self._timeout)),
                headers=self._headers,
                trust_env=False,  # a proxy for the web is none for a server of ours
                follow_redirects=False,  # another host is not the one that was asked, and must not see the token
            )
        rows = [
            {name: values[i] for name, values in columns.items() if name not in ("completion_ids", *EXTRAS)}
            for i in range(len(prompts))
        ]
        items = [
            {"id": str(i), "prompt": prompt, "completion": completion, "columns": row}
            for i, (prompt, completion, row) in enumerate(zip(prompts, completions, rows, strict=True))
        ]
        batches = [items[i : i + self._batch_size] for i in range(0, len(items), self._batch_size)]
        answers = await await_together([self._rewards(self._client, batch) for batch in batches])
        return [reward for answer in answers for reward in answer]

    async def _rewards(self, client: httpx.AsyncClient, items: Sequence[Mapping[str, Any]]) -> list[Any]:
        try:
            body = json.dumps({"version": VERSION, "items": items}, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"a dataset column cannot be sent as JSON ({error}): remove the column") from error
        async with self._slots:  # waiting for a turn is not waiting for the server: no time limit runs yet
            answer = await self._persist(client, body, len(items))
        return _by_id(self.name, answer, [item["id"] for item in items])

    async def _persist(self, client: httpx.AsyncClient, body: str, count: int) -> bytes:
        """Ask until there is an answer; while no request gets any, one at a time asks."""
        trial = AsyncRetrying(
            retry=retry_if_exception_type(_TransientError),
            wait=self._pause,
            stop=lambda state: self._left() <= 0,
            retry_error_callback=self._give_up,
        )
        answer: bytes = await trial(self._ask_in_turn, client, body, count)
        return answer

    def _left(self) -> float:
        """Seconds until the server has been down for too long."""
        return self._outage - (0.0 if self._failing_since is None else time.monotonic() - self._failing_since)

    def _pause(self, state: RetryCallState) -> float:
        """However long the server asks for: it is asked once more before the run is given up."""
        after = getattr(_fault(state), "after", 0.0)
        grown = min(LONGEST_PAUSE, 0.5 * 2 ** (state.attempt_number - 1))
        return min(max(after, self._random.uniform(0.5, 1.0) * grown), self._left())

    def _give_up(self, state: RetryCallState) -> NoReturn:
        raise RewardOutageError(
            f"the reward server {self.name} has not answered for {self._outage - self._left():.0f} s "
            f"(reward_outage_s={self._outage:g}): {_fault(state)}. Start it again; the same command continues the run."
        ) from _fault(state)

    async def _ask_in_turn(self, client: httpx.AsyncClient, body: str, count: int) -> bytes:
        try:
            async with nullcontext() if self._failing_since is None else self._probing:
                answer = await self._ask(client, body, count)
        except _TransientError:
            self._failing_since = time.monotonic() if self._failing_since is None else self._failing_since
            raise
        self._failing_since = None
        return answer

    async def _ask(self, client: httpx.AsyncClient, body: str, count: int) -> bytes:
        try:
            async with asyncio.timeout(self._timeout):
                return await self._exchange(client, body, LEAST_BYTES + count * BYTES_AN_ITEM)
        except TimeoutError as error:
            raise _TransientError(f"no whole answer within {self._timeout:g} s (reward_timeout_s)") from error
        except httpx.TransportError as error:
            raise _TransientError(f"{type(error).__name__}: {error}") from error

    async def _exchange(self, client: httpx.AsyncClient, body: str, limit: int) -> bytes:
        async with client.stream("POST", self._url, content=body) as response:
            if response.status_code in TRANSIENT:
                raise _TransientError(f"HTTP {response.status_code}", _retry_after(response.headers))
            if response.status_code != 200:
                raise RewardError(
                    f"the reward server {self.name} answers HTTP {response.status_code}: check its address (redirects "
                    f"are not followed), {TOKEN_VARIABLE}, and what it says of the request"
                )
            kind = response.headers.get("content-type", "")
            if kind.partition(";")[0].strip().lower() != "application/json":
                raise RewardError(f"the reward server {self.name} answers with {kind!r}, not application/json")
            received = bytearray()
            async for part in response.aiter_bytes():
                received += part
                if len(received) > limit:
                    raise RewardError(f"the reward server {self.name} answers with more than {limit} bytes")
            return bytes(received)


def _checked_name(url: str) -> str:
    """Host and path of the server's address, which are safe to show.

    Raises:
        ConfigError: see `HTTPReward`.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"reward {url!r}: give http://HOST/PATH or https://HOST/PATH")
    if parts.username or parts.password:
        raise ConfigError(
            f"the reward server at {parts.hostname} has a password in its address, which would be written into the "
            f"run folder: put the token into the environment variable {TOKEN_VARIABLE}"
        )
    if parts.scheme == "http" and not _is_loopback(parts.hostname) and os.environ.get(PLAIN_VARIABLE) != "1":
        raise ConfigError(
            f"http://{parts.hostname} would carry prompts, completions and the token over the network in clear: use "
            f"https, or set the environment variable {PLAIN_VARIABLE}=1 if that network is yours"
        )
    return f"{parts.hostname}{parts.path}".rstrip("/")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _headers() -> dict[str, str]:
    headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}  # so that the cap is on what is sent
    token = os.environ.get(TOKEN_VARIABLE)
    if token is None:
        return headers
    if not re.fullmatch(r"[\x21-\x7e]+", token):  # httpx would quote it in its error
        raise ConfigError(f"{TOKEN_VARIABLE} holds spaces, line ends or other characters that no header can carry")
    return headers | {"Authorization": f"Bearer {token}"}


def _retry_after(headers: Mapping[str, str]) -> float:
    try:
        return max(0.0, float(headers.get("retry-after", 0)))
    except ValueError:  # a date: our own pauses will do
        return 0.0


def _by_id(name: str, answer: bytes, ids: Sequence[str]) -> list[Any]:
    """The rewards in the order of `ids`; NaN and infinity become NaN, which the door refuses like any other.

    Raises:
        RewardError: not the JSON that was asked for, or other ids.
    """
    try:
        data = json.loads(answer, parse_constant=lambda word: float("nan"), object_pairs_hook=_without_repetition)
        found = {row["id"]: row["reward"] for row in data["rewards"]}
        repeated = len(found) < len(data["rewards"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise RewardError(
            f"the reward server {name} answers {len(answer)} bytes that are not "
            f'{{"rewards": [{{"id": ..., "reward": ...}}]}} ({type(error).__name__}: {error})'
        ) from error
    if repeated or set(found) != set(ids):
        missing, extra = sorted(set(ids) - set(found))[:3], sorted(map(str, set(found) - set(ids)))[:3]
        raise RewardError(
            f"the reward server {name} answers for other ids than it was asked for: {len(data['rewards'])} rewards for "
            f"{len(ids)} items, missing {missing}, unknown {extra}"
        )
    return [found[i] for i in ids]


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) < len(pairs):
        raise ValueError("a key appears twice")
    return dict(pairs)
