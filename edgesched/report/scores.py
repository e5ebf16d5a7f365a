"""Figures of scores: their distributions, their fits, what difficulty says of them, and the images they judge.

Plain arrays in, matplotlib figures out.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from edgesched.report.style import COLOURS, FAINT, INK, panels, wrapped


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
    figure, axes = panels(len(scores), sharey=True)
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
    figure, axes = panels(len(measured), sharey=True)
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
    figure, axes = panels(len(scores), height=1.9, rows=len(models), sharex=True, sharey="row", squeeze=False)
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
    figure, axes = panels(len(prompts), height=1.55, rows=len(pit), width=2.6, sharex=True, sharey=True, squeeze=False)
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


def score_levels(levels: Sequence[Mapping[str, Any]], cuts: Sequence[float], reference: str, score_name: str) -> Figure:
    """Mean score of every model on prompts of low, middle and high reference score, with 95 % intervals.

    Args:
        levels: As from :func:`edgesched.quality.diagnostics.score_levels`, lowest first.
        cuts: Thresholds between the levels, in points.
        reference: Name of the reference model.
        score_name: Label of the score axis.
    """
    figure, axes = panels(1, width=5.2, height=3.2)
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
    figure, (left, right) = panels(2, width=4.2, height=3.0)
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
                ax.set_title(wrapped(captions[c], int(14 * cell)), fontsize=4 * cell)
        axes[r, 0].set_ylabel(model, fontsize=min(8, 7 * cell))
    if title:
        figure.suptitle(title, fontsize=10)
    return figure
