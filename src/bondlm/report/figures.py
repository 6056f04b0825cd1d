"""The figures of a report about the evaluation: Best-of-N curve, win rate and reward against KL, quantiles.

Each function returns a matplotlib figure, or None where the runs hold nothing to draw.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from bondlm.report.canvas import COLOURS, INK, new_axes
from bondlm.report.numbers import baseline_rows, best_of_n_kl, best_of_n_win_rate, curve, evaluation_points
from bondlm.report.read import Run

MARKERS = "osD^vPX"
# The cost of RLOO in a sweep of beta_RL (.3, .45, .6; the rate falls to 0): win rates at the end points, and their KL
# in units of exact Best-of-N's. T5 on Debian descriptions, benchmarks/paper/results/frontier.jsonl.
RLOO_WIN_RATES, RLOO_KL_RATIOS = (0.750, 0.876), (1.74, 1.86)


def run_style(index: int) -> tuple[str, str]:
    """Colour and marker of the index-th run, the same in all figures; the first 49 differ."""
    colours = list(COLOURS.values())
    return colours[index % len(colours)], MARKERS[(index + index // len(colours)) % len(MARKERS)]


def best_of_n_figure(run: Run) -> Figure | None:
    """Reward of the reference's Best-of-N against N, with the policy at its effective N, and the baselines."""
    points = curve(run.result)
    if not points:
        return None
    figure, axes = new_axes()
    n = [point["n"] for point in points]
    value, low, high = (_floats(points, "reward", end) for end in ("value", "low", "high"))
    axes.plot(n, value, color=COLOURS["blue"], marker="." if len(n) <= 16 else "", label="Best-of-N of the reference")
    axes.fill_between(n, low, high, color=COLOURS["blue"], alpha=0.18, linewidth=0)
    for i, (name, row) in enumerate(baseline_rows(run.result)):
        if name == "policy":
            continue
        if row.get("effective_n", {}).get("value") and row.get("reward", {}).get("value") is not None:
            axes.plot(
                row["effective_n"]["value"],
                row["reward"]["value"],
                linestyle="",
                marker=MARKERS[i % len(MARKERS)],
                markersize=5,
                markerfacecolor="none",
                markeredgecolor=INK,
                label=name,
            )
    _plot_policy(axes, run.result, max(n))
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("N")
    axes.set_ylabel("mean reward")
    axes.legend(loc="lower right")
    return figure


def _plot_policy(axes: Axes, result: Mapping[str, Any], end: int) -> None:
    """The policy at (effective N, reward); an arrow at the curve's end if N is beyond it."""
    effective, reward = result["effective_n"], result["reward"]
    if reward["value"] is None:
        return
    beyond = effective["value"] is None
    x = {name: end if effective[name] is None else effective[name] for name in ("value", "low", "high")}
    _cross(axes, x, reward, COLOURS["vermillion"], ">" if beyond else "o", "the policy, one sample")


def plane_figure(runs: Sequence[Run]) -> Figure:
    """Win rate against KL: the exact curve of Best-of-N, and each run with its evaluations during training."""
    figure, axes = new_axes()
    seen = [point for run in runs for point in evaluation_points(run)]
    far = max([point["kl"]["value"] or 0.0 for point in seen] + [0.0])
    top = 16.0
    while best_of_n_kl(np.array(top)) < 1.1 * far and top < 2.0**20:
        top *= 2
    n = np.geomspace(1, top, 200)
    axes.plot(best_of_n_kl(n), best_of_n_win_rate(n), color=INK, label="Best-of-N, exact", zorder=1)
    for order in (1, 2, 4, 8, 16, 64, 256):
        if order <= top:
            at = (float(best_of_n_kl(np.array(order))), float(best_of_n_win_rate(np.array(order))))
            axes.plot(*at, marker=".", color=INK, markersize=6, zorder=1)
            axes.annotate(f"{order}", at, xytext=(-2, 5), textcoords="offset points", ha="right", fontsize=8)
    win_rate = np.linspace(*RLOO_WIN_RATES)
    kl = best_of_n_kl(win_rate / (1 - win_rate))
    low, high = RLOO_KL_RATIOS
    axes.fill_betweenx(win_rate, low * kl, high * kl, color=INK, alpha=0.3, linewidth=0, label="RLOO, swept (T5)")
    _plot_runs(axes, runs, "win_rate")
    axes.set_ylabel("win rate against the reference")
    axes.legend(loc="lower right")
    return figure


