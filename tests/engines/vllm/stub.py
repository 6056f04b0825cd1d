"""A small HTTP server that behaves as vLLM does, with a tiny model, and has the faults that a test asks for."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file

from bondlm.engines.local.engine import TransformersEngine

Answer = tuple[int, Any]


class Stub:
    """What the server holds; `fault(path, body)` may answer instead of it, `spoil(answer)` change what it answers."""

    def __init__(self, model: Any, eos_ids: list[int], *, max_model_len: int = 256) -> None:
        self._model, self._lock = deepcopy(model).eval(), threading.Lock()
        self._eos_ids, self._max_model_len = eos_ids, max_model_len
        for layer in self._model.modules():  # what it loads is scaled by the config that comes with it
            if isinstance(layer, LoraLayer):
                layer.scaling = dict.fromkeys(layer.scaling, 1.0)
        self._adapters: dict[str, dict[str, torch.Tensor]] = {}
        self._loaded: set[str] = set()
        self.requests: list[tuple[str, Any]] = []
        self.in_flight, self.most_in_flight = 0, 0
        self.fault: Callable[[str, Any], Answer | None] = lambda path, body: None
        self.spoil: Callable[[dict[str, Any]], None] = lambda answer: None
        self.url = ""
        self.is_asleep = self.is_closed = False

    def start_anew(self) -> None:
        self._adapters.clear()
        self._loaded.clear()

    def bodies(self, path: str) -> list[Any]:
        return [body for seen, body in self.requests if seen == path]

    def drawn(self) -> list[Any]:
        """Requests for samples, without the probes."""
        return [body for body in self.bodies("/v1/completions") if "prompt_logprobs" not in body]

    def answer(self, path: str, body: Any) -> Answer:
        self.requests.append((path, body))
        fault = self.fault(path, body)
        if fault is not None:
            return fault
        if path == "/v1/models":
            return 200, {"data": [{"id": "base", "parent": None, "max_model_len": self._max_model_len}]}
        if path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter"):
            return self._of_adapter(path, body)
        if path == "/collective_rpc":
            return self._rpc(**body)
        if path in ("/sleep?level=1", "/wake_up"):
            self.is_asleep = path != "/wake_up"
            self._adapters = {name: {k: v * 0 for k, v in state.items()} for name, state in self._adapters.items()}
            return 200, {}
        if path == "/is_sleeping":
            return 200, {"is_sleeping": self.is_asleep}
        if path != "/v1/completions":
            return 404, {"detail": "Not Found"}
        if isinstance(self._model, PeftModel) and body["model"] not in (*self._adapters, "base"):
            return 404, {"error": {"message": f"The model `{body['model']}` does not exist."}}
        with self._lock, self._serving(body["model"]) as model:
            # Closed: a late answer would be in the middle of PyTorch when the interpreter exits, and abort it.
            if self.is_asleep or self.is_closed:
                return 503, {"error": {"message": "asleep"}}
            choices = self._score(model, body) if "prompt_logprobs" in body else self._draw(model, body)
        answer = {"choices": choices}
        self.spoil(answer)
        return 200, answer

    def _rpc(self, method: str, **arguments: Any) -> Answer:
        if method == "reload_weights":
            folder = Path(arguments["kwargs"]["weights_path"])
            state = {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}
            self._model.load_state_dict(state)
        return 200, {"results": [None]}

    def _of_adapter(self, path: str, body: Any) -> Answer:
        name, known = body["lora_name"], body["lora_name"] in self._loaded
        if path == "/v1/unload_lora_adapter":
            self._loaded.discard(name)  # its weights stay, for faults that ignore what comes next
            return (200, "ok") if known else (404, {"error": {"message": "The lora adapter cannot be found."}})
        if known:
            return 400, {"error": {"message": "The lora adapter has already been loaded."}}
        self._loaded.add(name)
        self._adapters[name] = scaled(Path(body["lora_path"]))
        return 200, "ok"

    @contextmanager
    def _serving(self, name: str) -> Iterator[Any]:
        if not isinstance(self._model, PeftModel):
            yield self._model
            return
        if name == "base":
            with self._model.disable_adapter():
                yield self._model
            return
        set_peft_model_state_dict(self._model, self._adapters[name])
        yield self._model

    @torch.no_grad()
    def _score(self, model: Any, body: Any) -> list[Any]:
        ids = torch.tensor([body["prompt"]])
        logprobs = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
        rows = [{str(t): {"logprob": x}} for t, x in zip(body["prompt"][1:], logprobs[:, 0].tolist(), strict=True)]
        return [{"index": 0, "prompt_logprobs": [None, *rows], "prompt_token_ids": body["prompt"]}]

    def _draw(self, model: Any, body: Any) -> list[Any]:
        @contextmanager
        def use(role: str) -> Iterator[Any]:
            yield model

        engine = TransformersEngine(use, eos_ids=self._eos_ids, pad_id=0)
        (drawn,) = engine.generate(
            *([body["prompt"]], body["n"]), role="policy", max_new_tokens=body["max_tokens"], seeds=[body["seed"]]
        )
        return [
            {
                "index": i,
                "prompt_token_ids": body["prompt"],
                "token_ids": c.ids,
                "logprobs": {"token_logprobs": c.logprobs},
                "finish_reason": "stop" if c.finished else "length",
            }
            for i, c in reversed(list(enumerate(drawn)))
        ]


def scaled(folder: Path) -> dict[str, torch.Tensor]:
    """An adapter's weights times its scaling, one for all layers, as vLLM 0.22 does it."""
    config = json.loads((folder / "adapter_config.json").read_text())
    scaling = config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"])
    state = load_file(folder / "adapter_model.safetensors")
    return {name: tensor * (scaling if "lora_B" in name else 1.0) for name, tensor in state.items()}


