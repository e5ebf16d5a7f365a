"""The whole chain, top to bottom: only this module knows the order of the stages."""

from __future__ import annotations

import dataclasses
import logging
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import get_method
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError

from edgesched import figures, report
from edgesched.bounds import regret, upper_bound
from edgesched.config import build, check
from edgesched.errors import ArgumentError, ConfigError, PlanError, SearchError
from edgesched.fit import fit as fit
from edgesched.latency import latency_remarks
from edgesched.objective import evaluate
from edgesched.priors import PRIORS, Priors
from edgesched.priors import schedule as plan_from_priors
from edgesched.simulate import Replay, compare, replay
from edgesched.table import ScoreTable
from edgesched.tracking import Tracker
from edgesched.types import Plan, PromptSet, Scenario, SearchResult
from edgesched.writing import json_document, write_json

if TYPE_CHECKING:
    from edgesched.quality_model import QualityModel

log = logging.getLogger(__name__)
PUBLISHED_BASELINES = ("direct", "random", "equal_allocation", "optimal_step")
COMPARED = ("published", "annealing")
_QUIET = ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero")


def run(cfg: DictConfig) -> float | None:
    """Check the configuration, run the task it names under a W&B run, and print where the results are.

    Args:
        cfg: The composed configuration.

    Returns:
        What a sweep maximises: the replayed utility of the annealed plan, or None for other tasks.

    Raises:
        EdgeschedError: For every mistake that the user can mend, in one line.
    """
    for name in _QUIET:
        logging.getLogger(name).setLevel(logging.ERROR)
    check(cfg)
    try:
        task = get_method(cfg.task)
    except Exception as exc:
        raise ConfigError(f"task: {cfg.task!r} cannot be located") from exc
    if task is not schedule and cfg.data.get("_target_") == PRIORS:
        raise ConfigError(
            f"data: priors are no measurements; {cfg.name} needs a score table, only plans can do without"
        )
    if cfg.debug:
        cfg = _smaller(cfg)
    folder = Path(cfg.run_folder)
    plain = _plain(cfg)
    settings = dict(plain["logger"])
    if settings["group"] is None and HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
        settings["group"] = f"{cfg.name}/{folder.parent.name}"
    with Tracker(folder, plain, str(cfg.name), **settings) as tracker:
        value = task(cfg, folder, tracker)
    print(f"Run folder: {os.path.relpath(folder)}", flush=True)
    return value


