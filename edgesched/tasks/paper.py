"""The published evaluation in one command: a grid of loads, budgets and weights, against the four baselines.

A budget is the speed of the server relative to the one that the times were measured on: at budget 2 every step and
every overhead takes half the time. Everything is repeated over random halves of the prompts; one half is planned
with, the other replayed.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from rich.progress import track

from edgesched.assign import Method, plan_all, plan_policies
from edgesched.assign.methods import BASELINES, OURS
from edgesched.data.table import ScoreTable
from edgesched.data.writing import json_document, left_out
from edgesched.errors import ArgumentError
from edgesched.evaluation.cascade import replay_all
from edgesched.evaluation.grid import Grid, headline
from edgesched.evaluation.levels import score_levels
from edgesched.evaluation.replay import replay
from edgesched.generation.samples import LiveSamples
from edgesched.protocols import Policy, Search
from edgesched.report import plans, scores
from edgesched.report.page import Cell, Page, Section
from edgesched.runs.run import Run
from edgesched.search import exact, solve
from edgesched.serving.measure import ServedForReal
from edgesched.streams.queues import agreement
from edgesched.tasks.pictures import Album, score_figures, sentences
from edgesched.tasks.problem import Problem
from edgesched.types import Scenario

ALLOCATIONS = ("equal_allocation", "optimal_step", "published", "annealing", "relaxed", "exact")
CLAIMED = {"quality_gain_pct": 4.7, "latency_cut_pct": 39.1}
Point = tuple[float, float, float]


@dataclasses.dataclass(frozen=True, eq=False)
class Peers:
    """Policies and cascades that the middle of the grid is compared with.

    Args:
        compare: Policies by name.
        search: Sets what they leave open.
        cascade: Which image a cascade delivers, for each cascade.
        judge_s: Seconds of the judge an image with the whole server.
    """

    compare: Mapping[str, Policy]
    search: Search
    cascade: Sequence[str] = ("last", "better")
    judge_s: float = 0.0


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How often everything is repeated.

    Args:
        splits: Random halves of the prompts.
        draws: Bootstrap draws over prompts, for every split.
        replay_draws: Those of the comparison with peers.
        agreement_requests: Requests of each replica that theory is checked with.

    Raises:
        ArgumentError: If there is no split.
    """

    splits: int = 10
    draws: int = 200
    replay_draws: int = 1000
    agreement_requests: int = 20000

    def __post_init__(self) -> None:
        if self.splits < 1:
            raise ArgumentError(f"paper.splits: expected at least 1, got {self.splits}")


def paper(
    run: Run,
    *,
    problem: Problem,
    methods: Mapping[str, Method],
    peers: Peers,
    sizes: Sizes,
    loads: Sequence[float],
    budgets: Sequence[float],
    latency_weights: Sequence[float],
    rate: float = 1.0,
    samples: LiveSamples | None = None,
    serve: bool = True,
    served: ServedForReal | None = None,
    routing: str = "random",
    seed: int = 0,
) -> float:
    """Run every method on every grid point of every split: headline, ten figures, report.

    Args:
        run: Where the results go.
        problem: Table, fits and latency model.
        methods: Assignment and search of every method; the baselines and ours have to be among them.
        peers: Policies that the middle of the grid is compared with.
        sizes: How often everything is repeated.
        loads: Requests of every category a slot.
        budgets: Speed of the server relative to the measured one.
        latency_weights: Score points a second.
        rate: Requests a second of every category, for the checks of the simulator.
        samples: Images to generate live, or None.
        serve: Serve a short stream for real too.
        served: That stream, or None.
        routing: How a replayed request comes to its model.
        seed: Seed of the checks.

    Returns:
        Median relative quality gain of annealing over the four baselines together, in per cent.

    Raises:
        ArgumentError: If an axis of the grid is empty or a method is missing.
    """
    missing = [n for n in (*BASELINES, *OURS) if n not in methods]
    if missing:
        raise ArgumentError(f"method: the published evaluation needs {', '.join(missing)} too")
    points, middle = grid_points(loads, budgets, latency_weights)
    run.tracker.score_table(problem.table)
    images = samples.make() if samples else {}
    grid = run_grid(problem, methods, points, sizes, routing)
    metrics: dict[str, Any] = {
        "headline": headline(grid, "annealing", BASELINES),
        "headline_published": headline(grid, "published", BASELINES),
        "grid": {
            "points": len(points), "splits": sizes.splits, "loads": list(loads),
            "budgets": list(budgets), "latency_weights": list(latency_weights), "middle": list(middle),
        },
        "middle": {name: _middle(grid, name, middle, sizes.splits) for name in methods if name in grid.utility},
        "agreement": {},
        "remarks": list(problem.whole.remarks(str(problem.workload["latency"]))),
        "source": problem.source,
    }  # fmt: skip
    metrics["words"] = words(metrics["headline"], {})
    run.save(metrics)  # what comes after is optional, and must not lose the grid
    with left_out("the agreement of simulator, theory and service"):
        metrics["agreement"] = _agreement(problem, rate, middle[2], served if serve else None, sizes, seed)
        found = {key: value for key, value in metrics["agreement"].items() if value is not None}
        metrics["words"] = words(metrics["headline"], found)
    album = Album(run.figures, vector=True)
    with left_out("the remaining figures"):
        _pictures(album, problem, methods, grid, middle, peers, sizes, routing)
    if samples:
        album.keep("samples", scores.sample_images(images, samples.shown.texts),
                   "Images generated in this run, a row for each model.")  # fmt: skip
    run.save(metrics)
    run.publish(_page(problem.table, metrics, album))
    return float(np.median([row["quality_gain_pct"]["median"] for row in metrics["headline"].values()]))


