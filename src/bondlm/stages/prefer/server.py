"""A local page that shows two answers and asks which is better.

It listens only on the loopback interface. All addresses begin with a random token, so that other pages in the browser
and other users of the machine cannot read or choose.
"""

import base64
import hashlib
import hmac
import json
import re
import secrets
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread
from typing import Any

from bondlm.data.rows import conversation_text
from bondlm.runs.redact import visible
from bondlm.stages.prefer.choices import VERDICTS, Choices
from bondlm.stages.prefer.pairs import Pair

PAGE = Path(__file__).parent / "page.html"
HOSTS = ("127.0.0.1", "localhost", "[::1]")
LONGEST = 1024  # bytes of a request's body


class PreferServer(ThreadingHTTPServer):
    """Shows pairs one by one; `serve_forever` returns when all are decided, or when the person ends it."""

    daemon_threads = True

    def __init__(self, choices: Choices, pairs: Sequence[Pair], port: int = 0) -> None:
        """Listen on 127.0.0.1; port 0 means any free port.

        Raises:
            OSError: the port is in use or not permitted.
        """
        self._choices, self._pairs, self._lock = choices, pairs, Lock()
        self._left = choices.left_of(pairs)
        self.kept = 0  # choices in this session
        self.token = secrets.token_urlsafe(24)
        super().__init__(("127.0.0.1", port), _Handler)

    @property
    def url(self) -> str:
        """The address of the page, which includes the token."""
        return f"http://127.0.0.1:{self.server_address[1]}/{self.token}/"

    @property
    def num_left(self) -> int:
        """Pairs without a choice."""
        return len(self._left)

    def state(self) -> dict[str, Any]:
        """The data for the page: the next pair, if there is one, and the number of decided pairs."""
        with self._lock:
            return self._state()

    def _state(self) -> dict[str, Any]:
        counts = {"decided": len(self._pairs) - len(self._left), "total": len(self._pairs)}
        if not self._left:
            return counts | {"pair": None}
        pair = self._left[0]
        texts = {"prompt": conversation_text(pair.row["prompt"]), "left": pair.left, "right": pair.right}
        return counts | {"pair": _name(pair)} | {name: visible(text) for name, text in texts.items()}

    def decide(self, name: Any, verdict: Any) -> tuple[int, dict[str, Any]]:
        """Store a verdict on the shown pair; returns the HTTP status and what to show next.

        A pair that was already decided, in another tab or by a key pressed twice, is not decided again.
        """
        if verdict not in VERDICTS:
            return 400, {"error": f"verdict must be one of {', '.join(VERDICTS)}"}
        with self._lock:
            if not self._left or _name(self._left[0]) != name:
                return 409, self._state()
            try:
                self._choices.add(self._left[0], verdict)
            except OSError as error:
                return 500, {"error": f"this choice was not kept: {error.strerror}"}
            self._left.pop(0)
            self.kept += 1
            return 200, self._state()

    def end(self) -> None:
        """Make `serve_forever` return, after the current answer."""
        Thread(target=self.shutdown, daemon=True).start()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore a browser that closed the connection."""


def _name(pair: Pair) -> str:
    return hashlib.sha256(pair.key.encode()).hexdigest()[:16]


class _Handler(BaseHTTPRequestHandler):
    server: PreferServer
    timeout = 30

    def do_GET(self) -> None:
        path = self._path()
        if path == "":
            page = PAGE.read_bytes()
            self._answer(200, page, "text/html; charset=utf-8", _policy(page.decode()))
        elif path == "state":
            self._say(200, self.server.state())
        else:
            self._say(404, {"error": "not found"})

    def do_POST(self) -> None:
        path, body = self._path(), self._body()
        if path is None:
            self._say(404, {"error": "not found"})
        elif path == "verdict" and body is not None:
            status, state = self.server.decide(body.get("pair"), body.get("verdict"))
            self._say(status, state)
            if status == 200 and state["pair"] is None:
                self.server.end()
        elif path == "end" and body is not None:
            self._say(200, {})
            self.server.end()
        else:
            self._say(400, {"error": "not a request of this page"})

    def _path(self) -> str | None:
        """The path after the token; None for requests without the token or with another host name."""
        host = re.sub(r":\d+$", "", self.headers.get("Host", ""))
        parts = self.path.split("/")
        if len(parts) != 3 or host not in HOSTS:
            return None
        return parts[2] if hmac.compare_digest(parts[1].encode(), self.server.token.encode()) else None

    def _body(self) -> dict[str, Any] | None:
        """The JSON object that was sent; a form on another page cannot send this content type without permission."""
        length = self.headers.get("Content-Length", "")
        if self.headers.get("Content-Type") != "application/json" or not length.isdecimal() or int(length) > LONGEST:
            return None
        try:
            body = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError):
            return None
        return body if isinstance(body, dict) else None

    def _say(self, status: int, value: dict[str, Any]) -> None:
        self._answer(status, json.dumps(value).encode(), "application/json")

    def _answer(self, status: int, body: bytes, kind: str, policy: str = "default-src 'none'") -> None:
        self.send_response(status)
        headers = {"Content-Type": kind, "Content-Length": str(len(body)), "Cache-Control": "no-store"}
        headers |= {"Content-Security-Policy": policy, "Referrer-Policy": "no-referrer"}
        headers |= {"X-Content-Type-Options": "nosniff", "Cross-Origin-Resource-Policy": "same-origin"}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing: addresses hold the token."""


def _policy(page: str) -> str:
    """The policy: only the page's own scripts and styles, and connections only to this server."""
    hashes = {}
    for tag in ("script", "style"):
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        hashes[tag] = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    rules = ["default-src 'none'", *(f"{tag}-src 'sha256-{digest}'" for tag, digest in hashes.items())]
    rules += ["connect-src 'self'", "img-src data:", "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'"]
    return "; ".join(rules)
