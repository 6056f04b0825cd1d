"""JSON over HTTP that survives transient faults, with every wait bounded.

After a transient fault (no connection, 429, 5xx, half an answer) a request is tried again, with growing random pauses,
until `outage` seconds have passed without any answer. A permanent fault (401, 404, a wrong answer) is not retried.
While the server is down, one call at a time checks whether it is back.
"""

import asyncio
import ipaddress
import os
import random
import re
import ssl
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import NoReturn
from urllib.parse import SplitResult, urlsplit

import httpx
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type

from bondlm.errors import ConfigError, RewardError, RewardOutageError

PLAIN_VARIABLE, PROXY_VARIABLE, CA_VARIABLE = "BONDLM_REWARD_PLAIN_HTTP", "BONDLM_PROXY", "SSL_CERT_FILE"
PROXIES = ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY")
MAX_REQUESTS = 8  # in flight together
LONGEST_CONNECT, LONGEST_PAUSE = 10.0, 30.0  # seconds
LEAST_BYTES = 65_536  # of an answer: a longer one is not what we asked for
MOST_SAID = 4096  # bytes of a refusal that are kept


class RefusedError(RewardError):
    """A status that retrying will not change; `said` is the beginning of its body."""

    def __init__(self, message: str, status: int = 0, said: bytes = b"") -> None:
        super().__init__(message)
        self.status, self.said = status, said


class _TransientError(Exception):
    """A transient fault; `after` is the pause in seconds that the server asked for, if any."""

    def __init__(self, message: str, after: float = 0.0) -> None:
        super().__init__(message)
        self.after = after


def _fault(state: RetryCallState) -> BaseException | None:
    return None if state.outcome is None else state.outcome.exception()


