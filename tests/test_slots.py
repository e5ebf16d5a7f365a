"""Replanning is served as a plain simulation of shares that change would serve it; forecasts look back only."""

import numpy as np
import pytest
import torch

import edgesched as es
from edgesched.errors import RequestError
from edgesched.objective import service_times
from edgesched.requests import RequestStream, bursty, poisson
from edgesched.slots import demand_of_slots, forecast, plan_slots, run_slots

NAMES = ("a", "b", "c")


def scenario(latency="queue", seed=0):
    return es.Scenario.random(1, categories=3, models=3, steps=6, latency=latency, seed=seed)


def by_hand(stream, scenario, run, slot_s):
    """Small steps in time: every model works off its requests in order at the share of the moment."""
    slots = len(run.plan)
    seconds = service_times(scenario.repeat(slots), run.plan.steps)
    left = [float(seconds[s, m]) for s, m in zip(run.slot.tolist(), run.model.tolist(), strict=True)]
    arrival, finish = stream.arrival_s[0].tolist(), [None] * len(left)
    share, clock, dt = None, 0.0, slot_s / 4_000
    for tick in range(10**7):
        if tick % 4_000 == 0:
            k = tick // 4_000
            work = [sum(w for w, m, a, f in zip(left, run.model.tolist(), arrival, finish, strict=True)
                        if m == i and a < clock - 1e-12 and f is None) for i in range(3)]  # fmt: skip
            total = sum(work)
            part = min(0.9, total / slot_s) if k < slots else 1.0
            base = run.plan.share[min(k, slots - 1)].tolist()
            share = [b * (1 - part) + (part * w / total if total > 0 else 0.0) for b, w in zip(base, work, strict=True)]
            if k >= slots and total <= 0:
                break
        for m in range(3):
            budget = share[m] * dt
            for i, of in enumerate(run.model.tolist()):
                if of != m or finish[i] is not None or arrival[i] > clock or budget <= 0:
                    continue
                spent = min(budget, left[i])
                left[i] -= spent
                budget -= spent
                if left[i] <= 1e-12:
                    finish[i] = clock + dt
        clock += dt
    return np.array(finish) - np.array(arrival)


@pytest.mark.parametrize("seed", [0, 1])
def test_latencies_are_those_of_a_plain_simulation_in_small_steps(seed):
    problem = scenario(seed=seed)
    stream = bursty([0.5, 0.6, 0.4], NAMES, requests=24, burst_s=4.0, burst=5.0, seed=seed)
    run = run_slots(stream, problem, es.solve, slot_s=4.0, seed=seed)
    expected = by_hand(stream, problem, run, 4.0)
    assert np.allclose(run.latency_s, expected, atol=4.0 / 1_000)
    assert int(run.backlog[-1]) >= 0


def test_nothing_is_lost_when_the_server_is_overwhelmed():
    problem = scenario(seed=3)
    stream = poisson([40.0, 40.0, 40.0], NAMES, requests=600, seed=3)
    run = run_slots(stream, problem, es.solve, slot_s=1.0, how="last")
    assert bool(run.latency_s.isfinite().all())
    assert bool((run.latency_s > 0).all())
    work = service_times(problem.repeat(len(run.plan)), run.plan.steps)[run.slot, run.model].sum()
    assert float((stream.arrival_s[0] + run.latency_s).max()) == pytest.approx(float(work), rel=0.5)
    assert int(run.backlog[-1]) > 100


def test_a_plan_for_a_constant_demand_is_made_once():
    problem = scenario("slot")
    expected = torch.tensor([[2.0, 1.0, 3.0]], dtype=torch.float64).repeat(5, 1)
    calls = []

    def search(batch):
        calls.append(len(batch))
        return es.solve(batch)

    plan = plan_slots(problem, expected, 1.0, search)
    assert calls == [1]
    assert len(plan) == 5
    one = es.solve(
        es.Scenario(
            expected[:1],
            problem.quality,
            problem.steps,
            problem.step_time_s,
            problem.overhead_s,
            problem.latency_weight,
        )
    )
    assert torch.equal(plan.steps[3], one.plan.steps[0])


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
