"""A server's faults: those that pass are ridden out, the others end with their own code and soon."""

import random
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bondlm.engines.vllm.http import ATTEMPTS, LORA_OPTIONS, WHOLE_OPTIONS, how_to_start
from bondlm.engines.vllm.lora import VLLMEngine
from bondlm.errors import BondError, ConfigError, EngineError, NonFiniteError, ResourceError
from bondlm.models.roles import Roles
from engines.vllm.helpers import EOS, IDS, SEEDS, connect, draw_both
from engines.vllm.stub import Answer, Stub, first, slow


@pytest.mark.parametrize(
    "answer",
    [(500, "oops"), (503, {"error": {"message": "busy"}}), (408, ""), (425, ""), (529, "full"), (200, "reset")],
)
def test_a_fault_that_passes_is_ridden_out(engine: VLLMEngine, stub: Stub, answer: Answer) -> None:
    expected = draw_both(engine)
    stub.fault, generator = first(ATTEMPTS - 1, answer), random.getstate()
    assert draw_both(engine) == expected
    assert random.getstate() == generator  # the run's own generators do not notice


def spoil_choice(**changes: Any) -> Callable[[dict[str, Any]], None]:
    def spoil(answer: dict[str, Any]) -> None:
        if "token_ids" in answer["choices"][0]:
            answer["choices"][0] |= changes

    return spoil


def nan_logprob(answer: dict[str, Any]) -> None:
    for choice in answer["choices"]:
        if "logprobs" in choice:
            choice["logprobs"]["token_logprobs"][0] = float("nan")


def drop_last_token(answer: dict[str, Any]) -> None:
    for choice in answer["choices"]:
        if choice.get("finish_reason") == "stop":
            choice["token_ids"].pop()
            choice["logprobs"]["token_logprobs"].pop()


def lose_a_sample(answer: dict[str, Any]) -> None:
    if "token_ids" in answer["choices"][0]:
        answer["choices"].pop()


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (nan_logprob, NonFiniteError, "log-probability"),
        (drop_last_token, EngineError, "end-of-sequence|0 tokens"),
        (lose_a_sample, EngineError, r"samples \[\d\], 2 were"),
        (spoil_choice(index="0"), EngineError, "samples .'0'"),
        (spoil_choice(token_ids=5), EngineError, "token_ids=5"),
        (spoil_choice(logprobs={"token_logprobs": 5}), EngineError, "token_logprobs=5"),
        (spoil_choice(token_ids=[True], logprobs={"token_logprobs": [-1.0]}), EngineError, "vocabulary"),
        (spoil_choice(prompt_token_ids=[1, 2]), EngineError, "prompt"),
        (spoil_choice(token_ids=[5000], logprobs={"token_logprobs": [-1.0]}), EngineError, "vocabulary"),
        (spoil_choice(logprobs={"token_logprobs": [-1.0] * 99}), EngineError, "99 log-probabilities"),
        (spoil_choice(token_ids=[0, 1, 0], logprobs={"token_logprobs": [-1.0] * 3}), EngineError, "went on after"),
        (spoil_choice(token_ids=None), EngineError, "'token_ids'"),
        (lambda answer: answer.clear(), EngineError, "choices"),
    ],
)
def test_an_answer_that_is_wrong_is_not_learned_from(
    engine: VLLMEngine, stub: Stub, spoil: Any, error: type[BondError], message: str
) -> None:
    stub.spoil = spoil
    with pytest.raises(error, match=message):
        engine.generate(IDS, 2, role="policy", max_new_tokens=6, seeds=SEEDS)


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        ((500, "EngineDeadError"), ResourceError, "HTTP 500.*EngineDeadError"),
        ((529, "full"), ResourceError, "HTTP 529"),
        ((501, "no such method"), ConfigError, "HTTP 501"),
        ((200, "reset"), ResourceError, "no answer"),
        ((400, {"error": {"message": "the prompt is too long"}}), ConfigError, "the prompt is too long"),
        ((401, ""), ConfigError, "VLLM_API_KEY"),
        ((200, "<html>"), EngineError, "not JSON"),
    ],
)
def test_a_server_that_fails_is_an_error_soon(
    engine: VLLMEngine, stub: Stub, answer: Answer, error: type[BondError], message: str
) -> None:
    stub.fault = first(10**9, answer)
    begin = time.monotonic()
    with pytest.raises(error, match=message):
        draw_both(engine)
    assert time.monotonic() - begin < 5


def test_a_server_that_is_slow_is_an_error_soon(stub: Stub, roles: Roles, tmp_path: Path) -> None:
    engine = connect(stub, roles, tmp_path, timeout=0.5)
    stub.fault = slow(3)
    begin = time.monotonic()
    with pytest.raises(ResourceError, match=r"0\.5 s.*vllm_timeout"):
        draw_both(engine)
    assert time.monotonic() - begin < 2.5  # one answer's time limit, and one retry's


def test_a_server_that_is_down_is_refused_with_the_command(roles: Roles, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    stub = Stub(roles.model, EOS)
    stub.url = f"http://127.0.0.1:{port}"
    with pytest.raises(ConfigError, match=rf"api_server.*--port {port}"):
        connect(stub, roles, tmp_path)


@pytest.mark.parametrize(
    ("url", "host", "port"),
    [
        ("http://127.0.0.1:8123", "127.0.0.1", 8123),
        ("http://[::1]", "::1", 8000),
        ("http://gpu-7:8001/prefix", "gpu-7", 8001),
        ("https://vllm.example.org", "vllm.example.org", 8000),
        ("http://gpu-7:no", "gpu-7", 8000),
    ],
)
def test_the_command_to_start_a_server_has_the_address(url: str, host: str, port: int) -> None:
    assert f"--host {host} --port {port} --" in how_to_start(url, "MODEL", ["--enable-lora"])


@pytest.mark.parametrize("options", [LORA_OPTIONS, WHOLE_OPTIONS])
def test_the_command_starts_a_server_that_reports_what_it_draws_from(options: tuple[str, ...]) -> None:
    """By default vLLM reports log-probabilities of temperature 1 at every temperature."""
    command = how_to_start("http://127.0.0.1:8000", "MODEL", options)
    assert "--generation-config vllm --logprobs-mode processed_logprobs" in command


@pytest.mark.parametrize(
    ("path", "answer", "message"),
    [
        ("/v1/models", (200, {"data": []}), "is this a vLLM server"),
        ("/v1/models", (200, {"data": ["m"]}), "is this a vLLM server"),
        ("/v1/models", (200, {"data": [{"max_model_len": 64}]}), "is this a vLLM server"),
        ("/v1/models", (404, "nothing here"), "nothing here"),
        ("/v1/load_lora_adapter", (404, {"detail": "Not Found"}), "VLLM_ALLOW_RUNTIME_LORA_UPDATING"),
        (
            "/v1/load_lora_adapter",
            (500, {"error": {"message": "LoRA rank 32 is greater than max_lora_rank 16."}}),
            "LoRA rank 32 .*--max-lora-rank",
        ),
    ],
)
def test_a_server_that_cannot_serve_us_is_refused(
    stub: Stub, roles: Roles, tmp_path: Path, path: str, answer: Answer, message: str
) -> None:
    stub.fault = first(10**9, answer, path)
    with pytest.raises(ConfigError, match=message):
        connect(stub, roles, tmp_path)