class Client:
    """Posts to one address, with a bounded number of requests at a time."""

    def __init__(
        self,
        url: str,
        name: str,
        headers: Mapping[str, str],
        *,
        what: str,
        advice: str,
        timeout: float,
        outage: float,
        max_requests: int = MAX_REQUESTS,
        is_final: Callable[[int, bytes], bool] = lambda status, said: False,
    ) -> None:
        """Set the address and the time limits.

        Args:
            url: where requests go.
            name: its name in messages, without secrets.
            headers: headers of each request, the only place for secrets.
            what: "reward server", for messages.
            advice: what to check if it refuses.
            timeout: time limit of one request, seconds.
            outage: seconds without any answer after which the client gives up.
            max_requests: maximum requests in flight.
            is_final: whether a status that is usually transient is permanent, judged by its body.

        Raises:
            ConfigError: the proxy that the environment names for it is not an address.
        """
        self.name = name
        self._url, self._headers, self._what, self._advice = url, headers, what, advice
        self._timeout, self._outage, self._is_final = timeout, outage, is_final
        self._proxy = _proxy_to(url)
        self._client: httpx.AsyncClient | None = None
        self._max_requests, self._slots = max_requests, asyncio.Semaphore(max_requests)
        self._failing_since: float | None = None  # shared by all requests: the circuit breaker
        self._probing = asyncio.Lock()
        self._random = random.Random()  # noqa: S311 (spreads retries; the run's own generators must not move)

    async def post(self, body: str, limit: int) -> bytes:
        """The answer to a request, of at most `limit` bytes.

        Raises:
            RefusedError: the server refuses it.
            RewardError: its answer is not JSON or too long, or its certificate is not trusted.
            RewardOutageError: it did not answer for `outage` seconds.
        """
        if self._client is None:  # created here, inside the event loop of all later calls
            self._client = httpx.AsyncClient(
                # The slots limit the requests; the pool must neither limit them again nor count waiting as a fault.
                timeout=httpx.Timeout(self._timeout, connect=min(LONGEST_CONNECT, self._timeout), pool=None),
                limits=httpx.Limits(max_connections=None, max_keepalive_connections=self._max_requests),
                headers=self._headers,
                verify=_trusted(),
                proxy=self._proxy,
                trust_env=False,  # a proxy would read what is sent by plain http: it must be named on purpose
                follow_redirects=False,  # another host must not see the token
            )
        async with self._slots:  # no time limit runs while a request waits for a slot
            return await self._persist(self._client, body, limit)

    async def _persist(self, client: httpx.AsyncClient, body: str, limit: int) -> bytes:
        """Ask until there is an answer; while no request gets one, only one at a time is sent."""
        trial = AsyncRetrying(
            retry=retry_if_exception_type(_TransientError),
            wait=self._pause,
            stop=lambda state: self._left() <= 0,
            retry_error_callback=self._give_up,
        )
        answer: bytes = await trial(self._ask_in_turn, client, body, limit)
        return answer

    def _left(self) -> float:
        """Seconds left until the server has been down for too long."""
        return self._outage - (0.0 if self._failing_since is None else time.monotonic() - self._failing_since)

    def _pause(self, state: RetryCallState) -> float:
        """The pause before the next try; however long it should be, the server is asked once more before giving up."""
        after = getattr(_fault(state), "after", 0.0)
        grown = min(LONGEST_PAUSE, 0.5 * 2 ** (state.attempt_number - 1))
        return min(max(after, self._random.uniform(0.5, 1.0) * grown), self._left())

    def _give_up(self, state: RetryCallState) -> NoReturn:
        raise RewardOutageError(
            f"the {self._what} {self.name} has not answered for {self._outage - self._left():.0f} s "
            f"(reward_outage_s={self._outage:g}): {_fault(state)}. {self._what_to_do()}; the same command continues "
            "the run."
        ) from _fault(state)

    def _what_to_do(self) -> str:
        unused = [name for name in (*PROXIES, *map(str.lower, PROXIES)) if os.environ.get(name)]
        if self._proxy is not None or not unused or _is_loopback(parts_of(self._url).hostname or ""):
            return "Start it again"
        return f"Start it again, or, if it is behind the proxy in {unused[0]}, set {PROXY_VARIABLE} to that address"

    async def _ask_in_turn(self, client: httpx.AsyncClient, body: str, limit: int) -> bytes:
        if self._failing_since is not None:
            async with self._probing:
                if self._failing_since is not None:  # otherwise the server came back while this request waited
                    return await self._ask_and_note(client, body, limit)
        return await self._ask_and_note(client, body, limit)

    async def _ask_and_note(self, client: httpx.AsyncClient, body: str, limit: int) -> bytes:
        try:
            answer = await self._ask(client, body, limit)
        except _TransientError:
            self._failing_since = time.monotonic() if self._failing_since is None else self._failing_since
            raise
        self._failing_since = None
        return answer

    async def _ask(self, client: httpx.AsyncClient, body: str, limit: int) -> bytes:
        try:
            async with asyncio.timeout(self._timeout):
                return await self._exchange(client, body, limit)
        except TimeoutError as error:
            raise _TransientError(f"no complete answer within {self._timeout:g} s (reward_timeout_s)") from error
        except httpx.TransportError as error:
            if (reason := _distrust(error)) is not None:
                raise RewardError(
                    f"the {self._what} {self.name} has a certificate that is not trusted: {reason}. If its authority "
                    f"is your own, put that one's certificate into a file and the file's path into {CA_VARIABLE}"
                ) from error
            raise _TransientError(f"{type(error).__name__}: {error}") from error

    async def _exchange(self, client: httpx.AsyncClient, body: str, limit: int) -> bytes:
        async with client.stream("POST", self._url, content=body) as response:
            status = response.status_code
            if status != 200:
                said = await _beginning(response)
                if _is_transient(status) and not self._is_final(status, said):
                    raise _TransientError(f"HTTP {status}", _retry_after(response.headers))
                message = f"the {self._what} {self.name} answers HTTP {status}: {self._advice}"
                raise RefusedError(message, status, said)
            kind = response.headers.get("content-type", "")
            if kind.partition(";")[0].strip().lower() != "application/json":
                raise RewardError(f"the {self._what} {self.name} answers with {kind!r}, not application/json")
            received = bytearray()
            async for part in response.aiter_bytes():
                received += part
                if len(received) > limit:
                    raise RewardError(f"the {self._what} {self.name} answers with more than {limit} bytes")
            return bytes(received)


