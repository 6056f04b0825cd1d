"""Rows R3 and R7 to R10 of the fault matrix: what a reward server can do wrong, on a real socket."""

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
from rewards.reward_stub import Answer, changed, endless, good, half, hang, reset, serving, status, text, trickle
from tiny import prompt_rows
from trainer.helpers import config, same, trainer, weights

from bondlm.errors import ConfigError, RewardError, RewardOutageError
from bondlm.rewards import HTTPReward, NamedReward, score
from bondlm.runs.folder import DROPPED_FILE

TEXTS = ["5", "-2", "11", "0", "7"]
VALUES = [5.0, -2.0, 11.0, 0.0, 7.0]


def ask(url: str, *, timeout: float = 5.0, outage: float = 5.0, drop: bool = False) -> Any:
    """The rewards of TEXTS, or all scores if bad rows may be dropped."""
    reward = NamedReward("server", HTTPReward(url, timeout=timeout, outage=outage, batch_size=3))
    scores = score([reward], ["p"] * len(TEXTS), TEXTS, allow_bad_rows=drop)
    return scores if drop else scores.total.tolist()


def test_r3_answers_in_another_order_are_matched_by_id() -> None:
    with serving(otherwise=changed(lambda rows: rows[::-1])) as server:
        assert ask(server.url) == VALUES


@pytest.mark.parametrize(
    "change",
    [
        lambda rows: rows[1:],
        lambda rows: [*rows, rows[0]],
        lambda rows: [*rows, {"id": "99", "reward": 1.0}],
        lambda rows: [{"id": "99", "reward": 1.0}, *rows[1:]],
        lambda rows: [rows[0], *rows[:-1]],
    ],
    ids=["one short", "one twice", "one more", "another", "twice instead of another"],
)
def test_r3_ids_that_were_not_asked_for_are_refused(change: Any) -> None:
    with serving(otherwise=changed(change)) as server:
        with pytest.raises(RewardError, match=r"missing \[.*unknown \["):
            ask(server.url)
        assert len(server.requests) <= 2  # a wrong answer is not asked for again


@pytest.mark.parametrize("answer", [hang, trickle], ids=["silence", "a byte at a time"])
def test_r7_a_server_that_hangs_is_given_up(answer: Answer) -> None:
    began = time.monotonic()
    with serving(otherwise=answer) as server:
        with pytest.raises(RewardOutageError, match=r"0\.2 s.*reward_timeout_s") as caught:
            ask(server.url, timeout=0.2, outage=0.7)
        assert caught.value.exit_code == 4
        assert len(server.requests) >= 2
    assert time.monotonic() - began < 4


@pytest.mark.parametrize("answer", [hang, trickle], ids=["silence", "a byte at a time"])
def test_r7_one_that_hangs_once_is_asked_again(answer: Answer) -> None:
    with serving(answer) as server:
        assert ask(server.url, timeout=0.5) == VALUES


TRANSIENT = {
    "500": status(500),
    "502": status(502),
    "503": status(503),
    "504": status(504),
    "520, of a proxy": status(520),
    "529, overloaded": status(529),
    "429": status(429, Retry_After="0"),
    "429 with a date": status(429, Retry_After="Wed, 21 Oct 2026 07:28:00 GMT"),
    "connection reset": reset,
    "half a body": half,
}


@pytest.mark.parametrize("answer", TRANSIENT.values(), ids=TRANSIENT.keys())
def test_r8_a_fault_that_passes_is_ridden_out(answer: Answer) -> None:
    with serving(answer, answer) as server:
        assert ask(server.url) == VALUES
        assert len(server.requests) == 4  # two batches, and two tries that failed


def test_r8_retry_after_is_honoured() -> None:
    with serving(status(429, Retry_After="1")) as server:
        began = time.monotonic()
        assert ask(server.url) == VALUES
        assert time.monotonic() - began >= 1.0


