"""Upper bounds on utility by weak duality, and how far a utility is from them.

Completing the square, (Σ n_m √t_m)² ≥ 2x Σ n_m √t_m − x² for every x, so that in slot mode

    U ≤ min_{0 ≤ x ≤ N √t_max} (1/N) [ Σ_c n_c max_{m,k} (Q[c,m,k] − 2ωx √t_mk) + ωx² ],

and in queue mode, with ρ the total load and g(ρ) = ρ + ρ² / (2 (1 − ρ)) convex,

    U ≤ min_{0 ≤ ρ < 1} (1/N) [ Σ_c n_c max_{m,k} (Q − ω g'(ρ) t_mk) + ω (ρ g'(ρ) − g(ρ)) ].

Given an assignment p, the sum becomes Σ_m max_k Σ_c n_c p_cm (·). Slices, memory limits and deadlines
only shrink the set of plans: the bounds stay valid, and looser.
"""

from __future__ import annotations

import torch
from torch import Tensor

from edgesched.errors import PlanError
from edgesched.objective import _marginal, loads, step_service_times
from edgesched.types import Scenario

_BISECTIONS = 56
_CELLS_AT_ONCE = 8_000_000


def price(scenario: Scenario, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Terms of the dual at x (slot) or ρ (queue): price of a request, constant, and what x should equal.

    Args:
        scenario: Batch of B scenarios.
        x: Dual variable, shape (B,).

    Returns:
        Cost coefficient, shape (B,), of the per-request cost (√t or t); constant of the bound, shape (B,).
    """
    weight = scenario.latency_weight.double()
    if scenario.latency == "slot":
        return 2 * weight * x, weight * x.square(), x
    slope = _marginal(x)
    delay = x + x.square() / (2 * (1 - x))
    return weight * slope, weight * (x * slope - delay), x


def request_cost(scenario: Scenario) -> Tensor:
    """What a request adds to the dual's load: √t_mk in slot mode, t_mk in queue mode, shape (B, M, K)."""
    service = step_service_times(scenario).double()
    return service.sqrt() if scenario.latency == "slot" else service


def upper_bound(scenario: Scenario, assignment: Tensor | None = None) -> Tensor:
    """Upper bound on the utility of every plan, by the equations at the head of this module.

    Args:
        scenario: Batch of B scenarios.
        assignment: If given, shape (B, C, M), the bound is on plans with this assignment only.

    Returns:
        Bound, shape (B,), float64; −inf where no plan is feasible.

    Raises:
        PlanError: If the assignment's shape does not fit.

    Example:
        >>> s = Scenario([[4.0]], [[[[20.0, 25.0]]]], [1, 8], [[0.1]], [[0.0]], [0.5])
        >>> upper_bound(s)
        tensor([23.4000], dtype=torch.float64)
    """
    b, c, m, k = scenario.shape
    if assignment is not None and assignment.shape != (b, c, m):
        raise PlanError(f"assignment: the scenario needs shape {(b, c, m)}, got {tuple(assignment.shape)}")
    at_once = max(1, _CELLS_AT_ONCE // (c * m * k if assignment is None else m * k))
    parts = []
    for start in range(0, b, at_once):
        part = slice(start, start + at_once)
        parts.append(
            _bound(scenario[part] if b > at_once else scenario, None if assignment is None else assignment[part])
        )
    return torch.cat(parts)


def _bound(scenario: Scenario, assignment: Tensor | None) -> Tensor:
    gain, weight, cost = dual_terms(scenario, assignment)
    low, high = dual_interval(scenario, cost)
    with torch.no_grad():
        x = _minimiser(scenario, gain, weight, cost, low, high)
    value = dual_value(scenario, gain, weight, cost, x)[0]
    return value / scenario.demand.double().sum(-1)


def dual_terms(scenario: Scenario, assignment: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Groups that choose freely: their gains (B, G, choices), weights (B, G) and costs (B, G or 1, choices)."""
    b, c, m, k = scenario.shape
    cost = request_cost(scenario)
    quality = scenario.quality.double()
    demand = scenario.demand.double()
    if assignment is None:
        return quality.reshape(b, c, m * k), demand, cost.reshape(b, 1, m * k)
    weight = demand[..., None] * assignment.double()
    loaded = weight > 0
    gain = torch.where(loaded[..., None], weight[..., None] * torch.where(loaded[..., None], quality, 0.0), 0.0).sum(1)
    load = loads(scenario, assignment).double()
    mean = torch.where(load[..., None] > 0, gain / load.clamp(min=1e-300)[..., None], 0.0)
    return mean, load, cost


def dual_interval(scenario: Scenario, cost: Tensor) -> tuple[Tensor, Tensor]:
    """Where the dual variable lies, two tensors of shape (B,)."""
    zero = torch.zeros(len(scenario), dtype=torch.float64, device=scenario.device)
    if scenario.latency == "slot":
        return zero, scenario.demand.double().sum(-1) * cost.flatten(1).amax(-1)
    return zero, zero + (1 - 1e-9)


def dual_value(
    scenario: Scenario, gain: Tensor, weight: Tensor, cost: Tensor, x: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """N times the bound at x, the load Σ weight · cost of the choices made there, and the choices (B, G)."""
    coefficient, constant, _ = price(scenario, x)
    net, choice = (gain - coefficient[:, None, None] * cost).max(-1)
    loaded = weight > 0
    total = torch.where(loaded, weight * torch.where(loaded, net, 0.0), 0.0).sum(-1) + constant
    chosen = cost.expand(*weight.shape, cost.shape[-1]).gather(-1, choice[..., None]).squeeze(-1)
    return total, (weight * chosen).sum(-1), choice


def _minimiser(scenario: Scenario, gain: Tensor, weight: Tensor, cost: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Bisection on the sign of the subgradient: the load at x falls as x grows, and equals x at the minimum."""
    for _ in range(_BISECTIONS):
        mid = (low + high) / 2
        above = dual_value(scenario, gain, weight, cost, mid)[1] > mid
        low, high = torch.where(above, mid, low), torch.where(above, high, mid)
    return high


def gap(bound: Tensor, utility: Tensor) -> Tensor:
    """(bound − utility) / max(|bound|, 1), shape (B,); +inf for an infeasible plan."""
    return (bound - utility) / bound.abs().clamp(min=1)


def regret(scenario: Scenario, bound: Tensor, utility: Tensor) -> Tensor:
    """(bound − utility) / (bound − utility of the best single model and step count for everyone), shape (B,)."""
    from edgesched.objective import single_best_utility

    room = bound - single_best_utility(scenario).double()
    return (bound - utility) / room.clamp(min=1e-12)
