"""Errors of several processes: an error in one is raised in all, so none waits for a process that has left."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

from bondlm.errors import BondError, EngineError

_T = TypeVar("_T")


class Processes(Protocol):
    """The processes of a run; every one must make the same calls in the same order."""

    @property
    def size(self) -> int:
        """The number of processes."""

    @property
    def rank(self) -> int:
        """The number of this process, from 0; process 0 writes what is written once."""

    def gather_objects(self, items: list[_T]) -> list[_T]:
        """The lists of all processes, concatenated in the order of their ranks."""


@contextmanager
def together(processes: Processes) -> Iterator[None]:
    """Raise an error that occurs inside on one process in every process; all processes must enter this.

    Raises:
        BondError: the error of the first process that has one, marked `known_to_all`. Other exceptions become an
            EngineError, unless there is only one process.
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
    """The error of that process, in the form that all processes raise."""
    told = type(error)(f"process {rank}: {error}")
    told.known_to_all = True
    return told


def _of_ours(error: Exception) -> BondError:
    return error if isinstance(error, BondError) else EngineError(f"{type(error).__name__}: {error}")
