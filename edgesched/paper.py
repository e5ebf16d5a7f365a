"""The published evaluation in one command: a grid of loads, budgets and weights, against the four baselines.

A budget is the speed of the server relative to the one that the times were measured on: at budget 2 every step and
every overhead takes half the time. Everything is repeated over random halves of the prompts; one half is planned
with, the other replayed.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from rich.progress import track

from edgesched import figures, report
from edgesched.config import build
from edgesched.diagnostics import score_levels
from edgesched.errors import ConfigError
from edgesched.policies import plan_policies, replay_all
from edgesched.queueing import agreement
from edgesched.search import exact, solve
from edgesched.simulate import replay
from edgesched.table import ScoreTable
from edgesched.tracking import Tracker
from edgesched.types import Plan, Scenario
from edgesched.writing import json_document, left_out, write_json

BASELINES = ("direct", "random", "equal_allocation", "optimal_step")
ALLOCATIONS = ("equal_allocation", "optimal_step", "published", "annealing", "relaxed", "exact")
OURS = ("published", "annealing")
CLAIMED = {"quality_gain_pct": 4.7, "latency_cut_pct": 39.1}
Pictures = dict[str, tuple[Path, str]]


@dataclass(frozen=True)
class Grid:
    """What replay gave at every point of the grid.

    Attributes:
        points: (load, budget, weight) of every point, G of them.
        utility: Method → shape (splits, G, draws), the first draw the value itself.
        quality: Method → shape (splits, G, draws).
        latency_s: Method → shape (splits, G).
    """

    points: list[tuple[float, float, float]]
    utility: dict[str, np.ndarray]
    quality: dict[str, np.ndarray]
    latency_s: dict[str, np.ndarray]

    def curve(self, method: str, what: str, along: int, at: Sequence[float], against: str | None = None) -> np.ndarray:
        """Mean over splits with a 95 % interval over splits and prompts along one axis of the grid.

        Args:
            method: Its key.
            what: ``"utility"``, ``"quality"`` or ``"latency_s"``.
            along: The axis: 0 load, 1 budget, 2 weight.
            at: Where the other two axes stay, (load, budget, weight).
            against: A method whose values are taken off, split by split and draw by draw.

        Returns:
            Shape (values, 4): the axis' value, mean, low, high.
        """
        rows = []
        for g, point in enumerate(self.points):
            if all(point[i] == at[i] for i in range(3) if i != along):
                values = getattr(self, what)[method][:, g]
                if against is not None:
                    values = values - getattr(self, what)[against][:, g]
                value = values[:, 0].mean() if values.ndim == 2 else values.mean()
                low, high = np.quantile(values[:, 1:] if values.ndim == 2 else values, [0.025, 0.975])
                rows.append((point[along], value, low, high))
        return np.array(sorted(rows))


def paper(cfg: DictConfig, folder: Path, tracker: Tracker) -> float | None:
    """Score table → every method on every grid point of every split → headline, ten figures, report.

    Args:
        cfg: The composed configuration; ``paper`` holds the grid.
        folder: Run folder.
        tracker: W&B run.

    Returns:
        Median relative quality gain of annealing over the four baselines together, in per cent.
    """
    from edgesched.pipeline import _live_samples, build_method, remarks

    started = time.perf_counter()
    table: ScoreTable = build(cfg.data, "data")
    tracker.score_table(table)
    methods = {name: build_method(name, node) for name, node in cfg.method.items()}
    missing = [n for n in (*BASELINES, *OURS) if n not in methods]
    if missing:
        raise ConfigError(f"method: the published evaluation needs {', '.join(missing)} too")
    points, middle = _points(cfg)
    samples = _live_samples(cfg)
    grid = _run_grid(cfg, table, methods, points)
    whole = build(cfg.quality, "quality")(table)
    metrics: dict[str, Any] = {
        "headline": headline(grid, "annealing"),
        "headline_published": headline(grid, "published"),
        "grid": {
            "points": len(points), "splits": int(cfg.paper.splits), "loads": list(cfg.paper.loads),
            "budgets": list(cfg.paper.budgets), "latency_weights": list(cfg.paper.latency_weights), "middle": list(middle),
        },
        "middle": {
            name: {what: float(getattr(grid, what)[name][:, points.index(middle)].reshape(int(cfg.paper.splits), -1)[:, 0].mean())
                   for what in ("utility", "quality", "latency_s")}
            for name in methods
        },
        "source": {"device": table.device, "digest": table.digest(), "rows": len(table)},
    }  # fmt: skip
    metrics |= {"agreement": {}, "words": words(metrics["headline"], {})}
    metrics["remarks"] = list(remarks(whole, str(cfg.workload.latency)))
    write_json(folder / "metrics.json", metrics)  # what comes after is optional, and must not lose the grid
    with left_out("the agreement of simulator, theory and service"):
        metrics["agreement"] = _agreement(cfg, whole, middle[2])
        metrics["words"] = words(
            metrics["headline"], {key: value for key, value in metrics["agreement"].items() if value is not None}
        )
    pictures: Pictures = {}
    with left_out("the remaining figures"):
        _figures(cfg, folder / "figures", table, methods, grid, middle, samples, pictures)
    metrics["seconds_total"] = time.perf_counter() - started
    write_json(folder / "metrics.json", metrics)
    columns, rows = headline_rows(metrics)
    report.print_table(f"Gains on held-out prompts, scores from {table.device}", columns, rows)
    for sentence in metrics["words"]:
        print(sentence, flush=True)
    _report(folder, cfg, table, metrics, pictures, (columns, rows))
    tracker.summary(metrics)
    tracker.table("headline", columns, [[report.show(cell) for cell in row] for row in rows])
    tracker.images({name: file for name, (file, _) in pictures.items()})
    return float(np.median([row["quality_gain_pct"]["median"] for row in metrics["headline"].values()]))


def _points(cfg: DictConfig) -> tuple[list[tuple[float, float, float]], tuple[float, float, float]]:
    """Grid points, and the middle one, at which the others are cut."""
    axes = [[float(v) for v in cfg.paper[name]] for name in ("loads", "budgets", "latency_weights")]
    for name, axis in zip(("loads", "budgets", "latency_weights"), axes, strict=True):
        if not axis or min(axis) <= 0 or len(set(axis)) < len(axis):
            raise ConfigError(f"paper.{name}: expected different numbers above 0, got {axis}")
    if int(cfg.paper.splits) < 1:
        raise ConfigError(f"paper.splits: expected at least 1, got {cfg.paper.splits}")
    at = [sorted(axis)[len(axis) // 2] for axis in axes]
    return [(load, budget, weight) for load, budget, weight in itertools.product(*axes)], (at[0], at[1], at[2])


def _scenarios(quality: Any, points: Sequence[tuple[float, float, float]], latency: str) -> Scenario:
    """One scenario for every grid point."""
    load, budget, weight = (torch.tensor(column, dtype=torch.float64) for column in zip(*points, strict=True))
    base = quality.scenario(load[:, None].repeat(1, len(quality.categories)), weight, latency=latency)
    return dataclasses.replace(
        base, step_time_s=base.step_time_s / budget[:, None], overhead_s=base.overhead_s / budget[:, None]
    )


def _run_grid(
    cfg: DictConfig, table: ScoreTable, methods: Mapping[str, Any], points: list[tuple[float, float, float]]
) -> Grid:
    """Plan with every method on all points at once, and replay, for every split."""
    from edgesched.pipeline import plan_all

    found: dict[str, dict[str, list[Any]]] = {w: {n: [] for n in methods} for w in ("utility", "quality", "latency_s")}
    for split in track(range(int(cfg.paper.splits)), description="Splits of the prompts"):
        fit_half, held = table.split(split)
        quality = build(cfg.quality, "quality")(fit_half)
        scenarios = _scenarios(quality, points, str(cfg.workload.latency))
        plans = {name: result.plan for name, result in plan_all(methods, scenarios, quality).items()}
        kept: dict[str, dict[str, list[Any]]] = {w: {n: [] for n in plans} for w in found}
        for g in range(len(points)):
            outcomes = replay(
                {name: plan[g : g + 1] for name, plan in plans.items()}, scenarios[g], held, quality.models,
                planned_on=fit_half, routing=cfg.replay.routing, draws=int(cfg.paper.draws), seed=split,
            )  # fmt: skip
            for name, o in outcomes.items():
                kept["utility"][name].append([o.utility, *o.utility_draws.tolist()])
                kept["quality"][name].append([o.quality, *o.quality_draws.tolist()])
                kept["latency_s"][name].append(o.latency_s)
        for what, by_name in kept.items():
            for name, values in by_name.items():
                found[what][name].append(values)
    arrays = {what: {n: np.array(v) for n, v in by_name.items() if v} for what, by_name in found.items()}
    return Grid(points, arrays["utility"], arrays["quality"], arrays["latency_s"])


def headline(grid: Grid, ours: str) -> dict[str, dict[str, dict[str, Any]]]:
    """Relative quality gain and delay cut of a method over every baseline, both at the same grid points.

    ``median lo hi``: the median over grid points, with a 95 % interval over splits and prompts (over splits only for
    the delay, which does not depend on the prompts replayed). ``best``: at the one grid point where the quality gain
    is largest among those where the delay falls too, or the utility gain where there is none; named in ``best_point``.

    Args:
        grid: What replay gave.
        ours: The method's key.

    Returns:
        Baseline → ``quality_gain_pct latency_cut_pct utility_gain best_point``.
    """
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    for name in BASELINES:
        quality = 100 * (grid.quality[ours] / grid.quality[name] - 1)
        cut = 100 * (1 - grid.latency_s[ours] / grid.latency_s[name])
        gain = grid.utility[ours] - grid.utility[name]
        mean_quality, mean_cut, mean_gain = quality[..., 0].mean(0), cut.mean(0), gain[..., 0].mean(0)
        both = (mean_quality > 0) & (mean_cut > 0)
        best = int(np.where(both, mean_quality, -np.inf).argmax()) if both.any() else int(mean_gain.argmax())
        load, budget, weight = grid.points[best]

        def spread(values: np.ndarray, at: float) -> dict[str, float]:
            median = np.median(values, axis=1)
            drawn = median[:, 1:] if values.ndim == 3 else median
            low, high = np.quantile(drawn, [0.025, 0.975])
            centre = median[:, 0].mean() if values.ndim == 3 else median.mean()
            return {"best": float(at), "median": float(centre), "lo": float(low), "hi": float(high)}

        rows[name] = {
            "quality_gain_pct": spread(quality, mean_quality[best]),
            "latency_cut_pct": spread(cut, mean_cut[best]),
            "utility_gain": spread(gain, mean_gain[best]),
            "best_point": {"load": load, "budget": budget, "latency_weight": weight, "both_better": bool(both.any()),
                           "points_both_better": int(both.sum())},
        }  # fmt: skip
    return rows


def headline_rows(metrics: Mapping[str, Any]) -> tuple[list[str], list[list[report.Cell]]]:
    """The headline as a table, with the published figures as its last row."""
    columns = ["comparison", "quality", "delay cut", "utility (points)", "best point: quality, delay cut"]
    rows: list[list[report.Cell]] = []
    for ours, key in (("annealing", "headline"), ("published", "headline_published")):
        for other, row in metrics[key].items():
            q, t, u = row["quality_gain_pct"], row["latency_cut_pct"], row["utility_gain"]
            rows.append([
                f"{ours} over {other}",
                f"{q['median']:+.1f} % ({q['lo']:+.1f} to {q['hi']:+.1f})",
                f"{t['median']:+.1f} % ({t['lo']:+.1f} to {t['hi']:+.1f})",
                f"{u['median']:+.2f} ({u['lo']:+.2f} to {u['hi']:+.2f})",
                f"{q['best']:+.1f} %, {t['best']:+.1f} %",
            ])  # fmt: skip
    best = f"up to +{CLAIMED['quality_gain_pct']} %, up to +{CLAIMED['latency_cut_pct']} %"
    rows.append(["arXiv 2409.09072", None, None, None, best])
    return columns, rows


def words(rows: Mapping[str, Mapping[str, Any]], found: Mapping[str, float]) -> list[str]:
    """Which baseline annealing beats, in which sense, and which it does not."""
    sentences = []
    for name, row in rows.items():
        q, t, u = row["quality_gain_pct"], row["latency_cut_pct"], row["utility_gain"]
        sure = "gains" if u["lo"] > 0 else ("loses" if u["hi"] < 0 else "cannot be told apart in")
        text = f"Over {name}, annealing {sure} utility: {u['median']:+.2f} points in the median ({u['lo']:+.2f} to {u['hi']:+.2f})"
        if q["median"] > 0 and t["median"] > 0:
            text += f", with {q['median']:.1f} % more quality and {t['median']:.1f} % less delay"
        elif q["median"] <= 0 < t["median"]:
            text += f"; it gives up {-q['median']:.1f} % of quality for {t['median']:.1f} % less delay"
        elif t["median"] <= 0 < q["median"]:
            text += f"; it takes {-t['median']:.1f} % more delay for {q['median']:.1f} % more quality"
        point = row["best_point"]
        text += (
            f". Better in both at {point['points_both_better']} grid points, best +{q['best']:.1f} % and −{t['best']:.1f} %."
            if point["both_better"] else ". No grid point is better in both."
        )  # fmt: skip
        sentences.append(text)
    if "simpy_max_abs_s" in found:
        sentences.append(
            f"The simulator and SimPy differ by at most {found['simpy_max_abs_s']:.1e} s in any request's latency."
        )
    if "pk_relative" in found:
        sentences.append(f"Its mean delay is {100 * found['pk_relative']:.2f} % off Pollaczek and Khinchine, its own 95 % interval "
                         f"being {100 * found['pk_halfwidth']:.2f} % wide to either side.")  # fmt: skip
    if {"measured_vs_predicted_pct", "measured_vs_simulated_pct", "measured_vs_resimulated_pct"} <= set(found):
        sentences.append(f"Served for real on this machine, the mean delay was {found['measured_vs_predicted_pct']:.1f} % off theory and "
                         f"{found['measured_vs_simulated_pct']:.1f} % off a simulation of the same arrivals"
                         f" ({found['measured_vs_resimulated_pct']:.1f} % with the step times seen meanwhile).")  # fmt: skip
    return sentences


def _agreement(cfg: DictConfig, quality: Any, weight: float) -> dict[str, float | None]:
    """The simulator against SimPy and Pollaczek and Khinchine, and theory against this machine serving for real."""
    from edgesched.service import measure

    scenario = quality.scenario(float(cfg.paper.rate), weight, latency="queue")
    plan = solve(scenario).plan
    found = agreement(scenario, plan, requests=int(cfg.service.agreement_requests), seed=int(cfg.seed))
    measured: dict[str, float | None] = {}
    if cfg.paper.serve:
        measured = measure(cfg)[1].errors()
    return found | {
        key: measured.get(key)
        for key in (
            "measured_vs_predicted_pct",
            "measured_vs_simulated_pct",
            "measured_vs_resimulated_pct",
            "measured_s",
            "simulated_s",
            "predicted_s",
        )
    }


def _figures(
    cfg: DictConfig,
    folder: Path,
    table: ScoreTable,
    methods: Mapping[str, Any],
    grid: Grid,
    middle: tuple[float, float, float],
    samples: Any,
    made: Pictures,
) -> None:
    """The ten figures, each put into ``made`` when it stands: name → (file, caption)."""
    from edgesched.pipeline import plan_all, score_figures

    def keep(name: str, figure: Any, caption: str) -> None:
        made[name] = (figures.save(figure, folder / f"{name}.png", vector=True), caption)

    fit_half, held = table.split(0)
    quality = build(cfg.quality, "quality")(fit_half)
    for name, (figure, caption) in score_figures(fit_half, quality).items():
        keep(name, figure, caption)
    if samples is not None:
        keep(
            "samples",
            figures.sample_images(samples[1], samples[0].texts),
            "Images generated in this run, a row for each model.",
        )
    with left_out("the figure of score levels"):
        found = score_levels(table, quality.models)
        keep("score_levels", figures.score_levels(found["levels"], found["cuts"], found["reference"], table.score),
             f"Prompts in three levels by their score under {found['reference']}: what every model makes of them.")  # fmt: skip
    scenario = _scenarios(quality, [middle], str(cfg.workload.latency))
    compared = {str(n): build(node, f"policies.compare.{n}") for n, node in cfg.policies.compare.items()}
    plans: dict[str, Plan] = plan_policies(compared, scenario, quality, build(cfg.policies.search, "policies.search"))
    outcomes = replay_all(scenario, plans, fit_half, held, quality.models, cfg)
    ranked = dict(sorted(outcomes.items(), key=lambda item: -item[1].utility))
    where = f"{middle[0]:g} requests of every category, budget {middle[1]:g}, {middle[2]:g} points a second"
    keep("assignment_methods", figures.methods_compared({
        name: {"utility": (o.utility, *o.interval("utility")), "quality": (o.quality, *o.interval("quality")),
               "latency_s": (o.latency_s,) * 3} for name, o in ranked.items()}),
        f"Assignment methods and peer policies at {where}, the same search behind all; 95 % intervals over prompts.")  # fmt: skip
    results = plan_all(
        {n: methods[n] for n in ("published", "annealing", "relaxed") if n in methods}, scenario, quality
    )
    bound = float(results["annealing"].bound[0])
    optimum = float(exact(scenario).utility[0])
    keep("convergence", figures.convergence({n: r.history[:, 0].numpy() for n, r in results.items()}, bound, optimum),
         f"Best utility so far against the joint upper bound and the exact optimum, at {where}.")  # fmt: skip
    keep("allocation_methods", figures.methods_compared({
        name: {what: tuple(grid.curve(name, what, 0, middle)[sorted({p[0] for p in grid.points}).index(middle[0]), 1:])
               for what in ("utility", "quality", "latency_s")} for name in ALLOCATIONS if name in grid.utility}),
        f"Ways to set steps and shares at {where}; 95 % intervals over splits and prompts.")  # fmt: skip
    shown = [n for n in (*OURS[::-1], *BASELINES) if n in grid.utility]
    for name, along, label in (
        ("load", 0, "requests of every category"),
        ("budget", 1, "budget (speed of the server)"),
    ):
        curves = {n: grid.curve(n, "utility", along, middle) for n in shown}
        paired = {n: grid.curve(n, "utility", along, middle, "annealing") for n in shown}
        keep(f"utility_over_{name}", figures.lines(curves, paired, label, "held-out utility (points)", "annealing"),
             f"Utility over {name}, the rest as at {where}; left as it is, right against annealing on the same prompts; "
             "bands are 95 % intervals over splits and prompts.")  # fmt: skip
    fronts = {n: (grid.curve(n, "latency_s", 2, middle), grid.curve(n, "quality", 2, middle)) for n in shown}
    keep("front", figures.front(fronts), f"Quality against delay as the weight of delay changes, at load {middle[0]:g} "
         f"and budget {middle[1]:g}; 95 % intervals over splits and prompts.")  # fmt: skip


def _report(
    folder: Path,
    cfg: DictConfig,
    table: ScoreTable,
    metrics: Mapping[str, Any],
    pictures: Pictures,
    headline_table: tuple[list[str], list[list[report.Cell]]],
) -> None:
    """The page of the published evaluation."""
    size = metrics["grid"]
    facts = {
        "Scores come from": table.device,
        "Score table": f"{len(table)} images, digest {metrics['source']['digest']}",
        "Grid": f"{size['points']} points: loads {size['loads']}, budgets {size['budgets']}, weights {size['latency_weights']}",
        "Splits of the prompts": str(size["splits"]),
        "Run took": f"{metrics['seconds_total']:.1f} s",
    }
    text = (
        *metrics["words"],
        *metrics["remarks"],
        "Gains are relative, at the same grid point, on prompts that the plans were not made from; the interval is over "
        "splits and prompts. The best point is the one with the largest quality gain where the delay falls too.",
    )
    agreement: list[list[report.Cell]] = [[name, value] for name, value in metrics["agreement"].items()]
    sections = [
        report.Section("What came out", text, *headline_table),
        *(report.Section(f"Figure {i}: {name.replace('_', ' ')}", figures=[picture])
          for i, (name, picture) in enumerate(pictures.items(), 1)),
        report.Section("Do the numbers agree with each other", (), ("check", "value"), agreement),
        report.Section("All of it", code=json_document({k: metrics[k] for k in ("headline", "middle")})),
    ]  # fmt: skip
    report.write_html(folder / "report.html", f"edgesched: {cfg.name}", facts, sections)