def _middle(grid: Grid, name: str, middle: Point, splits: int) -> dict[str, float]:
    """What a method gives at the middle of the grid, the mean over splits."""
    at = grid.points.index(middle)
    return {what: float(getattr(grid, what)[name][:, at].reshape(splits, -1)[:, 0].mean())
            for what in ("utility", "quality", "latency_s")}  # fmt: skip


def grid_points(
    loads: Sequence[float], budgets: Sequence[float], latency_weights: Sequence[float]
) -> tuple[list[Point], Point]:
    """Grid points, and the middle one, at which the others are cut.

    Args:
        loads: Requests of every category a slot.
        budgets: Speed of the server relative to the measured one.
        latency_weights: ω in points per second.

    Raises:
        ArgumentError: If an axis is empty, repeats a value, or has one that is not positive.
    """
    axes = [[float(v) for v in axis] for axis in (loads, budgets, latency_weights)]
    for name, axis in zip(("loads", "budgets", "latency_weights"), axes, strict=True):
        if not axis or min(axis) <= 0 or len(set(axis)) < len(axis):
            raise ArgumentError(f"paper.{name}: expected different numbers above 0, got {axis}")
    at = [sorted(axis)[len(axis) // 2] for axis in axes]
    return [(load, budget, weight) for load, budget, weight in itertools.product(*axes)], (at[0], at[1], at[2])


def _scenarios(problem: Problem, quality: Any, points: Sequence[Point]) -> Scenario:
    """One scenario for every grid point."""
    load, budget, weight = (torch.tensor(column, dtype=torch.float64) for column in zip(*points, strict=True))
    demand = load[:, None].repeat(1, len(quality.categories))
    base = problem.at(quality, demand=demand, latency_weight=weight)
    return dataclasses.replace(
        base, step_time_s=base.step_time_s / budget[:, None], overhead_s=base.overhead_s / budget[:, None]
    )


def run_grid(problem: Problem, methods: Mapping[str, Method], points: list[Point], sizes: Sizes, routing: str) -> Grid:
    """Plan with every method on all points at once, and replay, for every split.

    Args:
        problem: Table, fits and latency model.
        methods: Assignment and search of every method.
        points: Load, budget and ω of every grid point.
        sizes: How often everything is repeated.
        routing: As of :func:`edgesched.evaluation.replay.replay`.

    Raises:
        ScoreTableError: If a half lacks prompts of a category, or an option was not measured.
        ArgumentError: If an argument of a method is wrong, whatever the problem.
        SearchError: If no method can plan.
    """
    found: dict[str, dict[str, list[Any]]] = {w: {n: [] for n in methods} for w in ("utility", "quality", "latency_s")}
    for split in track(range(sizes.splits), description="Splits of the prompts"):
        fit_half, held = problem.table.split(split)
        quality = problem.quality(fit_half)
        scenarios = _scenarios(problem, quality, points)
        chosen = {name: result.plan for name, result in plan_all(methods, scenarios, quality).items()}
        kept: dict[str, dict[str, list[Any]]] = {w: {n: [] for n in chosen} for w in found}
        for g in range(len(points)):
            outcomes = replay(
                {name: plan[g : g + 1] for name, plan in chosen.items()}, scenarios[g], held, quality.models,
                planned_on=fit_half, routing=routing, draws=sizes.draws, seed=split,
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


def headline_rows(metrics: Mapping[str, Any]) -> tuple[list[str], list[list[Cell]]]:
    """The headline as a table, with the published figures as its last row."""
    columns = ["comparison", "quality", "delay cut", "utility (points)", "best point: quality, delay cut"]
    rows: list[list[Cell]] = []
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
    """Which baseline annealing beats, in which sense, and which it does not.

    Args:
        rows: Baseline → how annealing compares with it.
        found: What the checks of the simulator found, as far as they were made.
    """
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


def _agreement(
    problem: Problem, rate: float, weight: float, served: ServedForReal | None, sizes: Sizes, seed: int
) -> dict[str, float | None]:
    """The simulator against SimPy and Pollaczek and Khinchine, and theory against this machine serving for real."""
    scenario = problem.at(problem.whole, demand=rate, latency_weight=weight, latency="queue")
    plan = solve(scenario).plan
    found = agreement(scenario, plan, requests=sizes.agreement_requests, seed=seed)
    measured = {} if served is None else served.measure(problem.whole)[0].errors()
    names = (
        "measured_vs_predicted_pct",
        "measured_vs_simulated_pct",
        "measured_vs_resimulated_pct",
        "measured_s",
        "simulated_s",
        "predicted_s",
    )
    return found | {key: measured.get(key) for key in names}


def _pictures(
    album: Album,
    problem: Problem,
    methods: Mapping[str, Method],
    grid: Grid,
    middle: Point,
    peers: Peers,
    sizes: Sizes,
    routing: str,
) -> None:
    """The figures, each kept when it stands."""
    keep = album.keep
    fit_half, held = problem.table.split(0)
    quality = problem.quality(fit_half)
    for name, (figure, caption) in score_figures(fit_half, quality).items():
        keep(name, figure, caption)
    with left_out("the figure of score levels"):
        found = score_levels(problem.table, quality.models)
        keep("score_levels", scores.score_levels(found["levels"], found["cuts"], found["reference"], problem.table.score),
             f"Prompts in three levels by their score under {found['reference']}: what every model makes of them.")  # fmt: skip
    scenario = _scenarios(problem, quality, [middle])
    chosen = plan_policies(peers.compare, scenario, quality, peers.search)
    outcomes = replay_all(scenario, chosen, fit_half, held, quality.models, cascade=peers.cascade, judge_s=peers.judge_s,
                          routing=routing, draws=sizes.replay_draws)  # fmt: skip
    ranked = dict(sorted(outcomes.items(), key=lambda item: -item[1].utility))
    where = f"{middle[0]:g} requests of every category, budget {middle[1]:g}, {middle[2]:g} points a second"
    keep("assignment_methods", plans.methods_compared({
        name: {"utility": (o.utility, *o.interval("utility")), "quality": (o.quality, *o.interval("quality")),
               "latency_s": (o.latency_s,) * 3} for name, o in ranked.items()}),
        f"Assignment methods and peer policies at {where}, the same search behind all; 95 % intervals over prompts.")  # fmt: skip
    results = plan_all(
        {n: methods[n] for n in ("published", "annealing", "relaxed") if n in methods}, scenario, quality
    )
    bound = float(results["annealing"].bound[0])
    optimum = float(exact(scenario).utility[0])
    keep("convergence", plans.convergence({n: r.history[:, 0].numpy() for n, r in results.items()}, bound, optimum),
         f"Best utility so far against the joint upper bound and the exact optimum, at {where}.")  # fmt: skip
    keep("allocation_methods", plans.methods_compared({
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
        keep(f"utility_over_{name}", plans.lines(curves, paired, label, "held-out utility (points)", "annealing"),
             f"Utility over {name}, the rest as at {where}; left as it is, right against annealing on the same prompts; "
             "bands are 95 % intervals over splits and prompts.")  # fmt: skip
    fronts = {n: (grid.curve(n, "latency_s", 2, middle), grid.curve(n, "quality", 2, middle)) for n in shown}
    keep("front", plans.front(fronts), f"Quality against delay as the weight of delay changes, at load {middle[0]:g} "
         f"and budget {middle[1]:g}; 95 % intervals over splits and prompts.")  # fmt: skip


def _page(table: ScoreTable, metrics: Mapping[str, Any], album: Album) -> Page:
    """The page of the published evaluation."""
    size = metrics["grid"]
    facts = {
        "Scores come from": table.device,
        "Score table": f"{len(table)} images, digest {metrics['source']['digest']}",
        "Grid": f"{size['points']} points: loads {size['loads']}, budgets {size['budgets']}, weights {size['latency_weights']}",
        "Splits of the prompts": str(size["splits"]),
    }
    text = (
        *metrics["words"],
        *sentences(metrics["remarks"]),
        "Gains are relative, at the same grid point, on prompts that the plans were not made from; the interval is over "
        "splits and prompts. The best point is the one with the largest quality gain where the delay falls too.",
    )
    checks: list[list[Cell]] = [[name, value] for name, value in metrics["agreement"].items()]
    return Page(facts, [
        Section("What came out: gains on held-out prompts", text, *headline_rows(metrics), key="headline"),
        *(Section(f"Figure {i}: {name.replace('_', ' ')}", figures=[picture])
          for i, (name, picture) in enumerate(album.pictures.items(), 1)),
        Section("Do the numbers agree with each other", (), ("check", "value"), checks),
        Section("All of it", code=json_document({k: metrics[k] for k in ("headline", "middle")})),
    ])  # fmt: skip
