"""Searches against brute force, each other and the bounds."""

import dataclasses

import pytest
import torch
from factories import draw_plan
from reference import brute_force, utility

import edgesched as es
from edgesched.errors import SearchError
from edgesched.search._plans import best_assignment, plan_at

SMALL = {"chains": 32, "iterations": 400}


def agrees(result, scenario):
    """A result says what its plan gives."""
    assert torch.allclose(es.evaluate(scenario, result.plan).utility, result.utility)
    assert (result.utility <= result.bound + 1e-9 * result.bound.abs()).all()
    assert result.feasible.all()
    assert result.history.shape[1] == len(scenario)


def test_anneal_equals_exact_with_the_assignment_given_on_a_thousand_scenarios():
    s = es.Scenario.random(1000, seed=11)
    p = draw_plan(s, 11).assignment
    exact = es.search.exact(s, assignment=p)
    found = es.search.anneal(s, assignment=p, chains=16, iterations=400)
    agrees(exact, s)
    agrees(found, s)
    assert ((exact.utility - found.utility) / exact.utility.abs()).max() <= 1e-3
    assert (found.utility <= exact.utility + 1e-9).all()
    joint = es.upper_bound(s)
    for i in range(5):
        plan = draw_plan(s, i, sharp=i % 2 == 0)
        assert (es.evaluate(s, plan).utility <= joint + 1e-9).all()


@pytest.mark.parametrize("method", ["anneal", "relax", "coordinate"])
def test_joint_search_reaches_the_exact_optimum(method):
    s = es.Scenario.random(12, steps=10, seed=5)
    exact = es.search.exact(s)
    options = SMALL if method == "anneal" else {}
    found = getattr(es.search, method)(s, **options)
    agrees(exact, s)
    agrees(found, s)
    assert ((exact.utility - found.utility) / exact.utility.abs()).max() <= 1e-3
    assert (found.utility <= exact.utility + 1e-7).all()


@pytest.mark.parametrize("joint", [True, False])
def test_exact_is_at_least_brute_force_on_a_grid(joint):
    s = es.Scenario.random(3, categories=2, models=2, steps=4, seed=8)
    plan = draw_plan(s, 8)
    exact = es.search.exact(s, assignment=None if joint else plan.assignment).utility
    for b in range(3):
        grid = brute_force(s, b, assignment=None if joint else plan.assignment[b].tolist(), share_units=40)
        assert exact[b] >= grid - 1e-9
        assert exact[b] - grid <= 0.02 * abs(grid)


def test_best_assignment_beats_random_ones():
    s = es.Scenario.random(6, steps=8, seed=3)
    index = torch.tensor([[2, 4, 1]] * 6)
    ours = es.evaluate(s, plan_at(s, index)).utility
    for i in range(60):
        p = draw_plan(s, i, sharp=i % 2 == 0).assignment
        steps = s.steps[index]
        other = es.evaluate(s, es.Plan(p, steps, es.best_share(s, p, steps))).utility
        assert (other <= ours + 1e-9).all()
    assert best_assignment(s, index).sum(-1).allclose(torch.ones(6, 4, dtype=torch.float64))


def test_result_of_a_scenario_does_not_depend_on_its_batch():
    s = es.Scenario.random(6, seed=2)
    together = es.search.anneal(s, **SMALL)
    for b in (0, 3):
        alone = es.search.anneal(s[b], **SMALL)
        assert torch.equal(alone.utility, together.utility[b : b + 1])
        assert torch.equal(alone.plan.assignment, together.plan.assignment[b : b + 1])
    assert torch.equal(es.search.anneal(s, **SMALL).utility, together.utility)
    assert es.search.anneal(s, **SMALL, seed=1).utility.allclose(together.utility, rtol=1e-3)


def test_permuting_categories_and_models_permutes_the_optimum():
    s = es.Scenario.random(3, steps=6, seed=4)
    order = torch.tensor([2, 0, 1])
    moved = dataclasses.replace(
        s,
        demand=s.demand.flip(-1),
        quality=s.quality.flip(1)[:, :, order],
        step_time_s=s.step_time_s[:, order],
        overhead_s=s.overhead_s[:, order],
    )
    assert torch.allclose(es.search.exact(s).utility, es.search.exact(moved).utility)


def test_given_parts_stay_fixed():
    s = es.Scenario.random(4, seed=6)
    plan = draw_plan(s, 6)
    result = es.search.anneal(s, assignment=plan.assignment, steps=plan.steps, share=plan.share, **SMALL)
    assert torch.equal(result.plan.steps, plan.steps)
    assert torch.equal(result.plan.share, plan.share)
    assert torch.equal(result.plan.assignment, plan.assignment)
    shared = es.search.anneal(s, assignment=plan.assignment, share=plan.share, **SMALL)
    assert (shared.utility >= result.utility - 1e-12).all()


def test_annealed_shares_come_close_to_the_closed_form_without_polish():
    s = es.Scenario.random(8, seed=7)
    p = draw_plan(s, 7).assignment
    exact = es.search.exact(s, assignment=p).utility
    found = es.search.anneal(s, assignment=p, shares="annealed", polish=False, chains=64, iterations=1500)
    agrees(found, s)
    assert ((exact - found.utility) / exact.abs()).max() < 5e-3


def test_equal_allocation_and_optimal_step_are_what_they_say():
    s = es.Scenario.random(3, seed=1)
    p = draw_plan(s, 1).assignment
    equal = es.search.equal_allocation(s, assignment=p, **SMALL)
    assert torch.allclose(equal.plan.share, torch.full((3, 3), 1 / 3, dtype=torch.float64))
    steps = es.search.optimal_step(s, assignment=p, **SMALL)
    assert (steps.plan.steps == 50).all()
    free = es.search.exact(s, assignment=p)
    assert (free.utility >= equal.utility - 1e-9).all()
    assert (free.utility >= steps.utility - 1e-9).all()
    with pytest.raises(SearchError, match="needs an assignment"):
        es.search.equal_allocation(s)


