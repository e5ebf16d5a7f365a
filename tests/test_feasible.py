"""Feasibility is one decision, compared before utility: every search against brute force in plain Python."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import brute_force, utility

import edgesched as es
from edgesched.equations.feasible import memory_fits
from edgesched.equations.utility import single_best_plan, single_best_utility
from edgesched.errors import SearchError
from edgesched.search import anneal, branch, coordinate, exact, random_search, relax, tree

QUICK = {
    anneal: {"chains": 8, "iterations": 60},
    relax: {"starts": 2, "iterations": 20},
    tree: {"iterations": 20, "rollouts": 4},
    random_search: {"samples": 64},
    branch: {},
    coordinate: {},
    exact: {},
    es.solve: {},
}


def tiny(seed):
    """A problem of two categories, two models and two counts, of any mode, with any limits, masks and idle demand."""
    rng = np.random.default_rng(seed)
    quality = rng.normal(25, 4, (1, 2, 2, 2)) * rng.choice([1, 1e4])
    quality[rng.random(quality.shape) < rng.choice([0, 0.3])] = -np.inf
    latency = rng.choice(["slot", "queue"])
    demand = rng.choice([0.0, 1e-14, 0.5, 2.0], (1, 2), p=[0.1, 0.1, 0.4, 0.4])
    demand[0, 0] = max(demand[0, 0], 0.3)
    limits = {}
    if rng.random() < 0.3:
        limits["share_units"] = int(rng.integers(2, 6))
    if rng.random() < 0.3:
        limits |= {"memory_gib": rng.choice([0.1, 0.2, 0.30000000000000004], (1, 2)), "memory_limit_gib": [0.3]}
    if rng.random() < 0.4:
        limits["deadline_s"] = [float(rng.choice([0.2, 0.5, 2.0]))]
    times = rng.uniform(0.02, 0.25, (1, 2))
    weight = float(rng.choice([0.0, 0.1, 1000.0]))
    return es.Scenario(
        demand, quality, [1, 3], times, rng.choice([0.0, 0.05], (1, 2)), [weight], latency=str(latency), **limits
    )


def share_grid(scenario):
    return scenario.share_units or 12


@pytest.mark.parametrize("seed", [*range(24), *(pytest.param(s, marks=pytest.mark.slow) for s in range(24, 160))])
def test_every_method_is_feasible_where_brute_force_is(seed):
    scenario = tiny(seed)
    best = brute_force(scenario, 0, share_units=share_grid(scenario))
    bound = float(es.upper_bound(scenario))
    assert bound >= best - 1e-9 * max(1, abs(best))
    single = float(single_best_utility(scenario))
    for method, options in QUICK.items():
        try:
            result = method(scenario, **options)
        except SearchError:
            assert method in (branch, coordinate, exact)  # the others take every problem
            continue
        found = float(result.utility)
        assert bool(result.feasible) == math.isfinite(found)
        assert result.feasible.item() or best == -math.inf, method
        assert found >= single
        assert found <= float(result.bound) + 1e-9 * max(1, abs(found)) or found == -math.inf
        own = utility(
            scenario,
            0,
            result.plan.assignment[0].tolist(),
            result.plan.steps[0].tolist(),
            result.plan.share[0].tolist(),
        )
        assert own == pytest.approx(found, rel=1e-9, abs=1e-9)
        if method in (exact, es.solve) and result.method == "exact":
            assert found >= best - 1e-9 * max(1, abs(best))


@pytest.mark.parametrize("seed", [*range(16), *(pytest.param(s, marks=pytest.mark.slow) for s in range(16, 100))])
def test_with_the_assignment_given_too(seed):
    scenario = tiny(1000 + seed)
    rng = np.random.default_rng(seed)
    p = rng.choice([0.0, 0.5, 1.0], 2)
    assignment = [[p[0], 1 - p[0]], [p[1], 1 - p[1]]]
    best = brute_force(scenario, 0, assignment=assignment, share_units=share_grid(scenario))
    given = torch.tensor([assignment], dtype=torch.float64)
    assert float(es.upper_bound(scenario, given)) >= best - 1e-9 * max(1, abs(best))
    for method, options in QUICK.items():
        try:
            result = method(scenario, assignment=given, **options)
        except SearchError:
            continue
        assert result.feasible.item() or best == -math.inf, method
        if result.method == "exact":
            assert float(result.utility) >= best - 1e-9 * max(1, abs(best))


def test_an_ordinary_queue_is_solved():
    scenario = es.Scenario([[5.1]], [[[[20.0, 26.0]]]], [1, 2], [[0.1]], [[0.0]], [0.001], latency="queue")
    # One step: ρ = 0.51, delay 0.1 · (1 + 0.51 / 0.98) s; two steps overload the server.
    right = 20 - 0.001 * 0.1 * (1 + 0.51 / 0.98)
    for method in (es.solve, anneal, relax, tree, random_search):
        assert method(scenario).utility.item() == pytest.approx(right, abs=1e-9)


def test_a_weight_of_zero_is_no_nan_in_queue_mode():
    s = es.Scenario.random(1, models=2, steps=16, latency="queue", seed=0)
    s = dataclasses.replace(s, demand=s.demand * 0.8, latency_weight=s.latency_weight * 0)
    even = torch.full((1, 4, 2), 0.5, dtype=torch.float64)
    # By enumeration: the best mean quality among the pairs of counts whose queues fit into the server together.
    n, best = s.demand[0].numpy(), -math.inf
    q, a, o = s.quality[0].numpy(), s.step_time_s[0].numpy(), s.overhead_s[0].numpy()
    for i in range(16):
        for j in range(16):
            if 0.5 * n.sum() * (o[0] + (i + 1) * a[0] + o[1] + (j + 1) * a[1]) < 1:
                best = max(best, float((n * 0.5 * (q[:, 0, i] + q[:, 1, j])).sum() / n.sum()))
    assert best == pytest.approx(23.897, abs=1e-3)
    assert exact(s, assignment=even).utility.item() == pytest.approx(best, abs=1e-9)
    assert anneal(s, assignment=even).utility.item() == pytest.approx(best, abs=1e-6)
    assert relax(s, assignment=even).feasible.all()
    assert single_best_utility(s).isfinite().all()


def test_masks_hold_for_next_to_no_demand():
    s = es.Scenario([[1.0, 1e-14]], [[[[24.0, 25.0]], [[-math.inf, 5.0]]]], [1, 8], [[1.0]], [[0.0]], [4.0])
    assert es.upper_bound(s).item() == pytest.approx(-7)
    for method in (es.solve, exact, branch, coordinate, anneal, relax, tree):
        assert method(s).utility.item() == pytest.approx(-7)


def test_gradients_of_the_bound_are_finite_and_right_beside_masks():
    quality = torch.tensor([[[[1.0, -math.inf], [2, 3]], [[1.0, 2.0], [-math.inf, 3]]]], dtype=torch.float64)
    demand = torch.tensor([[1.0, 2.0]], dtype=torch.float64, requires_grad=True)
    p = torch.tensor([[[0.5, 0.5], [0.25, 0.75]]], dtype=torch.float64, requires_grad=True)

    def bound(n, given):
        s = es.Scenario(n, quality, [1, 2], [[0.1, 0.2]], [[0.0, 0.0]], [0.5])
        return es.upper_bound(s, given / given.sum(-1, keepdim=True))

    assert torch.autograd.gradcheck(bound, (demand, p), eps=1e-7, atol=1e-5)


def test_a_plan_hands_out_no_more_than_there_is():
    s = es.Scenario.random(3, seed=1)
    best = es.solve(s)
    p = best.plan.assignment * 1.00009
    swollen = es.Plan(p, best.plan.steps, best.plan.share)
    assert (es.evaluate(s, swollen).utility <= es.upper_bound(s) + 1e-9).all()
    assert torch.allclose(swollen.assignment.sum(-1), torch.ones(3, 4, dtype=torch.float64), atol=1e-15)
    assert (
        es.Plan(best.plan.assignment, best.plan.steps, best.plan.share * (1 + 9e-7)).share.sum(-1) <= 1 + 1e-12
    ).all()


def test_memory_is_one_number_everywhere():
    quality = [[[[1.0, 2.0], [2.0, 3.0]]]]
    both = {"memory_gib": [[0.1, 0.2]], "memory_limit_gib": [0.3]}
    s = es.Scenario([[2.0]], quality, [1, 2], [[0.1, 0.4]], [[0.0, 0.0]], [1.0], **both)
    assert memory_fits(s, torch.tensor([[True, True]])).item()
    half = es.Plan([[[0.5, 0.5]]], [[1, 1]], [[0.5, 0.5]])
    assert es.evaluate(s, half).feasible.item()
    alone = dataclasses.replace(s, memory_gib=torch.tensor([[0.1 + 0.2, 0.1 + 0.2]], dtype=torch.float64))
    free = dataclasses.replace(s, memory_gib=None, memory_limit_gib=None)
    plan = single_best_plan(free)
    assert es.evaluate(alone, plan).feasible.item()
    assert es.upper_bound(alone) >= es.evaluate(alone, plan).utility
    for method in (es.solve, anneal, relax, tree, random_search, exact):
        assert method(alone).utility >= es.evaluate(free, plan).utility - 1e-9
    tight = dataclasses.replace(alone, memory_limit_gib=torch.tensor([0.29], dtype=torch.float64))
    assert es.upper_bound(tight).item() == -math.inf
    assert not es.solve(tight).feasible.any()


@settings(max_examples=9, deadline=None)
@given(scale=st.sampled_from([1e-3, 1.0, 1e4]), weight=st.sampled_from([0.0, 1.0, 1000.0]), seed=st.integers(0, 50))
def test_no_scale_of_scores_or_weights_outbids_a_deadline(scale, weight, seed):
    s = es.Scenario.random(1, categories=2, models=2, steps=4, seed=seed)
    fastest = es.evaluate(s, single_best_plan(dataclasses.replace(s, quality=0 * s.quality))).latency_s
    s = dataclasses.replace(
        s, quality=s.quality * scale, latency_weight=torch.tensor([weight]).double(), deadline_s=fastest * 1.01
    )
    assert anneal(s, chains=8, iterations=100).feasible.all()
    assert es.solve(s, assignment=es.solve(s).plan.assignment).feasible.all()


def test_one_scenario_of_a_batch_by_any_whole_number():
    s = es.Scenario.random(3, latency="queue", seed=2)
    result = es.solve(s)
    one = np.int64(1)
    assert len(s[one]) == len(result.plan[one]) == len(result[one]) == 1
    assert torch.equal(result[-2].utility, result.utility[1:2])
    assert result[1:].history.shape[1] == 2
    assert torch.equal(es.evaluate(s[one], result.plan[one]).utility, es.evaluate(s, result.plan)[one].utility)
    with pytest.raises(IndexError):
        result[3]


def test_names_are_checked():
    s = es.Scenario.random(1, seed=0)
    named = dataclasses.replace(s, category_names=("a", "b", "c", "d"), model_names=("x", "y", "z"))
    assert named[0].to("cpu").category_names == ("a", "b", "c", "d")
    with pytest.raises(es.EdgeschedError, match="model_names: expected 3 different names"):
        dataclasses.replace(s, model_names=("x", "x", "z"))
