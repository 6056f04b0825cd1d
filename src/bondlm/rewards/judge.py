"""`judge:URL?model=NAME`: a chat model behind an OpenAI-compatible endpoint ranks a prompt's samples in one question.

The messages are made in `bondlm.rewards.question`; the costs are counted in `Usage`. Valid rankings are cached on disk,
so a run that continues from a checkpoint gets the same rankings and does not pay for them twice.
"""

import asyncio
import copy
import hashlib
import itertools
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bondlm.errors import ConfigError, RewardError, RewardOutageError
from bondlm.rewards.answers import Failure
from bondlm.rewards.cache import Cache
from bondlm.rewards.calls import await_together
from bondlm.rewards.client import MAX_REQUESTS, Client, RefusedError, bearer, checked_name, parts_of
from bondlm.rewards.question import CRITERION, Question, ask_about, read_ranking
from bondlm.rewards.ranking import in_order, rows_of
from bondlm.rewards.texts import column_text, completion_text

KEY_VARIABLE, OPENAI_HOST, OPENAI_VARIABLE = "BONDLM_JUDGE_KEY", "api.openai.com", "OPENAI_API_KEY"
LIMIT, OLD_LIMIT = "max_completion_tokens", "max_tokens"
TRIES = 3  # for a question whose answer is not a ranking, each with other ids and in another order
MOST_BYTES = 1 << 20  # of an answer, including its reasoning
_AGAIN = "the same command continues the run with as much again"
CHARS_A_TOKEN = 4  # roughly, for servers that do not count tokens


@dataclass
class Usage:
    """The number of questions to a judge, and their cost."""

    calls: int = 0  # to the server
    tokens: int = 0  # tokens of these calls, in and out
    cached: int = 0  # questions that were answered from disk
    is_counted: bool = True  # whether the server counts tokens; otherwise they are estimated
    # Totals over all answers, including those from disk: they give the cost per question.
    prompt_tokens: int = 0
    completion_tokens: int = 0
    characters: int = 0
    answers: int = 0

    def add(self, question: Question, tokens: Sequence[int]) -> None:
        """Add the tokens of one question, in and out, now or when it was first asked."""
        self.prompt_tokens += tokens[0]
        self.completion_tokens += tokens[1]
        self.characters += question.length
        self.answers += len(question.ids)

    def expected_tokens(self, characters: float, answers: float) -> int:
        """The expected tokens of questions with this many characters and answers to rank, at the rate so far."""
        per_character = self.prompt_tokens / max(1, self.characters)
        return round(per_character * characters + self.completion_tokens / max(1, self.answers) * answers)