def _plain(node: DictConfig) -> dict[str, Any]:
    """A node as a plain dictionary."""
    try:
        plain = OmegaConf.to_container(node, resolve=True, throw_on_missing=False)
    except InterpolationToMissingValueError as exc:
        key = str(exc).splitlines()[0].rsplit(" ", 1)[-1]
        raise ConfigError(f"{key}: has no value; give one, as {key}=...") from exc
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def _smaller(cfg: DictConfig) -> DictConfig:
    """Sizes at which everything ends in seconds."""
    cfg = cfg.copy()
    OmegaConf.set_readonly(cfg, False)
    for search in (cfg.search, cfg.service.search):
        for name, most in (("chains", 8), ("iterations", 50)):
            if name in search:
                search[name] = min(search[name], most)
    cfg.replay.draws = min(cfg.replay.draws, 50)
    if "per_category" in cfg.prompts:  # a table's texts stay as many as they are, though a campaign makes fewer
        cfg.prompts.per_category = cfg.prompts.per_category
    cfg.campaign.prompts_per_category = min(cfg.campaign.prompts_per_category, 2)
    cfg.campaign.steps = list(cfg.campaign.steps)[:2]
    cfg.campaign.seeds = 1
    cfg.campaign.timing_repeats = 1
    cfg.campaign.batch_size = min(cfg.campaign.batch_size, 8)
    cfg.policies.decisions.repeats = min(cfg.policies.decisions.repeats, 2)
    cfg.policies.loads, cfg.difficulty.loads = list(cfg.policies.loads)[:2], list(cfg.difficulty.loads)[:2]
    cfg.fit.folds, cfg.fit.draws = min(cfg.fit.folds, 2), min(cfg.fit.draws, 50)
    cfg.service.requests = min(cfg.service.requests, 6)
    # Timing takes most of a service: an idle second for every one at work, for every model.
    cfg.service.timing_repeats, cfg.service.steps = min(cfg.service.timing_repeats, 2), min(cfg.service.steps, 2)
    cfg.service.agreement_requests = min(cfg.service.agreement_requests, 500)
    if cfg.workload.get("arrivals") is not None and "requests" in cfg.workload.arrivals:
        cfg.workload.arrivals.requests = min(cfg.workload.arrivals.requests, 300)
    cfg.paper.splits, cfg.paper.draws = min(cfg.paper.splits, 2), min(cfg.paper.draws, 20)
    for axis in ("loads", "budgets", "latency_weights"):
        cfg.paper[axis] = list(cfg.paper[axis])[:2]
    cfg.quality.max_epochs = min(cfg.quality.max_epochs, 5)
    recipe = cfg.train.recipe
    recipe.scenes = min(recipe.scenes, 64)
    for stage in (recipe.autoencoder, recipe.decoder, recipe.judge, *recipe.denoisers.values()):
        stage.max_steps, stage.batch_size = min(stage.max_steps, 4), min(stage.batch_size, 8)
    cfg.train.examine_prompts = min(cfg.train.examine_prompts, 2)
    cfg.train.examine_steps = list(cfg.train.examine_steps)[:2]
    cfg.train.guidance_scales = list(cfg.train.guidance_scales)[:2]
    cfg.train.schedulers = list(cfg.train.schedulers)[:2]
    cfg.train.compared_steps = list(cfg.train.examine_steps)[:1]
    return cfg


# --- schedule -----------------------------------------------------------------------------------------


def schedule(cfg: DictConfig, folder: Path, tracker: Tracker) -> float | None:
    """Score table → distributions → scenario → plans of every method → replay on held-out prompts → report."""
    started = time.perf_counter()
    source = build(cfg.data, "data")
    if isinstance(source, Priors):
        return plan_from_priors(cfg, folder, tracker, source)
    table: ScoreTable = source
    tracker.score_table(table)
    methods = {name: build_method(name, node) for name, node in cfg.method.items()}
    samples = _live_samples(cfg)
    fit_half, replay_half = table.split()
    quality = build(cfg.quality, "quality")(fit_half)
    workload = _plain(cfg.workload)
    scenario = quality.scenario(**_workload(dict(workload), cfg, quality.models))
    log.info("%d rows from %s; planning with %d methods", len(table), table.device, len(methods))
    believed = build(cfg.estimate, "estimate")(scenario, fit_half, quality.models)
    results = plan_all(methods, believed, quality)
    outcomes = replay(
        {name: result.plan for name, result in results.items()}, scenario, replay_half, quality.models,
        planned_on=fit_half, routing=cfg.replay.routing, draws=cfg.replay.draws, seed=cfg.replay.seed,
    )  # fmt: skip
    metrics = _metrics(scenario, results, outcomes)
    metrics["source"] = {"device": table.device, "digest": table.digest(), "rows": len(table)}
    metrics["latency_fit"] = {
        name: dataclasses.asdict(fit) for name, fit in quality.latency_fits[cfg.workload.latency].items()
    }
    metrics["remarks"] = list(remarks(quality, str(cfg.workload.latency)))
    best = "annealing" if "annealing" in results else max(results, key=lambda n: outcomes[n].utility)
    plan = named_plan(results[best].plan, quality.categories, quality.models, best, workload)
    write_json(folder / "plan.json", plan)
    pictures = _schedule_figures(
        folder / "figures", table, fit_half, quality, results, outcomes, metrics, best, samples
    )
    metrics["seconds_total"] = time.perf_counter() - started
    write_json(folder / "metrics.json", metrics)
    columns, rows = _method_table(metrics)
    report.print_table(f"Plans for one slot, scores from {table.device}", columns, rows)
    _schedule_report(folder, cfg, table, metrics, plan, pictures, (columns, rows))
    tracker.summary(metrics)
    tracker.table("methods", columns, rows)
    tracker.images({name: file for name, (file, _) in pictures.items()})
    if samples is not None:
        shown = [
            [model, text, int(cfg.samples.steps), image]
            for model, row in samples[1].items()
            for text, image in zip(samples[0].texts, row, strict=True)
        ]
        tracker.sample_table("samples", ["model", "prompt", "steps", "image"], shown)
    return float(outcomes[best].utility)


