"""What every search method shares: checking what is given, and certifying what was found."""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor

from edgesched.equations.bounds import gap, upper_bound
from edgesched.equations.utility import evaluate, step_indices
from edgesched.errors import ArgumentError
from edgesched.search._fallback import best_feasible
from edgesched.types import Plan, Scenario, SearchResult


def checked_assignment(scenario: Scenario, assignment: Tensor | None) -> Tensor | None:
    """A given assignment, checked by the rules of a plan and expanded over the batch.

    Args:
        scenario: Batch of B scenarios.
        assignment: Shape (B, C, M), (1, C, M) or (C, M), or None.

    Raises:
        ArgumentError: If the shape does not fit.
        PlanError: If rows are no probabilities.
    """
    if assignment is None:
        return None
    b, c, m, _ = scenario.shape
    given = torch.as_tensor(assignment, dtype=scenario.demand.dtype, device=scenario.device)
    if given.shape not in ((b, c, m), (c, m), (1, c, m)):
        raise ArgumentError(f"assignment: the scenario needs shape {(b, c, m)}, got {tuple(given.shape)}")
    idle = torch.zeros(b, m, dtype=given.dtype, device=given.device)
    return Plan(given.expand(b, c, m), scenario.steps[:1].expand(b, m), idle).assignment


def checked_steps(scenario: Scenario, steps: Tensor | None) -> Tensor | None:
    """Given step counts as indices of the scenario's options, shape (B, M).

    Args:
        scenario: Batch of B scenarios.
        steps: Step counts, shape (B, M), (1, M) or (M,), or None.

    Raises:
        ArgumentError: If the shape does not fit.
        PlanError: If one is not among the scenario's options.
    """
    if steps is None:
        return None
    b, _, m, _ = scenario.shape
    given = torch.as_tensor(steps, device=scenario.device)
    if given.shape not in ((b, m), (m,), (1, m)):
        raise ArgumentError(f"steps: the scenario needs shape {(b, m)}, got {tuple(given.shape)}")
    return step_indices(scenario, given.expand(b, m))


def checked_share(scenario: Scenario, share: Tensor | None) -> Tensor | None:
    """Given shares, checked by the rules of a plan and expanded over the batch.

    Args:
        scenario: Batch of B scenarios.
        share: Shape (B, M), (1, M) or (M,), or None.

    Raises:
        ArgumentError: If the shape does not fit.
        PlanError: If shares are negative or sum to more than 1.
    """
    if share is None:
        return None
    b, c, m, _ = scenario.shape
    given = torch.as_tensor(share, dtype=scenario.demand.dtype, device=scenario.device)
    if given.shape not in ((b, m), (m,), (1, m)):
        raise ArgumentError(f"share: the scenario needs shape {(b, m)}, got {tuple(given.shape)}")
    even = torch.full((b, c, m), 1 / m, dtype=given.dtype, device=given.device)
    return Plan(even, scenario.steps[:1].expand(b, m), given.expand(b, m)).share


def number(name: str, value: float | None, *, above: float | None = None, least: float | None = None,
           below: float | None = None) -> None:  # fmt: skip
    """Refuse what is no finite number in its range; None is for what may be left out.

    Args:
        name: Argument, as the message calls it.
        value: What is given.
        above: Must be more than this.
        least: Must be at least this.
        below: Must be less than this.

    Raises:
        ArgumentError: If it is not.
    """
    if value is None:
        return
    fine = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    fine = fine and (above is None or value > above) and (least is None or value >= least)
    if not (fine and (below is None or value < below)):
        limits = [f"above {above}" * (above is not None), f"of at least {least}" * (least is not None),
                  f"below {below}" * (below is not None)]  # fmt: skip
        raise ArgumentError(f"{name}: expected a number {' and '.join(x for x in limits if x)}, got {value!r}")


def positive(name: str, value: int) -> None:
    """Refuse a count below 1.

    Args:
        name: Argument, as the message calls it.
        value: What is given.

    Raises:
        ArgumentError: If it is no integer of at least 1.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ArgumentError(f"{name}: expected a positive integer, got {value!r}")


def certified(
    method: str,
    scenario: Scenario,
    assignment: Tensor | None,
    plan: Plan,
    started: float,
    proposals: int,
    history: Tensor | None = None,
    bound: Tensor | None = None,
    index: Tensor | None = None,
    share: Tensor | None = None,
) -> SearchResult:
    """Evaluate a plan and put its bound and gap beside it; where a simpler plan is better, or feasible, take that.

    The bound is on what could be chosen: on plans with the given assignment if there is one.

    Args:
        method: Name of the method.
        scenario: Batch of B scenarios.
        assignment: Assignment that the search was held to, shape (B, C, M), or None.
        plan: Best plan found.
        started: When the search began, by ``time.perf_counter``.
        proposals: Plans examined, over all scenarios.
        history: Best utility at recorded iterations, shape (iterations', B); by default the result's alone.
        bound: A tighter bound that the method has proven, shape (B,).
        index: Positions of step counts that the search was held to, shape (B, M), or None.
        share: Shares that it was held to, shape (B, M), or None.
    """
    if scenario.device.type == "cuda":  # work that was only queued has not been done
        torch.cuda.synchronize(scenario.device)
    plan = best_feasible(scenario, plan, assignment, index, share)
    elapsed = time.perf_counter() - started
    outcome = evaluate(scenario, plan)
    if bound is None:
        bound = upper_bound(scenario, assignment)
    if history is None:
        history = outcome.utility[None]
    return SearchResult(
        method, plan, outcome.utility, bound, gap(bound, outcome.utility), outcome.feasible, history, proposals, elapsed
    )
