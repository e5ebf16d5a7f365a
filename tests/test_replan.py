"""Replanning is served as a plain simulation of shares that change would serve it; forecasts look back only."""

import numpy as np
import pytest
import torch

import edgesched as es
from edgesched.equations.utility import service_times
from edgesched.errors import RequestError
from edgesched.streams.arrivals import RequestStream, bursty, poisson
from edgesched.streams.replan import demand_of_slots, forecast, run_slots

NAMES = ("a", "b", "c")


def scenario(latency="queue", seed=0):
    return es.Scenario.random(1, categories=3, models=3, steps=6, latency=latency, seed=seed)


def one_model_each(batch):
    """A plan that sends every category whole to one model, another one when there is much of it."""
    busiest = batch.demand.argmax(-1)
    place = (torch.arange(3) + busiest[:, None]) % 3
    return es.solve(batch, assignment=torch.nn.functional.one_hot(place, 3).double())


def one_by_one(stream, scenario, run, slot_s):
    """Oracle: every request of every slot begun and finished by a plain loop, at the plans' shares."""
    seconds = service_times(scenario.repeat(len(run.plan)), run.plan.steps)
    arrival, category = stream.arrival_s[0].tolist(), stream.category[0].tolist()
    finish, waiting, arrived = [None] * len(arrival), [], 0
    running = [None] * 3  # request and full-server seconds that it still needs
    for k in range(len(run.plan)):
        begin, end = k * slot_s, (k + 1) * slot_s
        share = run.plan.share[k].tolist()
        stranded = [r[1] if r is not None and share[m] <= 0 else 0.0 for m, r in enumerate(running)]
        if sum(stranded) > 0:
            part = min(0.9, sum(stranded) / slot_s)
            share = [f * (1 - part) + part * w / sum(stranded) for f, w in zip(share, stranded, strict=True)]
        while arrived < len(arrival) and arrival[arrived] < end:
            waiting.append(arrived)
            arrived += 1
        to = run.plan.assignment[k].argmax(-1).tolist()
        for m in range(3):
            free = begin
            if running[m] is not None:
                number, left = running[m]
                free = begin + left / share[m]
                if free > end:
                    running[m] = (number, left - share[m] * slot_s)
                    continue
                finish[number], running[m] = free, None
            for number in [i for i in waiting if to[category[i]] == m] if share[m] > 0 else []:
                start = max(free, arrival[number])
                if start >= end:
                    break
                waiting.remove(number)
                free = start + float(seconds[k, m]) / share[m]
                if free > end:
                    running[m] = (number, (free - end) * share[m])
                    break
                finish[number] = free
    assert not waiting
    assert running == [None] * 3
    return np.array(finish, float) - np.array(arrival)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("slot_s", [4.0, 0.7])
def test_every_latency_is_that_of_a_plain_loop_over_requests(seed, slot_s):
    problem = scenario(seed=seed)
    stream = bursty([0.5, 0.6, 0.4], NAMES, requests=60, burst_s=4.0, burst=5.0, seed=seed)
    run = run_slots(stream, problem, one_model_each, slot_s=slot_s, how="last", seed=seed)
    assert run.latency_s.numpy() == pytest.approx(one_by_one(stream, problem, run, slot_s), rel=1e-9, abs=1e-9)
    assert int(run.backlog[-1]) == 0


def test_nothing_is_lost_when_the_server_is_overwhelmed():
    problem = scenario(seed=3)
    stream = poisson([40.0, 40.0, 40.0], NAMES, requests=120, seed=3)
    run = run_slots(stream, problem, es.solve, slot_s=2.0, how="last")
    assert bool(run.latency_s.isfinite().all())
    assert bool((run.latency_s > 0).all())
    work = service_times(problem.repeat(len(run.plan)), run.plan.steps)[run.slot, run.model].sum()
    assert float((stream.arrival_s[0] + run.latency_s).max()) >= float(work) - 1e-6
    assert int(run.backlog.max()) > 60
    assert int(run.backlog[-1]) == 0


def test_a_plan_for_the_mean_is_made_once_and_one_for_every_slot_otherwise():
    stream = poisson([1.0, 1.0, 1.0], NAMES, requests=60, seed=0)
    calls = []

    def search(batch):
        calls.append(batch.demand)
        return es.solve(batch)

    run_slots(stream, scenario("slot"), search, slot_s=5.0, how="once")
    assert len(calls) == 1
    calls.clear()
    run = run_slots(stream, scenario("slot"), search, slot_s=5.0, how="last")
    assert len(calls) == len(run.plan)


