"""The schedule task: score table, distributions, scenario, plans of every method, replay on held-out prompts."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

import numpy as np

from edgesched.assign import Method, plan_all
from edgesched.assign.methods import BASELINES, OURS
from edgesched.data.writing import json_document, write_json
from edgesched.equations.bounds import regret, upper_bound
from edgesched.equations.utility import evaluate
from edgesched.errors import ArgumentError
from edgesched.evaluation.replay import Replay, compare, replay
from edgesched.generation.samples import LiveSamples
from edgesched.quality.priors import Priors
from edgesched.report import plans, scores
from edgesched.report.page import Cell, Page, Section, show
from edgesched.runs.run import Run
from edgesched.tasks.pictures import Album, named_plan, score_figures, sentences
from edgesched.tasks.prior_plans import plan_from_priors
from edgesched.tasks.problem import Problem
from edgesched.types import Scenario, SearchResult

log = logging.getLogger(__name__)


def schedule(
    run: Run,
    *,
    problem: Problem,
    methods: Mapping[str, Method],
    samples: LiveSamples | None = None,
    routing: str = "random",
    draws: int = 1000,
    seed: int = 0,
) -> float | None:
    """Plan with every method and replay every plan on held-out prompts.

    Args:
        run: Where the results go.
        problem: What is planned for.
        methods: Assignment and search of every method, by name.
        samples: Images to generate live beside the plans, or None.
        routing: How a replayed request comes to its model: ``"random"`` or ``"quota"``.
        draws: Bootstrap draws over prompts.
        seed: Their seed.

    Returns:
        Replayed utility of the annealed plan, or of the best method where there is none.

    Raises:
        EdgeschedError: In one line, for what the user can mend.
    """
    if isinstance(problem.data, Priors):
        if samples:
            raise ArgumentError("samples: data=priors plans before any generation; expected samples=none")
        return plan_from_priors(run, problem, problem.data.quality(problem.models), methods)
    run.tracker.score_table(problem.table)
    images = samples.make() if samples else {}
    scenario, quality = problem.scenario, problem.fitted
    log.info("%d rows from %s; planning with %d methods", len(problem.table), problem.table.device, len(methods))
    results = plan_all(methods, problem.believed, quality)
    outcomes = replay(
        {name: result.plan for name, result in results.items()}, scenario, problem.held, quality.models,
        planned_on=problem.fit_half, routing=routing, draws=draws, seed=seed,
    )  # fmt: skip
    best = "annealing" if "annealing" in results else max(results, key=lambda n: outcomes[n].utility)
    metrics = _metrics(scenario, results, outcomes) | {
        "source": problem.source,
        "latency_fit": {n: dataclasses.asdict(fit) for n, fit in quality.latency_fits[scenario.latency].items()},
        "remarks": list(quality.remarks(scenario.latency)),
    }
    plan = named_plan(results[best].plan, quality.categories, quality.models, best, problem.workload)
    write_json(run.folder / "plan.json", plan)
    run.save(metrics)
    album = _pictures(run, problem, results, outcomes, metrics, best)
    if samples:
        album.keep("samples", scores.sample_images(images, samples.shown.texts),
                   "Images generated live in this run, a row for each model.")  # fmt: skip
        run.tracker.sample_table("samples", ["model", "prompt", "steps", "image"], [
            [model, text, samples.steps, image]
            for model, row in images.items() for text, image in zip(samples.shown.texts, row, strict=True)
        ])  # fmt: skip
    run.publish(_page(problem, metrics, plan, album))
    return float(outcomes[best].utility)


def _metrics(scenario: Scenario, results: Mapping[str, SearchResult], outcomes: Mapping[str, Replay]) -> dict[str, Any]:
    """Every method in the plan's view and on the held-out prompts, all against the same joint bound."""
    bound = upper_bound(scenario)
    methods: dict[str, Any] = {}
    for name, result in results.items():
        view = evaluate(scenario, result.plan)
        outcome = outcomes[name]
        low, high = outcome.interval("utility")
        q_low, q_high = outcome.interval("quality")
        methods[name] = {
            "utility": float(view.utility),
            "quality": float(view.quality),
            "latency_s": float(view.latency_s),
            "bound": float(bound),
            "gap": float((bound - view.utility) / bound.abs().clamp(min=1)),
            "regret": float(regret(scenario, bound, view.utility)),
            "seconds": result.elapsed_s,
            "feasible": bool(view.feasible),
            "proposals": result.proposals,
            "replay": {
                "utility": outcome.utility,
                "utility_lo": low,
                "utility_hi": high,
                "quality": outcome.quality,
                "quality_lo": q_low,
                "quality_hi": q_high,
                "latency_s": outcome.latency_s,
            },
        }
    gains = {
        ours: {other: compare(outcomes[ours], outcomes[other]) for other in BASELINES if other in outcomes}
        for ours in OURS
        if ours in outcomes
    }
    return {"methods": methods, "gains": gains}


