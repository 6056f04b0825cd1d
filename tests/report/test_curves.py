import json
from pathlib import Path

import numpy as np
import pytest

from bondlm.report.curves import MAX_POINTS, curve_figure, mean_phases, series
from bondlm.report.figures import RLOO_KL_RATIOS, RLOO_WIN_RATES, run_style
from bondlm.report.numbers import best_of_n_kl
from bondlm.report.read import read_run
from report.helpers import write_jsonl, write_run


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


def test_a_single_step_is_drawn_with_a_mark_and_a_bound_with_an_arrow(tmp_path):
    folder = write_run(tmp_path / "run")
    rows = [{"step": 3, "loss": 1.0, "reward": 0.7}, {"step": 3, "eval_effective_n": None, "eval_effective_n_low": 8.2}]
    write_jsonl(folder / "metrics.jsonl", rows)
    run = read_run(folder, "run")
    axes = curve_figure([run], "reward", "reward").axes[0]
    assert axes.lines[0].get_marker() == "."
    assert axes.get_xlim() == (2, 4)
    arrow = curve_figure([run], "", "effective N", evaluated="eval_effective_n").axes[0].lines[-1]
    assert arrow.get_xydata().tolist() == [[3, 8.2]]


def test_the_band_of_rloo_is_that_of_the_study():
    study = Path(__file__).parents[2] / "benchmarks" / "paper" / "results" / "frontier.jsonl"
    ends = [row for row in map(json.loads, study.read_text().splitlines()) if row.get("is_last")]
    swept = [row for row in ends if row["run"].startswith("rloo") and row["run"].endswith("-fall")]
    orders = [row["win_rate"] / (1 - row["win_rate"]) for row in swept]
    ratios = [row["kl"] / float(best_of_n_kl(np.array(n))) for row, n in zip(swept, orders, strict=True)]
    assert (min(ratios), max(ratios)) == pytest.approx(RLOO_KL_RATIOS, abs=0.005)
    assert (min(row["win_rate"] for row in swept), max(row["win_rate"] for row in swept)) == pytest.approx(
        RLOO_WIN_RATES, abs=0.001
    )


def test_runs_of_a_page_differ_in_colour_or_marker():
    assert len({run_style(index) for index in range(49)}) == 49
