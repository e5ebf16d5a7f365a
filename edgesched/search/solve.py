"""One call that picks the method that suits the problem."""

from __future__ import annotations

from torch import Tensor

from edgesched.search.anneal import anneal
from edgesched.search.coordinate import coordinate
from edgesched.search.exact import exact
from edgesched.types import Scenario, SearchResult

_FAST_COMBINATIONS = 20_000
_FAST_JOINT_COMBINATIONS = 2_000
_FAST_QUEUE_COMBINATIONS = 1_000


def solve(scenario: Scenario, *, assignment: Tensor | None = None, seed: int = 0) -> SearchResult:
    """Plan with the method that suits the problem; the result's ``method`` names it.

    Exact enumeration where the combinations of step counts are few; coordinate ascent over step counts in
    slot mode without constraints that do not separate; annealing for everything else.

    Args:
        scenario: Batch of B scenarios.
        assignment: Kept as it is if given, shape (B, C, M).
        seed: Seed of whatever is random.

    Example:
        >>> solve(Scenario.random(1, steps=10)).method
        'exact'
    """
    _, _, m, k = scenario.shape
    slot = scenario.latency == "slot"
    separable = slot and scenario.share_units is None and scenario.memory_gib is None and scenario.deadline_s is None
    if assignment is None:
        enumerable = separable and k**m <= _FAST_JOINT_COMBINATIONS
    else:
        enumerable = k**m <= (_FAST_COMBINATIONS if slot else _FAST_QUEUE_COMBINATIONS)
    if enumerable:
        return exact(scenario, assignment=assignment)
    if separable:
        return coordinate(scenario, assignment=assignment, seed=seed)
    return anneal(scenario, assignment=assignment, chains=128, iterations=2000, seed=seed)
