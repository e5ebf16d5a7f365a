"""Branch and bound, exact optima, climbing and the tightened bound, against enumeration in plain Python."""

import dataclasses
import itertools

import pytest
import torch
from factories import draw_plan
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import brute_force, simplex, utility

import edgesched as es
from edgesched.equations.branching import Concave, branch_and_bound, value
from edgesched.equations.dual import minimise
from edgesched.equations.utility import step_service_times
from edgesched.errors import ArgumentError, SearchError
from edgesched.search._plans import plan_at

seeds = st.integers(0, 10_000)


def enumerated(scenario, assignment=None):
    """Best utility over every combination of step counts, each solved by itself."""
    b, _, m, k = scenario.shape
    best = torch.full((b,), -torch.inf, dtype=torch.float64)
    for combo in itertools.product(range(k), repeat=m):
        index = torch.tensor(combo).expand(b, m)
        if assignment is None:
            plan = plan_at(scenario, index)
        else:
            steps = scenario.steps[index]
            plan = es.Plan(assignment, steps, es.best_share(scenario, assignment, steps))
        best = torch.maximum(best, es.evaluate(scenario, plan).utility)
    return best


@pytest.mark.parametrize("joint", [True, False])
def test_exact_equals_enumeration_of_step_counts(joint):
    s = es.Scenario.random(24, categories=5, models=3, steps=6, seed=21)
    s = dataclasses.replace(s, latency_weight=20 * s.latency_weight)
    p = None if joint else draw_plan(s, 21).assignment
    result = es.search.exact(s, assignment=p)
    expected = enumerated(s, p)
    assert torch.allclose(result.utility, expected, rtol=1e-9)
    assert (result.bound >= expected - 1e-9).all()
    assert (result.gap.abs() < 1e-6).all()


@settings(max_examples=10)
@given(seeds)
def test_bounds_order_and_hold(seed):
    s = es.Scenario.random(6, categories=6, models=4, steps=12, seed=seed)
    exact = es.search.exact(s)
    plain, tight, tighter = (es.upper_bound(s, nodes=n) for n in (1, 8, 64))
    assert (tighter <= tight + 1e-9).all()
    assert (tight <= plain + 1e-9).all()
    assert (exact.utility <= tighter + 1e-9).all()
    proven = es.search.branch(s, nodes=20)
    assert (exact.utility <= proven.bound + 1e-9).all()
    assert (proven.utility <= exact.utility + 1e-9).all()
    climbed = es.search.coordinate(s)
    assert (climbed.utility <= exact.utility + 1e-9).all()
    assert ((exact.utility - climbed.utility) / exact.utility.abs()).max() < 0.02


@settings(max_examples=10)
@given(seeds)
def test_tightened_queue_bound_holds_for_every_plan(seed):
    s = es.Scenario.random(6, categories=3, models=3, steps=8, seed=seed, latency="queue")
    tight = es.upper_bound(s)
    assert (tight <= es.upper_bound(s, nodes=1) + 1e-9).all()
    for i in range(8):
        plan = draw_plan(s, seed + i, sharp=i % 2 == 0)
        share = es.best_share(s, plan.assignment, plan.steps)
        assert (es.evaluate(s, es.Plan(plan.assignment, plan.steps, share)).utility <= tight + 1e-9).all()


def test_cutting_planes_find_the_minimum_of_the_dual():
    s = es.Scenario.random(20, categories=6, models=4, steps=10, seed=2)
    problem = Concave.of(s)
    index = torch.randint(0, 10, (20, 3, 4), generator=torch.Generator().manual_seed(0))
    ours, x = value(problem, index, torch.zeros(20, 3, dtype=torch.float64))
    cost = step_service_times(s).sqrt()[:, None].expand(-1, 3, -1, -1).gather(-1, index[..., None]).squeeze(-1)
    quality = s.quality[:, None].expand(-1, 3, -1, -1, -1)
    quality = quality.gather(-1, index[:, :, None, :, None].expand(-1, -1, 6, -1, 1)).squeeze(-1)
    weight = s.latency_weight[:, None]

    def dual(x):
        net = quality - (2 * weight * x)[..., None, None] * cost[:, :, None]
        return (s.demand[:, None] * net.amax(-1)).sum(-1) + weight * x.square()

    assert torch.allclose(dual(x), ours, rtol=1e-12)
    top = (s.demand.sum(-1)[:, None] * cost.amax(-1)) * 1.01
    for fraction in torch.linspace(0, 1, 200, dtype=torch.float64):
        assert (dual(fraction * top) >= ours - 1e-9).all()


