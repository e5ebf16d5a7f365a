"""Plans from priors: nothing is generated, and nothing replayed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgesched.assign import Method, plan_all
from edgesched.data.writing import json_document, write_json
from edgesched.equations.bounds import regret, upper_bound
from edgesched.equations.utility import evaluate
from edgesched.quality.priors import LABEL, NO_REPLAY, SINGLE, PriorQuality
from edgesched.report import plans
from edgesched.report.page import Cell, Page, Section
from edgesched.runs.run import Run
from edgesched.tasks.pictures import Album, named_plan
from edgesched.tasks.problem import Problem


def plan_from_priors(run: Run, problem: Problem, quality: PriorQuality, methods: Mapping[str, Method]) -> float:
    """Plan with every method, in the plan's own view alone.

    Args:
        run: Where the results go.
        problem: What is planned for.
        quality: Curves and times.
        methods: Assignment and search of every method, by name.

    Returns:
        Utility of the best plan in its own view.

    Raises:
        ArgumentError: If an argument of a method is wrong, whatever the problem.
        SearchError: If no method can plan for this problem.
        OutputError: If results cannot be written.
    """
    scenario = problem.scenario
    results = plan_all(methods, scenario, quality)
    bound = upper_bound(scenario)
    shown: dict[str, Any] = {}
    for name, result in results.items():
        view = evaluate(scenario, result.plan)
        shown[name] = {
            "utility": float(view.utility), "quality": float(view.quality), "latency_s": float(view.latency_s),
            "bound": float(bound), "gap": float((bound - view.utility) / bound.abs().clamp(min=1)),
            "regret": float(regret(scenario, bound, view.utility)), "seconds": result.elapsed_s,
            "feasible": bool(view.feasible), "proposals": result.proposals,
        }  # fmt: skip
    ranked = sorted(results, key=lambda n: (shown[n]["feasible"], shown[n]["utility"]), reverse=True)
    best = "annealing" if "annealing" in results else ranked[0]
    chosen = results[best].plan
    plan = named_plan(chosen, quality.categories, quality.models, best, problem.workload) | {"source": quality.device}
    write_json(run.folder / "plan.json", plan)
    metrics = {
        "methods": shown,
        "gains": {},
        "source": {"device": quality.device, "priors": True, "scores": quality.source,
                   "times": {name: t.source for name, t in quality.times.items()}, "digest": quality.digest()},
        "latency_prior": {n: {"step_time_s": t.step_time_s, "overhead_s": t.overhead_s} for n, t in quality.times.items()},
        "remarks": list(quality.remarks(scenario.latency)),
    }  # fmt: skip
    run.save(metrics)
    album = Album(run.figures)
    bars = plans.plan_bars(
        chosen.assignment[0].numpy(),
        chosen.share[0].numpy(),
        chosen.steps[0].numpy(),
        quality.categories,
        quality.models,
    )
    album.keep("plan", bars, f"The plan of {best}, from {LABEL}.")
    run.publish(_page(problem, quality, metrics, plan, album))
    return float(shown[best]["utility"])


def _page(
    problem: Problem, quality: PriorQuality, metrics: Mapping[str, Any], plan: Mapping[str, Any], album: Album
) -> Page:
    columns = ("method", "utility", "quality", "latency (s)", "gap to bound", "seconds")
    rows: list[list[Cell]] = [
        [name, m["utility"], m["quality"], m["latency_s"], f"{100 * m['gap']:z.2f} %", m["seconds"]]
        for name, m in metrics["methods"].items()
    ]
    times: list[list[Cell]] = [[n, t.step_time_s, t.overhead_s, t.source] for n, t in quality.times.items()]
    curves: list[list[Cell]] = [
        [f"{category}, {model}, {k} steps", float(quality.curve[c, m, i])]
        for c, category in enumerate(quality.categories)
        for m, model in enumerate(quality.models)
        for i, k in enumerate(quality.step_counts)
        if bool(quality.curve[c, m, i].isfinite())
    ]
    scenario = problem.scenario
    facts = {
        "Scores and times come from": quality.device,
        "Categories": ", ".join(quality.categories),
        "Latency model": f"{scenario.latency}, weight {float(scenario.latency_weight[0]):g} points per second",
    }
    return Page(facts, [
        Section(f"Plans for one slot from {LABEL}", (NO_REPLAY, SINGLE), columns, rows, album.of("plan"), key="methods"),
        Section("Times, as published", (), ("model", "seconds a step", "overhead (s)", "source"), times),
        Section("Scores, as assumed", (quality.source,), ("category, model, steps", "score (points)"), curves),
        Section("The plan", ("As plan.json in the run folder.",), code=json_document(plan)),
    ])  # fmt: skip
