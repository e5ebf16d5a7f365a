"""The policies task: assignment policies under a grid of loads; who wins on held-out prompts, and by how much."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from edgesched.assign import plan_policies
from edgesched.assign.methods import SINGLE
from edgesched.errors import ArgumentError, ScoreTableError
from edgesched.evaluation.cascade import replay_all
from edgesched.evaluation.levels import score_levels
from edgesched.evaluation.replay import Replay
from edgesched.evaluation.replay import compare as gain_over
from edgesched.evaluation.robust import LowerBound, compare_decisions
from edgesched.evaluation.variance import variance_table
from edgesched.protocols import Policy, Search
from edgesched.report import plans, scores
from edgesched.report.page import Cell, Page, Section, show
from edgesched.runs.run import Run
from edgesched.tasks.pictures import Album, sentences
from edgesched.tasks.problem import Problem

log = logging.getLogger(__name__)
LOWER = "joint_lower_bound"
_SPANS = {"utility": ("", "_lo", "_hi"), "quality": ("", "_lo", "_hi"), "latency_s": ("", "", "")}


def policies(
    run: Run,
    *,
    problem: Problem,
    compare: Mapping[str, Policy],
    search: Search,
    loads: Sequence[float],
    cascade: Sequence[str] = ("last", "better"),
    judge_s: float = 0.0,
    decisions: Mapping[str, Any],
    routing: str = "random",
    draws: int = 1000,
    seed: int = 0,
) -> None:
    """Plan every load with every policy, and replay.

    Args:
        run: Where the results go.
        problem: What is planned for; its demand is replaced by the loads.
        compare: Policies by name.
        search: Sets what a policy leaves open.
        loads: Requests of every category a slot (a second in queue mode).
        cascade: Which image a cascade delivers, ``"last"`` or ``"better"``, for each cascade that is compared.
        judge_s: Seconds of the judge an image with the whole server.
        decisions: Planning from few prompts: ``load``, ``repeats`` (0 leaves it out) and further arguments of
            :func:`edgesched.evaluation.robust.compare_decisions`.
        routing: How a replayed request comes to its model.
        draws: Bootstrap draws over prompts.
        seed: Seed of draws and estimates.

    Raises:
        ArgumentError: If a load is not positive.
    """
    if not loads or min(loads) <= 0:
        raise ArgumentError(f"policies.loads: expected positive numbers of requests, got {list(loads)}")
    table, held, quality = problem.table, problem.held, problem.fitted
    run.tracker.score_table(table)
    models = quality.models
    demand = torch.tensor(loads, dtype=torch.float64)[:, None].repeat(1, len(quality.categories))
    scenario = problem.believe(problem.at(demand=demand))
    planned = plan_policies(compare, scenario, quality, search)
    if "joint" in planned:
        planned[LOWER] = search(LowerBound(seed=seed)(scenario, problem.fit_half, models)).plan
    by_load = {}
    for i, load in enumerate(loads):
        at_load = {name: plan[i : i + 1] for name, plan in planned.items()}
        outcomes = replay_all(scenario[i], at_load, problem.fit_half, held, models, cascade=cascade, judge_s=judge_s,
                              routing=routing, draws=draws, seed=seed)  # fmt: skip
        by_load[str(load)] = policy_rows(outcomes)
    metrics: dict[str, Any] = {
        "loads": by_load,
        "words": words(by_load),
        "variance": _optional("the variance table", variance_table, table, draws=draws, seed=seed) or [],
        "score_levels": _optional("score levels", score_levels, table, models),
        "remarks": list(quality.remarks(scenario.latency)),
        "source": problem.source,
    }
    few = dict(decisions)
    load = float(few.pop("load"))
    if few["repeats"]:
        metrics["decisions"] = compare_decisions(
            problem.at(demand=load), problem.fit_half, held, models, seed=seed, search=search, **few
        )
    run.save(metrics)
    run.publish(_page(problem, metrics, _pictures(run, metrics, table.score)))


def _optional(what: str, made: Any, *given: Any, **options: Any) -> Any:
    """What a table can lack the prompts for, or None."""
    try:
        return made(*given, **options)
    except ScoreTableError as exc:
        log.warning("%s: left out (%s)", what, exc)
        return None


def policy_rows(outcomes: Mapping[str, Replay]) -> dict[str, dict[str, Any]]:
    """Every policy's replay, and its gain over the best single model and over free joint assignment.

    ``clear`` says that the gain's interval leaves zero out at 95 % for all policies of the load together
    (Bonferroni), because the winner is picked among them.
    """
    rest = max(len(outcomes) - 1, 1)
    rows: dict[str, dict[str, Any]] = {}
    for name, outcome in outcomes.items():
        low, high = outcome.interval("utility")
        row: dict[str, Any] = {
            "utility": outcome.utility, "utility_lo": low, "utility_hi": high, "quality": outcome.quality, "latency_s": outcome.latency_s,
        }  # fmt: skip
        row["quality_lo"], row["quality_hi"] = outcome.interval("quality")
        row["over_single"] = gain_over(outcome, outcomes[SINGLE])["utility_gain"]
        difference = (outcome.utility_draws - outcomes[SINGLE].utility_draws).double()
        edges = difference.quantile(torch.tensor([0.025 / rest, 1 - 0.025 / rest], dtype=torch.float64))
        row["clear"] = bool(edges[0] > 0) or bool(edges[1] < 0)
        if "joint" in outcomes:
            row["over_joint"] = gain_over(outcome, outcomes["joint"])["utility_gain"]
        rows[name] = row
    return rows


def words(by_load: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[str]:
    """In plain words, which policy wins at every load and by how much, also where nothing beats one model.

    Cascades that deliver the better image are named apart: the score that picks the image is the score that judges.
    """
    sentences = []
    for load, rows in by_load.items():
        fair = {n: r for n, r in rows.items() if n != "cascade_better"}
        name = max(fair, key=lambda n: fair[n]["utility"])
        gain = fair[name]["over_single"]
        start = f"At {load} requests of every category"
        if name == SINGLE or gain["value"] <= 1e-9:
            text = f"{start} the best single model for everyone wins ({rows[SINGLE]['utility']:.3f} points)"
        elif fair[name]["clear"]:
            text = (f"{start} {name} wins, {gain['value']:+.3f} points over the best single model "
                    f"({gain['lo']:+.3f} to {gain['hi']:+.3f})")  # fmt: skip
        else:
            text = (f"{start} no policy clearly beats the best single model; {name} is highest by {gain['value']:+.3f} points "
                    f"({gain['lo']:+.3f} to {gain['hi']:+.3f})")  # fmt: skip
        if "cascade_better" in rows:
            other = rows["cascade_better"]["over_single"]
            text += (f"; a cascade that keeps the better image by the judge's own score: {other['value']:+.3f} "
                     f"({other['lo']:+.3f} to {other['hi']:+.3f})")  # fmt: skip
        sentences.append(text + ".")
    return sentences


def _pictures(run: Run, metrics: Mapping[str, Any], score: str) -> Album:
    """Draw what was found."""
    album = Album(run.figures)
    by_load = metrics["loads"]
    gains = {load: {n: r["over_single"] for n, r in rows.items() if n != SINGLE} for load, rows in by_load.items()}
    album.keep("policies", plans.gains_over_load(gains),
               "Utility over the best single model against load; bars are paired 95 % intervals over prompts.")  # fmt: skip
    middle = list(by_load)[len(by_load) // 2]
    rows = {
        name: {key: tuple(row[key + end] if end else row[key] for end in ends) for key, ends in _SPANS.items()}
        for name, row in sorted(by_load[middle].items(), key=lambda item: -item[1]["utility"])
    }
    album.keep(
        "assignment_methods",
        plans.methods_compared(rows),
        f"Assignment methods at {middle} requests of every category, on held-out prompts; bars are 95 % intervals.",
    )
    found = metrics["score_levels"]
    if found is None:
        return album
    figure = scores.score_levels(found["levels"], found["cuts"], found["reference"], score)
    apart = "by another seed than is shown" if found["own_scores"] else "whose own bars are biased by it"
    album.keep(
        "score_levels",
        figure,
        f"Prompts in three levels by the score of {found['reference']}, {apart}; every model at its largest step "
        "count, bars are 95 % intervals over prompts.",
    )
    return album


def _page(problem: Problem, metrics: Mapping[str, Any], album: Album) -> Page:
    """The page of a policies run."""

    def span(value: Mapping[str, float]) -> str:
        return f"{value['value']:+.3f} ({value['lo']:+.3f} to {value['hi']:+.3f})"

    rows: list[list[Cell]] = []
    for load, by_name in metrics["loads"].items():
        for name, row in sorted(by_name.items(), key=lambda item: -item[1]["utility"]):
            over_joint = span(row["over_joint"]) if "over_joint" in row else None
            rows.append([load, name, row["utility"], f"{show(row['utility_lo'])} to {show(row['utility_hi'])}", row["quality"],
                         row["latency_s"], span(row["over_single"]), "yes" if row["clear"] else "no", over_joint])  # fmt: skip
    sections = [Section(
        "Policies under load, on held-out prompts", (*metrics["words"], *sentences(metrics["remarks"])),
        ("load", "policy", "utility", "95 % interval", "quality", "latency (s)", "over the best single model", "clear", "over joint"),
        rows, album.of("policies", "assignment_methods"), key="policies",
    )]  # fmt: skip
    if album.of("score_levels"):
        sections.append(Section("Score levels and models", figures=album.of("score_levels")))
    if metrics["variance"]:
        shares: list[list[Cell]] = [
            [r["source"], f"{100 * r['share']:.1f} %", f"{100 * r['lo']:.1f} to {100 * r['hi']:.1f} %",
             f"{100 * r['by_chance']:.1f} %", r["variance"]] for r in metrics["variance"]
        ]  # fmt: skip
        sections.append(Section(
            "Where the variance of scores lies",
            ("A category label can help to choose a model by the interaction of category and model only.",),
            ("source", "share of squares", "95 % interval", "by chance alone", "variance (points²)"), shares, key="variance",
        ))  # fmt: skip
    if "decisions" in metrics:
        few: list[list[Cell]] = [
            [r["prompts"] or "all", r["rule"], r["utility"], r["std"], r["p10"], r["regret"], r["optimism"],
             f"{r['gain']:+.4f} ± {r['gain_se']:.4f}"] for r in metrics["decisions"]
        ]  # fmt: skip
        sections.append(Section(
            "Decisions from few prompts, replayed", (),
            ("prompts a category", "plans on", "utility", "std", "10th percentile", "regret", "optimism", "over the mean"), few, key="decisions",
        ))  # fmt: skip
    scenario, names = problem.scenario, problem.fitted.models
    facts = {
        "Scores come from": problem.table.device,
        "Models": ", ".join(f"{m} ({s:.3g} s a step)" for m, s in zip(names, scenario.step_time_s[0].tolist(), strict=True)),
        "Prompts": f"{problem.held.frame['prompt_id'].nunique()} held out, {problem.fit_half.frame['prompt_id'].nunique()} to fit",
        "Latency model": f"{scenario.latency}, weight {float(scenario.latency_weight[0])} points per second",
    }  # fmt: skip
    return Page(facts, sections)
