"""The comparison of assignment policies under a grid of loads: who wins on held-out prompts, and by how much."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from edgesched.data.sources import variance_table
from edgesched.data.table import ScoreTable
from edgesched.data.writing import write_json
from edgesched.equations.objective import single_best_plan
from edgesched.errors import ConfigError, ScoreTableError
from edgesched.evaluation.replay import Replay, compare, plan_cascade, replay, replay_cascade
from edgesched.evaluation.robust import LowerBound, compare_decisions
from edgesched.quality.diagnostics import score_levels
from edgesched.report import figures, page
from edgesched.runs.config import build
from edgesched.runs.tracking import Tracker
from edgesched.types import Plan, Scenario

log = logging.getLogger(__name__)
SINGLE, LOWER = "single_best", "joint_lower_bound"
_SPANS = {"utility": ("", "_lo", "_hi"), "quality": ("", "_lo", "_hi"), "latency_s": ("", "", "")}


def policies(cfg: DictConfig, folder: Path, tracker: Tracker) -> float | None:
    """Score table → distributions → every policy at every load → replay on held-out prompts → tables in words.

    Args:
        cfg: The composed configuration; ``policies`` names the policies and loads.
        folder: Run folder.
        tracker: W&B run.

    Returns:
        None: nothing here is for a sweep to maximise.
    """
    from edgesched.tasks.schedule import _plain, _workload, remarks

    started = time.perf_counter()
    options = _plain(cfg.policies)
    table: ScoreTable = build(cfg.data, "data")
    tracker.score_table(table)
    compared = {str(n): build(node, f"policies.compare.{n}") for n, node in cfg.policies.compare.items()}
    search = build(cfg.policies.search, "policies.search")
    fit_half, held = table.split()
    quality = build(cfg.quality, "quality")(fit_half)
    models = quality.models
    workload = _workload(_plain(cfg.workload), cfg, models)
    if not options["loads"] or min(options["loads"]) <= 0:
        raise ConfigError(f"policies.loads: expected positive numbers of requests, got {options['loads']}")
    workload["demand"] = torch.tensor(options["loads"], dtype=torch.float64)[:, None].repeat(1, len(table.categories))
    scenario = build(cfg.estimate, "estimate")(quality.scenario(**workload), fit_half, models)
    plans = plan_policies(compared, scenario, quality, search)
    if "joint" in plans:
        believed = LowerBound(seed=int(cfg.seed))(scenario, fit_half, models)
        plans[LOWER] = search(believed).plan
    by_load = {}
    for i, load in enumerate(options["loads"]):
        outcomes = replay_all(scenario[i], {n: p[i : i + 1] for n, p in plans.items()}, fit_half, held, models, cfg)
        by_load[str(load)] = policy_rows(outcomes)
    metrics: dict[str, Any] = {"loads": by_load, "words": words(by_load), "variance": _variance(table, cfg)}
    settings = dict(options["decisions"])
    load = settings.pop("load")
    if settings["repeats"]:
        workload["demand"] = float(load)
        metrics["decisions"] = compare_decisions(
            quality.scenario(**workload), fit_half, held, models, seed=int(cfg.seed), search=search, **settings
        )
    metrics["source"] = {"device": table.device, "digest": table.digest(), "rows": len(table)}
    metrics["score_levels"] = _levels(table, models)
    metrics["remarks"] = list(remarks(quality, scenario.latency))
    metrics["seconds_total"] = time.perf_counter() - started
    write_json(folder / "metrics.json", metrics)
    pictures = _pictures(metrics, table, models, folder / "figures")
    sections = _sections(metrics, pictures)
    for section in sections:
        page.print_table(section.title, section.columns, section.rows)
    for sentence in metrics["words"]:
        print(sentence, flush=True)
    facts = {
        "Scores come from": table.device,
        "Models": ", ".join(f"{m} ({s:.3g} s a step)" for m, s in zip(models, scenario.step_time_s[0].tolist(), strict=True)),
        "Prompts": f"{held.frame['prompt_id'].nunique()} held out, {fit_half.frame['prompt_id'].nunique()} to fit",
        "Latency model": f"{scenario.latency}, weight {float(scenario.latency_weight[0])} points per second",
    }  # fmt: skip
    page.write_html(folder / "report.html", f"edgesched: {cfg.name}", facts, sections)
    tracker.summary(metrics)
    tracker.images({name: file for name, (file, _) in pictures.items()})
    return None


def plan_policies(compared: Mapping[str, Any], scenario: Scenario, scores: Any, search: Any) -> dict[str, Plan]:
    """Plan every load with every policy, and with one model for everyone; what does not fit is left out.

    Args:
        compared: Policies by name.
        scenario: Batch of loads.
        scores: Fitted distributions.
        search: Search for whatever the policy leaves open.
    """
    from edgesched.tasks.schedule import plan_all

    methods = {name: (policy, search) for name, policy in compared.items()}
    made = plan_all(methods, scenario, scores, "policies.compare") if methods else {}
    return {SINGLE: single_best_plan(scenario)} | {name: result.plan for name, result in made.items()}


def replay_all(
    scenario: Scenario,
    plans: Mapping[str, Plan],
    fit: ScoreTable,
    held: ScoreTable,
    models: Sequence[str],
    cfg: DictConfig,
) -> dict[str, Replay]:
    """Replay plans and cascades at one load, with the same bootstrap draws of the prompts."""
    draws, seed = int(cfg.replay.draws), int(cfg.replay.seed)
    outcomes = replay(plans, scenario, held, models, planned_on=fit, routing=cfg.replay.routing, draws=draws, seed=seed)
    for deliver in cfg.policies.cascade if len(models) > 1 else ():
        plan = plan_cascade(scenario, fit, models, deliver=deliver, judge_s=float(cfg.policies.judge_s))
        outcomes[f"cascade_{deliver}"] = replay_cascade(
            plan, scenario, held, models, planned_on=fit, draws=draws, seed=seed
        )
    return outcomes


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
        row["over_single"] = compare(outcome, outcomes[SINGLE])["utility_gain"]
        difference = (outcome.utility_draws - outcomes[SINGLE].utility_draws).double()
        edges = difference.quantile(torch.tensor([0.025 / rest, 1 - 0.025 / rest], dtype=torch.float64))
        row["clear"] = bool(edges[0] > 0) or bool(edges[1] < 0)
        if "joint" in outcomes:
            row["over_joint"] = compare(outcome, outcomes["joint"])["utility_gain"]
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


def _variance(table: ScoreTable, cfg: DictConfig) -> list[dict[str, Any]]:
    try:
        return variance_table(table, draws=int(cfg.replay.draws), seed=int(cfg.replay.seed))
    except ScoreTableError as exc:
        log.warning("the variance table is left out: %s", exc)
        return []


def _levels(table: ScoreTable, models: Sequence[str]) -> dict[str, Any] | None:
    try:
        return score_levels(table, models)
    except ScoreTableError as exc:
        log.warning("score levels are left out: %s", exc)
        return None


def _pictures(
    metrics: Mapping[str, Any], table: ScoreTable, models: Sequence[str], folder: Path
) -> dict[str, tuple[Path, str]]:
    """Draw what was found; name → (file, caption)."""
    by_load = metrics["loads"]
    made = {"policies": (figures.save(_figure(by_load), folder / "policies.png"),
                         "Utility over the best single model against load; bars are paired 95 % intervals over prompts.")}  # fmt: skip
    middle = list(by_load)[len(by_load) // 2]
    rows = {
        name: {key: tuple(row[key + end] if end else row[key] for end in ends) for key, ends in _SPANS.items()}
        for name, row in sorted(by_load[middle].items(), key=lambda item: -item[1]["utility"])
    }
    made["assignment_methods"] = (
        figures.save(figures.methods_compared(rows), folder / "assignment_methods.png"),
        f"Assignment methods at {middle} requests of every category, on held-out prompts; bars are 95 % intervals.",
    )
    found = metrics["score_levels"]
    if found is None:
        return made
    figure = figures.score_levels(found["levels"], found["cuts"], found["reference"], table.score)
    apart = "by another seed than is shown" if found["own_scores"] else "whose own bars are biased by it"
    made["score_levels"] = (
        figures.save(figure, folder / "score_levels.png"),
        f"Prompts in three levels by the score of {found['reference']}, {apart}; every model at its largest step "
        "count, bars are 95 % intervals over prompts.",
    )
    return made


def _sections(metrics: Mapping[str, Any], pictures: Mapping[str, tuple[Path, str]]) -> list[page.Section]:
    """Tables of the report."""

    def span(value: Mapping[str, float]) -> str:
        return f"{value['value']:+.3f} ({value['lo']:+.3f} to {value['hi']:+.3f})"

    rows: list[list[page.Cell]] = []
    for load, by_name in metrics["loads"].items():
        for name, row in sorted(by_name.items(), key=lambda item: -item[1]["utility"]):
            over_joint = span(row["over_joint"]) if "over_joint" in row else None
            rows.append([load, name, row["utility"], f"{page.show(row['utility_lo'])} to {page.show(row['utility_hi'])}", row["quality"],
                         row["latency_s"], span(row["over_single"]), "yes" if row["clear"] else "no", over_joint])  # fmt: skip
    sections = [page.Section(
        "Policies under load, on held-out prompts", (*metrics["words"], *metrics["remarks"]),
        ("load", "policy", "utility", "95 % interval", "quality", "latency (s)", "over the best single model", "clear", "over joint"),
        rows, [pictures["policies"], pictures["assignment_methods"]],
    )]  # fmt: skip
    if "score_levels" in pictures:
        sections.append(page.Section("Score levels and models", figures=[pictures["score_levels"]]))
    if metrics["variance"]:
        shares: list[list[page.Cell]] = [
            [r["source"], f"{100 * r['share']:.1f} %", f"{100 * r['lo']:.1f} to {100 * r['hi']:.1f} %",
             f"{100 * r['by_chance']:.1f} %", r["variance"]] for r in metrics["variance"]
        ]  # fmt: skip
        sections.append(page.Section(
            "Where the variance of scores lies",
            ("A category label can help to choose a model by the interaction of category and model only.",),
            ("source", "share of squares", "95 % interval", "by chance alone", "variance (points²)"), shares,
        ))  # fmt: skip
    if "decisions" in metrics:
        few: list[list[page.Cell]] = [
            [r["prompts"] or "all", r["rule"], r["utility"], r["std"], r["p10"], r["regret"], r["optimism"],
             f"{r['gain']:+.4f} ± {r['gain_se']:.4f}"] for r in metrics["decisions"]
        ]  # fmt: skip
        sections.append(page.Section(
            "Decisions from few prompts, replayed", (),
            ("prompts a category", "plans on", "utility", "std", "10th percentile", "regret", "optimism", "over the mean"), few,
        ))  # fmt: skip
    return sections


def _figure(by_load: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Any:
    """Gain of every policy over the best single model against load, a panel for each policy."""
    names = [n for n in next(iter(by_load.values())) if n != SINGLE]
    columns = min(4, len(names))
    figure, axes = figures._axes(
        columns, width=2.6, height=2.3, rows=-(-len(names) // columns), sharex=True, sharey=True
    )
    loads = [float(load) for load in by_load]
    for ax, name in zip(axes.flat, names, strict=False):
        gains = [rows[name]["over_single"] for rows in by_load.values()]
        value = [g["value"] for g in gains]
        spread = [[max(g["value"] - g["lo"], 0.0) for g in gains], [max(g["hi"] - g["value"], 0.0) for g in gains]]
        ax.axhline(0, color=figures.FAINT, linewidth=0.8)
        ax.errorbar(
            loads, value, yerr=spread, color=figures.COLOURS[0], marker="o", markersize=3, linewidth=1.3, capsize=2
        )
        ax.set_xscale("log")
        ax.set_yscale("symlog", linthresh=1.0)
        ax.set_title(name)
        ax.set_xlabel("requests a category")
    for ax in axes.flat[len(names) :]:
        ax.set_visible(False)
    axes.flat[0].set_ylabel("points over one model")
    return figure
