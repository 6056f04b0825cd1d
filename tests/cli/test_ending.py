"""The last lines of a run."""

import math
from pathlib import Path
from types import SimpleNamespace

from bondlm.cli.ending import ending


def test_a_policy_below_its_reference_has_no_n(tmp_path: Path) -> None:
    result = {
        "win_rate": {"value": 0.31, "low": 0.2, "high": 0.4},
        "effective_n": {"value": 1.0, "text": "1.0 [1.0, 1.0]"},
        "kl": {"value": 2.0, "low": 1.0, "high": 3.0},
        "kl_of_best_of_n": 0.0,
    }
    reporter = SimpleNamespace(first_step=0, training_seconds=3.0)
    reached, cost, _ = ending(tmp_path, 4, reporter, result)
    assert reached == "reached: one sample is below the untouched model (win rate 0.31, under 0.5), so there is no N"
    assert cost == "cost: KL 2.00 ±1.00 nats; 4 steps in 0:03"


def test_the_kl_of_an_n_beyond_the_samples_is_a_lower_bound(tmp_path: Path) -> None:
    result = {
        "win_rate": {"value": 0.99, "low": 0.97, "high": 1.0},
        "effective_n": {"value": math.inf, "text": "> 16 [12.0, > 16]"},
        "kl": {"value": 3.0, "low": 2.0, "high": 4.0},
        "kl_of_best_of_n": 1.84,
    }
    reporter = SimpleNamespace(first_step=0, training_seconds=3.0)
    _, cost, _ = ending(tmp_path, 4, reporter, result)
    assert cost == "cost: KL 3.00 ±1.00 nats, where Best-of-N itself needs at least 1.84; 4 steps in 0:03"