def remarks(quality: QualityModel, latency: str) -> tuple[str, ...]:
    """What a reader has to know of the fits behind a plan: times off their line, scores that did not settle."""
    unsettled = () if quality.converged else ("The fit of the scores did not settle; raise quality.max_epochs.",)
    return (*latency_remarks(quality.latency_fits[latency]), *unsettled)


def build_method(name: str, node: DictConfig) -> tuple[Any, Any]:
    """A method's assignment policy and its search."""
    if set(node) != {"assignment", "search"}:
        raise ConfigError(f"method.{name}: expected the keys assignment and search, got {', '.join(map(str, node))}")
    return build(node.assignment, f"method.{name}.assignment"), build(node.search, f"method.{name}.search")


def plan_all(
    methods: Mapping[str, tuple[Any, Any]], scenario: Scenario, scores: Any, group: str = "method"
) -> dict[str, SearchResult]:
    """Plan with every method; one that cannot solve this problem is left out, with the reason.

    Args:
        methods: Name → assignment policy and search.
        scenario: What is planned for.
        scores: Fitted distributions.
        group: Where the methods stand in the configuration, for the message.

    Raises:
        ArgumentError: If an argument of a method is wrong, whatever the problem.
        SearchError: If no method is left.
    """
    results, reason = {}, ""
    for name, (policy, search) in methods.items():
        try:
            given = policy(scenario, scores)
            results[name] = search(scenario) if given is None else search(scenario, assignment=given.detach())
        except ArgumentError as exc:
            raise ArgumentError(f"{group}.{name}: {exc}") from exc
        except (PlanError, SearchError) as exc:
            log.warning("%s is left out: %s", name, exc)
            reason = str(exc)
    if not results:
        raise SearchError(f"no method could plan for this scenario; {reason}")
    return results


def _workload(workload: dict[str, Any], cfg: DictConfig, models: tuple[str, ...]) -> dict[str, Any]:
    """The scenario's arguments: memory of each model comes from its own configuration, the stream is for others."""
    for name in ("arrivals", "path", "rate_scale"):
        workload.pop(name, None)
    if workload.get("memory_limit_gib") is not None:
        missing = [m for m in models if m not in cfg.model or cfg.model[m].get("memory_gib") is None]
        if missing:
            raise ConfigError(f"workload.memory_limit_gib: model.{missing[0]}.memory_gib is needed too")
        workload["memory_gib"] = [float(cfg.model[m].memory_gib) for m in models]
    return workload


def _live_samples(cfg: DictConfig) -> tuple[PromptSet, dict[str, list[np.ndarray]]] | None:
    """Images generated now by every model, for a few prompts."""
    from edgesched.campaign import sample_grid

    if cfg.samples.prompts_per_category < 1:
        return None
    prompts = build(cfg.prompts, "prompts").per_category(cfg.samples.prompts_per_category)
    images = {}
    for name, node in cfg.model.items():
        model = build(node, f"model.{name}")
        images[str(name)] = list(sample_grid(model, prompts, cfg.samples.steps))
        model.unload()
    log.info("generated %d images live", sum(len(row) for row in images.values()))
    return prompts, images


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
        ours: {other: compare(outcomes[ours], outcomes[other]) for other in PUBLISHED_BASELINES if other in outcomes}
        for ours in COMPARED
        if ours in outcomes
    }
    return {"methods": methods, "gains": gains}


