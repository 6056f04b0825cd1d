"""The calls of vLLM's HTTP interface that we use, with time limits, a few jittered retries and clear errors."""

import math
import os
import random
import shlex
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception_type,
    retry_if_result,
    stop_after_attempt,
    stop_after_delay,
)

from bondlm.errors import ConfigError, EngineError, NonFiniteError, ResourceError

REFUSAL = 500  # where vLLM uses it to refuse, it is not retried
# Without these a server samples as generation_config.json says, and reports log-probabilities of temperature 1 always.
OWN_DISTRIBUTION = ("--generation-config", "vllm", "--logprobs-mode", "processed_logprobs")
WHOLE_PROMPTS = "--no-enable-chunked-prefill"  # on a CPU, vLLM 0.32 crashes when a prompt with a seed is split
LORA_OPTIONS = ("--enable-lora", "--max-loras", "3", "--max-lora-rank", "64", *OWN_DISTRIBUTION)
WHOLE_OPTIONS = ("--load-format", "dummy", *OWN_DISTRIBUTION)  # started without weights, until it receives ours
ATTEMPTS = 4
CONNECT_TIMEOUT = 5.0  # seconds


class VLLMClient:
    """A connection to one server; safe to use from many threads."""

    def __init__(
        self,
        url: str,
        *,
        timeout: float,
        max_wait: float = 10.0,
        start_options: Sequence[str] = LORA_OPTIONS,
        how_it_ended: Callable[[], str] | None = None,
    ) -> None:
        """No call waits longer than `timeout` seconds for the next bytes, and no retry begins later than that.

        Args:
            url: the server's address, such as http://127.0.0.1:8000.
            timeout: seconds.
            max_wait: longest pause between two tries, seconds; pauses are random.
            start_options: options that error messages suggest for starting the server.
            how_it_ended: asked after a failed connection to a server of our own; empty if it still runs.
        """
        self.url = url.rstrip("/").removesuffix("/v1")
        self._timeout, self._max_wait, self._how_it_ended = timeout, max_wait, how_it_ended
        self.by_hand = how_to_start(self.url, "MODEL", start_options)
        self._random = random.Random()  # noqa: S311 (spreads retries; the run's own generators must not move)
        key = os.environ.get("VLLM_API_KEY")
        self._http = httpx.Client(
            base_url=self.url,
            timeout=httpx.Timeout(timeout, connect=min(CONNECT_TIMEOUT, timeout)),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=64),
            headers={"Authorization": f"Bearer {key}"} if key else {},
            trust_env=False,  # proxies are for the web, not for our own server
        )

    def close(self) -> None:
        """Drop all connections."""
        self._http.close()

    def base_model(self) -> tuple[str, int]:
        """Name and context length of the model that the server serves.

        Raises:
            ConfigError: there is no server, or it is not vLLM.
        """
        try:
            models = self._answer("GET", "/v1/models").get("data")
        except (ResourceError, EngineError) as error:
            raise ConfigError(f"{error}. {self.by_hand}") from error
        for model in models if isinstance(models, list) else []:
            if isinstance(model, dict) and model.get("parent") is None:
                name, length = model.get("id"), model.get("max_model_len")
                if isinstance(name, str) and type(length) is int:
                    return name, length
        raise ConfigError(f"{self.url}/v1/models lists no base model with its max_model_len: is this a vLLM server?")

    def load_adapter(self, name: str, folder: Path) -> None:
        """Load the adapter in `folder` under `name`, replacing any adapter of that name.

        vLLM's own `load_inplace` would read the folder again at every step of the model, for every request.

        Raises:
            ConfigError: the server refuses, for example because its maximum rank is too small.
        """
        with suppress(ConfigError):  # there was none of that name; a server without adapter support fails below
            self._send("POST", "/v1/unload_lora_adapter", {"lora_name": name}, refusal=REFUSAL)
        body = {"lora_name": name, "lora_path": str(folder.resolve())}
        try:
            response = self._send("POST", "/v1/load_lora_adapter", body, refusal=REFUSAL)
        except ConfigError as error:
            if "already been loaded" in str(error):  # a retry after a lost answer: the probe will tell
                return
            raise ConfigError(
                f"{error}. Adapters need a server that was started with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, "
                "--enable-lora, --max-loras 3 and a --max-lora-rank of at least the adapter's r, and that sees the run "
                "folder under the same path"
            ) from error
        if response.status_code != 200:
            raise EngineError(f"{self.url} did not load {name!r}: HTTP {response.status_code}")

    def rpc(self, method: str, **arguments: Any) -> None:
        """Have vLLM's workers call their method of that name, with `args` (a list) and `kwargs` (a dictionary).

        Raises:
            ConfigError: the server has no such route, or the method failed.
        """
        try:
            self._send("POST", "/collective_rpc", {"method": method} | arguments, refusal=REFUSAL)
        except ConfigError as error:
            if "HTTP 404" not in str(error):
                raise
            raise ConfigError(
                f"{error}: it takes new weights only in vLLM's development mode, VLLM_SERVER_DEV_MODE=1. {self.by_hand}"
            ) from error

    def is_asleep(self) -> bool:
        """Whether the server has released its memory; False for a server without that route."""
        try:
            return self._answer("GET", "/is_sleeping").get("is_sleeping") is True
        except ConfigError:
            return False

    def sleep(self) -> None:
        """Make the server release its memory: its cache is dropped, its weights are kept in main memory."""
        self._send("POST", "/sleep?level=1")

    def wake_up(self) -> None:
        """Make the server take its memory again.

        Raises:
            ResourceError: it cannot, because that memory is in use.
        """
        self._send("POST", "/wake_up")
        if self.is_asleep():
            raise ResourceError(f"the vLLM server at {self.url} did not wake up; see its log")

    def prompt_logprobs(self, model: str, ids: Sequence[int], salt: str) -> list[float]:
        """Log-probability of each of `ids` except the first.

        Raises:
            EngineError: the answer does not have one number for each, or comes from an older vLLM.
            NonFiniteError: one of them is not finite.
        """
        body = {
            "model": model,
            "prompt": list(ids),
            "max_tokens": 1,
            "temperature": 0,
            "prompt_logprobs": 0,
            "return_token_ids": True,
            "cache_salt": salt,
        }
        (choice,) = self.complete(body)[:1]
        of_answer(choice, "prompt_token_ids")  # samples are checked by it: fail before any is drawn
        rows = choice.get("prompt_logprobs")
        if not isinstance(rows, list) or len(rows) != len(ids):
            raise EngineError(f"{self.url} sent no log-probabilities of a probe text of {len(ids)} tokens")
        try:
            values = [float(row[str(token)]["logprob"]) for row, token in zip(rows[1:], ids[1:], strict=True)]
        except (KeyError, TypeError, ValueError) as error:
            raise EngineError(f"{self.url} scored other tokens than those of the probe text ({error!r})") from error
        if not all(math.isfinite(value) for value in values):
            raise NonFiniteError(f"{self.url}: {model!r} gives a probe text log-probabilities that are not finite")
        return values

    def complete(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        """The choices in the answer of /v1/completions."""
        choices = self._answer("POST", "/v1/completions", body).get("choices")
        if not isinstance(choices, list) or not choices or not all(isinstance(c, dict) for c in choices):
            raise EngineError(f"{self.url}/v1/completions sent no choices: is this a vLLM server?")
        return choices

    def _answer(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        response = self._send(method, path, body)
        try:
            answer = response.json()
        except ValueError as error:
            raise EngineError(f"{self.url}{path} sent what is not JSON: {response.text[:200]!r}") from error
        if not isinstance(answer, dict):
            raise EngineError(f"{self.url}{path} sent {type(answer).__name__}, not an object")
        return answer

    def _send(self, method: str, path: str, body: dict[str, Any] | None = None, *, refusal: int | None = None) -> Any:
        """Make one call and retry after transient faults, which is harmless, since every sample has its own seed."""

        def passes(response: Any) -> bool:
            return response.status_code != refusal and _is_transient(response.status_code)

        trial = Retrying(
            stop=stop_after_attempt(ATTEMPTS) | stop_after_delay(self._timeout),
            wait=lambda state: self._random.uniform(0, min(self._max_wait, 0.2 * 2 ** (state.attempt_number - 1))),
            retry=retry_if_exception_type(httpx.TransportError) | retry_if_result(passes),
            retry_error_callback=_last_outcome,
        )
        try:
            response = trial(self._http.request, method, path, json=body)
        except httpx.TimeoutException as error:
            raise ResourceError(
                f"the vLLM server at {self.url} did not answer {path} within {self._timeout:g} s "
                f"({type(error).__name__}): it is overloaded, out of KV cache, asleep or hangs; see its log, or raise "
                "vllm_timeout"
            ) from error
        except (httpx.HTTPError, httpx.InvalidURL, RuntimeError) as error:  # RuntimeError: the client was closed
            ended = "" if self._how_it_ended is None else self._how_it_ended()
            raise ResourceError(ended or f"no answer from the vLLM server at {self.url}{path}: {error!r}") from error
        if response.status_code in (401, 403):
            raise ConfigError(f"{self.url} refuses access (HTTP {response.status_code}): set VLLM_API_KEY to its key")
        if passes(response):
            raise ResourceError(
                f"the vLLM server at {self.url} failed at {path} with HTTP {response.status_code}, {ATTEMPTS} times: "
                f"{_message(response)}. See its log"
            )
        if response.status_code >= 300:
            raise ConfigError(f"{self.url}{path} says HTTP {response.status_code}: {_message(response)}")
        return response


def _last_outcome(state: RetryCallState) -> Any:
    """The last answer or failure, unchanged."""
    return None if state.outcome is None else state.outcome.result()


def _is_transient(status: int) -> bool:
    """Whether a call may succeed later: 520 to 530 come from a gateway without its server, 529 from a full one."""
    return status in (408, 425, 429) or (status >= 500 and status not in (501, 505))  # what it cannot do


def _message(response: Any) -> str:
    """The server's error message, in one line."""
    try:
        answer = response.json()
        error = answer.get("error", answer) if isinstance(answer, dict) else answer
        text = str(error.get("message", error) if isinstance(error, dict) else error)
    except ValueError:
        text = str(response.text)
    return " ".join(text.split())[:500]


def of_answer(answer: Any, key: str) -> Any:
    """The value of `key` in vLLM's answer.

    Raises:
        EngineError: the key is missing.
    """
    if not isinstance(answer, dict) or answer.get(key) is None:
        raise EngineError(f"the vLLM server's answer has no {key!r}: bondlm needs vLLM 0.22 or newer")
    return answer[key]


def how_to_start(url: str, model: str, options: Sequence[str]) -> str:
    """The sentence that says how to start a server by hand."""
    where, port = urlsplit(url), None
    with suppress(ValueError):  # no number of a port
        port = where.port
    setting = "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True" if "--enable-lora" in options else "VLLM_SERVER_DEV_MODE=1"
    return (
        f"To start one by hand: {setting} python -m vllm.entrypoints.openai.api_server --model {model} "
        f"--host {where.hostname or '127.0.0.1'} --port {port or 8000} {shlex.join(options)} (docs/vllm.md)"
    )
