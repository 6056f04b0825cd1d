"""Save matplotlib figures as files, and as inline SVG that follows the light or dark theme of the page."""

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's colours, distinguishable for colour-blind readers; in the page each is a CSS variable (page.css).
COLOURS = {
    "vermillion": "#d55e00",
    "blue": "#0072b2",
    "green": "#009e73",
    "purple": "#cc79a7",
    "orange": "#e69f00",
    "sky": "#56b4e9",
    "brown": "#8c6d46",
}
INK = "#767676"  # readable on white and on black; in the page it is the text's colour
WIDTH, HEIGHT = 4.6, 3.3  # inches: narrow, so that letters stay readable on a phone
_SETTINGS: Any = {  # matplotlib types the keys one by one
    "font.family": "sans-serif",
    "font.size": 9.5,
    "text.color": INK,
    "text.parse_math": False,  # names may hold a $
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": INK,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.6,
    "svg.fonttype": "none",  # text stays text: the page's font, searchable, small
    "svg.hashsalt": "bondlm",
}


@contextmanager
def drawing() -> Iterator[None]:
    """Apply the style of all figures to the body of a `with`."""
    with matplotlib.rc_context(_SETTINGS), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a name in a script that the PNG's font lacks
        yield


def new_axes(height: float = HEIGHT) -> tuple[Figure, Axes]:
    """A figure with one pair of axes."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.add_subplot()


def save(figure: Figure, folder: Path, name: str) -> str:
    """Write NAME.svg and NAME.png; returns the SVG for the page."""
    figure.savefig(folder / f"{name}.png", dpi=160, facecolor="white")
    stream = io.StringIO()
    figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    (folder / f"{name}.svg").write_text(stream.getvalue(), encoding="utf-8")
    return inline(stream.getvalue(), name)


def inline(svg: str, name: str) -> str:
    """Return the `<svg>` element for an HTML page: unique ids, the theme's colours, full container width."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\b(id="|url\(#|xlink:href="#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r'(<svg\b[^>]*?) width="[^"]*" height="[^"]*"|(<svg\b[^>]*?) height="[^"]*"', r"\1\2", svg, count=1)
    svg = re.sub(r'(<svg\b[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = svg.replace("<svg ", '<svg role="img" ', 1).replace(INK, "currentColor")
    for colour, code in COLOURS.items():
        svg = svg.replace(code, f"var(--{colour})")
    return svg