def test_r8_a_long_retry_after_does_not_end_the_run_early() -> None:
    """The server asks for an hour: it is asked once more when `reward_outage_s` is over, and then given up."""
    for answers, outcome in (([status(503, Retry_After="3600")], VALUES), ([], None)):
        with serving(*answers, otherwise=good if answers else status(503, Retry_After="3600")) as server:
            began = time.monotonic()
            if outcome is not None:
                assert ask(server.url, outage=1.0) == outcome
            else:
                with pytest.raises(RewardOutageError, match="HTTP 503"):
                    ask(server.url, outage=1.0)
            assert 0.9 < time.monotonic() - began < 4


def test_r8_pauses_grow_and_no_two_are_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []

    async def note(seconds: float) -> None:
        pauses.append(seconds)

    monkeypatch.setattr("bondlm.rewards.client.asyncio.sleep", note)
    with serving(*[status(503)] * 10) as server:
        ask(server.url, outage=1000.0)
    assert len(pauses) == len(set(pauses)) == 10
    assert max(pauses[:2]) <= 1.0
    assert min(sorted(pauses)[-2:]) > 4.0
    assert max(pauses) <= 30.0


def test_r8_no_server_there() -> None:
    with serving() as server:
        url = server.url
    with pytest.raises(RewardOutageError, match=r"reward_outage_s=0\.5.*ConnectError"):
        ask(url, outage=0.5)


REFUSED = {
    "another type": (text("<html>", Content_Type="text/html"), "'text/html'.*application/json"),
    "a redirect": (status(307, Location="http://localhost:1/score"), "HTTP 307"),
    "a redirect with rewards": (status(302, Location="/score"), "HTTP 302"),
    "no body": (status(204), "HTTP 204"),
}


