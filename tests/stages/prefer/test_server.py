"""`bondlm prefer` through real requests: what is shown, what is kept, and who is refused."""

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any
from urllib import request

import pytest

from bondlm.cli import main
from bondlm.stages.prefer.choices import Choices
from bondlm.stages.prefer.pairs import read_pairs
from bondlm.stages.prefer.server import LONGEST, PreferServer
from stages.helpers import write

from .helpers import ask, decide, serving, shorter

HOSTILE = "<img src=x onerror=alert(1)> \x1b[31m \u202e"


def samples(count: int = 3) -> list[dict[str, Any]]:
    texts = ["short", "a longer answer", HOSTILE]
    return [{"prompt": f"p{i}", "completion": text} for i in range(count) for text in texts[: 2 + (i == 0)]]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[PreferServer]:
    path = Path(write(tmp_path / "s.jsonl", samples()))
    made = PreferServer(Choices(tmp_path / "preferences.jsonl"), read_pairs(path, 9, seed=0))
    thread = Thread(target=made.serve_forever, args=(0.01,))
    thread.start()
    with made:
        yield made
        made.shutdown()
        thread.join(5)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_person_decides_and_comes_back(tmp_path: Path) -> None:
    """The process is ended in the middle, and the same command goes on where it was."""
    path, out = write(tmp_path / "scored.jsonl", samples(5)), tmp_path / "preferences.jsonl"
    with serving(path) as (process, url):
        assert decide(url, shorter, most=2)["decided"] == 2
        assert len(rows(out)) == 2
        process.send_signal(signal.SIGKILL)
        process.wait(10)
    with serving(path) as (process, url):
        assert ask(url + "state")[1]["decided"] == 2
        assert decide(url, lambda state: "tie", most=1)["decided"] == 3
        decide(url, shorter)
        output = process.communicate(timeout=20)[0]
        assert process.returncode == 0
    assert f"3 more choices, 0 of 5 pairs left: {out}" in output
    kept = rows(out)
    assert len({row["prompt"] for row in kept}) == 5
    assert [row["verdict"] for row in kept].count("tie") == 1
    assert all(len(row["chosen"]) <= len(row["rejected"]) for row in kept if "chosen" in row)
    assert not out.with_name(f"{out.name}.lock").exists()


def test_the_person_or_ctrl_c_ends_it_and_all_is_kept(tmp_path: Path) -> None:
    path = write(tmp_path / "scored.jsonl", samples())
    with serving(path, "--output", str(tmp_path / "mine.jsonl")) as (process, url):
        decide(url, shorter, most=1)
        assert ask(url + "end", {})[0] == 200
        assert process.wait(20) == 0
    with serving(path, "--output", str(tmp_path / "mine.jsonl")) as (process, url):
        decide(url, shorter, most=1)
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
    assert len(rows(tmp_path / "mine.jsonl")) == 2


def test_a_verdict_counts_once(server: PreferServer) -> None:
    """A key that is pressed twice, or a second tab, does not decide the pair behind it."""
    first = ask(server.url + "state")[1]
    body = {"pair": first["pair"], "verdict": "left"}
    status, second = ask(server.url + "verdict", body)
    assert (status, second["decided"]) == (200, 1)
    assert ask(server.url + "verdict", body) == (409, second)
    assert server.kept == 1


def test_texts_are_shown_with_what_hides_in_them(server: PreferServer) -> None:
    seen: list[str] = []

    def look(state: dict[str, Any]) -> str:
        seen.extend((state["left"], state["right"]))
        return "skip"

    decide(server.url, look)
    assert r"<img src=x onerror=alert(1)> \x1b[31m \u202e" in seen


@pytest.mark.parametrize(
    ("path", "headers"),
    [
        ("state", {"Host": "evil.example"}),
        ("state", {"Host": "evil.example:80"}),
        ("../wrong-token/state", {}),
        ("../state", {}),
        ("../", {}),
        ("nothing", {}),
        ("x/state", {}),
    ],
)
def test_who_does_not_know_the_address_gets_nothing(server: PreferServer, path: str, headers: dict[str, str]) -> None:
    base = server.url if not path.startswith("../") else server.url.removesuffix(f"{server.token}/")
    url = base + path.removeprefix("../")
    assert ask(url, None, headers) == (404, {"error": "not found"})
    assert ask(url, {"pair": "x", "verdict": "left"}, headers | {"Content-Type": "application/json"})[0] in (400, 404)
    assert server.kept == 0


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
def test_what_another_page_may_send_unasked_is_refused(server: PreferServer, kind: str) -> None:
    pair = ask(server.url + "state")[1]["pair"]
    assert ask(server.url + "verdict", {"pair": pair, "verdict": "left"}, {"Content-Type": kind})[0] == 400
    assert ask(server.url + "end", {}, {"Content-Type": kind})[0] == 400
    assert server.kept == 0


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"[" * 1000, b"\xff", b'{"pair": 1}', b'{"pair": [], "verdict": {}}', b" " * (LONGEST + 1)],
)
def test_nonsense_is_refused(server: PreferServer, body: bytes) -> None:
    assert ask(server.url + "verdict", body)[0] == 400
    assert ask(server.url + "state")[1]["decided"] == 0


def test_a_choice_that_cannot_be_kept_is_said(server: PreferServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(number: int) -> None:
        raise OSError(28, "No space left on device")

    before = ask(server.url + "state")[1]
    monkeypatch.setattr("bondlm.stages.prefer.choices.os.fsync", full)
    status, answer = ask(server.url + "verdict", {"pair": before["pair"], "verdict": "left"})
    assert status == 500
    assert "No space left" in answer["error"]
    assert ask(server.url + "state")[1] == before


def test_the_page_speaks_to_this_server_alone(server: PreferServer) -> None:
    with request.urlopen(server.url, timeout=10) as answer:
        text, headers = answer.read().decode(), answer.headers
    assert server.server_address[0] == "127.0.0.1"
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert "unsafe" not in headers["Content-Security-Policy"]
    assert headers["Referrer-Policy"] == "no-referrer"
    assert server.token not in text
    assert "http" not in text.replace("http-equiv", "")


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ([], "prefer RUN"),
        (["{s}", "{s}"], "prefer RUN"),
        (["{s}", "--port", "-1"], "port=-1"),
        (["{s}", "--port", "70000"], "port=70000"),
        (["{s}", "--pairs_per_prompt", "0"], "pairs_per_prompt=0"),
        (["no-such-folder"], "no-such-folder"),
        (["{s}", "--output", "no/such/folder/p.jsonl"], "output="),
    ],
)
def test_settings_that_cannot_be_are_refused(tmp_path: Path, words: list[str], name: str, capsys: Any) -> None:
    path = write(tmp_path / "s.jsonl", samples())
    assert main(["prefer", *(word.replace("{s}", path) for word in words)]) == 2
    assert name in capsys.readouterr().err
