"""What several processes do as one: an error of one is an error of all, and none waits for another that has left."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

from bondlm.errors import BondError, EngineError

_T = TypeVar("_T")


class Processes(Protocol):
    """The processes of a run; every one must make the same calls in the same order."""

    @property
    def size(self) -> int:
        """How many there are."""

    @property
    def rank(self) -> int:
        """The number of this one, from 0; number 0 writes what is written once."""

    def gather_objects(self, items: list[_T]) -> list[_T]:
        """The lists of all processes, one after the other in the order of their ranks."""


@contextmanager
def together(processes: Processes) -> Iterator[None]:
    """What fails inside on one process is raised by every process, the same error; every one must come here.

    Raises:
        BondError: that of the first process with one, `known_to_all`. Another exception becomes an EngineError, unless
            the process is alone.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        if processes.size == 1:
            raise
        failure = error
    failures = processes.gather_objects([] if failure is None else [(processes.rank, _of_ours(failure))])
    if failures:
        raise shared(*failures[0]) from failure


def shared(rank: int, error: BondError) -> BondError:
    """The error of that process, as all raise it."""
    told = type(error)(f"process {rank}: {error}")
    told.known_to_all = True
    return told


def _of_ours(error: Exception) -> BondError:
    return error if isinstance(error, BondError) else EngineError(f"{type(error).__name__}: {error}")
