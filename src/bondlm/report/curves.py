"""The figures of a report about training: curves by step, and the time of a step by phase.

Each function returns a matplotlib figure, or None where the runs hold nothing to draw.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from bondlm.report.canvas import COLOURS, HEIGHT, INK, new_axes
from bondlm.report.figures import run_style
from bondlm.report.read import Run

MAX_POINTS = 300  # longer curves are drawn as means of this many groups of steps
FEW_POINTS = 12  # curves with at most this many points get markers, since a line of one point is invisible
PHASE_PREFIX = "time/"


def curve_figure(runs: Sequence[Run], name: str, label: str, *, evaluated: str | None = None) -> Figure | None:
    """A metric by step, one line per run; with `evaluated`, also the points from evaluations, with intervals."""
    figure, axes = new_axes(0.8 * HEIGHT)
    drawn: list[float] = []
    for i, run in enumerate(runs):
        colour, marker = run_style(i)
        steps, values = series(run.steps, name)
        points = _evaluated(run.evaluations, evaluated) if evaluated else np.empty(0)
        if steps.size:
            alpha = 0.5 if points.size else 1.0  # behind the points
            mark = "." if steps.size <= FEW_POINTS else ""
            axes.plot(steps, values, color=colour, alpha=alpha, linewidth=1.1, marker=mark, label=run.name)
        if points.size:
            _plot_points(axes, points, colour, marker, None if steps.size else run.name)
        drawn += [*steps, *(points[0] if points.size else ())]
    if not drawn:
        return None
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    if min(drawn) == max(drawn):
        axes.set_xlim(min(drawn) - 1, max(drawn) + 1)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(runs) > 1:
        axes.legend()
    return figure


def _plot_points(axes: Axes, points: NDArray[np.float64], colour: str, marker: str, label: str | None) -> None:
    """Evaluations with their intervals; if only a lower bound is known, an arrow upwards from it."""
    x, value, low, high = points
    known = ~np.isnan(value)
    arms = np.maximum(0.0, [value - low, high - value])[:, known]  # an interval need not contain the estimate
    style: Any = {"color": colour, "markersize": 5, "linestyle": "", "zorder": 3}
    axes.errorbar(x[known], value[known], yerr=arms, marker=marker, label=label, **style)
    axes.plot(x[~known], low[~known], marker=r"$\uparrow$", **style | {"markersize": 10})


def series(rows: Sequence[Mapping[str, Any]], name: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Steps and values of a metric, as means of groups of neighbours if there are more than `MAX_POINTS`."""
    points = np.array([(row["step"], row[name]) for row in rows if None not in (row.get("step"), row.get(name))], float)
    if not points.size:
        return np.empty(0), np.empty(0)
    groups = np.array_split(points, min(MAX_POINTS, len(points)))
    means = np.array([group.mean(axis=0) for group in groups])
    return means[:, 0], means[:, 1]


def _evaluated(rows: Sequence[Mapping[str, Any]], name: str) -> NDArray[np.float64]:
    """(4, points): step, value, low, high of an evaluation's measure; the value is NaN if only `low` is known."""
    keys = ("step", name, f"{name}_low", f"{name}_high")
    found = []
    for row in rows:
        step, value, low, high = (row.get(key) for key in keys)
        if step is None or value is low is None:
            continue
        known = math.nan if value is None else value
        found.append((step, known, known if low is None else low, known if high is None else high))
    return np.array(found, dtype=float).T


def mean_phases(run: Run) -> dict[str, float]:
    """Mean seconds of a step by phase, the longest first."""
    names = sorted({name for row in run.steps for name in row if name.startswith(PHASE_PREFIX)})
    means = {
        name.removeprefix(PHASE_PREFIX): float(np.mean([row.get(name) or 0.0 for row in run.steps])) for name in names
    }
    return dict(sorted(means.items(), key=lambda item: -item[1]))


def phase_figure(runs: Sequence[Run]) -> Figure | None:
    """Mean seconds of a step by phase, with a group of bars per phase and a bar per run."""
    timed = [(i, run, mean_phases(run)) for i, run in enumerate(runs) if mean_phases(run)]
    if not timed:
        return None
    names = list(timed[0][2])
    names += sorted({name for _, _, means in timed for name in means} - set(names))
    figure, axes = new_axes(max(0.8 * HEIGHT, 0.22 * len(names) * len(timed) + 0.8))
    width = 0.8 / len(timed)
    for position, (i, run, means) in enumerate(timed):
        at = np.arange(len(names)) + (position - (len(timed) - 1) / 2) * width
        colour = run_style(i)[0] if len(timed) > 1 else COLOURS["blue"]
        bars = axes.barh(at, [means.get(name, 0.0) for name in names], 0.9 * width, color=colour, label=run.name)
        total = sum(means.values())
        shares = [f"{means.get(name, 0.0) / total:.0%}" if total else "" for name in names]
        axes.bar_label(bars, shares, padding=3, fontsize=8, color=INK)
    axes.set_yticks(np.arange(len(names)), names)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("mean seconds of a step")
    if len(timed) > 1:
        axes.legend(loc="lower right")
    return figure
