"""An error of one process is an error of all: two threads stand for the processes."""

import threading
from collections.abc import Callable
from multiprocessing.pool import ThreadPool
from typing import Any

import pytest

from bondlm.engines.together import together
from bondlm.errors import BondError, ConfigError, EngineError, ResourceError


class Thread:
    """One of two processes."""

    size = 2

    def __init__(self, rank: int, said: list[Any], both: threading.Barrier) -> None:
        self.rank, self._said, self._both = rank, said, both

    def gather_objects(self, items: list[Any]) -> list[Any]:
        self._said[self.rank] = items
        self._both.wait(20)
        gathered = [item for each in self._said for item in each]
        self._both.wait(20)
        return gathered


def outcome_of_both(work: Callable[[int], object]) -> list[Exception | None]:
    said: list[Any] = [[], []]
    both = threading.Barrier(2)

    def run(rank: int) -> Exception | None:
        try:
            with together(Thread(rank, said, both)):
                work(rank)
        except BondError as error:
            return error
        return None

    return ThreadPool(2).map(run, range(2))


def failing(rank: int, error: Exception) -> Callable[[int], None]:
    def work(mine: int) -> None:
        if mine == rank:
            raise error

    return work


def test_nothing_happens_where_nothing_fails() -> None:
    assert outcome_of_both(lambda rank: None) == [None, None]


@pytest.mark.parametrize("rank", [0, 1])
def test_both_raise_what_one_has_raised(rank: int) -> None:
    outcomes = outcome_of_both(failing(rank, ResourceError("no answer")))
    assert [type(error) for error in outcomes] == [ResourceError] * 2
    assert {str(error) for error in outcomes} == {f"process {rank}: no answer"}
    assert all(error.known_to_all for error in outcomes)  # type: ignore[union-attr]


def test_of_two_errors_both_raise_the_first_ones() -> None:
    def work(rank: int) -> None:
        raise ConfigError("first") if rank == 0 else EngineError("second")

    assert [type(error) for error in outcome_of_both(work)] == [ConfigError] * 2


def test_an_error_that_is_not_ours_leaves_nobody_waiting() -> None:
    outcomes = outcome_of_both(failing(1, KeyError("a bug")))
    assert [type(error) for error in outcomes] == [EngineError] * 2
    assert all("KeyError" in str(error) for error in outcomes)
    assert isinstance(outcomes[1].__cause__, KeyError)  # type: ignore[union-attr]


def test_a_process_that_is_alone_raises_its_own() -> None:
    alone = Thread(0, [[], []], threading.Barrier(1))
    alone.size = 1
    failure = KeyError("a bug")
    with pytest.raises(KeyError) as caught, together(alone):
        raise failure
    assert caught.value is failure
