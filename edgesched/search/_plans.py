"""The best plan once step counts are chosen: what every search that sets steps ends with."""

from __future__ import annotations

import torch
from torch import Tensor

from edgesched.equations.branching import fixed_value
from edgesched.equations.shares import best_share
from edgesched.equations.utility import at_steps, step_service_times, unmasked
from edgesched.types import Plan, Scenario


def plan_of(scenario: Scenario, given: Tensor | None, index: Tensor) -> Plan:
    """The best plan in slot mode at positions of step counts, shape (B, M).

    Args:
        scenario: Batch of B scenarios in slot mode.
        given: Assignment, shape (B, C, M), or None where it is free.
        index: Positions of the step counts, shape (B, M).
    """
    if given is None:
        return plan_at(scenario, index)
    steps = scenario.steps[index]
    return Plan(given, steps, best_share(scenario, given, steps))


def plan_at(scenario: Scenario, index: Tensor) -> Plan:
    """The optimal plan in slot mode at fixed positions of the step counts, shape (B, M).

    Args:
        scenario: Batch of B scenarios in slot mode.
        index: Positions of the step counts, shape (B, M).
    """
    assignment = best_assignment(scenario, index)
    steps = scenario.steps[index]
    return Plan(assignment, steps, best_share(scenario, assignment, steps))


def best_assignment(scenario: Scenario, index: Tensor) -> Tensor:
    """The optimal assignment in slot mode at fixed step counts.

    Args:
        scenario: Batch of B scenarios in slot mode.
        index: Positions of the step counts, shape (B, M).

    Returns:
        Probabilities, shape (B, C, M).
    """
    m = scenario.shape[2]
    quality = at_steps(scenario.quality, index)
    cost = step_service_times(scenario).gather(-1, index[..., None]).squeeze(-1).sqrt()
    weight = scenario.latency_weight
    _, _, left, right = fixed_value(quality, cost, scenario.demand, weight, torch.zeros_like(weight))
    slow, fast = (torch.nn.functional.one_hot(choice, m).to(quality.dtype) for choice in (left, right))
    gain = scenario.demand[..., None] * unmasked(quality)
    load = [(scenario.demand * (p * cost[:, None]).sum(-1)).sum(-1) for p in (slow, fast)]
    value = [(p * gain).sum((-2, -1)) for p in (slow, fast)]
    # Along p = fast + θ (slow − fast) utility is a parabola in θ; its top is the primal optimum.
    rise, run = value[0] - value[1], load[0] - load[1]
    flat = run.abs() < 1e-15
    top = (rise / (2 * weight * run).where(~flat & (weight > 0), torch.ones_like(run)) - load[1]) / run.where(
        ~flat, torch.ones_like(run)
    )
    theta = torch.where(flat | (weight <= 0), (rise > 0).to(rise.dtype), top.clamp(0, 1))
    mixed = fast + theta[:, None, None] * (slow - fast)
    return mixed
