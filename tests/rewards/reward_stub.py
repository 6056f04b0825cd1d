"""A reward server in a thread of the test, whose answers a script spoils one by one."""

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[["Handler", list[dict[str, Any]]], None]


def rewards_of(items: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Texts are their own rewards where they are numbers, else their lengths."""
    texts = [i["completion"] if isinstance(i["completion"], str) else i["completion"][-1]["content"] for i in items]
    values = [float(text) if text.lstrip("-").isdigit() else float(len(text)) for text in texts]
    return [{"id": item["id"], "reward": value} for item, value in zip(items, values, strict=True)]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: "Server"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append({"headers": dict(self.headers), "path": self.path, **body})
            number = len(self.server.requests) - 1
            self.server.now += 1
            self.server.most = max(self.server.most, self.server.now)
        try:
            script = self.server.script
            answer = script[number] if number < len(script) else self.server.otherwise
            answer(self, body["items"])
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        finally:
            with self.server.lock:
                self.server.now -= 1

    def send(self, body: bytes, *, code: int = 200, length: int | None = None, **headers: str) -> None:
        self.send_response(code)
        named = {"Content-Type": "application/json", "Content-Length": str(len(body) if length is None else length)}
        for name, value in (named | {n.replace("_", "-"): v for n, v in headers.items()}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True
    script: Sequence[Answer]
    otherwise: Answer

    def handle_error(self, *args: Any) -> None:
        pass


def good(handler: Handler, items: list[dict[str, Any]]) -> None:
    handler.send(json.dumps({"rewards": rewards_of(items)}).encode())


def status(code: int, **headers: str) -> Answer:
    return lambda handler, items: handler.send(b"{}", code=code, **headers)


def text(body: str, **headers: str) -> Answer:
    return lambda handler, items: handler.send(body.encode(), **headers)


def changed(change: Callable[[list[dict[str, Any]]], Any]) -> Answer:
    """An answer in which something was done to the list of rewards."""
    return lambda handler, items: handler.send(json.dumps({"rewards": change(rewards_of(items))}).encode())


def reset(handler: Handler, items: list[dict[str, Any]]) -> None:
    handler.close_connection = True
    handler.connection.close()


def half(handler: Handler, items: list[dict[str, Any]]) -> None:
    body = json.dumps({"rewards": rewards_of(items)}).encode()
    handler.close_connection = True
    handler.send(body[: len(body) // 2], length=len(body))


def hang(handler: Handler, items: list[dict[str, Any]]) -> None:
    handler.server.released.wait(20)
    handler.close_connection = True


def trickle(handler: Handler, items: list[dict[str, Any]]) -> None:
    """One byte at a time: no single wait is long, the whole has no end."""
    handler.send(b"", length=10_000)
    while not handler.server.released.wait(0.02):
        handler.wfile.write(b" ")
        handler.wfile.flush()
    handler.close_connection = True


def endless(handler: Handler, items: list[dict[str, Any]]) -> None:
    handler.send(b"", length=10_000_000_000)
    block = b" " * 65_536
    handler.server.sent = 0  # type: ignore[attr-defined]
    while not handler.server.released.is_set():
        handler.wfile.write(block)
        handler.server.sent += len(block)  # type: ignore[attr-defined]


def slow(seconds: float) -> Answer:
    def answer(handler: Handler, items: list[dict[str, Any]]) -> None:
        time.sleep(seconds)
        good(handler, items)

    return answer


@contextmanager
def serving(*script: Answer, otherwise: Answer = good) -> Iterator[Server]:
    """A server that answers the first requests by the script, and all others well (or as `otherwise` says)."""
    server = Server(("127.0.0.1", 0), Handler)
    server.script, server.otherwise, server.requests = script, otherwise, []  # type: ignore[attr-defined]
    server.lock, server.released = threading.Lock(), threading.Event()  # type: ignore[attr-defined]
    server.now = server.most = 0  # type: ignore[attr-defined]
    server.url = f"http://127.0.0.1:{server.server_port}/score"  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield server
    finally:
        server.released.set()  # type: ignore[attr-defined]
        server.shutdown()
        server.server_close()
