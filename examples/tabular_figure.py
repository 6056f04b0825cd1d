"""The drawing of `tabular_study.py`: nine panels, lines labelled where they end, exact yardsticks in grey."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

INK, SOFT, GREY, PAPER = "#22252b", "#5b616b", "#8b9099", "#ffffff"
BLUE, RED, GREEN, ORANGE, PURPLE = "#2b6cb0", "#c8443c", "#2f8f6b", "#d98a1f", "#7a55a8"
SHADES = ("#a9c4e4", "#6a9bd1", "#2b6cb0", "#123e73")  # light to dark: small to large
HUES = (BLUE, GREEN, RED)
FAMILY = (*SHADES[:3], ORANGE, RED)
DASHED = (0, (4, 3))
NOTE = {"ha": "right", "fontsize": 8.8, "color": SOFT}
SUBTITLE = (
    "Lines: mean over 3 worlds; bands: their range. Dashed grey: exact Best-of-N. Training draws samples with bondlm's "
    "objectives; what is plotted is exact."
)

STYLE: Any = {
    "font.size": 9.5,
    "font.family": "DejaVu Sans",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#b9bdc4",
    "axes.labelcolor": INK,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 9,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "text.color": INK,
    "axes.grid": True,
    "grid.color": "#eceef1",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "lines.linewidth": 1.9,
    "svg.fonttype": "none",
    "figure.facecolor": PAPER,
    "savefig.facecolor": PAPER,
}


def line(ax: Any, x: np.ndarray, y_ST: np.ndarray, color: str, **style: Any) -> None:
    """Mean over worlds, and the range over worlds as a band."""
    ax.plot(x, y_ST.mean(0), color=color, solid_capstyle="round", **style)
    ax.fill_between(x, y_ST.min(0), y_ST.max(0), color=color, alpha=0.15, linewidth=0)


def end_labels(ax: Any, labels: Sequence[tuple[float, float, str, str]], gap: float = 0.062) -> None:
    """Write (x, y, text, color) to the right of the axes at their heights, pushed apart where they would overlap."""
    to_axes = ax.transAxes.inverted().transform
    places = sorted(
        ((float(to_axes(ax.transData.transform((x, y)))[1]), text, color) for x, y, text, color in labels),
        key=lambda place: place[0],
    )
    heights = [place[0] for place in places]
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + gap)
    shift = sum(h - place[0] for h, place in zip(heights, places, strict=True)) / len(places)
    for height, (_, text, color) in zip(heights, places, strict=True):
        ax.text(1.015, height - shift, text, transform=ax.transAxes, color=color, va="center", fontsize=9)


def yardstick(ax: Any, y: float, text: str) -> None:
    """A dashed grey line of an exact value, labelled on the left."""
    ax.axhline(y, color=GREY, linewidth=1.0, linestyle=DASHED, zorder=1)
    box = {"facecolor": PAPER, "edgecolor": "none", "pad": 1.2}
    place = ax.get_yaxis_transform()
    ax.text(0.985, y, text, transform=place, color=GREY, fontsize=8, va="center", ha="right", bbox=box, zorder=1.5)


def quantile_axis(ax: Any, top: float) -> None:
    """Show −1 / (mean log p≤), which is N for Best-of-N, on a log scale; ticks say the mean log-quantile itself."""
    ax.set_yscale("log", base=2)
    orders = [2**i for i in range(9) if 2**i < top]
    ax.set_yticks(orders, ["−1" if n == 1 else f"−1/{n}" for n in orders])
    ax.set_yticks([], minor=True)
    ax.set_ylim(0.93, top)
    ax.set_ylabel("mean log-quantile")


def plain_log_axis(ax: Any, ticks: Sequence[float]) -> None:
    """A log scale with plain numbers."""
    ax.set_yscale("log")
    ax.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.set_yticks([], minor=True)


def values_of(run: Any, measure: str) -> np.ndarray:
    """A run's (S, T) measure, the log-quantile as −1 / mean."""
    return -1 / run.log_quantile if measure == "log_quantile" else getattr(run, measure)


def curves(ax: Any, runs: Mapping[str, Any], colors: Sequence[str], measure: str, title: str) -> list[tuple]:
    """One measure of several runs over steps; returns what `end_labels` needs."""
    ends = []
    for (name, run), color in zip(runs.items(), colors, strict=True):
        values = values_of(run, measure)
        line(ax, run.steps, values, color)
        ends.append((run.steps[-1], float(values[:, -1].mean()), name, color))
    ax.set(xlabel="step", title=title, xlim=(0, max(run.steps[-1] for run in runs.values())))
    if measure == "log_quantile":
        quantile_axis(ax, 1.35 * max(end[1] for end in ends))
    return ends


