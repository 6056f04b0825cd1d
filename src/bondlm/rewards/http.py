"""A reward that a server computes: JSON over HTTP, answers matched by id (requests: `bondlm.rewards.client`).

The protocol is in docs/rewards.md, a server of twenty lines in examples/reward_server.py.
"""

import json
import math
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from bondlm.errors import ConfigError, RewardError
from bondlm.rewards.calls import await_together
from bondlm.rewards.client import LEAST_BYTES, Client, bearer, checked_name
from bondlm.rewards.extras import NAMES as EXTRAS

TOKEN_VARIABLE = "BONDLM_REWARD_TOKEN"  # noqa: S105 (the name of a variable, not a token)
VERSION = 1
BYTES_AN_ITEM = 4096  # per item of an answer
_ADVICE = f"check its address (redirects are not followed), {TOKEN_VARIABLE}, and what it says of the request"


class HTTPReward:
    """An asynchronous reward function that asks the server at `url`."""

    def __init__(self, url: str, *, timeout: float = 60.0, outage: float = 600.0, batch_size: int = 32) -> None:
        """A request carries at most `batch_size` completions and takes at most `timeout` seconds.

        The bearer token comes from the environment variable BONDLM_REWARD_TOKEN.

        Raises:
            ConfigError: it is not an address, holds a password, or would send prompts over a network unencrypted; or
                the token cannot be sent.
        """
        self.name, self._batch_size = checked_name(url, TOKEN_VARIABLE), batch_size
        limits: dict[str, Any] = {"timeout": timeout, "outage": outage}
        self._headers = bearer(TOKEN_VARIABLE)
        self.client = Client(url, self.name, self._headers, what="reward server", advice=_ADVICE, **limits)

    async def __call__(self, prompts: list[Any], completions: list[Any], **columns: list[Any]) -> list[Any]:
        """One reward per completion, in order; `score` checks that each is a number.

        Raises:
            ConfigError: a column cannot be sent as JSON.
            RewardError: the server refuses the request or answers something else.
            RewardOutageError: it did not answer for `outage` seconds.
        """
        rows = [
            {name: values[i] for name, values in columns.items() if name not in ("completion_ids", *EXTRAS)}
            for i in range(len(prompts))
        ]
        items = [
            {"id": str(i), "prompt": prompt, "completion": completion, "columns": row}
            for i, (prompt, completion, row) in enumerate(zip(prompts, completions, rows, strict=True))
        ]
        batches = [items[i : i + self._batch_size] for i in range(0, len(items), self._batch_size)]
        answers = await await_together([self._rewards(batch) for batch in batches])
        return [reward for answer in answers for reward in answer]

    async def _rewards(self, items: Sequence[Mapping[str, Any]]) -> list[Any]:
        try:
            body = json.dumps({"version": VERSION, "items": items}, allow_nan=False)
        except (TypeError, ValueError) as error:
            for item in items:
                refuse_no_json(item["columns"])
            raise ConfigError(f"a prompt has messages that cannot be sent as JSON ({error}): change them") from error
        answer = await self.client.post(body, LEAST_BYTES + len(items) * BYTES_AN_ITEM)
        return _by_id(self.name, answer, [item["id"] for item in items])


def refuse_no_json(columns: Mapping[str, Any]) -> None:
    """Refuse a row's columns that no request can carry.

    Raises:
        ConfigError: a value cannot be written as JSON, such as a date, bytes or NaN.
    """
    for name, value in columns.items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"the column {name!r} of a row is {reprlib.repr(value)}, which cannot be sent as JSON ({error}): "
                "remove the column, or write it as text or numbers"
            ) from error


def _by_id(name: str, answer: bytes, ids: Sequence[str]) -> list[Any]:
    """The rewards in the order of `ids`; NaN, infinity and null become NaN, which `score` refuses as usual.

    Many languages write NaN as null, so null does not say that the reward does not apply, as None of a function does.

    Raises:
        RewardError: the answer is not the requested JSON, or has other ids.
    """
    try:
        data = json.loads(answer, parse_constant=lambda word: math.nan, object_pairs_hook=_without_repetition)
        found = {row["id"]: row["reward"] for row in data["rewards"]}
        repeated = len(found) < len(data["rewards"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise RewardError(
            f"the reward server {name} answers {len(answer)} bytes that are not "
            f'{{"rewards": [{{"id": ..., "reward": ...}}]}} ({type(error).__name__}: {error})'
        ) from error
    if repeated or set(found) != set(ids):
        missing, extra = sorted(set(ids) - set(found))[:3], sorted(map(str, set(found) - set(ids)))[:3]
        raise RewardError(
            f"the reward server {name} answers for other ids than it was asked for: {len(data['rewards'])} rewards for "
            f"{len(ids)} items, missing {missing}, unknown {extra}"
        )
    return [math.nan if found[i] is None else found[i] for i in ids]


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) < len(pairs):
        raise ValueError("a key appears twice")
    return dict(pairs)
