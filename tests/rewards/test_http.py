"""The reward client on its own; what a server can do wrong is in tests/faults/test_rewards.py."""

import asyncio
import json
import random
import runpy
import shutil
import ssl
import subprocess
import threading
import time
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from bondlm.errors import BondError, ConfigError, RewardError, RewardOutageError
from bondlm.rewards import HTTPReward, NamedReward, check_room, load_rewards, score
from bondlm.rewards.client import MAX_REQUESTS, PLAIN_VARIABLE, PROXY_VARIABLE, Client
from bondlm.rewards.http import TOKEN_VARIABLE
from rewards.reward_stub import changed, good, serving, slow, status

TOKEN = "s3cr3t-t0k3n-0123456789"


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    monkeypatch.delenv(PLAIN_VARIABLE, raising=False)
    for name in (PROXY_VARIABLE, "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # it would refuse every connection


def ask(
    url: str, completions: list[str], *, columns: dict[str, list[Any]] | None = None, **options: Any
) -> list[float]:
    reward = NamedReward("r", HTTPReward(url, **{"timeout": 5.0, "outage": 5.0} | options))
    return score([reward], ["p"] * len(completions), completions, columns or {}).total.tolist()


def test_items_carry_prompt_completion_and_columns_and_the_answer_comes_in_order() -> None:
    columns = {
        "id": ["same", "same"],
        "truncated": [False, True],
        "completion_ids": [[1], [2]],
        "prompt_ref": [None, "b"],
    }
    with serving() as server:
        assert ask(server.url, ["7", "-3"], columns=columns) == [7.0, -3.0]
    (request,) = server.requests
    assert request["path"] == "/score"
    assert request["version"] == 1
    assert request["items"] == [
        {
            "id": "0",
            "prompt": "p",
            "completion": "7",
            "columns": {"id": "same", "truncated": False, "prompt_ref": None},
        },
        {"id": "1", "prompt": "p", "completion": "-3", "columns": {"id": "same", "truncated": True, "prompt_ref": "b"}},
    ]
    assert "Authorization" not in request["headers"]


def test_a_large_batch_travels_in_parts_a_bounded_number_at_a_time() -> None:
    texts = [str(i) for i in range(40)]
    with serving(otherwise=slow(0.8)) as server:
        # 40 requests of 0.8 s each, 8 at a time: a turn in the queue does not count against the limit of 3.5 s.
        assert ask(server.url, texts, batch_size=1, timeout=3.5) == [float(i) for i in range(40)]
        assert len(server.requests) == 40
        assert 2 <= server.most <= MAX_REQUESTS


def test_two_servers_are_asked_together() -> None:
    meeting = threading.Barrier(2)

    def answer(handler: Any, items: Any) -> None:
        meeting.wait(timeout=30)  # for the request to the other server
        good(handler, items)

    with serving(answer) as one, serving(answer) as two:
        rewards = load_rewards([one.url, two.url], [1.0, 0.5], timeout=60.0)
        assert [reward.name for reward in rewards] == ["score", "score_2"]
        assert score(rewards, ["p"], ["4"]).total.tolist() == [6.0]


def test_calls_share_a_connection_and_no_generator_of_the_run_moves() -> None:
    reward = [NamedReward("r", HTTPReward("http://127.0.0.1:1/x", outage=0.0))]
    before = random.getstate()
    with pytest.raises(RewardOutageError):
        score(reward, ["p"], ["4"])
    with serving(status(503), status(503)) as server:
        one = [NamedReward("r", HTTPReward(server.url))]
        for _ in range(3):
            assert score(one, ["p"], ["4"]).total.tolist() == [4.0]
    assert random.getstate() == before


def test_messages_and_columns_that_are_no_json() -> None:
    with serving() as server:
        prompts = [[{"role": "user", "content": "hi"}]]
        completions = [[{"role": "assistant", "content": "12"}]]
        assert score([NamedReward("r", HTTPReward(server.url))], prompts, completions).total.tolist() == [12.0]
        assert server.requests[0]["items"][0]["prompt"] == prompts[0]
        for value in (b"bytes", float("nan"), {1, 2}):
            with pytest.raises(ConfigError, match=r"'r'.*column 'image'.*JSON"):
                ask(server.url, ["a"], columns={"title": ["t"], "image": [value]})
            rows = [{"prompt": name, "prompt_ids": [1], "image": image} for name, image in (("a", 1), ("b", value))]
            with pytest.raises(ConfigError, match=r"'r'.*column 'image'.*JSON.*prompt 'b'"):  # before the first step
                check_room([NamedReward("r", HTTPReward(server.url))], rows, 3)
        with pytest.raises(ConfigError, match=r"'r'.*messages.*JSON"):
            score([NamedReward("r", HTTPReward(server.url))], [[prompts[0][0] | {"image": b"1"}]], completions)
        assert len(server.requests) == 1


@pytest.mark.parametrize("conversational", [False, True])
def test_a_surrogate_or_control_character_survives_the_way(conversational: bool) -> None:
    odd = 'a\x00"\\\u2028\U0001f600'
    completion: Any = [{"role": "assistant", "content": odd}] if conversational else odd
    with serving() as server:
        score([NamedReward("r", HTTPReward(server.url))], [odd], [completion])
        assert server.requests[0]["items"][0]["completion"] == completion


# -- the address


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http:///score", "http://HOST/PATH"),
        ("https://", "http://HOST/PATH"),
        ("http://me:pw@127.0.0.1:80a/score", "80a.*http://HOST:PORT/PATH"),
        ("http://[::1/score", "IPv6.*http://HOST:PORT/PATH"),
        ("http://me:pw@127.0.0.1/score", f"password.*{TOKEN_VARIABLE}"),
        ("http://10.0.0.7/score", rf"10\.0\.0\.7.*https.*{PLAIN_VARIABLE}=1"),
        ("http://rewards.example/score", rf"rewards\.example.*{PLAIN_VARIABLE}=1"),
    ],
)
def test_addresses_that_are_refused(url: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_rewards(url)
    assert "pw" not in str(caught.value)


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://host/x", "gopher://host"])
def test_other_schemes_are_no_servers(url: str) -> None:
    with pytest.raises(ConfigError, match=f"'{url}'.*module:function"):
        load_rewards(url)


def test_addresses_that_are_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    for url in ("https://rewards.example/score", "http://localhost:8/x", "http://127.3.2.1", "http://[::1]:80/s"):
        load_rewards(url)
    monkeypatch.setenv(PLAIN_VARIABLE, "1")
    assert load_rewards("http://10.0.0.7/v1/score?key=abc")[0].name == "score"


def test_the_name_shows_no_query() -> None:
    reward = HTTPReward("https://h.example/a/b?key=very-secret")
    assert reward.name == "h.example/a/b"
    assert "very-secret" not in repr(reward)


# -- the token


def test_the_token_is_sent_and_never_said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    caplog.set_level("DEBUG")

    def echo(handler: Any, items: Any) -> None:
        handler.send(json.dumps({"you sent": handler.headers["Authorization"]}).encode())

    messages = []
    for answer in (echo, status(401), status(302, Location="http://127.0.0.1:1/"), status(503)):
        with serving(otherwise=answer) as server:
            with pytest.raises(BondError) as caught:
                ask(server.url, ["a"], outage=0.0)
            messages.append(str(caught.value))
            assert server.requests[0]["headers"]["Authorization"] == f"Bearer {TOKEN}"
            assert len(server.requests) == 1
    assert TOKEN not in "".join(messages) + caplog.text + repr(HTTPReward("https://x.example"))


@pytest.mark.parametrize("token", [f"{TOKEN}\n", f"a {TOKEN}", f"{TOKEN}\u00e9", ""])
def test_a_token_that_no_header_can_carry_is_refused_unseen(token: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, token)
    with pytest.raises(ConfigError, match=TOKEN_VARIABLE) as caught:
        HTTPReward("http://127.0.0.1/x")
    assert TOKEN not in str(caught.value)


# -- failures among several requests


def test_one_failed_request_cancels_the_others() -> None:
    with serving(status(404), otherwise=slow(0.2)) as server:
        with pytest.raises(RewardError, match="HTTP 404"):
            ask(server.url, [str(i) for i in range(60)], batch_size=1)
        time.sleep(0.5)
        assert len(server.requests) <= 2 * MAX_REQUESTS


def test_while_the_server_is_down_one_request_at_a_time_asks() -> None:
    def fail(handler: Any, items: Any) -> None:
        time.sleep(0.03)
        handler.send(b"{}", code=503)

    with serving(otherwise=fail) as server:
        reward = HTTPReward(server.url, timeout=5.0, outage=1.6, batch_size=1)
        with pytest.raises(RewardOutageError):
            score([NamedReward("r", reward)], ["p"] * 6, ["a"] * 6)
        server.most = 0
        began = time.monotonic()
        with pytest.raises(RewardOutageError):  # the breaker is open: a second call waits no second time
            score([NamedReward("r", reward)], ["p"] * 6, ["a"] * 6)
        assert time.monotonic() - began < 1.0
        assert server.most == 1
        server.otherwise = good
        assert score([NamedReward("r", reward)], ["p"], ["5"]).total.tolist() == [5.0]
        assert reward.client._failing_since is None


def test_ids_of_the_wrong_type_are_not_ours() -> None:
    with serving(changed(lambda rows: [row | {"id": int(row["id"])} for row in rows])) as server:
        with pytest.raises(RewardError, match=r"missing \['0'\], unknown \['0'\]"):
            ask(server.url, ["1"])


def test_null_is_a_bad_value_beside_another_reward_too() -> None:
    """It was left out of the sum, as None of a function is."""
    with serving(changed(lambda rows: [row | {"reward": None} for row in rows])) as server:
        both = [NamedReward("r", HTTPReward(server.url)), NamedReward("one", lambda completions: [1.0])]
        scores = score(both, ["p"], ["5"], allow_bad_rows=True)
        assert "'r' is nan" in scores.bad[0]


def test_the_example_server_speaks_the_protocol(monkeypatch: pytest.MonkeyPatch) -> None:
    example = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "reward_server.py"))
    monkeypatch.setattr(example["Handler"], "log_message", lambda *args: None)
    server = ThreadingHTTPServer(("127.0.0.1", 0), example["Handler"])
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/score"
    try:
        assert ask(url, ["x" * 90, "x" * 130]) == [-10.0, -30.0]
        chat = [[{"role": "assistant", "content": "x" * 99}]]
        assert score(load_rewards(url), ["p"], chat).total.tolist() == [-1.0]
        monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
        client = HTTPReward(url)
        assert asyncio.run(client(prompts=["p"], completions=["x"])) == [-99.0]
        client = HTTPReward(url)
        client._headers["Authorization"] = "Bearer other"
        with pytest.raises(RewardError, match="HTTP 401"):
            asyncio.run(client(prompts=["p"], completions=["x"]))
    finally:
        server.shutdown()
        server.server_close()


