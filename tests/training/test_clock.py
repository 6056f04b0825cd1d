import contextlib
import math
import time
from dataclasses import replace

import pytest
import torch

from bondlm.training.clock import Clock, StepMeans
from bondlm.training.processes import World


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, as a list of one number that a test moves."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def test_a_phase_inside_another_counts_for_the_inner_one_alone(now: list[float]) -> None:
    clock = Clock()
    now[0] += 7  # before any phase: on nobody's account
    with clock("outer"):
        now[0] += 1
        with clock("inner"):
            now[0] += 10
            with clock("outer"):
                now[0] += 2
        now[0] += 4
    now[0] += 50
    with clock("inner"):
        now[0] += 3
    assert clock.drain() == {"outer": 7.0, "inner": 13.0}
    assert clock.drain() == {}


def test_drain_in_the_middle_of_a_phase_splits_it(now: list[float]) -> None:
    clock = Clock()
    clock.start("a")
    now[0] += 1
    assert clock.drain() == {"a": 1.0}
    now[0] += 2
    clock.stop()
    now[0] += 4
    assert clock.drain() == {"a": 2.0}


def test_a_phase_that_raises_is_left(now: list[float]) -> None:
    clock = Clock()
    with clock("outer"):
        with contextlib.suppress(ZeroDivisionError), clock("inner"):
            now[0] += 1
            raise ZeroDivisionError
        now[0] += 2
    assert clock.drain() == {"inner": 1.0, "outer": 2.0}


def test_phases_add_up_to_the_time_that_passed() -> None:
    clock = Clock()
    begin = time.perf_counter()
    with clock("a"):
        time.sleep(0.01)
        with clock("b"):
            time.sleep(0.02)
    passed = time.perf_counter() - begin
    seconds = clock.drain()
    assert seconds["a"] >= 0.01
    assert seconds["b"] >= 0.02
    assert sum(seconds.values()) == pytest.approx(passed, abs=2e-3)


ALONE = World(size=1, rank=0, device=torch.device("cpu"))


def test_means_are_weighted_and_nothing_of_weight_zero_counts() -> None:
    means = StepMeans()
    means.record({"a": 1.0}, weight=3.0)
    means.record({"a": float("nan")}, weight=0.0)
    means.record({"a": 5.0}, weight=1.0)
    means.record({"b": 2.0})
    means.record({"b": 4.0})
    assert means.drain(ALONE) == {"a": 2.0, "b": 3.0}
    assert means.drain(ALONE) == {}
    means.record({"a": float("nan")}, weight=0.0)
    assert math.isnan(means.drain(ALONE)["a"])
    means.record({"a": float("nan")})  # of a step where it is undefined
    means.record({"a": 3.0})
    assert means.drain(ALONE) == {"a": 3.0}
    every = torch.ones(3, dtype=torch.bool)
    means.record_of_each({"a": torch.tensor([[1.0, 3.0], [float("nan"), 1.0], [8.0, 8.0]])}, every)
    means.record_of_each({"a": torch.tensor([2.0, 2.0, 2.0])}, every)
    assert means.drain(ALONE) == {"a": 3.2}


def test_what_is_kept_apart_counts_for_no_phase_outside(now: list[float]) -> None:
    clock = Clock()
    with clock("outer"):
        now[0] += 1
        with clock.apart() as seconds:
            now[0] += 100
            with clock("inner"):
                now[0] += 10
            with clock.apart(), clock("innermost"):  # an evaluation's own
                now[0] += 20
        now[0] += 2
    assert seconds == {"inner": 10.0, "innermost": 20.0}
    assert clock.drain() == {"outer": 3.0}


def test_a_sum_that_was_infinite_stays_so_when_the_number_of_processes_changes() -> None:
    kept = [{"loss": (math.inf, 2.0)}, {"loss": (1.0, 2.0)}, {"other": (1.0, 2.0)}]
    first, second = StepMeans(), StepMeans()
    first.load_state(kept, replace(ALONE, size=2))
    second.load_state(kept, replace(ALONE, size=2, rank=1))
    assert first.state() == {"loss": (math.inf, 4.0), "other": (1.0, 2.0)}
    assert second.state() == {}
