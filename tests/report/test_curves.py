import numpy as np
import pytest

from bondlm.report.curves import MAX_POINTS, mean_phases, series
from bondlm.report.read import read_run
from report.helpers import write_run


def test_a_long_curve_becomes_means_of_groups():
    rows = [{"step": step, "reward": float(step % 2)} for step in range(1, 10 * MAX_POINTS + 1)]
    steps, values = series(rows, "reward")
    assert len(steps) == MAX_POINTS
    assert steps[0] == pytest.approx(5.5)
    assert values == pytest.approx(np.full(MAX_POINTS, 0.5))
    assert series([{"step": 1, "kl": None}], "kl")[0].size == 0


def test_phases_are_means_over_steps_the_longest_first(tmp_path):
    run = write_run(tmp_path / "run")
    means = mean_phases(read_run(run, "run"))
    assert list(means) == ["generate", "learn", "reference", "other"]
    assert list(means.values()) == pytest.approx([14.0, 9.9, 5.1, 0.04])
