"""Tasks that serve streams of requests: simulated under plans, slot by slot, and for real."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from omegaconf import DictConfig
from rich.progress import track
from torch import Tensor

from edgesched import figures, report
from edgesched.clock import WALL, Clock
from edgesched.config import build
from edgesched.errors import ArgumentError, ConfigError, ScoreTableError
from edgesched.latency import latency_remarks
from edgesched.objective import evaluate, service_times
from edgesched.queueing import agreement, backlog, simulate, summary
from edgesched.requests import RequestStream
from edgesched.simulate import prompt_scores
from edgesched.slots import FORECASTS, SlotRun, demand_of_slots, run_slots
from edgesched.table import ScoreTable
from edgesched.tracking import Tracker
from edgesched.types import Plan, Scenario
from edgesched.writing import json_document, write_json

if TYPE_CHECKING:
    from edgesched.serve import Measured

_TIMES = 200
_WHOLE = ("agreement_requests", "fixed_steps", "requests", "steps", "timing_repeats")
_POSITIVE = ("deadline_s", "slot_s", "utilisation")


def _check_service(cfg: DictConfig) -> None:
    """Refuse values of ``service`` before anything is fitted or served.

    Raises:
        ArgumentError: In one line, by its key.
    """
    for key in _WHOLE:
        value = cfg.service[key]
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ArgumentError(f"service.{key}: expected a whole number of at least 1, got {value!r}")
    for key in (*_POSITIVE, "ewma"):
        value = cfg.service[key]
        if value is None and key == "deadline_s":
            continue
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or value <= 0 or (key == "ewma" and value > 1):
            most = " and up to 1" if key == "ewma" else ""
            raise ArgumentError(f"service.{key}: expected a number above 0{most}, got {value!r}")
    given = cfg.service.forecasts
    unknown = [how for how in given if how not in FORECASTS] if isinstance(given, Sequence) else [given]
    if isinstance(given, str) or unknown:
        raise ArgumentError(f"service.forecasts: expected a list out of {', '.join(FORECASTS)}, got {given!s}")


def _stream(cfg: DictConfig, categories: Sequence[str], seed: int = 0) -> RequestStream:
    """Requests as ``workload.arrivals`` says, at the mean rate that ``workload.demand`` says."""
    if cfg.workload.get("arrivals") is None:
        raise ConfigError(
            "workload.arrivals: this experiment needs a stream; choose workload=poisson, bursty, diurnal or trace"
        )
    make = build(cfg.workload.arrivals, "workload.arrivals")
    stream: RequestStream = make(rate=_rates(cfg, categories), categories=categories, seed=int(cfg.seed) + seed)
    return stream


def _rates(cfg: DictConfig, categories: Sequence[str]) -> list[float]:
    """Mean requests a second of every category."""
    demand = cfg.workload.demand
    if isinstance(demand, (int, float)):
        return [float(demand)] * len(categories)
    unknown = [c for c in demand if c not in categories]
    if unknown:
        raise ConfigError(f"workload.demand: category {unknown[0]!r} is not one of {', '.join(categories)}")
    return [float(demand.get(c, 0.0)) for c in categories]


def _prepared(cfg: DictConfig) -> tuple[ScoreTable, ScoreTable, ScoreTable, Any, Scenario]:
    """Table, its halves, the fitted scores, and the scenario in queue mode."""
    from edgesched.pipeline import _plain, _workload

    table: ScoreTable = build(cfg.data, "data")
    fit_half, held = table.split()
    quality = build(cfg.quality, "quality")(fit_half)
    workload = _workload(_plain(cfg.workload), cfg, quality.models)
    return table, fit_half, held, quality, quality.scenario(**workload)


def _utility(
    stream: RequestStream,
    model: Tensor,
    step: Tensor,
    latency: Tensor,
    scores: Mapping[str, Tensor],
    weight: float,
    seed: int,
) -> tuple[float, float]:
    """Mean measured score of held-out prompts dealt to the requests, and utility.

    Raises:
        ScoreTableError: If a prompt was not scored with what serves it.
    """
    rng = np.random.default_rng(seed)
    total = 0.0
    for c, name in enumerate(stream.categories):
        mine = (stream.category[0] == c).numpy()
        values = scores[name].nanmean(1).numpy()
        prompt = rng.integers(len(values), size=int(mine.sum()))
        dealt = values[prompt, model.numpy()[mine], step.numpy()[mine]]
        if np.isnan(dealt).any():
            raise ScoreTableError(
                f"held-out prompts of category {name!r}: some have no score of the model and step count that serve them; "
                "score all prompts alike"
            )
        total += float(dealt.sum())
    quality = total / len(stream)
    return quality, quality - weight * float(latency.mean())


def simulate_task(cfg: DictConfig, folder: Path, tracker: Tracker, *, clock: Clock = WALL) -> float | None:
    """Score table → plans of every method → a stream of requests served under each → latencies, agreement, report."""
    from edgesched.pipeline import build_method, plan_all

    _check_service(cfg)
    started = clock.now()
    table, _, held, quality, scenario = _prepared(cfg)
    methods = {name: build_method(name, node) for name, node in cfg.method.items()}
    if scenario.latency != "queue":
        raise ConfigError(f"workload.latency: a stream is served from a queue, not by {scenario.latency!r}; give queue")
    planned = plan_all(methods, scenario, quality)
    results = {n: r for n, r in planned.items() if bool(r.feasible.all())}
    if not results:
        raise ConfigError(
            "workload.demand: no method finds a plan that keeps up with it; lower it or give more compute"
        )
    stream = _stream(cfg, held.categories)
    plans = [r.plan for r in results.values()]
    together = Plan(*(torch.cat([getattr(p, f) for p in plans]) for f in ("assignment", "steps", "share")))
    begun = clock.now()
    served = simulate(stream, scenario, together, discipline="queue", seed=int(cfg.seed))
    simulated_s = clock.now() - begun
    deadline = cfg.service.deadline_s
    found = summary(stream, served, deadline_s=None if deadline is None else float(deadline))
    scores = prompt_scores(held, quality.models, scenario.steps)
    weight = float(scenario.latency_weight[0])
    index = torch.searchsorted(scenario.steps, together.steps)
    rows: dict[str, dict[str, Any]] = {}
    for i, (name, result) in enumerate(results.items()):
        model = served.model[i, 0]
        seen, utility = _utility(stream, model, index[i][model], served.latency_s[i, 0], scores, weight, int(cfg.seed))
        rows[name] = {"utility": utility, "quality": seen, "planned_latency_s": float(_planned(scenario, result.plan))}
        rows[name] |= {key: float(value[i].mean()) for key, value in found.items() if key != "utilisation"}
        rows[name]["utilisation"] = dict(zip(quality.models, found["utilisation"][i].mean(0).tolist(), strict=True))
    best = max(rows, key=lambda n: rows[n]["utility"])
    checked = agreement(scenario, results[best].plan, requests=int(cfg.service.agreement_requests), seed=int(cfg.seed))
    remarks = list(latency_remarks(quality.latency_fits["queue"]))
    metrics: dict[str, Any] = {
        "methods": rows,
        "agreement": checked,
        "stream": {"requests": len(stream), "replicas": stream.replicas, "rate": stream.rate.tolist(),
                   "simulated_s": simulated_s, "requests_per_second": len(stream) * stream.replicas * len(plans) / max(simulated_s, 1e-9)},
        "left_out": [n for n in methods if n not in results],
        "latency_remarks": remarks,
        "source": {"device": table.device, "digest": table.digest(), "rows": len(table)},
        "seconds_total": clock.now() - started,
    }  # fmt: skip
    words = [
        *_agreement_words(checked),
        *_left_out_words([n for n in planned if n not in results]),
        *_overload_words(stream, scenario, {n: r.plan for n, r in results.items()}, quality.models),
        *_sentences(remarks),
    ]
    metrics["words"] = words
    write_json(folder / "metrics.json", metrics)
    times = torch.linspace(0, float(stream.arrival_s[0, -1]), _TIMES, dtype=torch.float64)
    waiting = backlog(stream, served, times)[:, 0]
    latencies = {name: served.latency_s[i, 0].numpy() for i, name in enumerate(results)}
    lines = {name: waiting[i].numpy() for i, name in enumerate(results)}
    picture = figures.save(figures.service(latencies, times.numpy(), lines), folder / "figures" / "latency.png")
    columns = [
        "method",
        "utility",
        "quality",
        "mean (s)",
        "planned (s)",
        "p50 (s)",
        "p95 (s)",
        "p99 (s)",
        "missed",
        "busiest model",
    ]
    table_rows: list[list[report.Cell]] = [
        [n, r["utility"], r["quality"], r["mean_s"], r["planned_latency_s"], r["p50_s"], r["p95_s"], r["p99_s"],
         None if "missed" not in r else f"{100 * r['missed']:.1f} %", f"{100 * max(r['utilisation'].values()):.0f} %"]
        for n, r in sorted(rows.items(), key=lambda item: -item[1]["utility"])
    ]  # fmt: skip
    _finish(cfg, folder, tracker, table, metrics, "Requests served under every plan", words, columns, table_rows,
            {"latency": (picture, "Left: latencies of requests, as the share that waits longer. Right: requests in the system.")})  # fmt: skip
    return float(rows[best]["utility"])


def _planned(scenario: Scenario, plan: Plan) -> Tensor:
    return evaluate(scenario, plan).latency_s[0]


def _sentences(remarks: Sequence[str]) -> list[str]:
    return [f"{said[0].upper()}{said[1:]}." for said in remarks]


def _left_out_words(names: Sequence[str]) -> list[str]:
    if not names:
        return []
    return [f"Left out: {', '.join(names)}; no plan that they find keeps up with the demand."]


def _overload_words(
    stream: RequestStream, scenario: Scenario, plans: Mapping[str, Plan], models: Sequence[str]
) -> list[str]:
    """A sentence for every plan of which this stream asks more than a model's share can make."""
    names = scenario.category_names or tuple(stream.categories)
    rate = stream.rate[[stream.categories.index(name) for name in names]]
    words = []
    for name, plan in plans.items():
        asked = rate @ plan.assignment[0].double()
        load = torch.where(asked > 0, asked * service_times(scenario, plan.steps)[0] / plan.share[0].double(), 0.0)
        m = int(load.argmax())
        if float(load[m]) >= 1:
            words.append(f"Under {name} this stream asks {models[m]} for {float(load[m]):.2f} times what its share can make: "
                         f"its queue grows as long as requests come, and its latencies with the stream's length.")  # fmt: skip
    return words


