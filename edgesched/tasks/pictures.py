"""What several tasks show: pictures of scores and plans, plans by name, sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgesched.data.table import ScoreTable
from edgesched.report import scores, style
from edgesched.report.page import Cell
from edgesched.types import Plan

if TYPE_CHECKING:
    from edgesched.quality import QualityModel

Pictures = dict[str, tuple[Path, str]]


class Album:
    """Pictures of a run, kept as they are drawn.

    Args:
        folder: Where they are written.
        vector: Write each as SVG too.
    """

    def __init__(self, folder: Path, *, vector: bool = False) -> None:
        self.folder, self.vector = folder, vector
        self.pictures: Pictures = {}

    def keep(self, name: str, figure: Any, caption: str) -> None:
        """Write a figure under its name, with the caption that the page shows.

        Args:
            name: Name of the picture, and of its file.
            figure: A matplotlib figure.
            caption: One sentence.
        """
        self.pictures[name] = (style.save(figure, self.folder / f"{name}.png", vector=self.vector), caption)

    def __getitem__(self, name: str) -> tuple[Path, str]:
        return self.pictures[name]

    def of(self, *names: str) -> list[tuple[Path, str]]:
        """Those of the named pictures that were drawn, in this order."""
        return [self.pictures[name] for name in names if name in self.pictures]


def named_plan(
    plan: Plan, categories: tuple[str, ...], models: tuple[str, ...], method: str, workload: Mapping[str, Any]
) -> dict[str, Any]:
    """A plan by names, as an operator would load it.

    Args:
        plan: Plans; the first is told.
        categories: Category names, C of them.
        models: Model names, M of them.
        method: What found it.
        workload: What it was planned for.
    """
    return {
        "method": method,
        "workload": dict(workload),
        "assignment": {
            category: {model: float(plan.assignment[0, c, m]) for m, model in enumerate(models)}
            for c, category in enumerate(categories)
        },
        "steps": {model: int(plan.steps[0, m]) for m, model in enumerate(models)},
        "share": {model: float(plan.share[0, m]) for m, model in enumerate(models)},
    }


def score_figures(fit_half: ScoreTable, quality: QualityModel) -> dict[str, tuple[Any, str]]:
    """What the scores of a table look like beside their fits; name → (figure, caption).

    Args:
        fit_half: Rows that were fitted.
        quality: Distributions fitted to them.
    """
    frame = fit_half.frame
    mean = quality.mean().detach().double().numpy()
    counts = np.array(quality.step_counts)
    measured = quality.measured.numpy()
    low, high = (float(v) for v in np.quantile(frame[fit_half.score], [0.002, 1.0]))
    grid = np.linspace(low, high + 0.1 * (high - low), 300)
    observed: dict[str, dict[str, np.ndarray]] = {}
    density: dict[str, dict[str, np.ndarray]] = {}
    means: dict[str, dict[str, np.ndarray]] = {}
    errors: dict[str, dict[str, np.ndarray]] = {}
    fitted: dict[str, dict[str, np.ndarray]] = {}
    for c, category in enumerate(fit_half.categories):
        for values in (observed, density, means, errors, fitted):
            values[category] = {}
        for m, model in enumerate(quality.models):
            mine = frame[(frame["category"] == category) & (frame["model"] == model)]
            own = counts[measured[m]]
            by_prompt = mine.groupby(["steps", "prompt_id"])[fit_half.score].mean().groupby("steps")
            means[category][model] = by_prompt.mean().to_numpy()
            errors[category][model] = 1.96 * (by_prompt.std(ddof=1) / np.sqrt(by_prompt.count())).fillna(0).to_numpy()
            fitted[category][model] = mean[c, m, measured[m]]
            k = int(own[mean[c, m, measured[m]].argmax()])
            at = int(np.flatnonzero(counts == k)[0])
            observed[category][model] = mine.loc[mine["steps"] == k, fit_half.score].to_numpy()
            density[category][model] = quality.density(grid, c, m, at)
    steps_of = {model: counts[measured[m]] for m, model in enumerate(quality.models)}
    return {
        "score_distributions": (
            scores.score_distributions(observed, density, grid),
            "Scores of the fit half at each model's best step count, with the fitted distributions.",
        ),
        "quality_over_steps": (
            scores.quality_over_steps(steps_of, means, errors, fitted),
            "Mean score against denoising steps: measured with 95 % intervals over prompts, and the fitted curves.",
        ),
    }


def family_rows(table: ScoreTable) -> tuple[list[str], list[list[Cell]]]:
    """Mean score of every model at its best step count, category by category, as columns and rows."""
    mean = table.frame.groupby(["model", "category", "steps"], sort=False)[table.score].mean()
    rows: list[list[Cell]] = []
    for model in table.models or ():
        best = [mean[model][category] for category in table.categories]
        rows.append([model, *(f"{b.max():.2f} ({b.idxmax()} steps)" for b in best)])
    return ["model", *table.categories], rows


def sentences(remarks: Sequence[str]) -> list[str]:
    """Remarks as sentences."""
    return [f"{said[0].upper()}{said[1:].rstrip('.')}." for said in remarks]


def stream_facts(table: ScoreTable, metrics: Mapping[str, Any]) -> dict[str, str]:
    """What a page on a stream says at its head.

    Args:
        table: Score table.
        metrics: Metrics of the run, with the node ``stream``.
    """
    stream = metrics["stream"]
    return {
        "Scores come from": table.device,
        "Requests": f"{stream['requests']}, {sum(stream['rate']):.2f} a second",
    }
