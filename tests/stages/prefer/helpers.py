"""A person without a browser: real requests to the address that `bondlm prefer` prints."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib import error, request

ROOT = Path(__file__).parents[3]


def ask(url: str, body: Any = None, headers: dict[str, str] | None = None) -> tuple[int, Any]:
    """Status and JSON of a GET, or of a POST with this body."""
    data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    given = {"Content-Type": "application/json"} if headers is None else headers
    try:
        with request.urlopen(request.Request(url, data, given), timeout=10) as answer:
            return answer.status, json.loads(answer.read())
    except error.HTTPError as refused:
        return refused.code, json.loads(refused.read() or "null")


def decide(url: str, choose: Callable[[dict[str, Any]], str], most: int = 1000) -> dict[str, Any]:
    """Choose until all is decided, or `most` times; the last state."""
    _, state = ask(url + "state")
    for _ in range(most):
        if state["pair"] is None:
            break
        status, state = ask(url + "verdict", {"pair": state["pair"], "verdict": choose(state)})
        assert status == 200
    found: dict[str, Any] = state
    return found


def shorter(state: dict[str, Any]) -> str:
    return "left" if len(state["left"]) <= len(state["right"]) else "right"


@contextmanager
def serving(*words: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`bondlm prefer` with these words as a process, and the address that it prints."""
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "bondlm", "prefer", *words]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    try:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if found := re.search(r"http://\S+/", line):
                break
        else:
            raise AssertionError("".join(lines))
        yield process, found.group()
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            process.wait(20)