def reward_plane_figure(runs: Sequence[Run]) -> Figure | None:
    """Mean reward against KL: Best-of-N of the first run's reference, and each run with its evaluations."""
    points = [point for point in curve(runs[0].result) if point["reward"]["value"] is not None]
    if not points:
        return None
    figure, axes = new_axes()
    kl = [best_of_n_kl(np.array(float(p["n"]))) if p.get("kl") is None else p["kl"] for p in points]
    axes.plot(kl, _floats(points, "reward", "value"), color=INK, label="Best-of-N of the reference", zorder=1)
    for x, point in zip(kl, points, strict=True):
        n = point["n"]
        if n & (n - 1) == 0:  # 1, 2, 4, ..
            at = (float(x), point["reward"]["value"])
            axes.plot(*at, marker=".", color=INK, markersize=6, zorder=1)
            axes.annotate(f"{n}", at, xytext=(-2, 5), textcoords="offset points", ha="right", fontsize=8)
    _plot_runs(axes, runs, "reward")
    axes.set_ylabel("mean reward")
    axes.legend(loc="lower right")
    return figure


def _plot_runs(axes: Axes, runs: Sequence[Run], measure: str) -> None:
    """Each run at (KL, measure) with its intervals, and its path through the evaluations during training."""
    for i, run in enumerate(runs):
        colour, marker = run_style(i)
        points = [p for p in evaluation_points(run) if None not in (p["kl"]["value"], p[measure]["value"])]
        if points[:-1]:
            path = [(p["kl"]["value"], p[measure]["value"]) for p in points]
            axes.plot(*zip(*path, strict=True), color=colour, alpha=0.6, linewidth=1, marker=marker, markersize=3)
        if None not in (run.result["kl"]["value"], run.result[measure]["value"]):
            _cross(axes, run.result["kl"], run.result[measure], colour, marker, run.name)
    axes.set_xlabel("KL(policy ‖ reference), nats")


def _cross(axes: Axes, x: Mapping[str, Any], y: Mapping[str, Any], colour: str, marker: str, label: str) -> None:
    """A point with both of its intervals; unknown ends are left out."""
    axes.errorbar(
        x["value"],
        y["value"],
        xerr=_arms(x),
        yerr=_arms(y),
        color=colour,
        marker=marker,
        markersize=7,
        elinewidth=1.4,
        capsize=2.5,
        linestyle="",
        label=label,
        zorder=3,
    )


def _arms(value: Mapping[str, Any]) -> list[list[float]]:
    ends = [value["value"] if value[end] is None else value[end] for end in ("low", "high")]
    # A percentile interval need not contain the estimate, and matplotlib refuses negative arms.
    return [[max(0.0, value["value"] - ends[0])], [max(0.0, ends[1] - value["value"])]]


def quantile_figure(run: Run) -> Figure | None:
    """How often the policy's samples fall into each quantile of the reference, with Best-of-N's density N u^(N−1)."""
    histogram = run.result.get("quantile_histogram")
    if not histogram or None in [*histogram["edges"], *histogram["policy"]]:
        return None
    figure, axes = new_axes()
    edges = np.array(histogram["edges"], dtype=float)
    density = np.array(histogram["policy"], dtype=float) / np.diff(edges)
    axes.stairs(density, edges, fill=True, color=COLOURS["vermillion"], alpha=0.35, label="the policy")
    u = np.linspace(0, 1, 200)
    for order, colour, line in ((2, "sky", "-"), (4, "blue", "--"), (8, "green", "-.")):
        axes.plot(u, order * u ** (order - 1), color=COLOURS[colour], linestyle=line, label=f"Best-of-{order}")
    axes.axhline(1.0, color=INK, linestyle=":", label="the reference")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.15 * max(4.0, float(density.max())))
    axes.set_xlabel("quantile of a policy sample's reward among the reference's")
    axes.set_ylabel("density")
    axes.legend(loc="upper left")
    return figure


def _floats(points: Sequence[Mapping[str, Any]], name: str, end: str) -> list[float]:
    return [float("nan") if point[name][end] is None else float(point[name][end]) for point in points]