@pytest.mark.parametrize("kind", ["queue", "sliced", "memory", "deadline"])
def test_anneal_keeps_constraints_and_comes_near_brute_force(kind):
    latency = "queue" if kind == "queue" else "slot"
    s = es.Scenario.random(3, categories=2, models=2, steps=3, seed=12, latency=latency)
    if kind == "sliced":
        s = dataclasses.replace(s, share_units=4)
    if kind == "memory":
        s = dataclasses.replace(s, memory_gib=[[2.0, 3.0]] * 3, memory_limit_gib=[3.5] * 3)
    if kind == "deadline":
        best = es.search.exact(s)
        late = es.evaluate(s, best.plan).latency_s
        s = dataclasses.replace(s, deadline_s=0.9 * late)
    found = es.search.anneal(s, chains=64, iterations=1500)
    if kind != "deadline":
        agrees(found, s)
    for b in range(3):
        if not found.feasible[b]:
            continue
        if kind == "memory":
            grid = max(brute_force(s, b, assignment=[[1.0, 0.0]] * 2), brute_force(s, b, assignment=[[0.0, 1.0]] * 2))
        else:
            grid = brute_force(s, b, assign_units=4, share_units=4 if kind == "sliced" else 20)
        assert found.utility[b] >= grid - 5e-3 * abs(grid)


def test_masked_step_counts_are_never_chosen():
    s = es.Scenario.random(4, steps=8, seed=3)
    quality = s.quality.clone()
    quality[:, :, 0, 4:] = -torch.inf
    quality[:, :, 2, :3] = -torch.inf
    s = dataclasses.replace(s, quality=quality)
    for result in (es.search.anneal(s, **SMALL), es.search.relax(s), es.search.exact(s), es.search.coordinate(s)):
        agrees(result, s)


def test_exact_refuses_what_it_cannot_solve():
    big = es.Scenario.random(1, models=8, latency="queue")
    with pytest.raises(SearchError, match="combinations"):
        es.search.exact(big, assignment=draw_plan(big, 0).assignment)
    with pytest.raises(SearchError, match="not proven within 3 nodes"):
        es.search.exact(es.Scenario.random(1, categories=16, models=8), nodes=3)
    with pytest.raises(SearchError, match="queue mode"):
        es.search.exact(es.Scenario.random(1, steps=3, latency="queue"))
    with pytest.raises(ValueError, match="a deadline"):
        es.search.exact(dataclasses.replace(es.Scenario.random(1, steps=3), deadline_s=[1.0]))


def test_bad_arguments_are_refused():
    s = es.Scenario.random(1, steps=3)
    for options, message in (
        ({"chains": 0}, "chains"),
        ({"iterations": -1}, "iterations"),
        ({"shares": "guess"}, "closed_form"),
        ({"cooling": 2.0}, "cooling"),
        ({"assignment": torch.ones(2, 2)}, "assignment"),
    ):
        with pytest.raises((SearchError, es.EdgeschedError), match=message):
            es.search.anneal(s, **options)
    with pytest.raises(TypeError, match="chain"):
        es.search.anneal(s, chain=3)


def test_anneal_stops_at_the_gap_and_reports_progress():
    s = es.Scenario.random(2, seed=1)
    seen = []
    result = es.search.anneal(
        s, chains=32, iterations=4000, stopping=es.search.Stopping(target_gap=0.05), callback=seen.append
    )
    assert (result.gap <= 0.05).all()
    assert result.proposals < 4000 * 32 * 2
    assert all((a.best <= b.best).all() for a, b in zip(seen, seen[1:], strict=False))
    assert all(0 <= p.acceptance <= 1 for p in seen)


def test_solve_names_its_method_and_is_near_the_best():
    assert es.solve(es.Scenario.random(1, steps=10)).method == "exact"
    assert es.solve(es.Scenario.random(1, latency="queue")).method == "anneal"
    s = es.Scenario.random(2, categories=8, models=6, steps=20, seed=3)
    result = es.solve(s)
    assert result.method in ("branch", "exact")
    agrees(result, s)
    assert (result.gap < 0.005).all()
    sliced = dataclasses.replace(s, share_units=7)
    assert es.solve(sliced, assignment=draw_plan(s, 1).assignment).method == "exact"


def test_gradient_flows_from_utility_back_to_the_demand_and_quality():
    drawn = torch.randn(1, 4, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    quality = drawn.cumsum(-1).requires_grad_()
    s = es.Scenario([[1.0, 2.0, 1.0, 1.0]], quality, [1, 2, 4, 8, 16], [[0.01, 0.02, 0.05]], 0.01, 0.5)
    es.upper_bound(s).sum().backward()
    assert quality.grad.isfinite().all()
    assert quality.grad.sum().item() == pytest.approx(1.0)


@pytest.fixture(scope="module")
def shipped():
    return es.fit_quality(es.ScoreTable.load())


@pytest.mark.parametrize(("rate", "least"), [(24, 69.7), (40, 59.0)])
def test_a_queue_on_the_shipped_table_is_solved(shipped, rate, least):
    """What a gradient search of another start found by itself; annealing once ended infeasible at these loads."""
    scenario = shipped.scenario([rate / 4] * 4, 0.1, latency="queue")
    result = es.solve(scenario)
    assert result.feasible.all()
    assert result.utility.item() >= least
    plan = result.plan
    own = utility(scenario, 0, plan.assignment[0].tolist(), plan.steps[0].tolist(), plan.share[0].tolist())
    assert own == pytest.approx(result.utility.item(), rel=1e-9)
