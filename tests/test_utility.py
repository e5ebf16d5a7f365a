"""Utility, shares and bounds against plain Python, brute force and finite differences."""

import dataclasses

import numpy as np
import pytest
import torch
from factories import draw_plan
from hypothesis import given
from hypothesis import strategies as st
from reference import simplex, utility

import edgesched as es
from edgesched.equations.bounds import gap, regret
from edgesched.equations.delay import total_delay
from edgesched.equations.utility import single_best_plan, single_best_utility
from edgesched.errors import PlanError

latencies = st.sampled_from(["slot", "queue"])
seeds = st.integers(0, 10_000)


@given(latencies, seeds, st.booleans())
def test_evaluate_equals_the_equations(latency, seed, sharp):
    s = es.Scenario.random(3, categories=3, models=3, steps=6, seed=seed, latency=latency)
    plan = draw_plan(s, seed, sharp)
    outcome = es.evaluate(s, plan)
    for b in range(3):
        expected = utility(s, b, plan.assignment[b].tolist(), plan.steps[b].tolist(), plan.share[b].tolist())
        assert outcome.utility[b].item() == pytest.approx(expected, rel=1e-12)
        assert outcome.feasible[b].item() == np.isfinite(expected)


def test_loaded_model_without_share_or_allowed_steps_is_infeasible_never_nan():
    s = es.Scenario([[1.0]], [[[[5.0, -torch.inf], [6.0, 7.0]]]], [1, 2], [[0.1, 0.1]], 0.0, 0.1)
    no_share = es.evaluate(s, es.Plan([[[0.5, 0.5]]], [[1, 1]], [[1.0, 0.0]]))
    masked = es.evaluate(s, es.Plan([[[0.5, 0.5]]], [[2, 1]], [[0.5, 0.5]]))
    unloaded = es.evaluate(s, es.Plan([[[0.0, 1.0]]], [[2, 1]], [[0.0, 1.0]]))
    for outcome in (no_share, masked):
        assert outcome.utility.item() == -torch.inf
        assert not outcome.feasible.item()
    assert unloaded.utility.item() == pytest.approx(6 - 0.1 * 0.1)


def test_evaluate_refuses_foreign_steps_and_shapes():
    s = es.Scenario.random(1, steps=5)
    with pytest.raises(PlanError, match="7 is not one of"):
        es.evaluate(s, es.Plan(torch.full((1, 4, 3), 1 / 3), torch.full((1, 3), 7), torch.full((1, 3), 1 / 3)))
    with pytest.raises(PlanError, match="the scenario needs shape"):
        es.evaluate(s, es.Plan(torch.full((1, 2, 3), 1 / 3), torch.full((1, 3), 1), torch.full((1, 3), 1 / 3)))


def test_constraints_make_plans_infeasible():
    base = es.Scenario.random(1, models=2, steps=4, seed=3)
    plan = es.Plan(torch.full((1, 4, 2), 0.5), [[2, 2]], [[0.3, 0.7]])
    free = es.evaluate(base, plan)
    sliced = dataclasses.replace(base, share_units=7)
    tight = dataclasses.replace(base, memory_gib=[[4.0, 6.0]], memory_limit_gib=[8.0])
    late = dataclasses.replace(base, deadline_s=free.latency_s / 2)
    assert free.feasible.item()
    for s in (sliced, tight, late):
        assert not es.evaluate(s, plan).feasible.item()
    assert es.evaluate(sliced, es.Plan(plan.assignment, plan.steps, [[3 / 7, 4 / 7]])).feasible.item()


@given(latencies, seeds)
def test_best_share_beats_every_other_share(latency, seed):
    s = es.Scenario.random(4, categories=2, models=3, steps=5, seed=seed, latency=latency)
    plan = draw_plan(s, seed)
    steps = plan.steps if latency == "slot" else torch.ones_like(plan.steps)
    best = es.best_share(s, plan.assignment, steps)
    assert best.sum(-1).allclose(torch.ones(4, dtype=torch.float64))
    ours = es.evaluate(s, es.Plan(plan.assignment, steps, best)).utility
    for share in simplex(3, 12):
        other = es.Plan(plan.assignment, steps, torch.tensor(share, dtype=torch.float64).expand(4, 3))
        assert (es.evaluate(s, other).utility <= ours + 1e-9).all()


@given(latencies, seeds)
def test_unit_shares_equal_brute_force(latency, seed):
    s = dataclasses.replace(
        es.Scenario.random(3, categories=2, models=3, steps=4, seed=seed, latency=latency), share_units=7
    )
    plan = draw_plan(s, seed)
    steps = torch.ones_like(plan.steps)
    best = es.evaluate(s, es.Plan(plan.assignment, steps, es.best_share(s, plan.assignment, steps))).utility
    tried = [
        es.evaluate(s, es.Plan(plan.assignment, steps, torch.tensor(f, dtype=torch.float64).expand(3, 3))).utility
        for f in simplex(3, 7)
    ]
    expected = torch.stack(tried).amax(0)
    assert torch.allclose(best, expected) or torch.equal(best.isfinite(), expected.isfinite())
    finite = expected.isfinite()
    assert torch.allclose(best[finite], expected[finite])