def _method_table(metrics: Mapping[str, Any]) -> tuple[list[str], list[list[Cell]]]:
    columns = ["method", "utility", "quality", "latency (s)", "gap to bound", "replayed utility", "95 % interval",
               "replayed latency (s)", "seconds"]  # fmt: skip
    rows: list[list[Cell]] = []
    for name, m in metrics["methods"].items():
        r = m["replay"]
        interval = f"{show(r['utility_lo'])} to {show(r['utility_hi'])}"
        rows.append([name, m["utility"], m["quality"], m["latency_s"], f"{100 * m['gap']:z.2f} %", r["utility"], interval,
                     r["latency_s"], m["seconds"]])  # fmt: skip
    return columns, rows


def _pictures(
    run: Run,
    problem: Problem,
    results: Mapping[str, SearchResult],
    outcomes: Mapping[str, Replay],
    metrics: Mapping[str, Any],
    best: str,
) -> Album:
    """Draw what the run found."""
    album = Album(run.figures)
    for name, (figure, caption) in score_figures(problem.fit_half, problem.fitted).items():
        album.keep(name, figure, caption)
    rows = {
        name: {
            "utility": (o.utility, *o.interval("utility")),
            "quality": (o.quality, *o.interval("quality")),
            "latency_s": (o.latency_s, o.latency_s, o.latency_s),
        }
        for name, o in outcomes.items()
        if np.isfinite(o.utility)
    }
    bound = metrics["methods"][best]["bound"]
    album.keep("methods_compared", plans.methods_compared(rows, bound),
         "Every method on held-out prompts; bars are 95 % intervals over prompts.")  # fmt: skip
    histories = {n: r.history[:, 0].numpy() for n, r in results.items() if n in ("annealing", "published", "relaxed")}
    optimum = metrics["methods"].get("exact", {}).get("utility")
    if histories:
        album.keep("convergence", plans.convergence(histories, bound, optimum),
             "Best utility so far of the searches against the joint upper bound.")  # fmt: skip
    plan = results[best].plan
    album.keep("plan", plans.plan_bars(plan.assignment[0].numpy(), plan.share[0].numpy(), plan.steps[0].numpy(),
                                   problem.fitted.categories, problem.fitted.models), f"The plan of {best}.")  # fmt: skip
    return album


def _gain_rows(metrics: Mapping[str, Any]) -> list[list[Cell]]:
    rows: list[list[Cell]] = []
    for ours, others in metrics["gains"].items():
        for other, gain in others.items():
            q, t, u = gain["quality_gain_pct"], gain["latency_cut_pct"], gain["utility_gain"]
            rows.append([
                f"{ours} over {other}",
                f"{q['value']:+.2f} %", f"{q['lo']:+.2f} to {q['hi']:+.2f} %", f"{t['value']:+.1f} %",
                f"{u['value']:+.3f}", f"{u['lo']:+.3f} to {u['hi']:+.3f}",
            ])  # fmt: skip
    return rows


def _page(problem: Problem, metrics: Mapping[str, Any], plan: Mapping[str, Any], album: Album) -> Page:
    """The page of a schedule run."""
    table, scenario = problem.table, problem.scenario
    best = plan["method"]
    own = metrics["methods"][best]
    ranked = sorted(metrics["methods"].items(), key=lambda item: -item[1]["replay"]["utility"])
    beaten = [
        n for n, m in metrics["methods"].items() if n != best and m["replay"]["utility"] < own["replay"]["utility"]
    ]
    lead = (
        f"On held-out prompts {ranked[0][0]} gives the highest utility ({ranked[0][1]['replay']['utility']:.3f} points). "
        f"{best} stands {100 * own['gap']:z.2f} % below the upper bound on every plan"
        + (f" and ahead of {', '.join(beaten)}." if beaten else ".")
    )
    if "exact" in metrics["methods"] and best != "exact":
        exact = metrics["methods"]["exact"]["utility"]
        lead += f" The exact optimum of the plan's view is {exact:.4f}; {best} reaches {own['utility']:.4f}."
    facts = {
        "Scores come from": table.device,
        "Score table": f"{len(table)} images, digest {metrics['source']['digest']}",
        "Categories": ", ".join(table.categories),
        "Latency model": f"{scenario.latency}, weight {float(scenario.latency_weight[0]):g} points per second",
    }
    return Page(facts, [
        Section("What came out", (lead, *sentences(metrics["remarks"])), *_method_table(metrics),
                album.of("methods_compared", "plan"), key="methods"),
        Section("Gains over the published baselines, on held-out prompts",
                ("The delay does not depend on the prompts drawn, so its cut has no interval over them.",),
                ("comparison", "quality", "95 % interval", "delay cut", "utility (points)", "95 % interval"), _gain_rows(metrics)),
        Section("What the scores say", figures=album.of("quality_over_steps", "score_distributions", "samples")),
        Section("How the search went", figures=album.of("convergence")),
        Section("The plan", ("As plan.json in the run folder, for an operator to load.",), code=json_document(plan)),
    ])  # fmt: skip