def named_plan(
    plan: Plan, categories: tuple[str, ...], models: tuple[str, ...], method: str, workload: Mapping[str, Any]
) -> dict[str, Any]:
    """A plan by names, as an operator would load it."""
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


def _method_table(metrics: Mapping[str, Any]) -> tuple[list[str], list[list[report.Cell]]]:
    columns = ["method", "utility", "quality", "latency (s)", "gap to bound", "replayed utility", "95 % interval",
               "replayed latency (s)", "seconds"]  # fmt: skip
    rows: list[list[report.Cell]] = []
    for name, m in metrics["methods"].items():
        r = m["replay"]
        interval = f"{report.show(r['utility_lo'])} to {report.show(r['utility_hi'])}"
        rows.append([name, m["utility"], m["quality"], m["latency_s"], f"{100 * m['gap']:z.2f} %", r["utility"], interval,
                     r["latency_s"], m["seconds"]])  # fmt: skip
    return columns, rows


def score_figures(fit_half: ScoreTable, quality: Any) -> dict[str, tuple[Any, str]]:
    """What the scores of a table look like beside their fits; name → (figure, caption)."""
    frame = fit_half.frame
    mean = quality.mean().detach().double().numpy()
    counts = np.array(quality.step_counts)
    measured = quality.measured.numpy()
    low, high = (float(v) for v in np.quantile(frame[fit_half.score], [0.002, 1.0]))
    grid = np.linspace(low, high + 0.1 * (high - low), 300)
    scores: dict[str, dict[str, np.ndarray]] = {}
    density: dict[str, dict[str, np.ndarray]] = {}
    means: dict[str, dict[str, np.ndarray]] = {}
    errors: dict[str, dict[str, np.ndarray]] = {}
    fitted: dict[str, dict[str, np.ndarray]] = {}
    for c, category in enumerate(fit_half.categories):
        for values in (scores, density, means, errors, fitted):
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
            scores[category][model] = mine.loc[mine["steps"] == k, fit_half.score].to_numpy()
            density[category][model] = quality.density(grid, c, m, at)
    steps_of = {model: counts[measured[m]] for m, model in enumerate(quality.models)}
    return {
        "score_distributions": (
            figures.score_distributions(scores, density, grid),
            "Scores of the fit half at each model's best step count, with the fitted distributions.",
        ),
        "quality_over_steps": (
            figures.quality_over_steps(steps_of, means, errors, fitted),
            "Mean score against denoising steps: measured with 95 % intervals over prompts, and the fitted curves.",
        ),
    }


def _schedule_figures(
    folder: Path,
    table: ScoreTable,
    fit_half: ScoreTable,
    quality: Any,
    results: Mapping[str, SearchResult],
    outcomes: Mapping[str, Replay],
    metrics: Mapping[str, Any],
    best: str,
    samples: tuple[PromptSet, dict[str, list[np.ndarray]]] | None,
) -> dict[str, tuple[Path, str]]:
    """Draw what the run found; name → (file, caption)."""
    made: dict[str, tuple[Path, str]] = {}

    def keep(name: str, figure: Any, caption: str) -> None:
        made[name] = (figures.save(figure, folder / f"{name}.png"), caption)

    for name, (figure, caption) in score_figures(fit_half, quality).items():
        keep(name, figure, caption)
    if samples is not None:
        prompts, images = samples
        keep("samples", figures.sample_images(images, prompts.texts),
             "Images generated live in this run, a row for each model.")  # fmt: skip
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
    keep("methods_compared", figures.methods_compared(rows, bound),
         "Every method on held-out prompts; bars are 95 % intervals over prompts.")  # fmt: skip
    histories = {n: r.history[:, 0].numpy() for n, r in results.items() if n in ("annealing", "published", "relaxed")}
    optimum = metrics["methods"].get("exact", {}).get("utility")
    if histories:
        keep("convergence", figures.convergence(histories, bound, optimum),
             "Best utility so far of the searches against the joint upper bound.")  # fmt: skip
    plan = results[best].plan
    keep("plan", figures.plan_bars(plan.assignment[0].numpy(), plan.share[0].numpy(), plan.steps[0].numpy(),
                                   quality.categories, quality.models), f"The plan of {best}.")  # fmt: skip
    return made


