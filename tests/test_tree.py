"""Tree search, random search and relaxation under every latency model and constraint, against brute force."""

import dataclasses

import pytest
import torch
from factories import draw_plan
from reference import brute_force

import edgesched as es
from edgesched.errors import ArgumentError
from edgesched.search._score import scored

METHODS = (es.search.tree, es.search.random_search, es.search.relax)
KINDS = ("slot", "queue", "sliced", "memory", "deadline")


def tiny(kind):
    s = es.Scenario.random(2, categories=2, models=2, steps=3, seed=12, latency="queue" if kind == "queue" else "slot")
    if kind == "sliced":
        return dataclasses.replace(s, share_units=4)
    if kind == "memory":
        return dataclasses.replace(s, memory_gib=[[2.0, 3.0]] * 2, memory_limit_gib=[3.5] * 2)
    if kind == "deadline":
        return dataclasses.replace(s, deadline_s=0.9 * es.evaluate(s, es.search.exact(s).plan).latency_s)
    return s


@pytest.mark.parametrize("kind", KINDS)
def test_every_method_keeps_constraints_and_comes_near_brute_force(kind):
    s = tiny(kind)
    grids = [brute_force(s, b, assign_units=4, share_units=4 if kind == "sliced" else 8) for b in range(2)]
    for method in METHODS:
        result = method(s, iterations=80) if method is es.search.tree else method(s)
        assert result.feasible.all(), method
        assert torch.allclose(es.evaluate(s, result.plan).utility, result.utility)
        assert (result.utility <= result.bound + 1e-9).all()
        allowed = 0.03 if method is es.search.tree else 0.1
        for b, grid in enumerate(grids):
            assert result.utility[b] >= grid - allowed * abs(grid), method


@pytest.mark.parametrize("joint", [True, False])
def test_tree_comes_near_the_optimum_and_beats_random_search(joint):
    s = es.Scenario.random(6, categories=6, models=4, steps=20, seed=4)
    p = None if joint else draw_plan(s, 4).assignment
    exact = es.search.exact(s, assignment=p).utility
    found = es.search.tree(s, assignment=p, iterations=150)
    drawn = es.search.random_search(s, assignment=p, samples=150 * 16)
    assert (found.utility <= exact + 1e-9).all()
    assert ((exact - found.utility) / exact.abs()).max() < 0.01
    assert found.utility.mean() > drawn.utility.mean()
    assert (found.history.diff(dim=0) >= 0).all()
    assert (drawn.history.diff(dim=0) >= 0).all()


@pytest.mark.parametrize("method", [es.search.tree, es.search.random_search])
def test_same_seed_same_result_alone_and_in_a_batch(method):
    s = es.Scenario.random(5, categories=3, models=3, steps=6, seed=9)
    size = {"iterations": 40} if method is es.search.tree else {"samples": 300}
    together = method(s, **size, seed=3)
    assert torch.equal(method(s, **size, seed=3).utility, together.utility)
    alone = method(s[2], **size, seed=3)
    assert torch.allclose(alone.utility, together.utility[2:3], rtol=1e-12)


def test_scores_of_candidates_equal_evaluate():
    for kind in KINDS:
        s = tiny(kind)
        plan = draw_plan(s, 1, sharp=True)
        index = plan.steps - 1
        utility, share = scored(s, index[:, None], plan.assignment[:, None])
        outcome = es.evaluate(s, es.Plan(plan.assignment, plan.steps, share[:, 0]))
        assert torch.allclose(utility[:, 0], outcome.utility)


def test_masked_step_counts_are_never_chosen_and_bad_arguments_refused():
    s = es.Scenario.random(3, steps=6, seed=3)
    quality = s.quality.clone()
    quality[:, :, 0, 2:] = -torch.inf
    s = dataclasses.replace(s, quality=quality)
    assert es.search.tree(s, iterations=60).feasible.all()
    assert es.search.random_search(s, samples=500).feasible.all()
    with pytest.raises(ArgumentError, match="rollouts"):
        es.search.tree(s, rollouts=0)
    with pytest.raises(ArgumentError, match="exploration"):
        es.search.tree(s, exploration=-1.0)
    with pytest.raises(ArgumentError, match="samples"):
        es.search.random_search(s, samples=0)
