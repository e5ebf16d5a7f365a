"""The slots task: planning slot by slot for a stream, against planning once and against equal steps for everyone."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from rich.progress import track
from torch import Tensor

from edgesched._checks import expect_positive, expect_whole
from edgesched.errors import ArgumentError
from edgesched.evaluation.replay import prompt_scores
from edgesched.evaluation.streamed import served_utility
from edgesched.protocols import Search
from edgesched.report import streams
from edgesched.report.page import Cell, Page, Section
from edgesched.runs.run import Run
from edgesched.streams.clock import WALL, Clock
from edgesched.streams.replan import FORECASTS, SlotRun, demand_of_slots, run_slots
from edgesched.tasks.pictures import Album, sentences, stream_facts
from edgesched.tasks.problem import Arrivals, Problem, stream_of
from edgesched.types import Scenario


def slots(
    run: Run,
    *,
    problem: Problem,
    arrivals: Arrivals | None,
    search: Search,
    slot_s: float = 30.0,
    forecasts: Sequence[str] = ("last", "ewma", "once", "known"),
    ewma: float = 0.3,
    fixed_steps: int = 30,
    routing: str = "random",
    seed: int = 0,
    clock: Clock = WALL,
) -> float:
    """Plan a stream slot by slot by several forecasts, once, and with the same steps for everyone.

    Args:
        run: Where the results go.
        problem: What is planned for, in queue mode.
        arrivals: Makes the stream.
        search: Plans every slot.
        slot_s: Seconds between two plans.
        forecasts: What a plan is made for.
        ewma: Weight of the newest slot.
        fixed_steps: Steps for everyone; the nearest measured count is taken.
        routing: How a request comes to its model.
        seed: Seed of the stream and the routing.
        clock: What time it is, for the seconds that planning takes.

    Returns:
        Utility of the best way of planning.

    Raises:
        ArgumentError: If a value is out of range.
    """
    expect_positive("stream.slot_s", slot_s)
    expect_positive("stream.ewma", ewma, most=1)
    expect_whole("stream.fixed_steps", fixed_steps)
    unknown = [how for how in forecasts if how not in FORECASTS]
    if unknown:
        raise ArgumentError(f"stream.forecasts: expected a list out of {', '.join(FORECASTS)}, got {list(forecasts)}")
    scenario, quality, held = problem.scenario, problem.fitted, problem.held
    stream = stream_of(problem, arrivals, held.categories, seed)
    count = int(scenario.steps[(scenario.steps - fixed_steps).abs().argmin()])
    ways = {how: (scenario, how) for how in forecasts} | {f"{count}_steps": (_at_steps(scenario, fixed_steps), "ewma")}
    scores = prompt_scores(held, quality.models, scenario.steps)
    weight = float(scenario.latency_weight[0])
    rows: dict[str, dict[str, Any]] = {}
    made: dict[str, SlotRun] = {}
    for name, (planned, how) in track(ways.items(), description="Serving slot by slot"):
        one = made[name] = run_slots(
            stream, planned, search, slot_s=slot_s, how=how, ewma=ewma, routing=routing, seed=seed, clock=clock
        )
        seen, utility = served_utility(stream, one.model, one.step, one.latency_s, scores, weight, seed)
        rows[name] = {"utility": utility, "quality": seen, **_told(one, scenario.steps)}
    demand = demand_of_slots(stream, slot_s)
    shown = len(demand)
    remarks = list(quality.remarks(scenario.latency))
    metrics: dict[str, Any] = {
        "methods": rows,
        "words": [*_slot_words(rows, count), *_backlog_words(made, shown), *sentences(remarks)],
        "remarks": remarks,
        "stream": {"requests": len(stream), "slots": shown, "slot_s": slot_s, "rate": stream.rate.tolist()},
        "source": problem.source,
    }
    run.save(metrics)
    run.publish(_page(problem, metrics, _pictures(run, demand, made, scenario.steps, slot_s)))
    return float(max(r["utility"] for r in rows.values()))


def _told(one: SlotRun, steps: Tensor) -> dict[str, float]:
    """Latencies, backlog, planning time and step counts of one way of planning."""
    ordered = one.latency_s.sort().values
    return {
        "mean_s": float(one.latency_s.mean()),
        "p95_s": float(ordered[int(0.95 * len(ordered))]),
        "p99_s": float(ordered[int(0.99 * len(ordered))]),
        "backlog_most": int(one.backlog.max()),
        "planning_ms_a_slot": 1000 * one.planning_s / len(one.plan),
        "mean_steps": float(steps[one.step].double().mean()),
    }


def _pictures(run: Run, demand: Tensor, made: Mapping[str, SlotRun], counts: Tensor, slot_s: float) -> Album:
    """Draw what was found."""
    shown = len(demand)
    steps = {n: _mean_by_slot(counts[r.step].double(), r.slot, len(r.backlog))[:shown] for n, r in made.items()}
    left = {n: r.backlog[:shown].numpy() for n, r in made.items()}
    album = Album(run.figures)
    album.keep("slots", streams.slots(demand.sum(-1).numpy() / slot_s, left, steps, slot_s),
               "Requests a second, requests left over at the end of every slot, and mean denoising steps.")  # fmt: skip
    return album


def _page(problem: Problem, metrics: Mapping[str, Any], album: Album) -> Page:
    columns = (
        "planning",
        "utility",
        "quality",
        "mean (s)",
        "p95 (s)",
        "p99 (s)",
        "largest backlog",
        "mean steps",
        "planning (ms a slot)",
    )
    rows: list[list[Cell]] = [
        [n, r["utility"], r["quality"], r["mean_s"], r["p95_s"], r["p99_s"], r["backlog_most"], r["mean_steps"], r["planning_ms_a_slot"]]
        for n, r in sorted(metrics["methods"].items(), key=lambda item: -item[1]["utility"])
    ]  # fmt: skip
    return Page(stream_facts(problem.table, metrics), [
        Section("Slot by slot, on held-out prompts", metrics["words"], columns, rows, album.of("slots"), key="slots"),
    ])  # fmt: skip


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