def _agreement_words(found: Mapping[str, float | None]) -> list[str]:
    words = [f"Mean latency is {100 * (found['pk_relative'] or 0):.2f} % from Pollaczek and Khinchine's "
             f"(the simulation's own 95 % interval: ± {100 * (found['pk_halfwidth'] or 0):.2f} %)."]  # fmt: skip
    if found["simpy_max_abs_s"] is None:
        return [*words, "SimPy is not installed, so requests were not compared one by one."]
    return [
        *words,
        f"No request differs from SimPy's event-by-event simulation by more than {found['simpy_max_abs_s']:.1e} s.",
    ]


def slots_task(cfg: DictConfig, folder: Path, tracker: Tracker, *, clock: Clock = WALL) -> float | None:
    """Score table → a stream → planning slot by slot by several forecasts, once, and with 30 steps for everyone."""
    _check_service(cfg)
    started = clock.now()
    table, _, held, quality, scenario = _prepared(cfg)
    stream = _stream(cfg, held.categories)
    slot_s = float(cfg.service.slot_s)
    search = build(cfg.service.search, "service.search")
    fixed = _at_steps(scenario, int(cfg.service.fixed_steps))
    count = int(scenario.steps[(scenario.steps - int(cfg.service.fixed_steps)).abs().argmin()])
    ways = {how: (scenario, how) for how in cfg.service.forecasts} | {f"{count}_steps": (fixed, "ewma")}
    scores = prompt_scores(held, quality.models, scenario.steps)
    weight = float(scenario.latency_weight[0])
    rows: dict[str, dict[str, Any]] = {}
    runs: dict[str, SlotRun] = {}
    for name, (problem, how) in track(ways.items(), description="Serving slot by slot"):
        run = runs[name] = run_slots(stream, problem, search, slot_s=slot_s, how=how, ewma=float(cfg.service.ewma),
                                     routing=str(cfg.replay.routing), seed=int(cfg.seed), clock=clock)  # fmt: skip
        seen, utility = _utility(stream, run.model, run.step, run.latency_s, scores, weight, int(cfg.seed))
        ordered = run.latency_s.sort().values
        rows[name] = {
            "utility": utility, "quality": seen, "mean_s": float(run.latency_s.mean()),
            "p95_s": float(ordered[int(0.95 * len(ordered))]), "p99_s": float(ordered[int(0.99 * len(ordered))]),
            "backlog_most": int(run.backlog.max()), "planning_ms_a_slot": 1000 * run.planning_s / len(run.plan),
            "mean_steps": float(scenario.steps[run.step].double().mean()),
        }  # fmt: skip
    demand = demand_of_slots(stream, slot_s)
    remarks = list(latency_remarks(quality.latency_fits[scenario.latency]))
    words = [*_slot_words(rows, count), *_backlog_words(runs, len(demand)), *_sentences(remarks)]
    metrics = {
        "methods": rows, "words": words, "latency_remarks": remarks,
        "stream": {"requests": len(stream), "slots": len(demand), "slot_s": slot_s, "rate": stream.rate.tolist()},
        "source": {"device": table.device, "digest": table.digest(), "rows": len(table)},
        "seconds_total": clock.now() - started,
    }  # fmt: skip
    write_json(folder / "metrics.json", metrics)
    shown = len(demand)
    steps = {n: _mean_by_slot(scenario.steps[r.step].double(), r.slot, len(r.backlog))[:shown] for n, r in runs.items()}
    picture = figures.save(
        figures.slots(
            demand.sum(-1).numpy() / slot_s, {n: r.backlog[:shown].numpy() for n, r in runs.items()}, steps, slot_s
        ),
        folder / "figures" / "slots.png",
    )
    columns = [
        "planning",
        "utility",
        "quality",
        "mean (s)",
        "p95 (s)",
        "p99 (s)",
        "largest backlog",
        "mean steps",
        "planning (ms a slot)",
    ]
    table_rows: list[list[report.Cell]] = [
        [n, r["utility"], r["quality"], r["mean_s"], r["p95_s"], r["p99_s"], r["backlog_most"], r["mean_steps"], r["planning_ms_a_slot"]]
        for n, r in sorted(rows.items(), key=lambda item: -item[1]["utility"])
    ]  # fmt: skip
    _finish(cfg, folder, tracker, table, metrics, "Slot by slot, on held-out prompts", words, columns, table_rows,
            {"slots": (picture, "Requests a second, requests left over at the end of every slot, and mean denoising steps.")})  # fmt: skip
    return float(max(r["utility"] for r in rows.values()))