def test_what_is_left_over_is_planned_for():
    stream = RequestStream(torch.zeros(1, 120), torch.zeros(1, 120, dtype=torch.int64), NAMES)
    seen = []

    def search(batch):
        seen.append(float(batch.demand.sum()))
        return es.solve(batch)

    run = run_slots(stream, scenario("slot"), search, slot_s=0.5, how="last")
    # After the last request a twentieth of the mean is expected: of 120, and of the twentieth of 40 · 0.05 elsewhere.
    assert seen[1] == pytest.approx(float(run.backlog[0]) + 0.05 * (120 + 2 * 0.05 * 40 * 0.05))
    assert run.backlog[0] > run.backlog[-1] == 0
    assert bool((run.backlog.diff() <= 0).all())


def test_forecasts_look_back_only():
    demand = torch.rand(20, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 10
    floor = 0.05 * demand.mean(0)
    later = torch.cat([demand[:10], demand[10:].flip(0)])
    for how in ("last", "ewma"):
        assert torch.allclose(forecast(demand, how)[:11], forecast(later, how)[:11])
        assert not torch.allclose(forecast(demand, how)[11:], forecast(later, how)[11:])
    assert torch.allclose(forecast(demand, "last")[1:], demand[:-1].maximum(floor))
    assert torch.allclose(forecast(demand, "known"), demand.maximum(floor))
    assert forecast(demand, "once").unique(dim=0).shape[0] == 1
    assert torch.allclose(forecast(demand, "ewma", ewma=1.0), forecast(demand, "last"))
    level = demand.mean(0) * 0.7 + demand[0] * 0.3
    assert torch.allclose(forecast(demand, "ewma", ewma=0.3)[1], level)


def test_every_request_is_in_its_slot():
    stream = poisson([1.0, 2.0, 3.0], NAMES, requests=500, seed=1)
    demand = demand_of_slots(stream, 2.0)
    assert int(demand.sum()) == 500
    assert demand[3, 1] == ((stream.arrival_s[0] // 2.0 == 3) & (stream.category[0] == 1)).sum()


def test_replanning_follows_a_demand_that_moves():
    """When all requests change category half-way, plans that follow beat the plan for the mean."""
    problem = scenario("slot", seed=5)
    n = 400
    arrival = torch.linspace(0, 200, n, dtype=torch.float64)[None]
    category = torch.where(arrival < 100, 0, 2)
    stream = RequestStream(arrival, category, NAMES)
    value = {}
    for how in ("once", "last", "known"):
        run = run_slots(stream, problem, es.solve, slot_s=10.0, how=how)
        quality = problem.quality[0, category[0], run.model, run.step]
        value[how] = float((quality - problem.latency_weight * run.latency_s).mean())
    assert value["last"] > value["once"] - 1e-9
    assert value["known"] > value["once"] - 1e-9


def test_bad_input_is_named():
    stream = poisson([1.0], ["a"], requests=5, replicas=2)
    with pytest.raises(RequestError, match="expected one replica, got 2"):
        demand_of_slots(stream, 1.0)
    with pytest.raises(RequestError, match="slot_s"):
        demand_of_slots(stream, 0.0)
    with pytest.raises(RequestError, match="forecast: 'guess' is not one of last, ewma, once, known"):
        forecast(torch.ones(2, 2), "guess")
    with pytest.raises(RequestError, match="ewma"):
        forecast(torch.ones(2, 2), "ewma", ewma=0.0)


def test_a_slot_is_planned_from_the_plan_of_the_slot_before():
    seen = []

    def search(batch, start=None):
        seen.append((start, one_model_each(batch)))
        return seen[-1][1]

    run_slots(poisson([2.0] * 3, NAMES, requests=60, seed=1), scenario(), search, slot_s=3.0, how="last")
    assert seen[0][0] is None
    assert len(seen) > 3
    for i, (start, _) in enumerate(seen[1:], 1):
        assert start is None or any(start is result.plan for _, result in seen[max(0, i - 2) : i])
    assert sum(start is not None for start, _ in seen) >= len(seen) - 2
