"""A server in a thread of the test that speaks the OpenAI chat protocol; its judge goes by a number, or a script."""

import json
import re
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

ANSWER = re.compile(r'<answer id="([^"]+)">\n(.*?)\n</answer>', re.DOTALL)
Words = Callable[[dict[str, str]], Any]


def scalar(text: str) -> float:
    """Any number that has few ties."""
    return zlib.crc32(text.encode()) / 2**32


def by_scalar(answers: dict[str, str]) -> str:
    """What a judge says who goes by the scalar; `answers` are texts by id, as they are presented."""
    return json.dumps({"ranking": sorted(answers, key=lambda i: -scalar(answers[i]))})


def by_length(answers: dict[str, str]) -> str:
    return json.dumps({"ranking": sorted(answers, key=lambda i: (-len(answers[i]), answers[i]))})


def as_presented(answers: dict[str, str]) -> str:
    """A judge who likes what comes first."""
    return json.dumps({"ranking": list(answers)})


class Judge(ThreadingHTTPServer):
    daemon_threads = True
    says: Words
    script: list[Any]  # of the first requests: words, or (status, headers, body), or seconds to wait

    def __init__(self, says: Words, script: list[Any], model: str, tokens: bool, structured: bool) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.says, self.script, self.model = says, list(script), model
        self.tokens, self.structured = tokens, structured
        self.requests: list[dict[str, Any]] = []
        self.spent = 0
        self.lock, self.released = threading.Lock(), threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def spec(self, **options: Any) -> str:
        more = "".join(f"&{name}={value}" for name, value in ({"cache": "off"} | options).items())
        return f"judge:{self.url}?model={self.model}{more}"

    def handle_error(self, *args: Any) -> None:
        pass


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Judge

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append({"headers": dict(self.headers), "path": self.path, **asked})
            step = self.server.script.pop(0) if self.server.script else self.server.says
        if isinstance(step, float):
            self.server.released.wait(step)
            step = self.server.says
        if isinstance(step, tuple):
            self._send(*step)
        elif self.path != "/v1/chat/completions":
            self._send(404, {}, {"error": {"message": "no such path"}})
        elif asked["model"] != self.server.model:
            self._send(404, {}, {"error": {"message": f"The model `{asked['model']}` does not exist."}})
        elif "response_format" in asked and not self.server.structured:
            self._send(400, {}, {"error": {"message": "response_format is not supported"}})
        else:
            self._answer(asked, step)

    def _answer(self, asked: dict[str, Any], says: Words) -> None:
        text = asked["messages"][-1]["content"]
        said = says(dict(ANSWER.findall(text)))
        message = said if isinstance(said, dict) else {"content": said}
        end = message.pop("finish_reason", "stop")
        body = {"choices": [{"message": {"role": "assistant", **message}, "finish_reason": end}]}
        if self.server.tokens:
            sent = sum(len(m["content"]) for m in asked["messages"]) // 5 + 7
            usage = {"prompt_tokens": sent, "completion_tokens": len(str(said)) // 3}
            body["usage"] = usage  # type: ignore[assignment]
            with self.server.lock:
                self.server.spent += sum(usage.values())
        self._send(200, {}, body)

    def _send(self, status: int, headers: dict[str, str], body: Any) -> None:
        data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in ({"Content-Type": "application/json", "Content-Length": str(len(data))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        pass


@contextmanager
def judging(
    says: Words = by_scalar, *script: Any, model: str = "small", tokens: bool = True, structured: bool = True
) -> Iterator[Judge]:
    """A judge that does what the script says first, and then answers with `says`."""
    server = Judge(says, list(script), model, tokens, structured)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield server
    finally:
        server.released.set()
        server.shutdown()
        server.server_close()