def handler_of(stub: Stub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def reply(self) -> None:
            length = int(self.headers.get("Content-Length", 0))
            body = json.loads(self.rfile.read(length)) if length else None
            stub.in_flight += 1
            stub.most_in_flight = max(stub.most_in_flight, stub.in_flight)
            try:
                status, answer = stub.answer(self.path, body)
            finally:
                stub.in_flight -= 1
            if answer == "reset":
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            data = answer.encode() if isinstance(answer, str) else json.dumps(answer).encode()
            try:
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)
            except OSError:  # the client has given up
                self.close_connection = True

        do_GET = do_POST = reply

        def log_message(self, format: str, *args: Any) -> None:
            pass

        def finish(self) -> None:
            try:
                super().finish()
            except (OSError, ValueError):  # reset
                self.close_connection = True

        def handle(self) -> None:
            try:
                super().handle()
            except (OSError, ValueError):
                self.close_connection = True

    return Handler


def main(model: Any, arguments: list[str]) -> None:
    """As vLLM's api_server, with one model that is given whole weights; says what it loads."""
    stub = Stub(model, [2])
    plain = stub.answer

    def answer(path: str, body: Any) -> Answer:
        if path == "/collective_rpc" and "kwargs" in body:
            print("loads", body["kwargs"]["weights_path"], flush=True)
        return (200, {}) if path == "/health" else plain(path, body)

    stub.answer = answer  # type: ignore[method-assign]
    port = int(arguments[arguments.index("--port") + 1])
    ThreadingHTTPServer(("127.0.0.1", port), handler_of(stub)).serve_forever()


@contextmanager
def serving(stub: Stub) -> Iterator[Stub]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler_of(stub))
    server.daemon_threads = True
    stub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield stub
    finally:
        server.shutdown()
        server.server_close()
        with stub._lock:
            stub.is_closed = True


def first(times: int, answer: Answer, path: str = "/v1/completions") -> Callable[[str, Any], Answer | None]:
    """A fault of the first `times` calls of `path` from now on."""
    left = [times]

    def fault(seen: str, body: Any) -> Answer | None:
        if seen != path or left[0] == 0:
            return None
        left[0] -= 1
        return answer

    return fault


def slow(seconds: float) -> Callable[[str, Any], Answer | None]:
    def fault(path: str, body: Any) -> Answer | None:
        if path == "/v1/completions":
            time.sleep(seconds)
        return None

    return fault