def _backlog_words(runs: Mapping[str, SlotRun], slots: int) -> list[str]:
    """A sentence for every way of planning under which requests were left when the last slot of the stream ended."""
    return [
        f"Under {name} {left} {'request was' if left == 1 else 'requests were'} not begun when the stream's last slot ended, and "
        f"took until the end of slot {len(run.backlog)} of {slots}: latencies depend on where the stream was cut."
        for name, run in runs.items()
        if (left := int(run.backlog[slots - 1]))
    ]


def _at_steps(scenario: Scenario, steps: int) -> Scenario:
    """The scenario in which every model runs its step count nearest to the given one."""
    allowed = scenario.quality[0].isfinite().all(0)
    distance = (scenario.steps - steps).abs().double().expand(allowed.shape).masked_fill(~allowed, torch.inf)
    only = torch.nn.functional.one_hot(distance.argmin(-1), len(scenario.steps)).bool()
    return dataclasses.replace(scenario, quality=scenario.quality.masked_fill(~only, -torch.inf))


def _mean_by_slot(values: Tensor, slot: Tensor, slots: int) -> np.ndarray:
    count = torch.bincount(slot, minlength=slots)
    return (
        (torch.bincount(slot, values, minlength=slots) / count.clamp(min=1)).masked_fill(count == 0, torch.nan).numpy()
    )


