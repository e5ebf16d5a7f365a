"""Figures of bench_search.py: gap against time, and how cost grows. Okabe and Ito's colours, and a marker each."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from edgesched.report.style import COLOURS, FIGURE_DPI, plain_log

_FLOOR = 1e-9
MARKERS = "osD^vPX*<>hd"


def draw(results: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write PNG and SVG of what was measured into a folder; returns the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    figures = {}
    if "peers" in results:
        figures["gap_against_time"] = gap_against_time(results["peers"])
    if "scaling" in results:
        figures["scaling"] = growth(results["scaling"])
    paths = [folder / f"{name}.{kind}" for name in figures for kind in ("png", "svg")]
    for path in paths:
        figures[path.stem].savefig(path, dpi=FIGURE_DPI)
    return paths


def _clean(ax: Axes) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(True, which="major", color="#e6e6e6", linewidth=0.6)
    ax.set_axisbelow(True)


def gap_against_time(peers: Mapping[str, Any]) -> Figure:
    """One panel per problem: every method once; and the curves of methods given more and more."""
    figure = Figure(figsize=(12, 4), layout="constrained")
    axes = figure.subplots(1, 3)
    names = list(dict.fromkeys(row["method"] for row in peers["rows"]))
    style = {n: (COLOURS[i % 8], MARKERS[i % len(MARKERS)]) for i, n in enumerate(names)}
    for ax, problem in zip(axes, ("given", "joint"), strict=False):
        for row in (r for r in peers["rows"] if r["problem"] == problem):
            colour, marker = style[row["method"]]
            ax.plot(
                1e3 * row["seconds"][1], max(row["gap_worst"], _FLOOR), marker, color=colour, ms=7, label=row["method"]
            )
        ax.set_title("Assignment given, C = 4, M = 3" if problem == "given" else "Joint, C = 16, M = 8")
        ax.set_xlabel("ms a scenario, in a batch where there is one")
    for name, points in peers["curves"].items():
        colour, marker = style[name]
        axes[2].plot(
            [1e3 * x for x, _ in points],
            [max(y, _FLOOR) for _, y in points],
            marker=marker,
            color=colour,
            ms=5,
            lw=1.3,
            label=name,
        )
    axes[2].set_title("Joint, as each method is given more")
    axes[2].set_xlabel("ms a scenario")
    for ax in axes:
        ax.set_xscale("log")
        ax.set_yscale("log")
        plain_log(ax.xaxis)
        _clean(ax)
    axes[0].set_ylabel("Worst gap to the proven optimum\n(below $10^{-9}$ at $10^{-9}$)")
    axes[2].set_ylabel("Mean gap to the proven optimum")
    handles = {t: h for ax in axes for h, t in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=6, frameon=False, fontsize=8)
    return figure


def growth(scaling: Mapping[str, Any]) -> Figure:
    """One panel per size that grows."""
    figure = Figure(figsize=(3.2 * len(scaling), 3.2), layout="constrained")
    axes = figure.subplots(1, len(scaling), squeeze=False)[0]
    names = list(dict.fromkeys(name for methods in scaling.values() for name in methods))
    for ax, (axis, methods) in zip(axes, scaling.items(), strict=True):
        for name, found in methods.items():
            i = names.index(name)
            x, y = zip(*((value, 1e3 * seconds) for value, seconds in found["points"]), strict=True)
            label = f"{name} (exponent {found['exponent']:.2f})"
            ax.plot(x, y, marker=MARKERS[i], color=COLOURS[i], lw=1.4, label=label)
        ax.set_xscale("log")
        ax.set_yscale("log")
        plain_log(ax.yaxis)
        ax.set_xticks(x, [str(value) for value in x])
        ax.minorticks_off()
        ax.set_title(axis.capitalize())
        ax.legend(frameon=False, fontsize=7)
        _clean(ax)
    axes[0].set_ylabel("ms a scenario")
    return figure
