"""Figures of plans: one plan, methods side by side, searches on their way, gains along an axis.

Plain arrays in, matplotlib figures out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from edgesched.report.style import COLOURS, FAINT, INK, MARKERS, panels, plain_log, wrapped

_MEASURES = (("utility", "utility (points)"), ("quality", "quality (points)"), ("latency_s", "response delay (s)"))


def plan_bars(
    assignment: np.ndarray, share: np.ndarray, steps: np.ndarray, categories: Sequence[str], models: Sequence[str]
) -> Figure:
    """A plan as a picture: which share of each category goes to which model, and what each model gets.

    Args:
        assignment: Shape (C, M).
        share: Shape (M,).
        steps: Shape (M,).
        categories: Names, C of them.
        models: Names, M of them.
    """  # fmt: skip
    figure, axes = panels(2, width=4.2, height=2.6)
    left: Axes
    left, right = axes
    start = np.zeros(len(categories))
    places = np.arange(len(categories))[::-1]
    for m, (model, colour) in enumerate(zip(models, COLOURS, strict=False)):
        left.barh(places, assignment[:, m], left=start, color=colour, label=model, height=0.6)
        start = start + assignment[:, m]
    left.set_yticks(places, list(categories))
    left.set_xlabel("share of the category's requests")
    left.set_xlim(0, 1)
    left.legend(frameon=False, fontsize=8, ncols=min(3, len(models)), loc="lower center", bbox_to_anchor=(0.5, 1.0))
    at = np.arange(len(models))[::-1]
    right.barh(at, share, color=COLOURS[: len(models)], height=0.6)
    for place, value, count in zip(at, share, steps, strict=True):
        text = f"{100 * value:.0f} %, {count} steps" if value > 0 else "no load"
        right.text(value + 0.01, place, text, va="center", fontsize=8)
    right.set_yticks(at, list(models))
    right.set_xlabel("share of the server")
    right.set_xlim(0, max(1.0, 1.35 * float(share.max())))
    return figure


def methods_compared(
    rows: Mapping[str, Mapping[str, tuple[float, float, float]]], bound: float | None = None
) -> Figure:
    """Utility, quality and delay of every method on held-out prompts, with 95 % intervals.

    Args:
        rows: Method → ``utility``, ``quality`` and ``latency_s``, each (value, low, high).
        bound: The joint upper bound on utility of the plan's view, drawn as a dashed line.
    """
    figure, axes = panels(3, width=3.4, height=0.34 * len(rows) + 1.3, sharey=True)
    names = list(rows)
    places = np.arange(len(names))[::-1]
    for ax, (key, label) in zip(axes, _MEASURES, strict=True):
        values = np.array([rows[n][key] for n in names])
        colours = [COLOURS[4] if n in ("annealing", "relaxed", "exact") else COLOURS[0] for n in names]
        # One method far off would squeeze all others: it is drawn at the edge, with its value.
        middle = np.median(values[:, 0])
        usual = np.median(np.abs(values[:, 0] - middle)) + np.median(values[:, 2] - values[:, 1]) + 1e-3 * abs(middle)
        off = np.abs(values[:, 0] - middle) > 12 * usual
        left, right = values[~off][:, 1].min(), values[~off][:, 2].max()
        margin = 0.12 * (right - left) + 1e-9
        for place, (value, low, high), colour, far in zip(places, values, colours, off, strict=True):
            if far:
                edge = left - margin if value < middle else right + margin
                text = f"◂ {value:.4g}" if value < middle else f"{value:.4g} ▸"
                side = "left" if value < middle else "right"
                ax.text(edge, place, text, color=colour, fontsize=8, va="center", ha=side)
                continue
            ax.plot([low, high], [place, place], color=colour, linewidth=1.6)
            ax.plot(value, place, "o", ms=5, color=colour)
        if bool(off.any()):
            ax.set_xlim(left - 1.3 * margin, right + 1.3 * margin)
        ax.set_xlabel(label)
        ax.set_ylim(-0.7, len(names) - 0.3)
    if bound is not None:
        limits = axes[0].get_xlim()
        axes[0].set_xlim(limits[0], max(limits[1], bound + 0.03 * (limits[1] - limits[0])))
        axes[0].axvline(bound, color=FAINT, linestyle="--", linewidth=1, label="bound (plan's view)")
        axes[0].legend(frameon=False, fontsize=7, loc="best")
    axes[0].set_yticks(places, names)
    return figure


def comparison(table: Any) -> Figure:
    """Utility, quality and delay of every setting and method, with intervals over seeds.

    Args:
        table: From :func:`edgesched.runs.compare.compare_runs`.
    """
    methods = list(dict.fromkeys(table["method"]))
    alone = table["setting"].nunique() == 1
    names = [
        r.method if alone else (r.setting if len(methods) == 1 else f"{r.setting}, {r.method}")
        for r in table.itertuples()
    ]
    figure, axes = panels(3, width=3.4, height=0.3 * len(table) + 1.2, sharey=True)
    places = np.arange(len(table))[::-1]
    for ax, (key, label) in zip(axes, _MEASURES, strict=True):
        for place, row in zip(places, table.to_dict("records"), strict=True):
            colour = COLOURS[methods.index(row["method"]) % len(COLOURS)]
            half = row[f"{key}_half"]
            ax.errorbar(row[key], place, xerr=None if half != half else half, color=colour, marker="o", markersize=4,
                        capsize=2, linewidth=1.4)  # fmt: skip
        ax.set_xlabel(label)
        ax.set_ylim(-0.7, len(table) - 0.3)
    axes[0].set_yticks(places, [wrapped(name, 42) for name in names])
    return figure


def convergence(histories: Mapping[str, np.ndarray], bound: float, exact: float | None = None) -> Figure:
    """Best utility so far against iterations, with the upper bound, and the distance to it on a log axis.

    Args:
        histories: Method → best utility at equally spaced iterations, shape (iterations,).
        bound: Upper bound on the utility of every plan.
        exact: Exact optimum, where it is known.
    """
    figure, axes = panels(2, width=4.2, height=3.0)
    left, right = axes
    for colour, (name, values) in zip(COLOURS, histories.items(), strict=False):
        iteration = np.arange(1, len(values) + 1)
        left.plot(iteration, values, color=colour, linewidth=1.5, label=name)
        distance = np.maximum(bound - values, 1e-9)
        right.plot(iteration, distance, color=colour, linewidth=1.5, label=name)
    left.axhline(bound, color=INK, linestyle="--", linewidth=1, label="upper bound")
    if exact is not None:
        left.axhline(exact, color=FAINT, linestyle=":", linewidth=1.2, label="exact optimum")
        right.axhline(max(bound - exact, 1e-9), color=FAINT, linestyle=":", linewidth=1.2, label="exact optimum")
    finite = np.concatenate([v[np.isfinite(v)] for v in histories.values()])
    if finite.size:
        low = float(np.quantile(finite, 0.02))
        left.set_ylim(low - 0.1 * max(bound - low, 1e-6), bound + 0.15 * max(bound - low, 1e-6))
    right.set_yscale("log")
    plain_log(right.yaxis)
    left.set_ylabel("best utility so far (points)")
    right.set_ylabel("upper bound − utility (points)")
    for ax in (left, right):
        ax.set_xlabel("recorded iteration")
        ax.set_xscale("log")
    left.legend(frameon=False, fontsize=8)
    return figure


def gains_over_load(gains: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Figure:
    """Gain of every policy over the best single model against load, a panel for each policy.

    Args:
        gains: Load → policy → ``value lo hi`` in points.
    """
    names = list(next(iter(gains.values())))
    columns = min(4, len(names))
    figure, axes = panels(columns, width=2.6, height=2.3, rows=-(-len(names) // columns), sharex=True, sharey=True)
    loads = [float(load) for load in gains]
    for ax, name in zip(axes.flat, names, strict=False):
        found = [by_name[name] for by_name in gains.values()]
        value = [g["value"] for g in found]
        spread = [[max(g["value"] - g["lo"], 0.0) for g in found], [max(g["hi"] - g["value"], 0.0) for g in found]]
        ax.axhline(0, color=FAINT, linewidth=0.8)
        ax.errorbar(loads, value, yerr=spread, color=COLOURS[0], marker="o", markersize=3, linewidth=1.3, capsize=2)
        ax.set_xscale("log")
        ax.set_yscale("symlog", linthresh=1.0)
        ax.set_title(name)
        ax.set_xlabel("requests a category")
    for ax in axes.flat[len(names) :]:
        ax.set_visible(False)
    axes.flat[0].set_ylabel("points over one model")
    return figure


def lines(
    curves: Mapping[str, np.ndarray], differences: Mapping[str, np.ndarray], across: str, along: str, against: str
) -> Figure:
    """Methods along one axis, and on the right how far each is from one of them; bands are 95 % intervals.

    Args:
        curves: Method → shape (points, 4): place on the axis, value, low, high.
        differences: Method → the same of its paired difference to the method ``against``.
        across: Label of the horizontal axis.
        along: Label of the vertical axis.
        against: The method that the others are held against.
    """
    figure, axes = panels(2, width=4.2, height=3.2)
    for i, name in enumerate(curves):
        for ax, shown in zip(axes, (curves, differences), strict=True):
            place, value, low, high = shown[name].T
            ax.fill_between(place, low, high, color=COLOURS[i], alpha=0.15, linewidth=0)
            ax.plot(place, value, color=COLOURS[i], marker=MARKERS[i], markersize=4, linewidth=1.4, label=name)
    axes[1].set_yscale("symlog", linthresh=1.0)
    axes[1].yaxis.set_major_formatter("{x:g}")
    axes[1].set_ylabel(f"less {against} (points)")
    axes[0].set_ylabel(along)
    for ax in axes:
        ax.set_xlabel(across)
        ax.set_xscale("log")
        ax.set_xticks(next(iter(curves.values()))[:, 0], [f"{v:g}" for v in next(iter(curves.values()))[:, 0]])
        ax.minorticks_off()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=6, frameon=False, fontsize=8)
    return figure


def front(curves: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> Figure:
    """Quality against delay, a line for every method through the weights of delay, with 95 % intervals.

    Args:
        curves: Method → delay and quality, each of shape (weights, 4): weight, value, low, high.
    """
    figure, axes = panels(1, width=5.2, height=3.6)
    for i, (name, (delay, quality)) in enumerate(curves.items()):
        spread = np.stack([quality[:, 1] - quality[:, 2], quality[:, 3] - quality[:, 1]]).clip(min=0)
        axes[0].errorbar(delay[:, 1], quality[:, 1], spread, color=COLOURS[i], marker=MARKERS[i], markersize=5,
                         linewidth=1.3, elinewidth=0.8, capsize=2, label=name, alpha=0.9)  # fmt: skip
    axes[0].set_xscale("log")
    plain_log(axes[0].xaxis)
    axes[0].set_xlabel("response delay (s)")
    axes[0].set_ylabel("quality on held-out prompts (points)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=8)
    return figure
