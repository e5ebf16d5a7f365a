"""One call that picks the method that suits the problem."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from edgesched.search._climb import separable
from edgesched.search.anneal import anneal
from edgesched.search.branch import branch
from edgesched.search.exact import exact
from edgesched.types import Scenario, SearchResult

#: Nodes of branch and bound for each scenario, whatever the batch, so that a plan does not depend on its company.
#: At C = 16, M = 8, K = 50 they take some 3 ms a scenario and leave a proven gap of 0.1 % in the median.
_NODES = 32
_CLOSED = 1e-6
_FAST_COMBINATIONS = 20_000
_FAST_QUEUE_COMBINATIONS = 1_000
_FAST_SUBSET_MODELS = 6


def solve(scenario: Scenario, *, assignment: Tensor | None = None, seed: int = 0) -> SearchResult:
    """Plan with the method that suits the problem; the result's ``method`` names it.

    Slot mode without slices, memory limit or deadline goes to branch and bound: ``"exact"`` where the proof
    closes for every scenario within its few nodes, ``"branch"`` otherwise, with the bound reached. A given assignment
    with slices, a memory limit on few models, and few combinations of step counts are solved exactly too;
    everything else is annealed.

    Args:
        scenario: Batch of B scenarios.
        assignment: Kept as it is if given, shape (B, C, M).
        seed: Seed of whatever is random.

    Returns:
        The best plan found; infeasible only where no feasible one was met.

    Raises:
        ArgumentError: If the assignment's shape does not fit.
        PlanError: If its rows are no probabilities.

    Example:
        >>> solve(Scenario.random(1, steps=10)).method
        'exact'
    """
    if separable(scenario):
        result = branch(scenario, assignment=assignment, nodes=_NODES, tolerance=_CLOSED)
        closed = bool((result.gap <= 2 * _CLOSED).all())
        return dataclasses.replace(result, method="exact") if closed else result
    if _exactly(scenario, assignment is not None):
        return exact(scenario, assignment=assignment)
    return anneal(scenario, assignment=assignment, chains=128, iterations=2000, seed=seed)


def _exactly(scenario: Scenario, given: bool) -> bool:
    """Whether :func:`exact` solves it, and fast."""
    _, _, m, k = scenario.shape
    slot = scenario.latency == "slot"
    if not given:
        limits = scenario.share_units is not None or scenario.deadline_s is not None
        return slot and not limits and m <= _FAST_SUBSET_MODELS
    if scenario.deadline_s is None and (scenario.share_units is not None or slot):
        return True
    return k**m <= (_FAST_COMBINATIONS if slot and scenario.share_units is None else _FAST_QUEUE_COMBINATIONS)
