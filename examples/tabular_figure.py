"""The drawing of `tabular_study.py`: nine panels, lines labelled where they end, exact yardsticks in grey."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

INK, GREY, PAPER = "#22252b", "#8b9099", "#ffffff"
BLUE, RED, GREEN, ORANGE, PURPLE = "#2b6cb0", "#c8443c", "#2f8f6b", "#d98a1f", "#7a55a8"
SHADES = ("#a9c4e4", "#6a9bd1", "#2b6cb0", "#123e73")  # light to dark: small to large

STYLE = {
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
    "xtick.color": "#5b616b",
    "ytick.color": "#5b616b",
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
    """Mean over seeds, and the range over seeds as a band."""
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
    ax.axhline(y, color=GREY, linewidth=1.0, linestyle=(0, (4, 3)), zorder=1)
    ax.annotate(
        text,
        (0.012, y),
        xycoords=("axes fraction", "data"),
        xytext=(0, 2),
        textcoords="offset points",
        color=GREY,
        fontsize=8,
        va="bottom",
    )


def curves(ax: Any, runs: Mapping[str, Any], colors: Sequence[str], measure: str, label: str, title: str) -> None:
    """One measure of several runs over steps."""
    ends = []
    for (name, run), color in zip(runs.items(), colors, strict=True):
        values = getattr(run, measure)
        line(ax, run.steps, values, color)
        ends.append((run.steps[-1], values[:, -1].mean(), name, color))
    ax.set(xlabel="step", ylabel=label, title=title, xlim=(0, max(run.steps[-1] for run in runs.values())))
    ax.margins(y=0.08)
    ax._end_labels = ends  # written once the limits are final


def finish(axes: Sequence[Any]) -> None:
    for ax in axes:
        if hasattr(ax, "_end_labels"):
            end_labels(ax, ax._end_labels)


def frontier(ax: Any, runs: Mapping[str, Any], colors: Sequence[str], curve: tuple[np.ndarray, np.ndarray]) -> None:
    """Mean log-quantile against KL to the reference, with the exact curve of Best-of-N."""
    ax.plot(*curve, color=GREY, linewidth=1.2, linestyle=(0, (4, 3)), zorder=1)
    for (_, run), color in zip(runs.items(), colors, strict=True):
        ax.plot(run.kl.mean(0), run.log_quantile.mean(0), color=color)
        ax.plot(run.kl[:, -1].mean(), run.log_quantile[:, -1].mean(), "o", color=color, markersize=4.5)


def save(figure: Any, out: Path) -> list[Path]:
    """PNG and SVG."""
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / "figure.png", out / "figure.svg"]
    for path in paths:
        figure.savefig(path, dpi=170)
    plt.close(figure)
    return paths