def _slot_words(rows: Mapping[str, Mapping[str, Any]], count: int) -> list[str]:
    replanned = {n: r for n, r in rows.items() if n in ("last", "ewma")}
    words = []
    if replanned and "once" in rows:
        best = max(replanned, key=lambda n: replanned[n]["utility"])
        gain = rows[best]["utility"] - rows["once"]["utility"]
        words.append(f"Replanning every slot ({best}) {'gains' if gain > 0 else 'costs'} {abs(gain):.2f} points of utility over "
                     f"planning once for the mean demand.")  # fmt: skip
    if replanned and "known" in rows:
        best = max(replanned, key=lambda n: replanned[n]["utility"])
        words.append(
            f"Knowing every slot's demand beforehand would be worth {rows['known']['utility'] - rows[best]['utility']:+.2f} points more."
        )
    if replanned and f"{count}_steps" in rows:
        best = max(replanned, key=lambda n: replanned[n]["utility"])
        other = rows[f"{count}_steps"]
        words.append(f"Against {count} steps for everyone it is {rows[best]['utility'] - other['utility']:+.2f} points: quality "
                     f"{rows[best]['quality']:.2f} against {other['quality']:.2f}, mean latency {rows[best]['mean_s']:.2f} s against "
                     f"{other['mean_s']:.2f} s.")  # fmt: skip
    return words