def _gain_rows(metrics: Mapping[str, Any]) -> list[list[report.Cell]]:
    rows: list[list[report.Cell]] = []
    for ours, others in metrics["gains"].items():
        for other, gain in others.items():
            q, t, u = gain["quality_gain_pct"], gain["latency_cut_pct"], gain["utility_gain"]
            rows.append([
                f"{ours} over {other}",
                f"{q['value']:+.2f} %", f"{q['lo']:+.2f} to {q['hi']:+.2f} %", f"{t['value']:+.1f} %",
                f"{u['value']:+.3f}", f"{u['lo']:+.3f} to {u['hi']:+.3f}",
            ])  # fmt: skip
    return rows


def _schedule_report(
    folder: Path,
    cfg: DictConfig,
    table: ScoreTable,
    metrics: Mapping[str, Any],
    plan: Mapping[str, Any],
    pictures: Mapping[str, tuple[Path, str]],
    method_table: tuple[list[str], list[list[report.Cell]]],
) -> None:
    """The page of a schedule run."""
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
        "Latency model": f"{cfg.workload.latency}, weight {cfg.workload.latency_weight} points per second",
        "Run took": f"{metrics['seconds_total']:.1f} s",
    }
    gains = _gain_rows(metrics)
    order = ("quality_over_steps", "score_distributions", "samples")
    sections = [
        report.Section("What came out", (lead, *metrics["remarks"]), *method_table,
                       figures=[pictures[n] for n in ("methods_compared", "plan") if n in pictures]),
        report.Section("Gains over the published baselines, on held-out prompts",
                       ("The delay does not depend on the prompts drawn, so its cut has no interval over them.",),
                       ("comparison", "quality", "95 % interval", "delay cut", "utility (points)", "95 % interval"), gains),
        report.Section("What the scores say", figures=[pictures[n] for n in order if n in pictures]),
        report.Section("How the search went", figures=[pictures[n] for n in ("convergence",) if n in pictures]),
        report.Section("The plan", ("As plan.json in the run folder, for an operator to load.",),
                       code=json_document(plan)),
    ]  # fmt: skip
    report.write_html(folder / "report.html", f"edgesched: {cfg.name}", facts, sections)


# --- campaign -----------------------------------------------------------------------------------------


def campaign(cfg: DictConfig, folder: Path, tracker: Tracker) -> float | None:
    """Prompts × models × steps × seeds → score table, into ``campaign.out``."""
    from edgesched.campaign import UnfinishedError, run_campaign

    count = cfg.campaign.prompts_per_category
    if count < 1:
        raise ConfigError(f"campaign.prompts_per_category: expected a positive whole number, got {count}")
    prompts = build(cfg.prompts, "prompts").per_category(count)
    models = {str(name): build(node, f"model.{name}") for name, node in cfg.model.items()}
    scorers = {str(name): build(node, f"score.{name}") for name, node in cfg.score.items()}
    started = time.perf_counter()
    options = _plain(cfg.campaign)
    options.pop("prompts_per_category")
    unfinished = None
    try:
        table = run_campaign(prompts, models, scorers, **options)
    except UnfinishedError as exc:  # told at the end: what could be made is reported first
        if exc.table is None:
            raise
        table, unfinished = exc.table, exc
    tracker.score_table(table)
    mean = table.frame.groupby(["model", "category", "steps"], sort=False)[table.score].mean()
    metrics = {
        "rows": len(table),
        "seconds_total": time.perf_counter() - started,
        "device": table.device,
        "digest": table.digest(),
        "mean_score": {f"{m}/{c}/{k}": float(v) for (m, c, k), v in mean.items()},
    }
    write_json(folder / "metrics.json", metrics)
    columns, rows = _family_table(table)
    report.print_table(f"Mean score at each model's best step count, on {table.device}", columns, rows)
    facts = {"Device": table.device, "Images": str(len(table)), "Table": str(cfg.campaign.out)}
    sections = [report.Section("Mean score at each model's best step count", (), columns, rows)]
    report.write_html(folder / "report.html", "edgesched: campaign", facts, sections)
    tracker.summary(metrics)
    tracker.table("family", columns, rows)
    print(f"Score table: {cfg.campaign.out}", flush=True)
    if unfinished is not None:
        raise unfinished
    return None