def test_minimise_without_weight_takes_the_best_gain():
    gain = torch.tensor([[1.0, 5.0, 3.0]], dtype=torch.float64)

    def choose(y):
        best, choice = (gain - y[:, None] * torch.arange(3.0, dtype=torch.float64)).max(-1, keepdim=True)
        return best.squeeze(-1) + y * choice.squeeze(-1), choice.squeeze(-1).double(), choice

    zero = torch.zeros(1, dtype=torch.float64)
    assert minimise(choose, "slot", zero, zero)[0].item() == 5.0


@pytest.mark.parametrize("latency", ["slot", "queue"])
def test_dynamic_programming_over_slices_equals_brute_force(latency):
    s = es.Scenario.random(4, categories=2, models=3, steps=4, seed=5, latency=latency)
    s = dataclasses.replace(s, share_units=7)
    plan = draw_plan(s, 5)
    result = es.search.exact(s, assignment=plan.assignment)
    for b in range(4):
        p = plan.assignment[b].tolist()
        best = max(
            utility(s, b, p, list(k), f)
            for k in itertools.product(s.steps.tolist(), repeat=3)
            for f in simplex(3, 7)
        )  # fmt: skip
        assert result.utility[b].item() == pytest.approx(best, rel=1e-9)
        assert result.bound[b] >= best - 1e-9


def test_memory_limit_is_solved_over_resident_sets():
    s = es.Scenario.random(3, categories=2, models=3, steps=3, seed=7)
    s = dataclasses.replace(
        s, memory_gib=[[2.0, 3.0, 4.0]] * 3, memory_limit_gib=[5.5, 6.5, 3.5], latency_weight=0.02 * s.latency_weight
    )
    result = es.search.exact(s)
    assert result.feasible.all()
    assert (result.gap.abs() < 1e-6).all()
    for b in range(2):
        grid = brute_force(s, b, assign_units=2, share_units=6)
        assert result.utility[b] >= grid - 1e-9
        assert result.utility[b] - grid <= 0.05 * abs(grid)
    none = es.search.exact(dataclasses.replace(s, memory_limit_gib=[1.0] * 3))
    assert not none.feasible.any()
    with pytest.raises(SearchError, match="sliced shares"):
        es.search.exact(dataclasses.replace(s, share_units=4))


@pytest.mark.parametrize("joint", [True, False])
def test_a_scenario_does_not_depend_on_its_batch(joint):
    s = es.Scenario.random(9, categories=6, models=5, steps=20, seed=3)
    p = None if joint else draw_plan(s, 3).assignment
    for method in (es.search.coordinate, es.search.branch, es.solve):
        together = method(s, assignment=p)
        for b in (0, 4):
            alone = method(s[b], assignment=None if p is None else p[b : b + 1])
            assert torch.equal(alone.plan.steps, together.plan.steps[b : b + 1])
            assert torch.allclose(alone.bound, together.bound[b : b + 1], rtol=1e-12)


def test_many_models_with_the_assignment_given_are_proven():
    s = es.Scenario.random(4, categories=16, models=12, seed=1)
    result = es.search.exact(s, assignment=draw_plan(s, 1).assignment)
    assert (result.gap.abs() < 1e-6).all()


def test_more_starts_are_never_worse_and_masked_steps_never_chosen():
    s = es.Scenario.random(6, categories=6, models=4, steps=12, seed=8)
    quality = s.quality.clone()
    quality[:, :, 1, 5:] = -torch.inf
    quality[:, :, 3] = -torch.inf
    s = dataclasses.replace(s, quality=quality)
    one, four = (es.search.coordinate(s, starts=n) for n in (1, 4))
    assert one.feasible.all()
    assert (four.utility >= one.utility - 1e-12).all()
    assert es.search.exact(s).feasible.all()


def test_time_limit_stops_the_proof_and_keeps_the_bound_valid():
    s = es.Scenario.random(2, categories=16, models=8, seed=5)
    short = es.search.branch(s, nodes=100_000, tolerance=0.0, max_seconds=0.05)
    long = es.search.branch(s, nodes=300)
    assert (long.utility <= short.bound + 1e-9).all()
    with pytest.raises(ArgumentError, match="tolerance"):
        es.search.branch(s, tolerance=-1.0)


def test_branching_alone_gives_a_bound_without_plans():
    s = es.Scenario.random(3, categories=4, models=3, steps=6, seed=1)
    proof = branch_and_bound(Concave.of(s), nodes=30, plans=False)
    assert (proof.bound / s.demand.sum(-1) >= es.search.exact(s).utility - 1e-9).all()
    assert (proof.row >= 0).all()