def serve_task(cfg: DictConfig, folder: Path, tracker: Tracker, *, clock: Clock = WALL) -> float | None:
    """A plan → a short stream really served by the pipelines on this machine → measured against predicted."""
    _check_service(cfg)
    started = clock.now()
    table, found, names, plan = measure(cfg, clock=clock)
    errors = found.errors()
    per_model: dict[str, dict[str, Any]] = {}
    for m, name in enumerate(names):
        mine = found.model == m
        if bool(mine.any()):
            per_model[name] = {
                "requests": int(mine.sum()), "measured_s": float(found.measured_s[mine].mean()),
                "simulated_s": float(found.simulated_s[mine].mean()), "predicted_s": float(found.predicted_s[m]) if found.load[m] < 1 else None, "load": float(found.load[m]),
                "alone_s": float(found.alone_s[m]), "inside_s": float(found.inside_s[m]), "share": float(found.share[m]),
                "share_realised": float(found.worked_s[m] / found.worked_s.sum()), "steps": int(plan.steps[0, m]),
            }  # fmt: skip
    metrics: dict[str, Any] = {"agreement": errors, "models": per_model, "source": {"device": _device()},
               "seconds_total": clock.now() - started}  # fmt: skip
    words = _served_words(errors, {n: r["load"] for n, r in per_model.items()}, len(found.model))
    metrics["words"] = words
    write_json(folder / "metrics.json", metrics)
    picture = figures.save(
        figures.measured(found.simulated_s.numpy(), found.measured_s.numpy(), found.model.numpy(), names),
        folder / "figures" / "measured.png",
    )
    columns = [
        "model",
        "requests",
        "steps",
        "share",
        "share realised",
        "alone (s)",
        "in service (s)",
        "measured (s)",
        "simulated (s)",
        "predicted (s)",
    ]
    rows: list[list[report.Cell]] = [
        [
            n,
            r["requests"],
            r["steps"],
            r["share"],
            r["share_realised"],
            r["alone_s"],
            r["inside_s"],
            r["measured_s"],
            r["simulated_s"],
            "overloaded" if r["predicted_s"] is None else r["predicted_s"],
        ]
        for n, r in per_model.items()
    ]
    _finish(cfg, folder, tracker, table, metrics, "Served for real", words, columns, rows,
            {"measured": (picture, "Latency of every request, measured against simulated on the same arrivals.")})  # fmt: skip
    return None


