"""Servers that speak another dialect of the chat protocol."""

import pytest

from bondlm.errors import RewardError

from .judge_stub import by_length, judging
from .test_judge import BY_LENGTH, ask, load


def test_a_server_that_knows_only_the_old_name_of_the_token_limit_gets_that() -> None:
    """Such as Mistral's, which forbids unknown fields; it could not be used."""
    forbidden = (422, {}, {"detail": [{"type": "extra_forbidden", "loc": ["body", "max_completion_tokens"]}]})
    with judging(by_length, forbidden) as server:
        reward = load(server, concurrency=1)
        assert ask(reward).total.tolist() == BY_LENGTH
        names = [[name for name in request if name.startswith("max_")] for request in server.requests]
        assert names == [["max_completion_tokens"], ["max_tokens"], ["max_tokens"]]
        assert all("response_format" in request for request in server.requests)
    too_many = (400, {}, {"error": {"message": "max_completion_tokens is too large: 9999999"}})
    other = (400, {}, {"error": {"message": "Use 'max_completion_tokens' instead of 'max_tokens'"}})
    with judging(by_length, *[too_many, other] * 2) as server, pytest.raises(RewardError, match="is too large"):
        ask(load(server, concurrency=1))
