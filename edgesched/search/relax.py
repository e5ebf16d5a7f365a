"""Gradient search on relaxed steps and assignment, then rounding and polish.

Steps become weights over the step options and the assignment a softmax; both climb the gradient of
:func:`edgesched.objective.soft_utility` (Adam, several starts at once) with the best shares for the
current loads. The weights are then rounded to one step count a model and polished by exchanging one
model's step count at a time.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

from edgesched.errors import SearchError
from edgesched.objective import best_share, calm_delay, evaluate, loads, share_for_load, step_service_times, total_delay
from edgesched.search._result import certified, checked_assignment, positive
from edgesched.search.exact import best_assignment, quality_by_step
from edgesched.types import Plan, Scenario, SearchResult

_SHARPEN = 4.0


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
        scenario: Batch of B scenarios; constraints other than the queue's stability are met by polish alone.
        assignment: Kept as it is if given, shape (B, C, M).
        starts: Starting points of each scenario.
        iterations: Gradient steps.
        learning_rate: Step size of Adam.
        sweeps: Most sweeps of the polish over the models.
        seed: Seed of the starting points.

    Returns:
        Best plan over the starts, with ``history`` of the best relaxed utility.

    Raises:
        SearchError: If an argument is out of its range.

    Example:
        >>> s = Scenario.random(2, seed=0)
        >>> bool((relax(s).gap < 0.02).all())
        True
    """
    started = time.perf_counter()
    for name, value in (("starts", starts), ("iterations", iterations), ("sweeps", sweeps)):
        positive(name, value)
    if learning_rate <= 0:
        raise SearchError(f"learning_rate: expected a positive number, got {learning_rate}")
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
    finite = torch.where(masked, torch.zeros_like(scenario.quality), scenario.quality)
    forbidden = masked.any(1)
    service = step_service_times(scenario)
    total = scenario.demand.sum(-1)
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
        optimizer.zero_grad()
        (-utility.sum()).backward()
        optimizer.step()
        best = torch.maximum(best, utility.detach().amax(0))
        history.append(best)
    with torch.no_grad():
        index = step_logit.masked_fill(forbidden, -torch.inf).argmax(-1)
        soft = given.expand(starts, b, c, m) if given is not None else assign_logit.softmax(-1)
        plans = [_polish(scenario, index[s], soft[s], given is not None, sweeps) for s in range(starts)]
        utilities = torch.stack([evaluate(scenario, plan).utility for plan in plans])
        winner = utilities.argmax(0)
        rows = torch.arange(b, device=device)
        fields = [torch.stack([getattr(p, f) for p in plans])[winner, rows] for f in ("assignment", "steps", "share")]
    plan = Plan(*fields)
    proposals = starts * b * (iterations + sweeps * m * k)
    return certified("relax", scenario, given, plan, started, proposals, torch.stack(history))


def _polish(scenario: Scenario, index: Tensor, assignment: Tensor, kept: bool, sweeps: int) -> Plan:
    """Exchange one model's step count at a time; a free assignment is sharpened and then made optimal."""
    b, _, m, _ = scenario.shape
    unconstrained = scenario.share_units is None and scenario.memory_gib is None and scenario.deadline_s is None
    concave = not kept and scenario.latency == "slot" and unconstrained
    if not kept:
        small = assignment < 1e-3
        assignment = assignment.masked_fill(small, 0)
        assignment = assignment / assignment.sum(-1, keepdim=True)
    before = torch.full((b,), -torch.inf, dtype=scenario.demand.dtype, device=scenario.device)
    for _ in range(sweeps):
        if concave:
            assignment = best_assignment(scenario, index)
        utility = before
        for model in range(m):
            index, utility = _exchange(scenario, index, assignment, model)
        if bool((utility <= before + 1e-12).all()):
            break
        before = utility
    if concave:
        assignment = best_assignment(scenario, index)
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
    else:
        share = share_for_load(scenario, load, service)
        delay = total_delay(scenario.latency, load, service, share)[0]
    total = scenario.demand.sum(-1)[:, None]
    utility = (quality - scenario.latency_weight[:, None] * delay) / total
    if scenario.deadline_s is not None:
        utility = utility.masked_fill(delay / total > scenario.deadline_s[:, None], -torch.inf)
    best, choice = utility.max(-1)
    index = index.clone()
    index[:, model] = choice
    return index, best