def _is_transient(status: int) -> bool:
    """Whether a request may succeed later: 529 is an overloaded model, 520 to 530 a proxy without its server."""
    return status in (408, 425, 429) or (status >= 500 and status not in (501, 505))  # what it cannot do


def _trusted() -> ssl.SSLContext:
    """Certificate authorities: those of certifi, or in `SSL_CERT_FILE` or `SSL_CERT_DIR`, and those of the system."""
    context = httpx.create_ssl_context()
    context.load_default_certs()
    return context


def _distrust(error: BaseException | None) -> str | None:
    """Why the server's certificate is refused, if that caused the error; a retry would not help."""
    while error is not None:
        if isinstance(error, ssl.SSLCertVerificationError):
            return error.verify_message
        error = error.__cause__ or error.__context__
    return None


def _proxy_to(url: str) -> httpx.Proxy | None:
    address = os.environ.get(PROXY_VARIABLE)
    if not address or _is_loopback(parts_of(url).hostname or ""):
        return None
    if not address.startswith(("http://", "https://")):
        raise ConfigError(f"{PROXY_VARIABLE} is not the address of a proxy: give http://HOST:PORT or https://HOST:PORT")
    return httpx.Proxy(address)


def parts_of(url: str) -> SplitResult:
    """The parts of an address.

    Raises:
        ConfigError: its port is not a number, or its IPv6 address is incomplete.
    """
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError as error:
        raise ConfigError(f"a reward server's address is wrong ({error}): give http://HOST:PORT/PATH") from error
    return parts


def checked_name(url: str, variable: str) -> str:
    """Host, port and path of the server's address, which are safe to show; the token comes from `variable`.

    Raises:
        ConfigError: it is not an address, holds a password, or would send prompts over a network unencrypted.
    """
    parts = parts_of(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"reward {url!r}: give http://HOST/PATH or https://HOST/PATH")
    if parts.username or parts.password:
        raise ConfigError(
            f"the reward server at {parts.hostname} has a password in its address, which would be written into the "
            f"run folder: put the token into the environment variable {variable}"
        )
    if parts.scheme == "http" and not _is_loopback(parts.hostname) and os.environ.get(PLAIN_VARIABLE) != "1":
        raise ConfigError(
            f"http://{parts.hostname} would send prompts, completions and the token unencrypted over the network: use "
            f"https, or set the environment variable {PLAIN_VARIABLE}=1 if you trust that network"
        )
    port = "" if parts.port is None else f":{parts.port}"  # so that two servers on one host have different names
    return f"{parts.hostname}{port}{parts.path}".rstrip("/")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def bearer(variable: str) -> dict[str, str]:
    """Headers of a request, with the token from the environment variable `variable`, if it is set.

    Raises:
        ConfigError: the token cannot be sent in a header.
    """
    headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}  # so that the cap is on bytes sent
    token = os.environ.get(variable)
    if token is None:
        return headers
    if not re.fullmatch(r"[\x21-\x7e]+", token):  # httpx would show it in its error
        raise ConfigError(f"{variable} holds spaces, line ends or other characters that no header can carry")
    return headers | {"Authorization": f"Bearer {token}"}


async def _beginning(response: httpx.Response) -> bytes:
    """The first bytes of the body of an error status."""
    received = bytearray()
    with suppress(httpx.TransportError):  # the status has arrived, and that is enough
        async for part in response.aiter_bytes():
            received += part
            if len(received) >= MOST_SAID:
                break
    return bytes(received[:MOST_SAID])


def _retry_after(headers: Mapping[str, str]) -> float:
    try:
        return max(0.0, float(headers.get("retry-after", 0)))
    except ValueError:  # a date: we use our own pauses
        return 0.0
