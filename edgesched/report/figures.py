"""The figures of a run: plain arrays in, matplotlib figures out.

Colours are Okabe and Ito's, which colour-blind readers can tell apart.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import LogFormatter, LogLocator, NullFormatter

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#F0E442", "#000000")
INK, FAINT = "#222222", "#999999"
FIGURE_DPI = 150
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


def _axes(columns: int, width: float = 3.1, height: float = 2.8, rows: int = 1, **shared: Any) -> tuple[Figure, Any]:
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


def score_distributions(
    scores: Mapping[str, Mapping[str, np.ndarray]],
    density: Mapping[str, Mapping[str, np.ndarray]],
    grid: np.ndarray,
    score_name: str = "CLIPScore",
) -> Figure:
    """Histograms of measured scores with the fitted densities, a panel for every category.

    Args:
        scores: Category → model → measured scores.
        density: Category → model → fitted density on ``grid``.
        grid: Score points.
        score_name: Label of the score axis.
    """
    figure, axes = _axes(len(scores), sharey=True)
    bins = np.linspace(float(grid.min()), float(grid.max()), 28)
    for ax, (category, by_model) in zip(axes, scores.items(), strict=True):
        for colour, (model, values) in zip(COLOURS, by_model.items(), strict=False):
            ax.hist(values, bins=bins, density=True, color=colour, alpha=0.28, edgecolor="none")
            ax.plot(grid, density[category][model], color=colour, linewidth=1.6, label=model)
        ax.set_title(category)
        ax.set_xlabel(f"{score_name} (points)")
    axes[0].set_ylabel("density")
    axes[0].legend(frameon=False, fontsize=8)
    return figure


def quality_over_steps(
    steps: Mapping[str, np.ndarray],
    measured: Mapping[str, Mapping[str, np.ndarray]],
    error: Mapping[str, Mapping[str, np.ndarray]],
    fitted: Mapping[str, Mapping[str, np.ndarray]],
    ceiling: Mapping[str, float] | None = None,
    score_name: str = "CLIPScore",
    band: Mapping[str, Mapping[str, np.ndarray]] | None = None,
) -> Figure:
    """Mean score against denoising steps: measured with 95 % intervals over prompts, and the fitted curve.

    Args:
        steps: Model → step counts, shape (K,).
        measured: Category → model → mean scores, shape (K,).
        error: Category → model → half-widths of the intervals, shape (K,).
        fitted: Category → model → fitted means, shape (K,).
        ceiling: Category → mean score of true renders, drawn as a dashed line.
        score_name: Label of the score axis.
        band: Category → model → half-widths of the curve's own intervals, shape (K,), drawn as a band.
    """
    figure, axes = _axes(len(measured), sharey=True)
    for ax, category in zip(axes, measured, strict=True):
        for colour, model in zip(COLOURS, measured[category], strict=False):
            k = steps[model]
            ax.errorbar(
                k, measured[category][model], error[category][model], fmt="o", ms=3.2, lw=1, color=colour, label=model
            )
            ax.plot(k, fitted[category][model], color=colour, linewidth=1.4)
            if band is not None:
                middle, half = fitted[category][model], band[category][model]
                ax.fill_between(k, middle - half, middle + half, color=colour, alpha=0.18, linewidth=0)
        if ceiling and category in ceiling:
            ax.axhline(ceiling[category], color=FAINT, linestyle="--", linewidth=1, label="true renders")
        ax.set_xscale("log")
        ticks = sorted({int(v) for k in steps.values() for v in k} & {1, 2, 4, 8, 10, 20, 30, 50, 100})
        ax.set_xticks(ticks, [str(v) for v in ticks])
        ax.minorticks_off()
        ax.set_title(category)
        ax.set_xlabel("denoising steps")
    axes[0].set_ylabel(f"{score_name} (points)")
    axes[-1].legend(frameon=False, fontsize=8, loc="lower right")
    return figure


def family_fits(
    scores: Mapping[str, Mapping[str, np.ndarray]],
    density: Mapping[str, Mapping[str, Mapping[str, np.ndarray]]],
    grid: np.ndarray,
    score_name: str = "CLIPScore",
) -> Figure:
    """Measured scores with the densities of every family, a row for every model, a column for every category.

    Args:
        scores: Category → model → measured scores.
        density: Category → model → family → fitted density on ``grid``.
        grid: Score points.
        score_name: Label of the score axis.
    """
    models = list(next(iter(scores.values())))
    figure, axes = _axes(len(scores), height=1.9, rows=len(models), sharex=True, sharey="row", squeeze=False)
    bins = np.linspace(float(grid.min()), float(grid.max()), 28)
    for column, (category, by_model) in zip(axes.T, scores.items(), strict=True):
        column[0].set_title(category)
        column[-1].set_xlabel(f"{score_name} (points)")
        for ax, (model, values) in zip(column, by_model.items(), strict=True):
            ax.hist(values, bins=bins, density=True, color=FAINT, alpha=0.35, edgecolor="none")
            lines = density[category][model].items()
            for colour, (family, line) in zip(COLOURS, lines, strict=False):
                ax.plot(grid, line, color=colour, linewidth=1.3, label=family)
    for row, model in zip(axes, models, strict=True):
        row[0].set_ylabel(model)
        # A piecewise density may have a narrow spike: the measured scores set the height.
        row[0].set_ylim(0, 1.25 * max(max(patch.get_height() for patch in ax.patches) for ax in row))
    axes[0, 0].legend(frameon=False, fontsize=7, loc="upper left")
    return figure


def pit_histograms(
    pit: Mapping[str, Mapping[str, np.ndarray]], notes: Mapping[str, Mapping[str, str]], prompts: Mapping[str, int]
) -> Figure:
    """PIT histograms on held-out prompts, a row for every family, a column for every category.

    A calibrated family is flat at 1; the grey band holds 95 % of a bin's heights if every prompt counted once.

    Args:
        pit: Family → category → PIT values in [0, 1].
        notes: Family → category → a short text for the panel.
        prompts: Category → prompts.
    """
    figure, axes = _axes(len(prompts), height=1.55, rows=len(pit), width=2.6, sharex=True, sharey=True, squeeze=False)
    edges = np.linspace(0, 1, 11)
    for row, colour, (family, by_category) in zip(axes, COLOURS, pit.items(), strict=False):
        row[0].set_ylabel(family)
        for ax, (category, values) in zip(row, by_category.items(), strict=True):
            half = 1.96 * np.sqrt(0.1 * 0.9 / prompts[category]) / 0.1
            ax.axhspan(1 - half, 1 + half, color="#dddddd", linewidth=0)
            ax.axhline(1, color=FAINT, linewidth=1)
            ax.hist(values, bins=edges, density=True, color=colour, alpha=0.75, edgecolor="white", linewidth=0.5)
            ax.text(0.03, 0.96, notes[family][category], transform=ax.transAxes, va="top", fontsize=7, color=INK)
    axes[0, 0].set_ylim(0, 1.25 * axes[0, 0].get_ylim()[1])
    for ax, category in zip(axes[0], prompts, strict=True):
        ax.set_title(category)
    for ax in axes[-1]:
        ax.set_xlabel("P(S ≤ score)")
    return figure


def sample_images(
    images: Mapping[str, Sequence[np.ndarray]], captions: Sequence[str], title: str = "", cell: float = 1.75
) -> Figure:
    """A row of images for every model, a column for every prompt.

    Args:
        images: Model → images of shape (H, W, 3), uint8, one for every caption.
        captions: What was asked for.
        title: Title of the sheet.
        cell: Inches that an image gets.
    """
    rows, columns = len(images), len(captions)
    figure = Figure(figsize=(cell * columns, cell * rows + 0.6), layout="constrained")
    axes = np.array(figure.subplots(rows, columns, squeeze=False))
    for r, (model, row) in enumerate(images.items()):
        for c, image in enumerate(row):
            ax = axes[r, c]
            ax.imshow(image, interpolation="nearest")
            ax.set_xticks([])
            ax.set_yticks([])
            ax.spines[:].set_visible(False)
            if r == 0:
                ax.set_title(_wrap(captions[c], int(14 * cell)), fontsize=4 * cell)
        axes[r, 0].set_ylabel(model, fontsize=min(8, 7 * cell))
    if title:
        figure.suptitle(title, fontsize=10)
    return figure


def _wrap(text: str, width: int) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, width))


def methods_compared(
    rows: Mapping[str, Mapping[str, tuple[float, float, float]]], bound: float | None = None
) -> Figure:
    """Utility, quality and delay of every method on held-out prompts, with 95 % intervals.

    Args:
        rows: Method → ``utility``, ``quality`` and ``latency_s``, each (value, low, high).
        bound: The joint upper bound on utility of the plan's view, drawn as a dashed line.
    """
    figure, axes = _axes(3, width=3.4, height=0.34 * len(rows) + 1.3, sharey=True)
    names = list(rows)
    places = np.arange(len(names))[::-1]
    panels = (("utility", "utility (points)"), ("quality", "quality (points)"), ("latency_s", "response delay (s)"))
    for ax, (key, label) in zip(axes, panels, strict=True):
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


def convergence(histories: Mapping[str, np.ndarray], bound: float, exact: float | None = None) -> Figure:
    """Best utility so far against iterations, with the upper bound, and the distance to it on a log axis.

    Args:
        histories: Method → best utility at equally spaced iterations, shape (iterations,).
        bound: Upper bound on the utility of every plan.
        exact: Exact optimum, where it is known.
    """
    figure, axes = _axes(2, width=4.2, height=3.0)
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
    figure, axes = _axes(2, width=4.2, height=2.6)
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


def gains_over_load(gains: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Figure:
    """Gain of every policy over the best single model against load, a panel for each policy.

    Args:
        gains: Load → policy → ``value lo hi`` in points.
    """
    names = list(next(iter(gains.values())))
    columns = min(4, len(names))
    figure, axes = _axes(columns, width=2.6, height=2.3, rows=-(-len(names) // columns), sharex=True, sharey=True)
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
    figure, axes = _axes(2, width=4.2, height=3.2)
    for i, name in enumerate(curves):
        for ax, shown in zip(axes, (curves, differences), strict=True):
            place, value, low, high = shown[name].T
            ax.fill_between(place, low, high, color=COLOURS[i], alpha=0.15, linewidth=0)
            ax.plot(place, value, color=COLOURS[i], marker=_MARKERS[i], markersize=4, linewidth=1.4, label=name)
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
    figure, axes = _axes(1, width=5.2, height=3.6)
    for i, (name, (delay, quality)) in enumerate(curves.items()):
        spread = np.stack([quality[:, 1] - quality[:, 2], quality[:, 3] - quality[:, 1]]).clip(min=0)
        axes[0].errorbar(delay[:, 1], quality[:, 1], spread, color=COLOURS[i], marker=_MARKERS[i], markersize=5,
                         linewidth=1.3, elinewidth=0.8, capsize=2, label=name, alpha=0.9)  # fmt: skip
    axes[0].set_xscale("log")
    plain_log(axes[0].xaxis)
    axes[0].set_xlabel("response delay (s)")
    axes[0].set_ylabel("quality on held-out prompts (points)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=8)
    return figure


def service(latencies: Mapping[str, np.ndarray], times: np.ndarray, waiting: Mapping[str, np.ndarray]) -> Figure:
    """How long requests take under every plan, and how many are in the system.

    Args:
        latencies: Method → seconds of every request, shape (n,).
        times: Seconds since the start, shape (T,).
        waiting: Method → requests that have come and are not delivered, shape (T,).
    """
    figure, axes = _axes(2, width=4.4, height=3.2)
    for i, (name, values) in enumerate(latencies.items()):
        ordered = np.sort(values[np.isfinite(values)])
        colour = COLOURS[i % len(COLOURS)]
        axes[0].plot(
            ordered, 1 - np.arange(len(ordered)) / max(len(ordered), 1), color=colour, linewidth=1.3, label=name
        )
        axes[1].plot(times, waiting[name], color=colour, linewidth=1.0)
    axes[0].set_xscale("log")
    axes[0].set_yscale("log")
    plain_log(axes[0].xaxis)
    axes[0].set_ylim(bottom=1e-3)
    axes[0].set_xlabel("latency (s)")
    axes[0].set_ylabel("share of requests that take longer")
    axes[1].set_yscale("symlog", linthresh=1.0)
    axes[1].yaxis.set_major_formatter("{x:g}")
    axes[1].set_xlabel("time (s)")
    axes[1].set_ylabel("requests in the system")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False, fontsize=8)
    return figure


def slots(demand: np.ndarray, left: Mapping[str, np.ndarray], steps: Mapping[str, np.ndarray], slot_s: float) -> Figure:
    """Demand over time, what is left over at the end of every slot, and the denoising steps chosen.

    Args:
        demand: Requests a second of every slot, shape (slots,).
        left: Way of planning → requests left over, shape (slots,).
        steps: Way of planning → mean denoising steps of the slot's requests, shape (slots,).
        slot_s: Length of a slot in seconds.
    """
    figure, axes = _axes(1, width=8.4, height=1.9, rows=3, sharex=True)
    time = np.arange(len(demand)) * slot_s
    axes[0].step(time, demand, where="post", color=INK, linewidth=1.0)
    axes[0].set_ylabel("requests (1/s)")
    for i, name in enumerate(left):
        axes[1].step(time, left[name], where="post", color=COLOURS[i], linewidth=1.1, label=name)
        axes[2].step(time, steps[name], where="post", color=COLOURS[i], linewidth=1.1)
    axes[1].set_yscale("symlog", linthresh=1.0)
    axes[1].yaxis.set_major_formatter("{x:g}")
    axes[1].set_ylabel("left over")
    axes[2].set_yscale("log")
    plain_log(axes[2].yaxis)
    axes[2].set_ylabel("mean steps")
    axes[2].set_xlabel("time (s)")
    figure.legend(*axes[1].get_legend_handles_labels(), loc="outside upper center", ncols=5, frameon=False, fontsize=8)
    return figure


def measured(simulated: np.ndarray, found: np.ndarray, model: np.ndarray, models: Sequence[str]) -> Figure:
    """Latency of every request, measured against simulated, with the line of equality.

    Args:
        simulated: Seconds, shape (n,).
        found: Seconds, shape (n,).
        model: Position of the model of each, shape (n,).
        models: Names.
    """
    figure, axes = _axes(1, width=4.6, height=3.8)
    for m, name in enumerate(models):
        mine = model == m
        axes[0].scatter(simulated[mine], found[mine], s=14, color=COLOURS[m], alpha=0.7, linewidths=0, label=name)
    ends = np.array([min(simulated.min(), found.min()), max(simulated.max(), found.max())])
    axes[0].plot(ends, ends, color=FAINT, linewidth=1.0)
    for axis, scale in ((axes[0].xaxis, axes[0].set_xscale), (axes[0].yaxis, axes[0].set_yscale)):
        scale("log")
        plain_log(axis)
    axes[0].set_xlabel("simulated latency (s)")
    axes[0].set_ylabel("measured latency (s)")
    axes[0].legend(frameon=False, fontsize=8)
    return figure


def comparison(table: Any) -> Figure:
    """Utility, quality and delay of every setting and method, with intervals over seeds.

    Args:
        table: From :func:`edgesched.runs.compare.compare_runs`.
    """
    measures = (("utility", "utility (points)"), ("quality", "quality (points)"), ("latency_s", "response delay (s)"))
    methods = list(dict.fromkeys(table["method"]))
    alone = table["setting"].nunique() == 1
    names = [
        r.method if alone else (r.setting if len(methods) == 1 else f"{r.setting}, {r.method}")
        for r in table.itertuples()
    ]
    figure, axes = _axes(3, width=3.4, height=0.3 * len(table) + 1.2, sharey=True)
    places = np.arange(len(table))[::-1]
    for ax, (key, label) in zip(axes, measures, strict=True):
        for place, row in zip(places, table.to_dict("records"), strict=True):
            colour = COLOURS[methods.index(row["method"]) % len(COLOURS)]
            half = row[f"{key}_half"]
            ax.errorbar(row[key], place, xerr=None if half != half else half, color=colour, marker="o", markersize=4,
                        capsize=2, linewidth=1.4)  # fmt: skip
        ax.set_xlabel(label)
        ax.set_ylim(-0.7, len(table) - 0.3)
    axes[0].set_yticks(places, [_wrap(name, 42) for name in names])
    return figure


def plain_log(axis: Any) -> None:
    """A logarithmic axis with plain numbers at 1, 2 and 5 times powers of ten."""
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def score_levels(levels: Sequence[Mapping[str, Any]], cuts: Sequence[float], reference: str, score_name: str) -> Figure:
    """Mean score of every model on prompts of low, middle and high reference score, with 95 % intervals.

    Args:
        levels: As from :func:`edgesched.quality.diagnostics.score_levels`, lowest first.
        cuts: Thresholds between the levels, in points.
        reference: Name of the reference model.
        score_name: Label of the score axis.
    """
    figure, axes = _axes(1, width=5.2, height=3.2)
    models = list(levels[0]["models"])
    for i, model in enumerate(models):
        value = np.array([level["models"][model]["mean"] for level in levels])
        low, high = (np.array([level["models"][model][edge] for level in levels]) for edge in ("lo", "hi"))
        at = np.arange(len(levels)) + 0.08 * (i - (len(models) - 1) / 2)
        spread = np.stack([value - low, high - value]).clip(min=0)
        axes[0].errorbar(
            at, value, spread, color=COLOURS[i], marker="o", markersize=5, capsize=3, linewidth=1.4, label=model
        )
    edges = [
        "below " + f"{cuts[0]:.1f}",
        *(f"{a:.1f} to {b:.1f}" for a, b in itertools.pairwise(cuts)),
        f"above {cuts[-1]:.1f}",
    ]
    axes[0].set_xticks(range(len(levels)), edges)
    axes[0].set_xlabel(f"score of the prompt under {reference} (points)")
    axes[0].set_ylabel(f"{score_name} (points)")
    axes[0].legend(fontsize=8, frameon=False, loc="lower right")
    return figure


def difficulty(
    offsets: Mapping[str, tuple[np.ndarray, np.ndarray]], gains: Mapping[str, Mapping[str, Mapping[str, Any]]]
) -> Figure:
    """Predicted against measured offsets of held-out prompts, and what planning by levels gains at every load.

    Args:
        offsets: Category → predicted and measured offsets, each of shape (prompts,), in points.
        gains: Where levels come from → load → ``value lo hi``, in points of utility.
    """
    figure, (left, right) = _axes(2, width=4.2, height=3.0)
    for colour, (name, (predicted, measured)) in zip(COLOURS, offsets.items(), strict=False):
        left.scatter(predicted, measured, s=12, color=colour, alpha=0.7, linewidths=0, label=name)
    both = np.concatenate([p for p, _ in offsets.values()])
    ends = np.array([both.min(), both.max()])
    left.plot(ends, ends, color=FAINT, linewidth=1.0)
    left.set_xlabel("predicted offset (points)")
    left.set_ylabel("measured offset (points)")
    left.legend(fontsize=7, frameon=False)
    for place, (colour, (name, by_load)) in enumerate(zip(COLOURS, gains.items(), strict=False)):
        load = np.array([float(n) for n in by_load]) * 1.06**place
        value = np.array([row["value"] for row in by_load.values()])
        low, high = (np.array([row[edge] for row in by_load.values()]) for edge in ("lo", "hi"))
        spread = np.stack([value - low, high - value]).clip(min=0)
        right.errorbar(
            load, value, yerr=spread, color=colour, marker="o", markersize=3, linewidth=1.3, capsize=2, label=name
        )
    right.axhline(0, color=FAINT, linewidth=0.8)
    right.set_xscale("log")
    right.set_xlabel("requests a category")
    right.set_ylabel("gain of levels (points)")
    right.legend(fontsize=7, frameon=False)
    return figure


def save(figure: Figure, path: Path, *, vector: bool = False) -> Path:
    """Write a figure as PNG, and as SVG beside it if asked for; returns the PNG's path.

    Texts stand as they are: a dollar sign in a prompt or a name begins no formula.
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
