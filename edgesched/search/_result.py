"""What every search method shares: checking what is given, and certifying what was found."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from edgesched.bounds import gap, upper_bound
from edgesched.errors import SearchError
from edgesched.objective import evaluate, step_indices
from edgesched.types import Plan, Scenario, SearchResult


def checked_assignment(scenario: Scenario, assignment: Tensor | None) -> Tensor | None:
    """A given assignment, checked by the rules of a plan and expanded over the batch."""
    if assignment is None:
        return None
    b, c, m, _ = scenario.shape
    given = torch.as_tensor(assignment, dtype=scenario.demand.dtype, device=scenario.device)
    if given.shape not in ((b, c, m), (c, m), (1, c, m)):
        raise SearchError(f"assignment: the scenario needs shape {(b, c, m)}, got {tuple(given.shape)}")
    given = given.expand(b, c, m)
    Plan(given, scenario.steps[:1].expand(b, m), torch.zeros(b, m, dtype=given.dtype, device=given.device))
    return given


def checked_steps(scenario: Scenario, steps: Tensor | None) -> Tensor | None:
    """Given step counts as indices of the scenario's options, shape (B, M)."""
    if steps is None:
        return None
    b, _, m, _ = scenario.shape
    given = torch.as_tensor(steps, device=scenario.device).expand(b, m)
    return step_indices(scenario, given)


def positive(name: str, value: int) -> None:
    """Refuse a count below 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise SearchError(f"{name}: expected a positive integer, got {value!r}")


def certified(
    method: str,
    scenario: Scenario,
    assignment: Tensor | None,
    plan: Plan,
    started: float,
    proposals: int,
    history: Tensor | None = None,
    bound: Tensor | None = None,
) -> SearchResult:
    """Evaluate a plan and put its bound and gap beside it.

    The bound is on what could be chosen: on plans with the given assignment if there is one. A method that
    has proven a tighter one gives its own.
    """
    if scenario.device.type == "cuda":  # work that was only queued has not been done
        torch.cuda.synchronize(scenario.device)
    elapsed = time.perf_counter() - started
    outcome = evaluate(scenario, plan)
    if bound is None:
        bound = upper_bound(scenario, assignment)
    if history is None:
        history = outcome.utility[None]
    return SearchResult(
        method, plan, outcome.utility, bound, gap(bound, outcome.utility), outcome.feasible, history, proposals, elapsed
    )
