"""Search over step counts alone, assignment and shares solved exactly at every point (slot mode).

See :mod:`edgesched.search._climb` for how; the bound tells how far from the optimum it can be.
"""

from __future__ import annotations

import time

from torch import Tensor

from edgesched.search._climb import climbed, needs_separable
from edgesched.search._plans import plan_of
from edgesched.search._result import certified, checked_assignment, positive
from edgesched.search._threads import threads_for
from edgesched.types import Scenario, SearchResult


def coordinate(
    scenario: Scenario, *, assignment: Tensor | None = None, starts: int = 1, sweeps: int = 50, seed: int = 0
) -> SearchResult:
    """Climb over step counts in slot mode by the best single-model change, to a local optimum.

    On ``Scenario.random(256, categories=16, models=8, steps=50)`` it is within 0.01 % of the proven joint
    optimum in the median and 0.2 % at worst, in about a millisecond each; more starts add next to nothing.

    Args:
        scenario: Batch of B scenarios in slot mode, without slices, memory limit or deadline.
        assignment: Shape (B, C, M), or None for a joint search.
        starts: Starting points: the dual's choice, then random changes of it.
        sweeps: Most changes from each starting point, in multiples of the number of models.
        seed: Seed of the other starting points.

    Returns:
        The best plan, with ``history`` of one value for each round of changes.

    Raises:
        SearchError: In queue mode or under constraints that do not separate.
        ArgumentError: If an argument is out of its range.
        PlanError: If the assignment's rows are no probabilities.

    Example:
        >>> s = Scenario.random(2, categories=16, models=8, seed=0)
        >>> bool((coordinate(s).gap < 0.02).all())
        True
    """
    started = time.perf_counter()
    positive("starts", starts)
    positive("sweeps", sweeps)
    needs_separable("coordinate", scenario)
    given = checked_assignment(scenario, assignment)
    with threads_for(starts * scenario.quality.numel()):
        index, history, proposals = climbed(scenario, given, starts, sweeps, seed)
        plan = plan_of(scenario, given, index)
        return certified("coordinate", scenario, given, plan, started, proposals, history)
