"""The closed form against an event-by-event oracle, SimPy and theory; plans and replicas do not disturb each other."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import edgesched as es
from edgesched.errors import PlanError, RequestError
from edgesched.streams.arrivals import RequestStream, poisson
from edgesched.streams.queues import (
    agreement,
    backlog,
    lindley,
    pollaczek_khinchine,
    route,
    simpy_latency,
    simulate,
    summary,
)


def by_hand(arrival, service, model, models):
    """One request after the other, in plain Python."""
    free = [0.0] * models
    latency = []
    for came, m in zip(arrival, model, strict=True):
        free[m] = max(free[m], came) + service[m]
        latency.append(free[m] - came)
    return latency


def problem(batch=1, latency="queue", seed=0):
    scenario = es.Scenario.random(batch, categories=3, models=3, steps=6, latency=latency, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    p = torch.rand((batch, 3, 3), generator=generator, dtype=torch.float64) + 0.05
    share = torch.rand((batch, 3), generator=generator, dtype=torch.float64) + 0.2
    steps = scenario.steps[torch.randint(0, 6, (batch, 3), generator=generator)]
    return scenario, es.Plan(p / p.sum(-1, keepdim=True), steps, share / share.sum(-1, keepdim=True))


def stream(requests=400, replicas=2, rate=(0.5, 0.3, 0.2), seed=0):
    return poisson(rate, ("a", "b", "c"), requests=requests, replicas=replicas, seed=seed)


@given(st.integers(0, 10_000), st.floats(0.05, 3.0))
def test_every_request_agrees_with_serving_one_after_the_other(seed, load):
    scenario, plan = problem(2, seed=seed % 50)
    came = stream(60, 2, rate=(0.5 * load, 0.3 * load, 0.2 * load), seed=seed)
    served = simulate(came, scenario, plan, seed=seed)
    for p in range(2):
        from edgesched.equations.utility import service_times

        service = (service_times(scenario, plan.steps)[p] / plan.share[p]).tolist()
        for r in range(2):
            expected = by_hand(came.arrival_s[r].tolist(), service, served.model[p, r].tolist(), 3)
            assert np.allclose(served.latency_s[p, r], expected, atol=1e-9)


def test_a_long_stream_keeps_its_precision():
    n = 400_000
    rng = np.random.default_rng(0)
    arrival, service = np.cumsum(rng.exponential(1.0, n)), np.full(n, 0.95)
    latency = lindley(torch.tensor(arrival), torch.tensor(service), torch.ones(n, dtype=torch.bool)) - torch.tensor(
        arrival
    )
    assert np.allclose(latency, by_hand(arrival, [0.95], np.zeros(n, int), 1), atol=1e-6)


def test_simpy_agrees_request_by_request():
    pytest.importorskip("simpy")
    scenario, plan = problem(seed=4)
    from edgesched.equations.utility import service_times

    came = stream(2_000, 1, seed=4)
    served = simulate(came, scenario, plan, seed=4)
    service = (service_times(scenario, plan.steps) / plan.share)[0]
    again = simpy_latency(came.arrival_s[0], service, served.model[0, 0])
    assert float((again - served.latency_s[0, 0]).abs().max()) < 1e-9


@pytest.mark.parametrize("seed", range(3))
def test_the_mean_is_pollaczek_and_khinchines_within_its_interval(seed):
    scenario = es.Scenario.random(1, categories=3, models=2, steps=6, latency="queue", seed=seed)
    plan = es.search.anneal(scenario, chains=32, iterations=200).plan
    found = agreement(scenario, plan, requests=8_000, replicas=24, checked=500, seed=seed)
    assert found["pk_relative"] < 1.6 * found["pk_halfwidth"]
    assert found["pk_halfwidth"] < 0.2
    assert found["simpy_max_abs_s"] is None or found["simpy_max_abs_s"] < 1e-8


def test_theory_by_itself():
    assert float(pollaczek_khinchine(torch.tensor(0.5), torch.tensor(1.0))) == pytest.approx(1.5)
    assert torch.isinf(pollaczek_khinchine(torch.tensor(1.0), torch.tensor(1.0)))
    assert float(pollaczek_khinchine(torch.tensor(0.0), torch.tensor(2.0))) == 2.0


def test_slots_are_batches_that_wait_for_the_one_before():
    scenario = es.Scenario([[1.0]], [[[[1.0]]]], [1], [[2.0]], [[0.0]], [0.0])
    plan = es.Plan([[[1.0]]], [[1]], [[0.5]])
    came = RequestStream([[0.0, 1.0, 10.5, 11.0, 30.0]], [[0] * 5], ("all",))
    served = simulate(came, scenario, plan, slot_s=10.0)
    # Two requests of 4 s each from 10 to 18; two more from 20 to 28; one from 40 to 44.
    assert served.finish_s[0, 0].tolist() == [18.0, 18.0, 28.0, 28.0, 44.0]
    slow = es.Plan([[[1.0]]], [[1]], [[0.125]])
    assert simulate(came, scenario, slow, slot_s=10.0).finish_s[0, 0].tolist() == [42.0, 42.0, 74.0, 74.0, 90.0]


def test_slot_mode_of_one_slot_is_the_objective():
    scenario, plan = problem(1, "slot", seed=7)
    n = scenario.demand.round().clamp(min=1)
    scenario = es.Scenario(
        n, scenario.quality, scenario.steps, scenario.step_time_s, scenario.overhead_s, scenario.latency_weight
    )
    category = torch.repeat_interleave(torch.arange(3), n[0].long())[None]
    came = RequestStream(torch.zeros(1, category.shape[1]), category, ("a", "b", "c"))
    one = es.Plan(torch.nn.functional.one_hot(plan.assignment.argmax(-1), 3).double(), plan.steps, plan.share)
    delay = simulate(came, scenario, one, slot_s=1e-9).latency_s.mean()
    assert float(delay) == pytest.approx(float(es.evaluate(scenario, one).latency_s), rel=1e-6)


def test_plans_and_replicas_do_not_depend_on_what_is_beside_them():
    scenario, plan = problem(4, seed=2)
    came = stream(300, 3, seed=2)
    whole = simulate(came, scenario, plan, seed=5)
    for i in range(4):
        alone = simulate(came, scenario[i], plan[i : i + 1], seed=5)
        assert torch.equal(whole.latency_s[i], alone.latency_s[0])
        assert torch.equal(whole.model[i], alone.model[0])


def test_routing_follows_the_plan():
    _, plan = problem(1, seed=3)
    came = stream(40_000, 1, seed=3)
    for routing, tolerance in (("random", 0.02), ("quota", 0.002)):
        model = route(came, plan.assignment, routing=routing, seed=1)[0, 0]
        for c in range(3):
            found = torch.bincount(model[came.category[0] == c], minlength=3).double()
            assert torch.allclose(found / found.sum(), plan.assignment[0, c], atol=tolerance)
    never = torch.tensor([[[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]])
    assert torch.equal(route(came, never)[0], came.category)


def test_backlog_and_summary_count_every_request():
    scenario, plan = problem(1, seed=6)
    came = stream(500, 2, seed=6)
    served = simulate(came, scenario, plan)
    times = torch.linspace(0, float(served.finish_s.max()) + 1, 50)
    waiting = backlog(came, served, times)
    assert int(waiting.min()) >= 0
    assert waiting[0, :, -1].tolist() == [0, 0]
    at = float(times[20])
    by_count = ((came.arrival_s <= at) & (served.finish_s[0] > at)).sum(-1)
    assert waiting[0, :, 20].tolist() == by_count.tolist()
    found = summary(came, served, deadline_s=float(served.latency_s.median()))
    assert torch.allclose(found["missed"].mean(), torch.tensor(0.5, dtype=torch.float64), atol=0.1)
    assert bool((found["p50_s"] <= found["p95_s"]).all() & (found["p95_s"] <= found["p99_s"]).all())
    assert bool((found["utilisation"] <= 1 + 1e-9).all())


def test_a_model_without_a_share_never_delivers():
    scenario, _ = problem(1)
    plan = es.Plan([[[1.0, 0.0, 0.0]] * 3], [scenario.steps[[0, 0, 0]].tolist()], [[0.0, 0.5, 0.5]])
    assert torch.isinf(simulate(stream(10, 1), scenario, plan).latency_s).all()


def test_bad_input_is_named():
    scenario, plan = problem(2)
    came = stream(10, 1)
    with pytest.raises(RequestError, match="discipline: 'lifo' is not one of"):
        simulate(came, scenario, plan, discipline="lifo")
    with pytest.raises(RequestError, match="routing: 'best' is not one of"):
        simulate(came, scenario, plan, routing="best")
    with pytest.raises(RequestError, match="slot_s"):
        simulate(came, scenario, plan, slot_s=0.0)
    with pytest.raises(PlanError, match="expected 1 or 2 for 2 plans, got 3"):
        simulate(came, es.Scenario.random(3, categories=3), plan)
    with pytest.raises(RequestError, match="expected 2 categories, got 3"):
        simulate(poisson([1, 1], ["a", "b"], requests=3), scenario, plan)
    with pytest.raises(RequestError, match="warm_up"):
        summary(came, simulate(came, scenario, plan), warm_up=1.0)
    with pytest.raises(RequestError, match="queue mode"):
        agreement(es.Scenario.random(1), plan[:1])


def test_categories_of_stream_and_scenario_are_matched_by_name():
    s = es.Scenario([[1.0, 1.0]], [[[[1.0], [2.0]], [[2.0], [1.0]]]], [1], [[0.1, 0.2]], [[0.0, 0.0]], [0.1],
                 latency="queue", category_names=("a", "b"))  # fmt: skip
    plan = es.Plan([[[1.0, 0.0], [0.0, 1.0]]], [[1, 1]], [[0.5, 0.5]])
    stream = poisson([0.5, 0.5], ["b", "a"], requests=200, seed=1)
    served = simulate(stream, s, plan)
    assert torch.equal(served.model[0], 1 - stream.category)
    with pytest.raises(RequestError, match="categories: the scenario's are a, b, the stream's x, y"):
        simulate(poisson([0.5, 0.5], ["x", "y"], requests=20), s, plan)