class JudgeReward:
    """A reward that ranks (`NamedReward.ranks`): asks a judge once per prompt and round."""

    ranks = True

    def __init__(
        self,
        url: str,
        model: str,
        *,
        criterion: str = CRITERION,
        rounds: int = 1,
        reference: str | None = None,
        seed: int = 0,
        temperature: float | None = 0.0,
        concurrency: int = MAX_REQUESTS,
        max_calls: int | None = None,
        max_tokens: int | None = None,
        answer_tokens: int | None = None,
        cache: str | None = None,
        key: str | None = None,
        timeout: float = 60.0,
        outage: float = 600.0,
    ) -> None:
        """Check the address, the criterion and the limits; no question is asked yet.

        Args:
            url: of the API, such as https://api.openai.com/v1.
            model: the model's name there.
            criterion: what makes an answer better.
            rounds: questions per prompt, each with the answers in a different order; their ranks are averaged.
            reference: the column of the data that has a good answer.
            seed: seed of the order of presentation.
            temperature: None leaves it to the server.
            concurrency: maximum requests in flight.
            max_calls: stop the run after this many calls of this process.
            max_tokens: stop the run after this many tokens, in and out.
            answer_tokens: maximum tokens of the judge's answer. Default: what a ranking needs, 64 + 24 per answer.
            cache: folder of the cache; "off" for none. Default: in the user's cache folder.
            key: environment variable with the API key. Default: BONDLM_JUDGE_KEY; OPENAI_API_KEY for api.openai.com.
            timeout: seconds that a request may take.
            outage: seconds without any answer after which the run gives up.

        Raises:
            ConfigError: an address, key, limit or folder that cannot be used.
        """
        self.model, self.rounds, self.reference = model, rounds, reference
        limits = {"rounds": rounds, "concurrency": concurrency, "max_calls": max_calls, "max_tokens": max_tokens}
        for name, value in (limits | {"answer_tokens": answer_tokens}).items():
            if value is not None and value < 1:
                raise ConfigError(f"judge {model!r}: {name}={value} must be at least 1")
        if temperature is not None and not 0 <= temperature < math.inf:
            raise ConfigError(f"judge {model!r}: temperature={temperature} must be a finite number >= 0, or none")
        self._criterion, self._seed, self._temperature = criterion, seed, temperature
        self._max_calls, self._max_tokens, self._answer_tokens = max_calls, max_tokens, answer_tokens
        self._key = key or (OPENAI_VARIABLE if parts_of(url).hostname == OPENAI_HOST else KEY_VARIABLE)
        if self._key not in os.environ and (key is not None or self._key == OPENAI_VARIABLE):
            raise ConfigError(
                f"judge {model!r}: its key belongs in the environment variable {self._key}, which is empty"
            )
        self._url = url.rstrip("/") + "/chat/completions"
        self._client = Client(
            self._url,
            checked_name(url, self._key),
            bearer(self._key),
            what=f"judge {model!r} at",
            advice=f"check its address, the model's name and the key in {self._key}",
            timeout=timeout,
            outage=outage,
            max_requests=concurrency,
            is_final=lambda status, said: status == 429 and b"insufficient_quota" in said,
        )
        self._cache = None if cache == "off" else Cache(cache)
        self._is_structured = True  # until the server says that it does not support that
        self._limit = LIMIT  # the name under which it takes the maximum of tokens
        self._shuffles = True
        self._slots = asyncio.Semaphore(concurrency)
        self.usage = Usage()

    @property
    def keeps_answers(self) -> bool:
        """Whether it has a cache."""
        return self._cache is not None

    def in_given_order(self) -> "JudgeReward":
        """The same judge, asked once, with the answers in the given order; calls are counted together."""
        other = copy.copy(self)
        other._shuffles, other.rounds = False, 1
        return other

    def __call__(self, prompt: Any, completions: Sequence[Any]) -> Any:
        """An awaitable of the completions' scores (larger is better) or a `Failure`."""
        return self.rank(prompt, [completion_text(completion) for completion in completions])

    def over(self, offered: Mapping[str, Sequence[Any]], groups: Sequence[int], name: str) -> Callable[..., Any]:
        """A reward function without data arguments that ranks these B rows, group by group (`RankReward.over`).

        Raises:
            ConfigError: the data have no column with the name `reference`.
        """
        if self.reference is not None and self.reference not in offered:
            raise ConfigError(f"judge {self.model!r}: the data have no column {self.reference!r} (reference)")
        members = rows_of(groups)
        agreements: list[float] = []

        async def ask(log_metric: Any = None) -> list[Any]:
            asked = [
                self.rank(
                    offered["prompts"][rows[0]],
                    [completion_text(offered["completions"][i]) for i in rows],
                    None if self.reference is None else column_text(self.reference, offered[self.reference][rows[0]]),
                    agreements,
                )
                for rows in members
            ]
            answers = await await_together(asked)
            if agreements and log_metric is not None:
                log_metric(f"judges/{name}/agreement", sum(agreements) / len(agreements))
            return in_order(members, answers)

        return ask

    async def rank(
        self,
        prompt: Any,
        texts: Sequence[str],
        reference: str | Failure | None = None,
        agreements: list[float] | None = None,
    ) -> Any:
        """A score per text, larger is better: minus the mean place over the rounds. Or a `Failure`.

        Raises:
            RewardError: the server refuses the request, or is not a chat endpoint.
            RewardOutageError: the server is down or out of quota, or the budget is spent.
        """
        if isinstance(reference, Failure):
            return reference
        different = list(dict.fromkeys(texts))
        if len(different) < 2:
            return [0.0] * len(texts)
        rounds = await await_together([self._round(prompt, different, reference, i) for i in range(self.rounds)])
        failed = [found for found in rounds if isinstance(found, Failure)]
        if failed:
            return failed[0]
        places = [[ranking.index(i) for i in range(len(different))] for ranking in rounds]
        if self.rounds > 1 and agreements is not None:
            agreements.append(agreement(places))
        scores = {text: -float(sum(place[i] for place in places)) for i, text in enumerate(different)}
        return [scores[text] for text in texts]

    async def _round(self, prompt: Any, texts: Sequence[str], reference: str | None, number: int) -> Any:
        """One ranking, best first; after an invalid answer the judge is asked again."""
        how: dict[str, Any] = {"criterion": self._criterion, "reference": reference, "shuffle": self._shuffles}
        salts = [(self._seed, number, attempt) for attempt in range(TRIES)]
        questions = [ask_about(prompt, texts, salt=salt, **how) for salt in salts]
        for question in questions:  # invalid answers are not cached, but the answer to the next question is
            if (known := self._known(question)) is not None:
                said, *tokens = known
                self.usage.cached += 1
                self.usage.add(question, tokens)
                return read_ranking(said, question.ids)
        problem = ""
        for question in questions:
            try:
                return read_ranking(await self._answer(question), question.ids)
            except ValueError as error:
                problem = str(error)
        return Failure(f"got no ranking from the judge in {TRIES} tries: {problem}")

    async def _answer(self, question: Question) -> str:
        """The judge's answer, which is cached if it is a ranking.

        Raises:
            ValueError: the judge refuses, or its answer is not a ranking.
        """
        async with self._slots:  # the budget is checked when its turn comes
            answer = _parsed(await self._post(self._request(question), question))
            if answer is None:
                raise RewardError(
                    f"the judge {self.model!r} at {self._client.name} sends no chat completion: give the address up "
                    "to and without /chat/completions, which often ends in /v1"
                )
            said, refusal, usage, end = answer
            tokens = self._note_cost(usage, question, said)
        if refusal:
            raise ValueError(f"it refused: {str(refusal)[:80]!r}")
        try:
            read_ranking(said if isinstance(said, str) else "", question.ids)
        except ValueError as error:
            if end != "length":
                raise
            most = self._request(question)[LIMIT]
            raise ValueError(
                f"its answer was cut off after {most} tokens; a model that thinks before it answers needs thousands, "
                "raise answer_tokens"
            ) from error
        if self._cache is not None:
            self._cache.put(self._key_of(question), said, tokens)
        return said

    def _known(self, question: Question) -> tuple[str, int, int] | None:
        return None if self._cache is None else self._cache.get(self._key_of(question))

    def _key_of(self, question: Question) -> str:
        asked = json.dumps([self._url, self._request(question)], sort_keys=True)
        return hashlib.sha256(asked.encode()).hexdigest()

    def _request(self, question: Question) -> dict[str, Any]:
        request: dict[str, Any] = {"model": self.model, "messages": question.messages}
        request[LIMIT] = self._answer_tokens or 64 + 24 * len(question.ids)
        return request if self._temperature is None else request | {"temperature": self._temperature}

    async def _post(self, request: dict[str, Any], question: Question) -> bytes:
        """The server's answer; the question is repeated without a schema if the server does not accept one."""
        self._spend()
        schema = {"name": "ranking", "strict": True, "schema": question.schema}
        structured: dict[str, Any] = {"response_format": {"type": "json_schema", "json_schema": schema}}
        asked = [structured, {}] if self._is_structured else [{}]
        for more in asked:
            try:
                answer = await self._limited(request | more)
            except RefusedError as error:
                if b"content_filter" in error.said:
                    raise ValueError("its content filter refused the question") from error
                if error.status in (400, 422) and more:
                    continue
                raise self._explained(error) from error
            self._is_structured = bool(more)
            return answer
        raise AssertionError("the last request is answered or refused")

    async def _limited(self, request: dict[str, Any]) -> bytes:
        """The server's answer; where it does not know the newer name of the maximum of tokens, by the older one."""
        try:
            return await self._client.post(json.dumps(_with_limit(request, self._limit)), MOST_BYTES)
        except RefusedError as error:
            if error.status not in (400, 422) or LIMIT.encode() not in error.said:
                raise
            try:
                answer = await self._client.post(json.dumps(_with_limit(request, OLD_LIMIT)), MOST_BYTES)
            except RefusedError:
                raise error from None  # the refusal had another reason
            self._limit = OLD_LIMIT
            return answer

    def _explained(self, error: RefusedError) -> RewardError:
        """The error with the server's message, without our key."""
        said = error.said.decode("utf-8", "replace").replace(os.environ.get(self._key, "\0"), "<secret>")[:300]
        kind = RewardOutageError if error.status in (402, 429) else RewardError  # nothing left to pay with
        return kind(f"{error}. It says: {said!r}")

    def _spend(self) -> None:
        """Count one more call, if the budget allows it."""
        used = self.usage
        if self._max_calls is not None and used.calls >= self._max_calls:
            raise RewardOutageError(f"judge {self.model!r} has used its {self._max_calls} calls (max_calls); {_AGAIN}")
        if self._max_tokens is not None and used.tokens >= self._max_tokens:
            raise RewardOutageError(
                f"judge {self.model!r} has used {used.tokens} of its {self._max_tokens} tokens (max_tokens); {_AGAIN}"
            )
        used.calls += 1

    def _note_cost(self, usage: Any, question: Question, said: Any) -> list[int]:
        """Tokens in and out, counted by the server or estimated."""
        counted = usage if isinstance(usage, dict) else {}
        tokens: list[Any] = [counted.get(name) for name in ("prompt_tokens", "completion_tokens")]
        if not all(type(count) is int and count >= 0 for count in tokens):
            self.usage.is_counted = False
            tokens = [question.length // CHARS_A_TOKEN, len(str(said)) // CHARS_A_TOKEN]
        self.usage.tokens += sum(tokens)
        self.usage.add(question, tokens)
        return tokens


def _with_limit(request: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {name if key == LIMIT else key: value for key, value in request.items()}


def _parsed(answer: bytes) -> tuple[Any, Any, Any, Any] | None:
    """Text, refusal, usage and reason of the end of an answer of the chat API; None if it is not one."""
    try:
        data = json.loads(answer)
        choice = data["choices"][0]
        message = choice["message"]
        return message.get("content"), message.get("refusal"), data.get("usage"), choice.get("finish_reason")
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
        return None


def agreement(places: Sequence[Sequence[int]]) -> float:
    """Share of pairs of answers that two rounds put in the same order, over all pairs of rounds."""
    same = [
        (one[i] < one[j]) == (other[i] < other[j])
        for one, other in itertools.combinations(places, 2)
        for i, j in itertools.combinations(range(len(one)), 2)
    ]
    return sum(same) / len(same)