def _family_table(table: ScoreTable) -> tuple[list[str], list[list[report.Cell]]]:
    mean = table.frame.groupby(["model", "category", "steps"], sort=False)[table.score].mean()
    rows: list[list[report.Cell]] = []
    for model in table.models or ():
        best = [mean[model][category] for category in table.categories]
        rows.append([model, *(f"{b.max():.2f} ({b.idxmax()} steps)" for b in best)])
    return ["model", *table.categories], rows


# --- training the micro family ------------------------------------------------------------------------


def train_micro(cfg: DictConfig, folder: Path, tracker: Tracker) -> float | None:
    """Train autoencoder, judge and denoisers, save them, and measure what they can do."""
    from transformers import CLIPModel

    from edgesched.campaign import device_name, run_campaign, sample_grid
    from edgesched.generate import DiffusionModel
    from edgesched.micro.family import compare_settings, examine_judge, reconstruction_scores, train_family
    from edgesched.micro.world import prompt_set
    from edgesched.score import CLIPScore

    started = time.perf_counter()
    recipe = build(cfg.train.recipe, "train.recipe")
    out, weights = Path(cfg.train.out), Path(cfg.train.weights)
    seconds = train_family(recipe, out, weights)
    judge = CLIPModel.from_pretrained(weights / "judge", dtype=torch.float32).eval()
    small = bool(cfg.debug)
    judged = examine_judge(judge, 8 if small else 400)
    models = {name: DiffusionModel(str(weights / name), resolution=64) for name in recipe.denoisers}
    vae = next(iter(models.values())).pipeline.vae.float()
    rebuilt = reconstruction_scores(judge, vae, 8 if small else 200)
    prompts = prompt_set(cfg.train.examine_prompts, seed=cfg.seed + 99)
    scorer = CLIPScore(str(weights / "judge"))
    counts = [int(k) for k in cfg.train.examine_steps]
    schedulers = [None if name is None else str(name) for name in cfg.train.schedulers]
    compared = [int(k) for k in cfg.train.compared_steps]
    settings = compare_settings(models, prompts, scorer, list(cfg.train.guidance_scales), schedulers, compared)
    chosen = {name: max((s for s in settings if s.model == name), key=lambda s: s.score) for name in models}
    for name, model in models.items():
        model.guidance_scale, model.scheduler = chosen[name].guidance_scale, chosen[name].scheduler
    examined = folder / "examination"
    table = run_campaign(prompts, models, {"clip_score": scorer}, steps=counts, seeds=1, out=examined,
                         batch_size=8 if small else 64, timing_repeats=1 if small else 3)  # fmt: skip
    mean = table.frame.groupby(["model", "category", "steps"])[table.score].mean()
    family: dict[str, Any] = {"render": judged["render"], "reconstruction": rebuilt}
    timing = {(r["model"], r["batch_size"], r["steps"]): r["latency_s"] for r in table.manifest["timing"]}
    batch = max(b for _, b, _ in timing)
    for name in models:
        family[name] = {c: {"best_score": float(mean[name][c].max())} for c in table.categories}
        counts = sorted(k for m, b, k in timing if m == name and b == batch)
        if len(counts) > 1:
            first, last = counts[0], counts[-1]
            family[name]["seconds_per_step"] = (timing[name, batch, last] - timing[name, batch, first]) / (last - first)
    metrics = {
        "judge": {"accuracy": judged["accuracy"], "accuracy_by_attribute": judged["accuracy_by_attribute"]},
        "family": family,
        "chosen": {name: dataclasses.asdict(setting) for name, setting in chosen.items()},
        "seconds": seconds,
        "seconds_total": time.perf_counter() - started,
        "device": device_name(next(iter(models.values())).device),
    }
    write_json(folder / "metrics.json", metrics)
    sheet = prompts.per_category(2)
    shown = sorted({counts[round(i * (len(counts) - 1) / 4)] for i in range(5)})
    images = {
        f"{name.removeprefix('micro_')}, {k}": list(sample_grid(model, sheet, k))
        for name, model in models.items()
        for k in shown
    }
    picture = figures.save(
        figures.sample_images(images, sheet.texts, "model, denoising steps", cell=1.1), folder / "figures/samples.png"
    )
    categories = list(table.categories)
    judge_rows: list[list[report.Cell]] = [
        [c, judged["accuracy"][c], judged["render"][c], rebuilt[c]] for c in categories
    ]
    attribute_rows: list[list[report.Cell]] = [[a, v] for a, v in judged["accuracy_by_attribute"].items()]
    columns, rows = _family_table(table)
    rows.append(["true renders", *(judged["render"][c] for c in categories)])
    setting_rows: list[list[report.Cell]] = [
        [s.model, s.scheduler or "as saved (DDIM)", s.guidance_scale, s.score, "chosen" if s in chosen.values() else ""]
        for s in settings
    ]
    setting_columns = ("model", "scheduler", "guidance scale", "mean score", "")
    report.print_table("Judge on unseen scenes", ["category", "prefers the true caption", "renders", "reconstructions"],
                       judge_rows)  # fmt: skip
    report.print_table(
        "Judge by the attribute that is wrong", ["attribute", "prefers the true caption"], attribute_rows
    )
    report.print_table("Mean score at each model's best step count", columns, rows)
    speed = {name: family[name].get("seconds_per_step", float("nan")) for name in models}
    speed_rows: list[list[report.Cell]] = [
        [name, f"{1000 * s:.2f}", s / next(iter(speed.values()))] for name, s in speed.items()
    ]
    sections = [
        report.Section("The judge", ("How often it prefers the true caption of an unseen render to one with a single "
                       "attribute wrong, and what it gives true renders and the autoencoder's reconstructions.",),
                       ("category", "prefers the true caption", "renders", "reconstructions"), judge_rows),
        report.Section("By the attribute that is wrong", (), ("attribute", "prefers the true caption"), attribute_rows),
        report.Section("The family at each model's best step count", (), columns, rows,
                       figures=[(picture, "Two prompts of each category; model and denoising steps at the left.")]),
        report.Section("Cost of a denoising step at batch 64", (),
                       ("model", "milliseconds an image", "over the first"), speed_rows),
        report.Section("Guidance and scheduler, by measurement",
                       (f"Mean score over the {len(prompts)} prompts at {', '.join(map(str, compared))} steps.",),
                       setting_columns, setting_rows),
    ]  # fmt: skip
    facts = {"Device": str(metrics["device"]), "Seconds": f"{metrics['seconds_total']:.0f}", "Weights": str(weights)}
    report.write_html(folder / "report.html", "edgesched: the micro family", facts, sections)
    _log_curves(out, recipe.denoisers, tracker)
    tracker.summary(metrics)
    tracker.images({"samples": picture})
    shutil.rmtree(examined / "shards", ignore_errors=True)
    print(f"Weights: {weights}", flush=True)
    return None


def _log_curves(out: Path, denoisers: Mapping[str, Any], tracker: Tracker) -> None:
    """Training curves, which the stages wrote as CSV, to W&B."""
    import pandas as pd

    for name in ("autoencoder", "judge", "decoder", *denoisers):
        for file in sorted(out.glob(f"{name}/log/metrics.csv")):
            frame = pd.read_csv(file)
            columns = [c for c in frame.columns if c not in ("epoch", "step")]
            for row in frame[["step", *columns]].dropna().to_dict("records"):
                tracker.metrics({name: {"step": row["step"], **{c: row[c] for c in columns}}})
