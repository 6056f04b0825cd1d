"""A reward server that answers as it is told: a list of behaviours, the last one for all further requests."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Behaviour = Callable[[BaseHTTPRequestHandler, list[dict[str, Any]]], None]


def send(handler: BaseHTTPRequestHandler, body: bytes, status: int = 200, **headers: str) -> None:
    handler.send_response(status)
    for name, value in ({"Content-Type": "application/json", "Content-Length": str(len(body))} | headers).items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(body)


def rewards(items: list[dict[str, Any]]) -> bytes:
    """The length of each completion."""
    return json.dumps({"rewards": [{"id": i["id"], "reward": len(i["completion"])} for i in items]}).encode()


def good(handler: BaseHTTPRequestHandler, items: list[dict[str, Any]]) -> None:
    send(handler, rewards(items))


def status(code: int, **headers: str) -> Behaviour:
    return lambda handler, items: send(handler, b"{}", code, **headers)


def body(text: bytes, **headers: str) -> Behaviour:
    return lambda handler, items: send(handler, text, **headers)


def half(handler: BaseHTTPRequestHandler, items: list[dict[str, Any]]) -> None:
    text = rewards(items)
    handler.send_response(200)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", str(len(text)))
    handler.end_headers()
    handler.wfile.write(text[: len(text) // 2])


def reset(handler: BaseHTTPRequestHandler, items: list[dict[str, Any]]) -> None:
    handler.connection.close()


class Stub:
    def __init__(self, url: str) -> None:
        self.url = url
        self.behaviours: list[Behaviour] = [good]
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []


@contextmanager
def running() -> Iterator[Stub]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                stub.requests.append(request)
                stub.headers.append(dict(self.headers.items()))
                act = stub.behaviours.pop(0) if len(stub.behaviours) > 1 else stub.behaviours[0]
            act(self, request["items"])

        def log_message(self, *args: Any) -> None:
            pass

    lock = threading.Lock()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    stub = Stub(f"http://127.0.0.1:{server.server_port}/score")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield stub
    finally:
        server.shutdown()
        server.server_close()