def _served_words(errors: Mapping[str, float | None], load: Mapping[str, float], requests: int) -> list[str]:
    """What a service that was measured says, in words; an overload has no predicted mean, and is told as such."""
    words = [f"{requests} requests were served on {_device()}: mean latency measured {errors['measured_s']:.3f} s, simulated on the "
             f"same arrivals {errors['simulated_s']:.3f} s ({errors['measured_vs_simulated_pct']:.1f} % apart). With the seconds an image "
             f"as they were during the service, not beforehand, the simulation is {errors['measured_vs_resimulated_pct']:.1f} % off."]  # fmt: skip
    if errors["predicted_s"] is not None:
        return [
            *words,
            f"The equations predicted {errors['predicted_s']:.3f} s ({errors['measured_vs_predicted_pct']:.1f} % apart).",
        ]
    over = [
        f"{name} was asked for {value:.2f} times what its share can make" for name, value in load.items() if value >= 1
    ]
    return [*words, f"{'; '.join(over)}: its queue grows as long as requests come, so the equations know no mean, and the "
            f"measured one is that of these {requests} requests alone."]  # fmt: skip


def measure(cfg: DictConfig, *, clock: Clock = WALL) -> tuple[ScoreTable, Measured, tuple[str, ...], Plan]:
    """Serve ``service.requests`` requests for real, at ``service.utilisation`` of what the plan can take.

    Every model serves an equal part of every category, at ``service.steps`` steps and the best shares for it: what is
    tested is the model of the machine, not the plan.
    """
    from edgesched.pipeline import _plain, _workload
    from edgesched.requests import poisson
    from edgesched.serve import alone, serve

    table: ScoreTable = build(cfg.data, "data")
    quality = build(cfg.quality, "quality")(table)
    names = tuple(n for n in quality.models if n in cfg.model)
    if not names:
        raise ConfigError(f"model: none of {', '.join(cfg.model)} is in the score table")
    models = {n: build(cfg.model[n], f"model.{n}") for n in names}
    prompts = build(cfg.prompts, "prompts").per_category(8)
    categories = tuple(dict.fromkeys(prompts.categories))
    scenario = quality.scenario(
        **_workload(_plain(cfg.workload) | {"demand": 1.0, "latency": "queue"}, cfg, quality.models)
    )
    counts = [int(scenario.steps[(scenario.steps - int(cfg.service.steps)).abs().argmin()])] * len(names)
    seconds = alone(
        list(models.values()), counts, prompts.texts[0], repeats=int(cfg.service.timing_repeats), clock=clock
    )
    share = seconds.sqrt() / seconds.sqrt().sum()
    rate = float(cfg.service.utilisation) * float((share / seconds).min()) * len(names)
    stream = poisson(
        [rate / len(categories)] * len(categories), categories, requests=int(cfg.service.requests), seed=int(cfg.seed)
    )
    even = torch.full((1, len(categories), len(names)), 1 / len(names), dtype=torch.float64)
    plan = Plan(even, torch.tensor([counts]), share[None])
    found = serve(stream, prompts, models, plan, routing=str(cfg.replay.routing), seed=int(cfg.seed), progress=True,
                  alone_s=seconds, clock=clock)  # fmt: skip
    return table, found, names, plan


def _device() -> str:
    from edgesched.campaign import device_name

    return device_name(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def _finish(
    cfg: DictConfig,
    folder: Path,
    tracker: Tracker,
    table: ScoreTable,
    metrics: Mapping[str, Any],
    title: str,
    words: Sequence[str],
    columns: Sequence[str],
    rows: Sequence[Sequence[report.Cell]],
    pictures: Mapping[str, tuple[Path, str]],
) -> None:
    """Table and words in the terminal, the page, and W&B."""
    report.print_table(title, list(columns), [list(row) for row in rows])
    for sentence in words:
        print(sentence, flush=True)
    facts = {"Scores come from": table.device, "Run took": f"{metrics['seconds_total']:.1f} s"}
    if "stream" in metrics:
        facts["Requests"] = f"{metrics['stream']['requests']}, {sum(metrics['stream']['rate']):.2f} a second"
    report.write_html(
        folder / "report.html", f"edgesched: {cfg.name}", facts,
        [
            report.Section(title, words, columns, rows, list(pictures.values())),
            report.Section("All of it", code=json_document(metrics)),
        ],
    )  # fmt: skip
    tracker.score_table(table)
    tracker.summary(dict(metrics))
    tracker.table(cfg.name, list(columns), [[report.show(cell) for cell in row] for row in rows])
    tracker.images({name: file for name, (file, _) in pictures.items()})