@given(latencies, seeds, st.booleans())
def test_upper_bound_holds_for_every_plan(latency, seed, given_assignment):
    s = es.Scenario.random(8, categories=3, models=3, steps=10, seed=seed, latency=latency)
    fixed = draw_plan(s, seed).assignment
    bound = es.upper_bound(s, fixed if given_assignment else None)
    for i in range(6):
        plan = draw_plan(s, seed + i, sharp=i % 2 == 0)
        p = fixed if given_assignment else plan.assignment
        best = es.evaluate(s, es.Plan(p, plan.steps, es.best_share(s, p, plan.steps))).utility
        assert (best <= bound + 1e-9 * bound.abs()).all()
    assert (es.upper_bound(s, fixed) <= es.upper_bound(s) + 1e-9).all()


def test_bounds_at_the_edges():
    s = es.Scenario.random(4, seed=1)
    free = dataclasses.replace(s, latency_weight=torch.zeros(4, dtype=torch.float64))
    best = (s.demand * s.quality.amax((-1, -2))).sum(-1) / s.demand.sum(-1)
    assert torch.allclose(es.upper_bound(free), best)
    masked = dataclasses.replace(s, quality=torch.full_like(s.quality, -torch.inf))
    assert (es.upper_bound(masked) == -torch.inf).all()


def test_bound_is_monotone_in_the_weight():
    s = es.Scenario.random(6, seed=4)
    heavier = dataclasses.replace(s, latency_weight=2 * s.latency_weight)
    assert (es.upper_bound(heavier) <= es.upper_bound(s) + 1e-9).all()


def test_single_best_is_the_best_single_plan_and_regret_is_one_there():
    s = es.Scenario.random(3, categories=2, models=3, steps=5, seed=2)
    ours = single_best_utility(s)
    everyone = []
    for m in range(3):
        for k in s.steps:
            p = torch.zeros(3, 2, 3, dtype=torch.float64)
            p[..., m] = 1
            share = torch.zeros(3, 3, dtype=torch.float64)
            share[:, m] = 1
            everyone.append(es.evaluate(s, es.Plan(p, k.expand(3, 3), share)).utility)
    assert torch.allclose(ours, torch.stack(everyone).amax(0))
    bound = es.upper_bound(s)
    assert torch.allclose(regret(s, bound, ours), torch.ones(3, dtype=torch.float64))
    assert (gap(bound, ours) >= 0).all()
    assert single_best_plan(s).assignment.sum(-1).eq(1).all()


def test_soft_utility_equals_evaluate_at_one_hot_weights():
    s = es.Scenario.random(5, seed=7)
    plan = draw_plan(s, 7)
    weights = torch.nn.functional.one_hot(plan.steps - 1, 50).double()
    assert torch.allclose(es.soft_utility(s, plan.assignment, weights, plan.share), es.evaluate(s, plan).utility)


@pytest.mark.parametrize("latency", ["slot", "queue"])
def test_gradients_match_finite_differences(latency):
    s = es.Scenario.random(2, categories=2, models=3, steps=4, seed=3, latency=latency)
    # Light load: finite differences mean something only where every queue is stable.
    s = dataclasses.replace(s, demand=0.05 * s.demand)
    steps = torch.ones(2, 3, dtype=torch.int64)
    drawn = torch.randn(2, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    logits = drawn.requires_grad_()
    share_logits = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)

    def by_parts(logits, share_logits, demand, quality, step_time, weight):
        scenario = es.Scenario(demand, quality, s.steps, step_time, s.overhead_s, weight, latency=latency)
        return es.evaluate(scenario, es.Plan(logits.softmax(-1), steps, share_logits.softmax(-1))).utility

    inputs = [t.clone().requires_grad_() for t in (s.demand, s.quality, s.step_time_s, s.latency_weight)]
    assert by_parts(logits, share_logits, *inputs).isfinite().all()
    assert torch.autograd.gradcheck(by_parts, (logits, share_logits, *inputs))
    assert torch.autograd.gradcheck(lambda z: es.best_share(s, z.softmax(-1), steps), logits, atol=1e-5)


def test_gradients_are_never_nan_with_masked_quality_and_idle_models():
    quality = torch.tensor([[[[5.0, -torch.inf], [6.0, 7.0], [-torch.inf, -torch.inf]]]], dtype=torch.float64)
    quality.requires_grad_()
    s = es.Scenario([[2.0]], quality, [1, 2], 0.1, 0.01, 0.2)
    p = torch.tensor([[[0.5, 0.5, 0.0]]], dtype=torch.float64, requires_grad=True)
    steps = torch.tensor([[1, 2, 1]])
    share = es.best_share(s, p, steps)
    es.evaluate(s, es.Plan(p, steps, share)).utility.sum().backward()
    assert p.grad.isfinite().all()
    assert not quality.grad.isnan().any()


def test_scaling_time_and_weight_together_changes_nothing():
    s = es.Scenario.random(4, seed=9)
    scaled = dataclasses.replace(
        s, step_time_s=10 * s.step_time_s, overhead_s=10 * s.overhead_s, latency_weight=s.latency_weight / 10
    )
    plan = draw_plan(s, 9)
    assert torch.allclose(es.evaluate(s, plan).utility, es.evaluate(scaled, plan).utility)
    assert torch.allclose(es.upper_bound(s), es.upper_bound(scaled))


def test_queue_delay_is_pollaczek_khinchine():
    load, service, share = torch.tensor([[2.0]]), torch.tensor([[0.25]]), torch.tensor([[1.0]])
    delay, stable = total_delay("queue", load, service, share)
    assert stable.all()
    assert delay.item() == pytest.approx(2.0 * 0.25 * (1 + 0.5 / (2 * 0.5)))
