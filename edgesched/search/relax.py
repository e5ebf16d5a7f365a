"""Gradient search on relaxed steps and assignment, then rounding and polish.

Steps become weights over the step options and the assignment a softmax; both climb the gradient of
:func:`edgesched.equations.utility.soft_utility` (Adam, several starts at once) with the best shares for the
current loads (queue shares are climbed too). The weights are then rounded to one step count a model and polished by
exchanging one model's step count at a time; in slot mode without constraints that do not separate, assignment and
shares are solved exactly meanwhile. A deadline is a penalty on the way; models are dropped until the rest fits into
memory.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

from edgesched.equations.branching import Concave
from edgesched.equations.delay import calm_delay, total_delay
from edgesched.equations.feasible import in_time, memory_fits, net_utility
from edgesched.equations.shares import best_share, share_for_load
from edgesched.equations.utility import (
    evaluate,
    loads,
    quality_by_step,
    single_best_plan,
    step_indices,
    step_service_times,
    unmasked,
)
from edgesched.search._climb import climb, separable
from edgesched.search._plans import plan_of
from edgesched.search._result import certified, checked_assignment, number, positive
from edgesched.search._score import routed
from edgesched.types import Plan, Scenario, SearchResult

_SHARPEN = 4.0
#: What a mean latency of twice the deadline costs, in spans of the scores: more than any quality is worth.
_LATE = 100.0


def relax(
    scenario: Scenario,
    *,
    assignment: Tensor | None = None,
    starts: int = 8,
    iterations: int = 200,
    learning_rate: float = 0.15,
    sweeps: int = 4,
    seed: int = 0,
) -> SearchResult:
    """Maximise the relaxed utility by gradient, round, and polish.

    Args:
        scenario: Batch of B scenarios, any latency model and constraints; slices count in the polish alone.
        assignment: Kept as it is if given, shape (B, C, M).
        starts: Starting points of each scenario.
        iterations: Gradient steps.
        learning_rate: Step size of Adam.
        sweeps: Most sweeps of the polish over the models.
        seed: Seed of the starting points.

    Returns:
        Best plan over the starts, with ``history`` of the best relaxed utility.

    Raises:
        ArgumentError: If an argument is out of its range.
        PlanError: If the assignment's rows are no probabilities.

    Example:
        >>> s = Scenario.random(2, seed=0)
        >>> bool((relax(s).gap < 0.02).all())
        True
    """
    started = time.perf_counter()
    for name, value in (("starts", starts), ("iterations", iterations), ("sweeps", sweeps)):
        positive(name, value)
    number("learning_rate", learning_rate, above=0)
    given = checked_assignment(scenario, assignment)
    b, c, m, k = scenario.shape
    dtype, device = scenario.demand.dtype, scenario.device
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        drawn = torch.randn((starts, 1, *shape), generator=generator, dtype=torch.float64)
        return drawn.to(device=device, dtype=dtype).expand(starts, b, *shape)

    place = torch.linspace(0, 1, k, dtype=dtype, device=device)
    centre = torch.rand((starts, 1, m, 1), generator=generator, dtype=torch.float64).to(device=device, dtype=dtype)
    step_logit = (-8 * (place - centre).square()).expand(starts, b, m, k).clone().requires_grad_()
    assign_logit = (2.0 * normal(c, m)).clone().requires_grad_()
    share_logit = torch.zeros(starts, b, m, dtype=dtype, device=device, requires_grad=True)
    parameters = [step_logit, share_logit] + ([assign_logit] if given is None else [])
    optimizer = torch.optim.Adam(parameters, lr=learning_rate)
    masked = torch.isneginf(scenario.quality)
    finite = unmasked(scenario.quality)
    forbidden = masked.any(1)
    service = step_service_times(scenario)
    total = scenario.demand.sum(-1)
    span = scenario.quality.flatten(1).amax(-1) - scenario.quality.masked_fill(masked, torch.inf).flatten(1).amin(-1)
    late = _LATE * torch.where(span.isfinite(), span + 1, 1.0)
    history = []
    best = torch.full((b,), -torch.inf, dtype=dtype, device=device)
    for i in range(iterations):
        sharpness = 1 + (_SHARPEN - 1) * i / iterations
        weights = (sharpness * step_logit).masked_fill(forbidden, -1e9).softmax(-1)
        p = given if given is not None else assign_logit.softmax(-1)
        quality = (scenario.demand[..., None] * p * (finite * weights[:, :, None]).sum(-1)).sum((-2, -1)) / total
        time_m = (service * weights).sum(-1)
        load = (scenario.demand[..., None] * p).sum(-2).expand_as(time_m)
        if scenario.latency == "slot":
            delay = (load * time_m.sqrt()).sum(-1).square()
        else:
            busy = load * time_m / share_logit.softmax(-1).clamp(min=1e-9)
            delay = calm_delay(busy).sum(-1)
        utility = quality - scenario.latency_weight * delay / total
        loss = -utility
        if scenario.deadline_s is not None:
            loss = loss + late * (delay / total / scenario.deadline_s - 1).clamp(min=0)
        optimizer.zero_grad()
        loss.sum().backward()
        optimizer.step()
        best = torch.maximum(best, utility.detach().amax(0))
        history.append(best)
    with torch.no_grad():
        index = step_logit.masked_fill(forbidden, -torch.inf).argmax(-1)
        soft = given.expand(starts, b, c, m) if given is not None else assign_logit.softmax(-1)
        if separable(scenario):
            plan = _climbed(scenario, index, given, sweeps)
        else:
            plans = [_polish(scenario, index[s], soft[s], given is not None, sweeps) for s in range(starts)]
            fastest = masked.any(1).logical_not().int().argmax(-1)
            plans.append(_polish(scenario, fastest, soft[0], given is not None, sweeps))
            if given is None:
                plans += [*(_routed(scenario, plan) for plan in plans), single_best_plan(scenario)]
            utilities = torch.stack([evaluate(scenario, plan).utility for plan in plans])
            winner = utilities.argmax(0)
            rows = torch.arange(b, device=device)
            parts = ("assignment", "steps", "share")
            plan = Plan(*(torch.stack([getattr(p, f) for p in plans])[winner, rows] for f in parts))
    proposals = starts * b * (iterations + sweeps * m * k)
    return certified("relax", scenario, given, plan, started, proposals, torch.stack(history))


def _climbed(scenario: Scenario, index: Tensor, given: Tensor | None, sweeps: int) -> Plan:
    """Climb from every start, index of shape (starts, B, M), with assignment and shares exact; the best of them."""
    starts, b, m = index.shape
    problem = Concave.of(scenario, given).take(torch.arange(b, device=index.device).repeat(starts))
    best, found, _, _ = climb(problem, index.reshape(-1, m), torch.zeros_like(problem.weight), sweeps * m)
    winner = best.reshape(starts, b).argmax(0)
    return plan_of(scenario, given, found.reshape(starts, b, m)[winner, torch.arange(b, device=index.device)])


def _routed(scenario: Scenario, plan: Plan) -> Plan:
    """The plan's step counts and resident models with the best assignment of a sweep over prices of load."""
    index = step_indices(scenario, plan.steps)[:, None]
    _, assignment, share = routed(scenario, index, (plan.assignment.amax(1) > 0)[:, None])
    return Plan(assignment[:, 0], plan.steps, share[:, 0])