# -- many requests, and certificates


def test_more_than_a_hundred_requests_may_be_under_way_and_all_go_on_when_a_server_is_back() -> None:
    """The pool of httpx ends at 100 by default; after a fault the others must not follow one by one."""
    count = 120
    with serving(*[status(503)] * 3, otherwise=slow(0.5)) as server:
        server.socket.listen(count)
        client = Client(*(server.url, "s", {}), what="server", advice="", timeout=20.0, outage=20.0, max_requests=count)
        body = json.dumps({"items": [{"id": "0", "completion": "5"}]})

        async def ask_all() -> None:
            await asyncio.gather(*[client.post(body, 1000) for _ in range(count)])

        began = time.monotonic()
        asyncio.run(ask_all())
        assert time.monotonic() - began < 15
    assert server.most > 100


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes a certificate with openssl")
def test_a_private_authority_is_trusted_if_it_is_named_and_else_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, key = tmp_path / "made.pem", tmp_path / "key.pem"
    how = "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=DNS:localhost".split()
    subprocess.run(["openssl", *how, "-keyout", str(key), "-out", str(made)], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(made, key)
    with serving() as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        url = server.url.replace("http://127.0.0.1", "https://localhost")
        began = time.monotonic()
        with pytest.raises(RewardError, match=r"not trusted: self.signed certificate.*SSL_CERT_FILE") as caught:
            ask(url, ["5"], outage=60.0)
        assert not isinstance(caught.value, RewardOutageError)
        assert time.monotonic() - began < 10
        monkeypatch.setenv("SSL_CERT_FILE", str(made))
        assert ask(url, ["5"]) == [5.0]


def test_a_proxy_is_used_if_it_is_named_for_it_and_only_to_other_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PLAIN_VARIABLE, "1")
    far = "http://rewards.invalid/score"  # a name that no resolver knows
    with pytest.raises(RewardOutageError, match=r"behind the proxy in HTTP_PROXY, set BONDLM_PROXY"):
        ask(far, ["5"], outage=0.2)
    with serving() as proxy:
        monkeypatch.setenv(PROXY_VARIABLE, proxy.url.removesuffix("/score"))
        assert ask(far, ["5"]) == [5.0]
    with serving() as own:
        assert ask(own.url, ["5"]) == [5.0]  # the proxy is gone
    monkeypatch.setenv(PROXY_VARIABLE, "proxy.example:3128")
    with pytest.raises(ConfigError, match="BONDLM_PROXY is not the address"):
        ask(far, ["5"])
