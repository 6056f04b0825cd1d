"""A run stops at the effective N that was asked for, or past the KL that was allowed: by the intervals' lower ends."""

from types import SimpleNamespace

import pytest

from bondlm.callbacks import StopCallback


def stops(callback, metrics):
    control = SimpleNamespace(should_training_stop=False)
    callback.on_evaluate(None, None, control, metrics=metrics)
    return control.should_training_stop


@pytest.mark.parametrize(
    ("target_n", "kl_budget", "n_low", "kl_low", "expected"),
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
def test_the_lower_ends_decide(target_n, kl_budget, n_low, kl_low, expected):
    high = {"eval_effective_n_high": 99.0, "eval_kl_high": 99.0, "eval_kl": 99.0, "eval_effective_n": 99.0}
    metrics = high | {"eval_effective_n_low": n_low, "eval_kl_low": kl_low}
    assert stops(StopCallback(target_n, kl_budget), metrics) is expected


def test_nothing_stops_without_numbers():
    assert not stops(StopCallback(4.0), {"eval_effective_n_low": 3.0})
    assert not stops(StopCallback(4.0, 1.0), None)
