"""A run stops at the effective N that was asked for, by the lower end of its interval, and past the KL that
was allowed, by its estimate."""

from types import SimpleNamespace

import pytest

from bondlm.training.callbacks import StopCallback


def stops(callback, metrics):
    control = SimpleNamespace(should_training_stop=False)
    callback.on_evaluate(None, None, control, metrics=metrics)
    return control.should_training_stop


@pytest.mark.parametrize(
    ("target_n", "kl_budget", "n_low", "kl", "expected"),
    [
        (4.0, None, 3.9, 99.0, False),
        (4.0, None, 4.0, 0.0, True),
        (None, 2.0, 99.0, 2.0, False),
        (None, 2.0, 1.0, 2.1, True),
        (4.0, 2.0, 1.0, 1.0, False),
        (4.0, 2.0, 5.0, 1.0, True),
        (4.0, 2.0, 1.0, 3.0, True),
        (None, None, 99.0, 99.0, False),
    ],
)
def test_a_goal_is_reached_for_certain_and_a_budget_is_not_overspent(target_n, kl_budget, n_low, kl, expected):
    others = {"eval_effective_n_high": 99.0, "eval_effective_n": 99.0, "eval_kl_high": 99.0, "eval_kl_low": 0.0}
    metrics = others | {"eval_effective_n_low": n_low, "eval_kl": kl}
    assert stops(StopCallback(target_n, kl_budget), metrics) is expected


def test_nothing_stops_without_numbers():
    assert not stops(StopCallback(4.0), {"eval_effective_n_low": 3.0})
    assert not stops(StopCallback(4.0, 1.0), None)
