"""Plans that every search may fall back on: a search ends with the best feasible plan it met, or with one of these.

The best single model and step count is a plan of every joint search. With the assignment given, every model at the
smallest count that its requests may run is the plan with the least delay: if that one is not feasible, none is. Where
a joint search has met nothing feasible, small problems are enumerated over what can make a plan feasible at all.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from edgesched.equations.shares import best_share
from edgesched.equations.utility import evaluate, quality_by_step, single_best_plan
from edgesched.search._score import routed, scored
from edgesched.types import Plan, Scenario

_COMBINATIONS = 60_000
_AT_ONCE = 4_096
_PARTS = 4


def best_feasible(
    scenario: Scenario, plan: Plan, given: Tensor | None, index: Tensor | None = None, share: Tensor | None = None
) -> Plan:
    """For every scenario the best feasible plan of those met and those to fall back on.

    Args:
        scenario: Batch of B scenarios.
        plan: What a search has found.
        given: The assignment that the search was held to, shape (B, C, M), or None.
        index: Positions of the step counts that it was held to, shape (B, M), or None.
        share: Shares that it was held to, shape (B, M), or None.

    Returns:
        Plans; infeasible only where no feasible one is known.
    """
    if given is not None:
        return _better(scenario, plan, _quickest(scenario, given, index, share))
    plan = _better(scenario, plan, single_best_plan(scenario, index, share))
    lost = (~evaluate(scenario, plan).feasible).nonzero().squeeze(1).tolist()
    if not lost:
        return plan
    parts = [plan.assignment.clone(), plan.steps.clone(), plan.share.clone()]
    for b in lost:
        own = (None if index is None else index[b : b + 1], None if share is None else share[b : b + 1])
        found = _enumerated(scenario[b], *own)
        if found is not None:
            for part, new in zip(parts, (found.assignment, found.steps, found.share), strict=True):
                part[b] = new[0]
    return Plan(*parts)


def _better(scenario: Scenario, plan: Plan, other: Plan) -> Plan:
    """The plan with the higher utility for every scenario; an infeasible one has −inf. Ties stay with the first."""
    take = evaluate(scenario, other).utility > evaluate(scenario, plan).utility
    if not bool(take.any()):
        return plan
    return Plan(
        torch.where(take[:, None, None], other.assignment, plan.assignment),
        torch.where(take[:, None], other.steps, plan.steps),
        torch.where(take[:, None], other.share, plan.share),
    )


def _quickest(scenario: Scenario, given: Tensor, index: Tensor | None, share: Tensor | None) -> Plan:
    """Every model at the smallest count that its requests may run."""
    if index is None:
        index = quality_by_step(scenario, given).isfinite().int().argmax(-1)
    steps = scenario.steps[index]
    return Plan(given, steps, best_share(scenario, given, steps) if share is None else share)


def _enumerated(scenario: Scenario, index: Tensor | None, share: Tensor | None) -> Plan | None:
    """A feasible plan of one scenario, by enumeration of sets of models, useful step counts and assignments.

    A step count is useful if it is the smallest for the categories that may run it: a larger one only adds delay.
    Categories are dealt by prices of load and, while there are few combinations, in every way: in quarters, or whole.
    """
    _, c, m, _ = scenario.shape
    demanded = scenario.demand[0] > 0
    counts = [_useful(scenario, model, demanded) if index is None else [int(index[0, model])] for model in range(m)]
    sizes = 1
    for options in counts:
        sizes *= len(options) + 1
    if sizes > _COMBINATIONS:
        counts = [options[:1] for options in counts]
    chosen = [[None, *options] for options in counts]
    rows = [
        row for row in itertools.islice(itertools.product(*chosen), _COMBINATIONS) if any(k is not None for k in row)
    ]
    if not rows:
        return None
    device = scenario.device
    on = torch.tensor([[k is not None for k in row] for row in rows], device=device)
    at = torch.tensor([[counts[j][0] if k is None and counts[j] else k or 0 for j, k in enumerate(row)] for row in rows],
                      device=device)  # fmt: skip
    best: tuple[float, Plan | None] = (-float("inf"), None)

    def consider(utility: Tensor, assignment: Tensor, where: Tensor, shares: Tensor) -> None:
        nonlocal best
        at_best = int(utility.argmax())
        if float(utility[at_best]) > best[0]:
            best = (
                float(utility[at_best]),
                Plan(assignment[at_best][None], scenario.steps[where[at_best]][None], shares[at_best][None]),
            )

    if share is None:
        for first in range(0, len(rows), _AT_ONCE):
            part = slice(first, first + _AT_ONCE)
            utility, assignment, shares = routed(scenario, at[None, part], on[None, part])
            consider(utility[0], assignment[0], at[part], shares[0])
    for ways in (_quarters(m), torch.eye(m)):
        if best[1] is not None or float(len(ways)) ** c * len(at) > _COMBINATIONS:
            continue
        deals = torch.cartesian_prod(*[torch.arange(len(ways))] * c).reshape(-1, c)
        assignments = ways.to(scenario.demand)[deals.to(device)]
        distinct = at.unique(dim=0)
        for where in distinct:
            tried = where.expand(1, len(assignments), m)
            if share is None:
                utility, shares = scored(scenario, tried, assignments[None])
                consider(utility[0], assignments, tried[0], shares[0])
            else:
                held = scenario.repeat(len(assignments))
                held_share = share.expand(len(assignments), m)
                outcome = evaluate(held, Plan(assignments, scenario.steps[tried[0]], held_share))
                consider(outcome.utility, assignments, tried[0], held_share)
    return best[1]


def _useful(scenario: Scenario, model: int, demanded: Tensor) -> list[int]:
    """Positions of step counts of a model that let a category run which no smaller count lets."""
    allowed = scenario.quality[0, :, model].isfinite()[demanded]
    kept: list[int] = []
    for k in range(allowed.shape[1]):
        mine = allowed[:, k]
        if bool(mine.any()) and not any(bool((allowed[:, j] | ~mine).all()) for j in kept):
            kept.append(k)
    return kept


def _quarters(models: int) -> Tensor:
    """Every way to deal four quarters to the models, shape (ways, M)."""
    ways = (
        [row for row in itertools.product(range(_PARTS + 1), repeat=models) if sum(row) == _PARTS]
        if models <= 4
        else []
    )
    return torch.tensor(ways or torch.eye(models).tolist(), dtype=torch.float64) / (_PARTS if ways else 1)
