"""The fit task: every family of score distributions, judged on held-out prompts."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.progress import track

from edgesched.data.table import ScoreTable
from edgesched.errors import ArgumentError
from edgesched.quality import diagnostics
from edgesched.report import scores
from edgesched.report.page import Cell, Page, Section
from edgesched.runs.run import Run
from edgesched.tasks.pictures import Album

if TYPE_CHECKING:
    from collections.abc import Callable

    import pandas as pd

    from edgesched.quality import QualityModel


def fit(
    run: Run,
    *,
    data: ScoreTable,
    families: Mapping[str, Callable[..., QualityModel]],
    folds: int = 5,
    draws: int = 1000,
    level: float = 0.05,
    seed: int = 0,
) -> None:
    """Fit all families out of fold, and say which predicts best and which categories are not Gaussian.

    Args:
        run: Where the results go.
        data: Score table.
        families: Fits by name.
        folds: Every prompt is judged by fits to the other folds.
        draws: Bootstrap draws over prompts.
        level: Level of the tests, after Holm's correction.
        seed: Seed of the draws.

    Raises:
        ArgumentError: If there is no family.
        ScoreTableError: If the table has too few prompts for the folds.
    """
    if not families:
        raise ArgumentError("fit.families: expected at least one")
    run.tracker.score_table(data)
    held: dict[str, pd.DataFrame] = {}
    models: dict[str, QualityModel] = {}
    measured: dict[str, dict[str, Any]] = {}
    for name in track(families, description="Fitting families"):
        fitter = families[name]
        held[name] = diagnostics.in_order(diagnostics.out_of_fold(data, fitter, folds), data)
        begun = time.perf_counter()
        models[name] = fitter(data, logger=_csv_logger(run, name), checkpoint=run.folder / "checkpoints" / name)
        measured[name] = diagnostics.summarise(held[name], draws, seed)
        measured[name] |= {"seconds": time.perf_counter() - begun, "strength": models[name].strength}
        measured[name] |= {
            "converged": models[name].converged,
            "misfit": diagnostics.cell_misfit(models[name], data)[:10],
        }
    chosen = min(measured, key=lambda name: measured[name]["crps"])
    for name, rows in held.items():
        measured[name] |= _judged(rows, held[chosen], draws, seed)
    normal = diagnostics.pit_tests(held["gaussian"]) if "gaussian" in held else []
    metrics: dict[str, Any] = {
        "families": measured,
        "chosen": chosen,
        "non_gaussian": [
            {key: test[key] for key in ("category", "model", "p", "p_holm", "p_shape", "p_shape_holm")}
            for test in normal
            if test["p_least"] < level
        ],
        "words": diagnostics.non_gaussian_words(normal, level) if normal else "",
        "source": {"device": data.device, "digest": data.digest(), "rows": len(data)},
    }
    run.save(metrics)
    album = _pictures(run, data, models, held, measured, chosen, level)
    run.publish(_page(data, metrics, album))
    _log_losses(run, families)


def _judged(rows: pd.DataFrame, best: pd.DataFrame, draws: int, seed: int) -> dict[str, Any]:
    """How far a family is from the best one, and where its intervals and PIT values are off."""
    value, low, high = diagnostics.compare_crps(rows, best, draws, seed)
    return {
        "crps_above_chosen": {"value": value, "lo": low, "hi": high},
        "by_model": diagnostics.coverage_by(rows, "model"),
        "by_category": diagnostics.coverage_by(rows, "category"),
        "pit": diagnostics.pit_tests(rows),
    }


def _csv_logger(run: Run, name: str) -> Any:
    from lightning.pytorch.loggers import CSVLogger

    return CSVLogger(run.folder, "log", name)


def _log_losses(run: Run, families: Mapping[str, Any]) -> None:
    """The loss of every epoch, which Lightning wrote as CSV, to W&B."""
    import pandas as pd

    for name in families:
        for row in pd.read_csv(run.folder / "log" / name / "metrics.csv").to_dict("records"):
            run.tracker.metrics({"fit": {name: {"epoch": int(row["epoch"]), "loss": float(row["loss"])}}})


def _interval(values: Mapping[str, Any], key: str, digits: int = 2) -> str:
    low, high = values["intervals"][key]
    return f"{values[key]:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def _family_rows(measured: Mapping[str, Any], chosen: str) -> tuple[list[str], list[list[Cell]]]:
    columns = ["family", "CRPS (points)", "above the best", "NLL (nats)", "in 50 %", "in 80 %", "in 95 %",
               "shrinkage (prompts)", "seconds"]  # fmt: skip
    rows: list[list[Cell]] = []
    for name, m in sorted(measured.items(), key=lambda item: item[1]["crps"]):
        gap = m["crps_above_chosen"]
        above = "best" if name == chosen else f"{gap['value']:+.3f} ({gap['lo']:+.3f} to {gap['hi']:+.3f})"
        coverage: list[Cell] = [f"{100 * m[f'coverage_{level}']:.1f} %" for level in (50, 80, 95)]
        rows.append([name, _interval(m, "crps"), above, _interval(m, "nll"), *coverage, m["strength"], m["seconds"]])
    return columns, rows


def _pictures(
    run: Run,
    table: ScoreTable,
    models: Mapping[str, QualityModel],
    held: Mapping[str, pd.DataFrame],
    measured: Mapping[str, Any],
    chosen: str,
    level: float,
) -> Album:
    """Draw what was found."""
    album = Album(run.figures)
    quality, frame = models[chosen], table.frame
    counts, seen = np.array(quality.step_counts), quality.measured.numpy()
    mean = quality.mean().detach().numpy()
    error = 1.96 * diagnostics.standard_errors(quality, table).numpy()
    low, high = (float(v) for v in np.quantile(frame[table.score], [0.002, 1.0]))
    grid = np.linspace(low, high + 0.1 * (high - low), 400)
    observed: dict[str, dict[str, np.ndarray]] = {}
    density: dict[str, dict[str, dict[str, np.ndarray]]] = {}
    points: dict[str, dict[str, np.ndarray]] = {c: {} for c in quality.categories}
    bars, fitted, band = copy.deepcopy(points), copy.deepcopy(points), copy.deepcopy(points)
    for c, category in enumerate(quality.categories):
        observed[category], density[category] = {}, {}
        for m, model in enumerate(quality.models):
            mine = frame[(frame["category"] == category) & (frame["model"] == model)]
            last = int(np.flatnonzero(seen[m])[-1])
            observed[category][model] = mine.loc[mine["steps"] == counts[last], table.score].to_numpy()
            density[category][model] = {name: q.density(grid, c, m, last) for name, q in models.items()}
            by_prompt = mine.groupby(["steps", "prompt_id"])[table.score].mean().groupby("steps")
            points[category][model] = by_prompt.mean().to_numpy()
            spread = by_prompt.std(ddof=1) / np.sqrt(by_prompt.count())
            bars[category][model] = 1.96 * spread.fillna(0).to_numpy()
            fitted[category][model], band[category][model] = mean[c, m, seen[m]], error[c, m, seen[m]]
    album.keep("family_fits", scores.family_fits(observed, density, grid, table.score),
               "Scores at each model's largest step count, with the fit of every family.")  # fmt: skip
    if len(counts) > 1:
        steps_of = {model: counts[seen[m]] for m, model in enumerate(quality.models)}
        figure = scores.quality_over_steps(steps_of, points, bars, fitted, None, table.score, band)
        album.keep(
            "quality_over_steps",
            figure,
            f"Mean score against denoising steps: measured with 95 % intervals over prompts, and the curves of "
            f"{chosen} with theirs, robust to dependence within a prompt. Every category is drawn towards the mean of "
            f"its model as by {quality.strength:g} prompts more.",
        )
    prompts = {str(c): int(n) for c, n in frame.groupby("category", sort=False)["prompt_id"].nunique().items()}
    _keep_pit(album, prompts, held, measured, level)
    return album


def _keep_pit(
    album: Album,
    prompts: Mapping[str, int],
    held: Mapping[str, pd.DataFrame],
    measured: Mapping[str, Any],
    level: float,
) -> None:
    """Draw where held-out scores fall, with how many tests reject at ``level``."""
    pit: dict[str, dict[str, np.ndarray]] = {}
    notes: dict[str, dict[str, str]] = {}
    for name, rows in held.items():
        by_category = dict(iter(rows.groupby("category", sort=False)))
        pit[name] = {category: part["pit"].to_numpy() for category, part in by_category.items()}
        notes[name] = {}
        for category in by_category:
            tests = [t for t in measured[name]["pit"] if t["category"] == category]
            bad = sum(t["p_least"] < level for t in tests)
            notes[name][category] = f"{bad} of {len(tests)} rejected" if bad else "none rejected"
    album.keep(
        "pit_histograms",
        scores.pit_histograms(pit, notes, prompts),
        "Where held-out scores fall in the fitted distributions, all models, steps and seeds; flat is calibrated. "
        "The note counts the models whose test, on one row per prompt, rejects.",
    )


def _lead(metrics: Mapping[str, Any]) -> str:
    """What came out, in words."""
    chosen = metrics["chosen"]
    own = metrics["families"][chosen]
    unsettled = [n for n, m in metrics["families"].items() if not m["converged"]]
    tied = [n for n, m in metrics["families"].items() if n != chosen and m["crps_above_chosen"]["lo"] <= 0]
    shares = [m["coverage_80"] for m in own["by_model"].values()]
    words = (
        f"{chosen} predicts scores of held-out prompts best (CRPS {own['crps']:.2f} points). Its nominal 80 % intervals "
        f"hold {100 * own['coverage_80']:.1f} % of them, {100 * min(shares):.1f} to {100 * max(shares):.1f} % by model."
    )
    if unsettled:
        words += f" The fit did not settle for {', '.join(unsettled)}; give it more epochs before it is judged."
    return words + (f" Over prompts it cannot be told apart from {', '.join(tied)}." if tied else "")


def _page(table: ScoreTable, metrics: Mapping[str, Any], album: Album) -> Page:
    """The page of a fit run."""
    own = metrics["families"][metrics["chosen"]]
    facts = {
        "Scores come from": table.device,
        "Score table": f"{len(table)} images, digest {metrics['source']['digest']}",
        "Categories": ", ".join(table.categories),
    }
    coverage: list[list[Cell]] = [
        [group, *(f"{100 * c[f'coverage_{level}']:.1f} %" for level in (50, 80, 95))]
        for by in ("by_model", "by_category")
        for group, c in own[by].items()
    ]
    misfit: list[list[Cell]] = [
        [f"{m['category']}, {m['model']}", *(m[key] for key in ("steps", "measured", "fitted", "misfit", "error"))]
        for m in own["misfit"]
    ]
    others = {(t["category"], t["model"]): t["p_least"] for t in own["pit"]}
    normal = metrics["families"].get("gaussian", {"pit": []})["pit"]
    tests: list[list[Cell]] = [
        [f"{t['category']}, {t['model']}", t["prompts"], t["steps"], t["statistic"], t["p"], t["p_holm"],
         t["p_shape"], t["p_shape_holm"], others[t["category"], t["model"]]]
        for t in normal
    ]  # fmt: skip
    return Page(facts, [
        Section("What came out", (_lead(metrics), metrics["words"],
                       "Every prompt was judged by fits to other prompts; in brackets 95 % intervals over prompts."),
                       *_family_rows(metrics["families"], metrics["chosen"]), album.of("family_fits"), key="families"),
        Section("Quality over steps", ("Where the fitted means are furthest from the measured ones, in points.",),
                       ("category, model", "steps", "measured", "fitted", "misfit", "standard error"), misfit,
                       album.of("quality_over_steps")),
        Section(f"Coverage of the intervals of {metrics['chosen']}", (),
                       ("group", "in 50 %", "in 80 %", "in 95 %"), coverage, album.of("pit_histograms")),
        Section("Is a category Gaussian?",
                       ("One seed of every prompt at the largest step count: Kolmogorov–Smirnov on the PIT, Shapiro–Wilk on "
                        "its normal scores (the shape alone), corrected together by Holm's method.",),
                       ("category, model", "prompts", "steps", "distance", "p", "p corrected", "p of the shape",
                        "corrected", f"least corrected, {metrics['chosen']}"), tests),
    ])  # fmt: skip