@pytest.mark.parametrize(("answer", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_r8_what_is_no_answer_is_refused_at_once(answer: Answer, message: str) -> None:
    with serving(otherwise=answer) as server:
        with pytest.raises(RewardError, match=message) as caught:
            ask(server.url)
        assert not isinstance(caught.value, RewardOutageError)
        assert len(server.requests) <= 2


def test_r8_a_body_without_end_is_cut() -> None:
    with serving(otherwise=endless) as server:
        with pytest.raises(RewardError, match=r"more than (73728|77824) bytes"):
            ask(server.url)
        time.sleep(0.1)
        assert server.sent < 30_000_000  # type: ignore[attr-defined]  # what fits the socket's buffers, not 10 GB


@pytest.mark.parametrize("code", [400, 401, 403, 404, 422])
def test_r9_what_will_not_pass_is_not_tried_again(code: int) -> None:
    with serving(otherwise=status(code)) as server:
        with pytest.raises(RewardError, match=f"HTTP {code}") as caught:
            ask(server.url)
        assert caught.value.exit_code == 4
        assert not isinstance(caught.value, RewardOutageError)
        assert len(server.requests) <= 2


BAD_VALUES = {"NaN": "NaN", "Infinity": "Infinity", "-Infinity": "-Infinity", "1e999": "1e999", "null": "null"}
BAD_VALUES |= {"text": '"5"', "a list": "[5]", "an object": "{}"}


@pytest.mark.parametrize("value", BAD_VALUES.values(), ids=BAD_VALUES.keys())
def test_r10_a_value_that_is_no_number_is_a_bad_row(value: str) -> None:
    """As R1: the row is refused, and none of the others."""

    def answer(handler: Any, items: list[dict[str, Any]]) -> None:
        parts = [f'{{"id": "{i["id"]}", "reward": {value if i["id"] == "1" else 2.5}}}' for i in items]
        handler.send(f'{{"rewards": [{", ".join(parts)}]}}'.encode())

    with serving(otherwise=answer) as server:
        scores = ask(server.url, drop=True)
        assert list(scores.bad) == [1]
        assert scores.total[[0, 2, 3, 4]].tolist() == [2.5] * 4
        with pytest.raises(RewardError, match="row 1 of 5"):
            ask(server.url)


BAD_JSON = {
    "a key twice": '{"rewards": [], "rewards": []}',
    "a key twice inside": '{"rewards": [{"id": "0", "id": "1", "reward": 1}]}',
    "nested deeply": '{"rewards": ' + "[" * 30_000 + "]" * 30_000 + "}",
    "no JSON": "<html>",
    "cut": '{"rewards": [{"id"',
    "not UTF-8": '{"rewards": "\udcff"}',
    "no rewards": '{"scores": []}',
    "rewards by position": '{"rewards": [1, 2, 3]}',
    "an id that is a list": '{"rewards": [{"id": [], "reward": 1}]}',
    "a number of a million digits": '{"rewards": [{"id": "0", "reward": ' + "9" * 60_000 + "}]}",
    "a list": "[]",
    "null": "null",
}


@pytest.mark.parametrize("body", BAD_JSON.values(), ids=BAD_JSON.keys())
def test_r10_an_answer_that_is_not_the_protocols_is_refused(body: str) -> None:
    with serving(otherwise=lambda h, items: h.send(body.encode(errors="surrogateescape"))) as server:
        with pytest.raises(RewardError, match=r'bytes.*\{"rewards"') as caught:
            ask(server.url)
        assert len(str(caught.value)) < 600


def test_r10_in_training_the_prompt_is_dropped_and_the_others_learn(tmp_path: Path) -> None:
    bad = prompt_rows(4)[2]["prompt"]

    def answer(handler: Any, items: list[dict[str, Any]]) -> None:
        values = ["NaN" if item["prompt"] == bad else str(len(item["completion"])) for item in items]
        parts = [f'{{"id": "{i["id"]}", "reward": {v}}}' for i, v in zip(items, values, strict=True)]
        handler.send(f'{{"rewards": [{", ".join(parts)}]}}'.encode())

    with serving(otherwise=answer) as server:
        made = trainer(tmp_path, reward=server.url, rows=4, max_steps=1)
        before = weights(made.roles.model)
        made.train()
    assert not same(weights(made.roles.model), before)
    rows = [json.loads(line) for line in (tmp_path / DROPPED_FILE).read_bytes().splitlines()]
    assert [row["prompt"] for row in rows] == [bad]
    assert "reward 'score' is nan" in rows[0]["reason"]


def test_a_stub_that_is_good_is_good() -> None:
    with serving(otherwise=good) as server:
        assert ask(server.url) == VALUES


@pytest.mark.parametrize(
    ("settings", "seconds"),
    [
        ({}, 780),  # the default limits of rewards are longer than ten minutes
        ({"reward_outage_s": 120.0}, 600),
        ({"reward_outage_s": 3600.0, "reward_timeout_s": 0.25}, 3661),
        ({"reward_outage_s": math.inf}, 31_536_000),
        ({"ddp_timeout": 8}, 8),
    ],
)
def test_m1_processes_wait_longer_for_each_other_than_one_may_for_its_server(
    settings: dict[str, Any], seconds: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the limit reaches the process group. A rank that is gone: test_processes.py."""
    limits: list[float] = []
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(
        "bondlm.config.bond_config.PartialState", lambda timeout, **others: limits.append(timeout.total_seconds())
    )
    monkeypatch.setattr("transformers.TrainingArguments.__post_init__", lambda self: None)
    made = config(tmp_path, report_to=[], **settings)
    assert made.ddp_timeout == seconds
    assert limits == [seconds]


def test_m1_a_server_that_is_down_is_given_up_within_its_limits() -> None:
    """One request until it is noticed, the outage, one request more: what `ddp_timeout` counts with."""
    with serving(otherwise=hang) as server:
        began = time.monotonic()
        with pytest.raises(RewardOutageError):
            ask(server.url, timeout=0.5, outage=1.0)
        assert time.monotonic() - began < 1.0 + 2 * 0.5 + 2  # two seconds for a busy machine; a request hangs for 20


def test_m1_a_limit_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="ddp_timeout=0: "):
        config(tmp_path, ddp_timeout=0)