def _fitted(scenario: Scenario, assignment: Tensor) -> Tensor:
    """The assignment without the models of least load, one after the other, until what stays fits into memory."""
    if scenario.memory_gib is None or scenario.memory_limit_gib is None:
        return assignment
    kept = torch.ones_like(scenario.memory_gib, dtype=torch.bool)
    for _ in range(kept.shape[-1]):
        load = loads(scenario, assignment)
        over = ~memory_fits(scenario, load > 0)
        least = load.masked_fill(load <= 0, torch.inf).argmin(-1)
        kept = kept & ~(over[:, None] & torch.nn.functional.one_hot(least, kept.shape[-1]).bool())
        left = torch.where(kept[:, None], assignment.clamp(min=1e-12), 0.0)
        assignment = torch.where(over[:, None, None], left / left.sum(-1, keepdim=True).clamp(min=1e-300), assignment)
    return torch.where(kept.any(-1)[:, None, None], assignment, 1.0 / kept.shape[-1])


def _polish(scenario: Scenario, index: Tensor, assignment: Tensor, kept: bool, sweeps: int) -> Plan:
    """Exchange one model's step count at a time; a free assignment is sharpened first, and made to fit into memory."""
    b, _, m, _ = scenario.shape
    if not kept:
        small = assignment < 1e-3
        assignment = assignment.masked_fill(small, 0)
        assignment = _fitted(scenario, assignment / assignment.sum(-1, keepdim=True))
    before = torch.full((b,), -torch.inf, dtype=scenario.demand.dtype, device=scenario.device)
    for _ in range(sweeps):
        utility = before
        for model in range(m):
            index, utility = _exchange(scenario, index, assignment, model)
        if bool((utility <= before + 1e-12).all()):
            break
        before = utility
    steps = scenario.steps[index]
    return Plan(assignment, steps, best_share(scenario, assignment, steps))


def _exchange(scenario: Scenario, index: Tensor, assignment: Tensor, model: int) -> tuple[Tensor, Tensor]:
    """The best option of one model with everything else kept; returns indices and utility."""
    b, _, m, k = scenario.shape
    tried = index[:, None].expand(b, k, m).clone()
    tried[..., model] = torch.arange(k, device=index.device)
    rows = torch.arange(b, device=index.device)[:, None, None]
    models = torch.arange(m, device=index.device)
    quality = quality_by_step(scenario, assignment)[rows, models, tried].sum(-1)
    service = step_service_times(scenario)[rows, models, tried]
    load = loads(scenario, assignment)[:, None].expand(b, k, m)
    if scenario.latency == "slot" and scenario.share_units is None:
        delay = (load * service.sqrt()).sum(-1).square()
        stable = torch.ones_like(delay, dtype=torch.bool)
    else:
        share = share_for_load(scenario, load, service)
        delay, stable = total_delay(scenario.latency, load, service, share)
    total = scenario.demand.sum(-1)[:, None]
    feasible = stable & in_time(scenario, delay / total)
    utility = net_utility(quality / total, scenario.latency_weight[:, None], delay / total, feasible)
    best, choice = utility.max(-1)
    index = index.clone()
    index[:, model] = choice
    return index, best
