"""What every figure shares: colours, axes, and files in which texts stand as they are.

Colours are Okabe and Ito's, which colour-blind readers can tell apart.
"""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import LogFormatter, LogLocator, NullFormatter

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#F0E442", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
INK, FAINT = "#222222", "#999999"
FIGURE_DPI = 150


def panels(columns: int, width: float = 3.1, height: float = 2.8, rows: int = 1, **shared: Any) -> tuple[Figure, Any]:
    """A figure of ``rows`` × ``columns`` axes, each ``width`` × ``height`` inches.

    Args:
        columns: Columns of axes.
        width: Inches of one of the axes.
        height: Inches of one of the axes.
        rows: Rows of axes.
        shared: As ``Figure.subplots`` takes it: ``sharex``, ``sharey``, ``squeeze``.
    """
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = np.atleast_1d(figure.subplots(rows, columns, **shared))
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(True, color="#e6e6e6", linewidth=0.6)
        ax.set_axisbelow(True)
        ax.tick_params(labelsize=8, colors=INK)
        ax.title.set_size(10)
        ax.xaxis.label.set_size(9)
        ax.yaxis.label.set_size(9)
    return figure, axes


def plain_log(axis: Any) -> None:
    """A logarithmic axis with plain numbers at 1, 2 and 5 times powers of ten."""
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def wrapped(text: str, width: int) -> str:
    """``text`` in lines of at most ``width`` characters.

    Args:
        text: Words.
        width: Characters.
    """
    return "\n".join(textwrap.wrap(text, width))


def save(figure: Figure, path: Path, *, vector: bool = False) -> Path:
    """Write a figure as PNG, and as SVG beside it if asked for; returns the PNG's path.

    Texts stand as they are: a dollar sign in a prompt or a name begins no formula.

    Args:
        figure: The figure; its texts are changed.
        path: PNG file; its folder is made.
        vector: Write SVG too.
    """
    _take_literally(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=FIGURE_DPI)
    if vector:
        figure.savefig(path.with_suffix(".svg"))
    return path


def _take_literally(figure: Figure) -> None:
    for text in figure.findobj(Text):
        text.set_parse_math(False)
    for ax in figure.axes:
        for axis in (ax.xaxis, ax.yaxis):
            if isinstance(axis.get_major_formatter(), LogFormatter):  # powers of ten are formulas of matplotlib's own
                for tick in axis.get_major_ticks():
                    tick.label1.set_parse_math(True)
                    tick.label2.set_parse_math(True)
