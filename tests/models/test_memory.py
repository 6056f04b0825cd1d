import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from bondlm.errors import ResourceError
from bondlm.models.memory import try_or_halve


def attempt(work: Callable[[], Any], size: int, **how: Any) -> Any:
    return try_or_halve(work, size, "rows", doing="drawing", advice="take fewer", **how)


def full() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory.\nDetails")


def wrong_shapes() -> None:
    raise RuntimeError("shapes differ")


def test_what_fits_is_done() -> None:
    assert attempt(lambda: "done", 5) == ("done", 5)


def test_what_does_not_is_to_be_tried_again_with_half() -> None:
    with pytest.warns(UserWarning, match=r"bondlm: out of memory while drawing 5 rows, continuing with 2 \(CUDA"):
        assert attempt(full, 5) == (None, 2)


@pytest.mark.parametrize(("size", "may_halve"), [(1, True), (4, False)])
def test_where_there_is_no_half_the_advice_is_given(size: int, may_halve: bool) -> None:
    with pytest.raises(ResourceError, match=rf"drawing {size} rows? \(CUDA out of memory.\): take fewer"):
        attempt(full, size, may_halve=may_halve)


def test_another_error_is_not_about_memory() -> None:
    with pytest.raises(RuntimeError, match="shapes"):
        attempt(wrong_shapes, 4)


@pytest.mark.filterwarnings("ignore:bondlm. out of memory")
def test_the_tensors_of_the_attempt_are_let_go() -> None:
    held: list[Any] = []

    def work() -> None:
        tensor = torch.zeros(3)
        held.append(weakref.ref(tensor))
        full()

    attempt(work, 4)
    gc.collect()
    assert held[0]() is None
