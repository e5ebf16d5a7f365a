"""The simulate task: a stream of requests served under the plan of every method."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from edgesched._checks import expect_positive, expect_whole
from edgesched.assign import Method, plan_all
from edgesched.equations.utility import evaluate, service_times
from edgesched.errors import ArgumentError
from edgesched.evaluation.replay import prompt_scores
from edgesched.evaluation.streamed import served_utility
from edgesched.report import streams
from edgesched.report.page import Cell, Page, Section
from edgesched.runs.run import Run
from edgesched.streams.arrivals import RequestStream
from edgesched.streams.queues import Served, agreement, backlog, summary
from edgesched.streams.queues import simulate as serve_stream
from edgesched.tasks.pictures import Album, sentences, stream_facts
from edgesched.tasks.problem import Arrivals, Problem, stream_of
from edgesched.types import Plan, Scenario

_TIMES = 200


def simulate(
    run: Run,
    *,
    problem: Problem,
    methods: Mapping[str, Method],
    arrivals: Arrivals | None,
    deadline_s: float | None = 2.0,
    agreement_requests: int = 20000,
    seed: int = 0,
) -> float:
    """Plan with every method, serve one stream under each plan, and hold the simulator against theory.

    Args:
        run: Where the results go.
        problem: What is planned for, in queue mode.
        methods: Assignment and search of every method, by name.
        arrivals: Makes the stream.
        deadline_s: Seconds within which a request should be done, or None.
        agreement_requests: Requests of each replica that theory is checked with.
        seed: Seed of the stream and the routing.

    Returns:
        Utility of the best method.

    Raises:
        ArgumentError: If a value is out of range, or no plan keeps up with the demand.
    """
    expect_whole("stream.agreement_requests", agreement_requests)
    if deadline_s is not None:
        expect_positive("stream.deadline_s", deadline_s)
    scenario, quality, held = problem.scenario, problem.fitted, problem.held
    if scenario.latency != "queue":
        raise ArgumentError(
            f"workload.latency: a stream is served from a queue, not by {scenario.latency!r}; give queue"
        )
    planned = plan_all(methods, scenario, quality)
    results = {n: r for n, r in planned.items() if bool(r.feasible.all())}
    if not results:
        raise ArgumentError(
            "workload.demand: no method finds a plan that keeps up with it; lower it or give more compute"
        )
    stream = stream_of(problem, arrivals, held.categories, seed)
    plans = {name: result.plan for name, result in results.items()}
    together = Plan(*(torch.cat([getattr(p, f) for p in plans.values()]) for f in ("assignment", "steps", "share")))
    begun = time.perf_counter()
    served = serve_stream(stream, scenario, together, discipline="queue", seed=seed)
    simulated_s = time.perf_counter() - begun
    rows = _rows(problem, stream, served, plans, deadline_s, seed)
    best = max(rows, key=lambda n: rows[n]["utility"])
    checked = agreement(scenario, plans[best], requests=agreement_requests, seed=seed)
    left_out = [n for n in methods if n not in results]
    remarks = list(quality.remarks("queue"))
    metrics: dict[str, Any] = {
        "methods": rows,
        "agreement": checked,
        "stream": {"requests": len(stream), "replicas": stream.replicas, "rate": stream.rate.tolist(), "simulated_s": simulated_s,
                   "requests_per_second": len(stream) * stream.replicas * len(plans) / max(simulated_s, 1e-9)},
        "left_out": left_out,
        "remarks": remarks,
        "source": problem.source,
        "words": [
            *_agreement_words(checked),
            *_left_out_words([n for n in planned if n not in results]),
            *_overload_words(stream, scenario, plans, quality.models),
            *sentences(remarks),
        ],
    }  # fmt: skip
    run.save(metrics)
    run.publish(_page(problem, metrics, _pictures(run, stream, served, list(plans))))
    return float(rows[best]["utility"])


def _rows(
    problem: Problem,
    stream: RequestStream,
    served: Served,
    plans: Mapping[str, Plan],
    deadline_s: float | None,
    seed: int,
) -> dict[str, dict[str, Any]]:
    """What came of every plan: utility, quality, latencies and how busy each model was."""
    scenario, models = problem.scenario, problem.fitted.models
    found = summary(stream, served, deadline_s=deadline_s)
    scores = prompt_scores(problem.held, models, scenario.steps)
    weight = float(scenario.latency_weight[0])
    rows: dict[str, dict[str, Any]] = {}
    for i, (name, plan) in enumerate(plans.items()):
        model = served.model[i, 0]
        step = torch.searchsorted(scenario.steps, plan.steps)[0][model]
        seen, utility = served_utility(stream, model, step, served.latency_s[i, 0], scores, weight, seed)
        rows[name] = {
            "utility": utility, "quality": seen, "planned_latency_s": float(evaluate(scenario, plan).latency_s[0]),
        }  # fmt: skip
        rows[name] |= {key: float(value[i].mean()) for key, value in found.items() if key != "utilisation"}
        rows[name]["utilisation"] = dict(zip(models, found["utilisation"][i].mean(0).tolist(), strict=True))
    return rows


def _pictures(run: Run, stream: RequestStream, served: Served, names: Sequence[str]) -> Album:
    """Draw what was found."""
    times = torch.linspace(0, float(stream.arrival_s[0, -1]), _TIMES, dtype=torch.float64)
    waiting = backlog(stream, served, times)[:, 0]
    latencies = {name: served.latency_s[i, 0].numpy() for i, name in enumerate(names)}
    lines = {name: waiting[i].numpy() for i, name in enumerate(names)}
    album = Album(run.figures)
    album.keep("latency", streams.service(latencies, times.numpy(), lines), "Left: latencies of requests, as the share that waits "
               "longer. Right: requests in the system.")  # fmt: skip
    return album


def _page(problem: Problem, metrics: Mapping[str, Any], album: Album) -> Page:
    columns = (
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
    )
    rows: list[list[Cell]] = [
        [n, r["utility"], r["quality"], r["mean_s"], r["planned_latency_s"], r["p50_s"], r["p95_s"], r["p99_s"],
         None if "missed" not in r else f"{100 * r['missed']:.1f} %", f"{100 * max(r['utilisation'].values()):.0f} %"]
        for n, r in sorted(metrics["methods"].items(), key=lambda item: -item[1]["utility"])
    ]  # fmt: skip
    return Page(stream_facts(problem.table, metrics), [
        Section("Requests served under every plan", metrics["words"], columns, rows, album.of("latency"), key="simulate"),
    ])  # fmt: skip


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
