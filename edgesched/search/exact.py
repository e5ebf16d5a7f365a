"""Exact optima by enumeration of step counts, with assignment and shares solved exactly for each.

With step counts fixed, the joint problem in slot mode is concave in the assignment: maximise a linear
quality minus ω (Σ n_m √t_m)² / N. Its one-dimensional dual (see :mod:`edgesched.bounds`) has no gap, and
the optimal assignment mixes at most two neighbouring choices of one category.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

from edgesched.errors import SearchError
from edgesched.objective import best_share, loads, share_for_load, step_service_times, total_delay
from edgesched.search._result import certified, checked_assignment
from edgesched.types import Plan, Scenario, SearchResult

_BISECTIONS = 44
_CELLS_AT_ONCE = 12_000_000
_MAX_COMBINATIONS = 250_000


def combinations(models: int, options: int, device: torch.device | str = "cpu") -> Tensor:
    """Every choice of one of ``options`` for each of ``models``, shape (options^models, models)."""
    axes = [torch.arange(options, device=device)] * models
    return torch.cartesian_prod(*axes).reshape(-1, models)


def _refuse_large(scenario: Scenario, limit: int) -> None:
    _, _, m, k = scenario.shape
    if k**m > limit:
        raise SearchError(
            f"exact: {k} step counts for {m} models are {float(k) ** m:.3g} combinations, more than "
            f"{limit}; use search.coordinate or search.anneal"
        )


def exact(scenario: Scenario, *, assignment: Tensor | None = None, seed: int = 0) -> SearchResult:
    """The exact optimum, joint or with the assignment given.

    Given an assignment, every combination of step counts is tried with its best shares (closed form in
    slot mode, one multiplier in queue mode, units dealt out one by one for sliced shares). The joint
    optimum is solved in slot mode without slices, memory limit or deadline.

    Args:
        scenario: Batch of B scenarios with K^M ≤ 250,000.
        assignment: Shape (B, C, M), or None for the joint optimum.
        seed: Taken for the common signature; nothing is random here.

    Returns:
        A result whose utility no plan exceeds.

    Raises:
        SearchError: If the optimum cannot be had exactly by these means; it says what can be used.

    Example:
        >>> s = Scenario.random(1, steps=8, seed=0)
        >>> bool(exact(s).gap < 0.01)
        True
    """
    started = time.perf_counter()
    given = checked_assignment(scenario, assignment)
    _, _, m, k = scenario.shape
    _refuse_large(scenario, _MAX_COMBINATIONS)
    if given is None:
        kinds = {
            "queue mode": scenario.latency != "slot",
            "sliced shares": scenario.share_units is not None,
            "a memory limit": scenario.memory_gib is not None,
            "a deadline": scenario.deadline_s is not None,
        }
        for kind, present in kinds.items():
            if present:
                raise SearchError(f"exact: the joint optimum with {kind} is not solved exactly; give an assignment "
                                  "or use search.anneal")  # fmt: skip
        plan = _joint(scenario)
    else:
        if scenario.latency == "queue" or scenario.share_units is not None:
            _refuse_large(scenario, 20_000)
        plan = _given(scenario, given)
    return certified("exact", scenario, given, plan, started, len(scenario) * k**m)


def _given(scenario: Scenario, assignment: Tensor) -> Plan:
    """Enumerate step counts; shares follow."""
    b, _, m, k = scenario.shape
    combos = combinations(m, k, scenario.device)
    service = step_service_times(scenario)
    load = loads(scenario, assignment)
    total = scenario.demand.sum(-1)
    gains = quality_by_step(scenario, assignment)
    models = torch.arange(m, device=scenario.device)
    best: list[Tensor] = []
    at_once = max(1, _CELLS_AT_ONCE // (len(combos) * m))
    for start in range(0, b, at_once):
        rows = slice(start, start + at_once)
        quality = gains[rows][:, models, combos].sum(-1)
        chosen = service[rows][:, models, combos]
        weight = load[rows, None].expand_as(chosen)
        if scenario.latency == "slot" and scenario.share_units is None:
            delay = (weight * chosen.sqrt()).sum(-1).square()
        else:
            share = share_for_load(scenario, weight, chosen)
            delay = total_delay(scenario.latency, weight, chosen, share)[0]
        utility = quality - scenario.latency_weight[rows, None] * delay
        if scenario.deadline_s is not None:
            late = delay > scenario.deadline_s[rows, None] * total[rows, None] * (1 + 1e-9)
            utility = utility.masked_fill(late, -torch.inf)
        best.append(utility.argmax(-1))
    steps = scenario.steps[combos[torch.cat(best)]]
    return Plan(assignment, steps, best_share(scenario, assignment, steps))


def quality_by_step(scenario: Scenario, assignment: Tensor) -> Tensor:
    """Σ_c n_c p_cm Q[c, m, k], −inf where a category with load may not run it, shape (B, M, K)."""
    weight = (scenario.demand[..., None] * assignment)[..., None]
    used = weight > 0
    return torch.where(used, weight * torch.where(used, scenario.quality, 0.0), 0.0).sum(1)


def _joint(scenario: Scenario) -> Plan:
    """Enumerate step counts; the value of each combination is its dual, the best one's assignment its primal."""
    b, c, m, k = scenario.shape
    combos = combinations(m, k, scenario.device)
    root = step_service_times(scenario).sqrt()
    models = torch.arange(m, device=scenario.device)
    at_once = max(1, _CELLS_AT_ONCE // (c * m))
    winners = []
    for i in range(b):
        values = []
        for part in combos.split(at_once):
            quality = scenario.quality[i][:, models, part].transpose(0, 1)
            cost = root[i][models, part]
            values.append(
                concave_value(quality, cost, scenario.demand[i].expand(len(part), c), scenario.latency_weight[i])[0]
            )
        winners.append(combos[torch.cat(values).argmax()])
    index = torch.stack(winners)
    return plan_at(scenario, index)


def concave_value(quality: Tensor, cost: Tensor, demand: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Best utility over assignments at fixed step counts, times N, by bisection on the dual variable.

    Args:
        quality: Q at the step counts, shape (P, C, M).
        cost: √t at the step counts, shape (P, M).
        demand: n, shape (P, C).
        weight: ω, a scalar or shape (P,).

    Returns:
        Value, and the ends of the last interval of the dual variable, each of shape (P,).
    """
    weight = weight.expand(len(demand))
    low = torch.zeros_like(demand[:, 0])
    high = demand.sum(-1) * cost.amax(-1)
    for _ in range(_BISECTIONS):
        mid = (low + high) / 2
        choice = (quality - (2 * weight * mid)[:, None, None] * cost[:, None]).argmax(-1)
        above = (demand * cost.gather(-1, choice)).sum(-1) > mid
        low, high = torch.where(above, mid, low), torch.where(above, high, mid)
    net = (quality - (2 * weight * high)[:, None, None] * cost[:, None]).amax(-1)
    served = demand > 0
    value = torch.where(served, demand * torch.where(served, net, 0.0), 0.0).sum(-1) + weight * high.square()
    return value, low, high


def best_assignment(scenario: Scenario, index: Tensor) -> Tensor:
    """The optimal assignment in slot mode at fixed step counts.

    Args:
        scenario: Batch of B scenarios in slot mode.
        index: Positions of the step counts, shape (B, M).

    Returns:
        Probabilities, shape (B, C, M).
    """
    b, c, m, _ = scenario.shape
    quality = scenario.quality.gather(-1, index[:, None, :, None].expand(b, c, m, 1)).squeeze(-1)
    cost = step_service_times(scenario).gather(-1, index[..., None]).squeeze(-1).sqrt()
    weight = scenario.latency_weight
    _, low, high = concave_value(quality, cost, scenario.demand, weight)
    ends = []
    for x in (low, high):
        choice = (quality - (2 * weight * x)[:, None, None] * cost[:, None]).argmax(-1)
        ends.append(torch.nn.functional.one_hot(choice, m).to(quality.dtype))
    slow, fast = ends
    gain = scenario.demand[..., None] * torch.where(torch.isneginf(quality), 0.0, quality)
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


def plan_at(scenario: Scenario, index: Tensor) -> Plan:
    """The optimal plan in slot mode at fixed positions of the step counts, shape (B, M)."""
    assignment = best_assignment(scenario, index)
    steps = scenario.steps[index]
    return Plan(assignment, steps, best_share(scenario, assignment, steps))