def draw_figure(
    runs: Mapping[str, Mapping[str, Any]],
    best_curve: tuple[np.ndarray, np.ndarray],
    reward_curves: Mapping[str, tuple[np.ndarray, np.ndarray]],
    yardsticks: Mapping[int, float],
    order: int,
) -> Any:
    """The whole study. `yardsticks` is Best-of-N's exact mean log-quantile, `reward_curves` the panel of X8."""
    plt.rcParams.update(STYLE)
    figure, axes = plt.subplots(3, 3, figsize=(14.0, 11.6))
    figure.subplots_adjust(left=0.06, right=0.925, top=0.888, bottom=0.05, hspace=0.42, wspace=0.6)
    (forward, backward, quantile), (iterated, pareto, learned), (eta, gamma, rewards) = axes
    labels = {
        forward: curves(forward, runs["x1"], HUES, "forward", f"X1   Forward KL(Best-of-{order} ‖ π)"),
        backward: curves(backward, runs["x1"], HUES, "backward", f"X1   Backward KL(π ‖ Best-of-{order})"),
        quantile: curves(quantile, runs["x1"], HUES, "log_quantile", "X1   Log-quantile"),
        iterated: curves(iterated, runs["x2"], FAMILY, "log_quantile", "X2   Fixed N, and iterated Best-of-n"),
        learned: _learned_panel(learned, runs["x3"], order),
        eta: curves(eta, runs["x5"], SHADES[1:], "log_quantile", "X5   J-BOND: mixing rate of the anchor"),
        gamma: curves(gamma, runs["x6"], SHADES[::-1], "kl", "X6   J-BOND: strength of the extra KL"),
    }
    for ax, ticks in ((forward, (0.15, 0.3, 0.6, 1.2)), (backward, (0.3, 0.6, 1.2, 2.4, 4.8))):
        plain_log_axis(ax, ticks)
        ax.set_ylabel("nats")
    yardstick(quantile, -1 / yardsticks[order], f"Best-of-{order}")
    for n, value in yardsticks.items():
        yardstick(iterated, -1 / value, f"Best-of-{n}")
    _frontier_panel(pareto, runs["x2"], best_curve)
    gamma.set(ylabel="KL(π ‖ reference), nats", ylim=(0, None))
    _reward_panel(rewards, reward_curves)
    figure.canvas.draw()  # the limits are final now
    for ax, ends in labels.items():
        end_labels(ax, ends)
    figure.text(0.06, 0.962, "BOND on a table, measured exactly", fontsize=17, fontweight="bold")
    figure.text(0.06, 0.938, SUBTITLE, fontsize=10, color=SOFT)
    return figure


def _frontier_panel(ax: Any, runs: Mapping[str, Any], best_curve: tuple[np.ndarray, np.ndarray]) -> None:
    """Log-quantile against KL to the reference, with the exact curve of Best-of-N, which nothing can beat."""
    kls, quantiles = best_curve
    ax.plot(kls, -1 / quantiles, color=GREY, linewidth=1.2, linestyle=DASHED, zorder=1)
    for run, color in zip(runs.values(), FAMILY, strict=True):
        x, y = run.kl.mean(0), values_of(run, "log_quantile").mean(0)
        ax.plot(x, y, color=color, linewidth=1.6)
        ax.plot(x[-1], y[-1], "o", color=color, markersize=5)
    quantile_axis(ax, 1.35 * max(values_of(run, "log_quantile").mean(0)[-1] for run in runs.values()))
    ax.set(xlabel="KL(π ‖ reference), nats", title="X2   What a nat buys")
    ax.set(xlim=(0, 1.04 * max(run.kl.mean(0).max() for run in runs.values())))
    ax.text(0.97, 0.06, "dashed: Best-of-N, exact\ncolours as on the left", transform=ax.transAxes, **NOTE)


def _learned_panel(ax: Any, runs: Mapping[str, Any], order: int) -> list[tuple]:
    """Both KLs for the Monte-Carlo quantile (lines) and the learned one (dots)."""
    monte_carlo, model = runs.values()
    ends = []
    for measure, color in (("backward", RED), ("forward", BLUE)):
        values = values_of(monte_carlo, measure)
        line(ax, monte_carlo.steps, values, color)
        ax.plot(model.steps, values_of(model, measure).mean(0), color=color, linestyle=(0, (1, 1.7)), linewidth=2.3)
        ends.append((monte_carlo.steps[-1], float(values[:, -1].mean()), measure, color))
    ax.set(xlabel="step", ylabel=f"KL to Best-of-{order}, nats", title="X3   Learned quantile, and Monte Carlo")
    ax.set(xlim=(0, monte_carlo.steps[-1]))
    plain_log_axis(ax, (0.3, 0.6, 1.2, 2.4, 4.8))
    ax.text(0.97, 0.84, "line: 16 samples\ndots: model, 1 sample", transform=ax.transAxes, **NOTE)
    return ends


def _reward_panel(ax: Any, reward_curves: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """Mean reward of the estimates against log p."""
    styles = [(INK, "-", 2.4), (RED, "-", 1.9), (ORANGE, "-", 1.6), (GREEN, (0, (1, 1.4)), 2.6), (PURPLE, "-", 1.3)]
    for (name, (p, values)), (color, dash, width) in zip(reward_curves.items(), styles, strict=True):
        ax.plot(p, values, color=color, linestyle=dash, linewidth=width, label=name)
    ax.plot([0.5], [np.log(0.5)], "o", color=RED, markersize=5, zorder=5)
    ax.set(xlabel="true quantile p≤", ylabel="mean reward", title="X8   What J-BOND's reward stands for")
    ax.set(xlim=(0, 1), ylim=(-4.6, 0.15))
    ax.legend(frameon=False, fontsize=8.8, loc="lower right", handlelength=1.6)


def save(figure: Any, out: Path) -> list[Path]:
    """PNG and SVG."""
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / "figure.png", out / "figure.svg"]
    for path in paths:
        figure.savefig(path, dpi=170)
    plt.close(figure)
    return paths
