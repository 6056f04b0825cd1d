"""Rewards that compare: a function is called once per prompt with all samples, and says which are better.

Shapes: B rows (one prompt with one completion each); rows of one prompt are a group.
"""

import inspect
import math
import reprlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from numbers import Integral
from typing import Any

from bondlm.rewards.answers import Failure
from bondlm.rewards.calls import accepted_arguments, await_together, exhausted

PER_COMPLETION = ("completions", "completion_ids", "truncated")


class RankReward:
    """Asks `f(prompt, completions, **columns) -> ranking or scores` once per prompt.

    The answer is one number per completion, where larger is better and equal numbers tie; or `{"ranking": [best, ..,
    worst]}`, which contains the position of each completion once; or None if the reward does not apply to the prompt.
    Numbers of different prompts are never compared. An invalid ranking is a failure for its prompt.
    """

    ranks = True

    def __init__(self, function: Callable[..., Any], name: str | None = None) -> None:
        """`function` may be async; `name` is used in metrics and errors."""
        self.function = function
        self.asked: tuple[Callable[..., Any], Sequence[str]] = (function, ("completions", "truncated"))  # with lists
        self.__name__: str = name or str(getattr(function, "__name__", type(function).__name__))

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """The function itself."""
        return self.function(*arguments, **named)

    def over(self, offered: Mapping[str, Sequence[Any]], groups: Sequence[int], name: str) -> Callable[..., Any]:
        """A reward function without data arguments that ranks these B rows, group by group.

        Args:
            offered: `prompts`, `completions` and columns, B each; for columns, the value in the group's first row is
                used.
            groups: the group of each row.
            name: what metrics and errors call it.
        """
        members = rows_of(groups)

        def ask(trainer_state: Any = None, log_metric: Any = None) -> Any:
            extras = {"trainer_state": trainer_state, "log_metric": log_metric}
            answers = [self._ask(offered, rows, extras, name) for rows in members]
            if not any(inspect.isawaitable(answer) for answer in answers):
                return in_order(members, answers)
            return _later(members, answers)

        return ask

    def _ask(
        self, offered: Mapping[str, Sequence[Any]], rows: Sequence[int], extras: Mapping[str, Any], name: str
    ) -> Any:
        lists = {key: [offered[key][i] for i in rows] for key in ("completions", "truncated") if key in offered}
        single = {key: values[rows[0]] for key, values in offered.items() if key not in (*PER_COMPLETION, "prompts")}
        single |= {"prompt": offered["prompts"][rows[0]], **extras}
        return self.function(**accepted_arguments(name, self.function, lists, single))


def is_ranking(spec: Any) -> bool:
    """Whether a reward spec compares the samples of a prompt."""
    return spec.startswith(("rank:", "judge:")) if isinstance(spec, str) else getattr(spec, "ranks", False) is True


def by_pairs(compare: Callable[..., Any]) -> RankReward:
    """Make a rank function from one that compares two answers, called for every ordered pair of a prompt's samples.

    A sample's score is its mean chance to beat another sample, over both orders of each pair.

    Args:
        compare: `f(prompt, first, second, **columns)`, async or not: returns for each pair of the two lists the chance,
            in [0, 1], that the first answer is better, such as a cross-encoder's sigmoid; or None if it does not apply
            to the prompt. Anything else is a failure for its prompt.
    """
    name = getattr(compare, "__name__", type(compare).__name__)

    def rank(prompt: Any, completions: list[Any], **columns: Any) -> Any:
        count = len(completions)
        columns.pop("truncated", None)  # it belongs to completions, not to pairs
        pairs = [(i, j) for i in range(count) for j in range(count) if i != j]
        arguments = {"first": [completions[i] for i, _ in pairs], "second": [completions[j] for _, j in pairs]}
        given = accepted_arguments(name, compare, arguments, {"prompt": prompt, **columns})
        chances = compare(**given) if pairs else []
        return _awaited_wins(chances, pairs, count) if inspect.isawaitable(chances) else _wins(chances, pairs, count)

    reward = RankReward(rank, getattr(compare, "__name__", None))
    reward.asked = (compare, ("first", "second"))
    return reward


async def _awaited_wins(chances: Awaitable[Any], pairs: Sequence[tuple[int, int]], count: int) -> Any:
    return _wins(await chances, pairs, count)


def _wins(chances: Any, pairs: Sequence[tuple[int, int]], count: int) -> list[float] | Failure | None:
    """Each sample's sum of chances to win, over both orders of each pair."""
    if chances is None:
        return None
    chances = exhausted(chances)
    try:
        known = [float(chance) for chance in chances]
    except (TypeError, ValueError):
        known = []
    if len(known) != len(pairs) or not all(0 <= chance <= 1 for chance in known):
        asked = f"for each of {len(pairs)} pairs the chance, in [0, 1], that its first answer is better"
        return Failure(f"returned {reprlib.repr(chances)}: expected {asked}")
    terms: list[list[float]] = [[] for _ in range(count)]
    for (i, j), chance in zip(pairs, known, strict=True):
        terms[i] += [chance]
        terms[j] += [1.0, -chance]
    return [math.fsum(of_sample) for of_sample in terms]  # exact in any order, so equal samples tie


async def _later(members: Sequence[Sequence[int]], answers: Sequence[Any]) -> list[Any]:
    async def settled(answer: Any) -> Any:
        return await answer if inspect.isawaitable(answer) else answer

    waiting: list[Awaitable[Any]] = [settled(answer) for answer in answers]
    return in_order(members, await await_together(waiting))


def rows_of(groups: Sequence[int]) -> list[list[int]]:
    """The rows of each group, in the order in which the groups begin."""
    members: dict[int, list[int]] = {}
    for row, group in enumerate(groups):
        members.setdefault(group, []).append(row)
    return list(members.values())


def in_order(members: Sequence[Sequence[int]], answers: Sequence[Any]) -> list[Any]:
    """The groups' answers as one value per row (B); an invalid ranking becomes a `Failure` for the whole group."""
    values: dict[int, Any] = {}
    for rows, answer in zip(members, answers, strict=True):
        values |= zip(rows, _values(answer, len(rows)), strict=True)
    return [values[row] for row in range(len(values))]


def _values(answer: Any, count: int) -> list[Any]:
    answer = exhausted(answer)
    if answer is None or isinstance(answer, Failure):
        return [answer] * count
    if isinstance(answer, Mapping):
        return _of_ranking(answer, count)
    try:
        listed = answer.tolist() if hasattr(answer, "tolist") else list(answer)
    except TypeError:
        listed = None
    if not isinstance(listed, list) or isinstance(answer, str | bytes) or len(listed) != count:
        return [Failure(f"{_ASKED} {count} scores or {{'ranking': [..]}}, got {reprlib.repr(answer)}")] * count
    return listed


def _of_ranking(answer: Mapping[str, Any], count: int) -> list[Any]:
    ranking: Any = answer.get("ranking")
    ranking = ranking.tolist() if hasattr(ranking, "tolist") else ranking  # an array or a tensor
    if not isinstance(ranking, list | tuple) or not _is_permutation(ranking, count):
        return [Failure(f"{_ASKED} each of 0..{count - 1} once, got {reprlib.repr(dict(answer))}")] * count
    place = {int(i): float(-number) for number, i in enumerate(ranking)}
    return [place[i] for i in range(count)]


_ASKED = "did not rank the samples: expected"


def _is_permutation(ranking: Sequence[Any], count: int) -> bool:
    whole = all(isinstance(i, Integral) and not isinstance(i, bool) for i in ranking)
    return whole and sorted(ranking) == list(range(count))
