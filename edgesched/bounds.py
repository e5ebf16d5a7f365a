"""Upper bounds on utility by weak duality, and how far a utility is from them.

Completing the square, (Σ n_m √t_m)² ≥ 2x Σ n_m √t_m − x² for every x, so that in slot mode

    U ≤ min_{0 ≤ x ≤ N √t_max} (1/N) [ Σ_c n_c max_{m,k} (Q[c,m,k] − 2ωx √t_mk) + ωx² ],

and in queue mode, with ρ the total load and g(ρ) = ρ + ρ² / (2 (1 − ρ)) convex,

    U ≤ min_{0 ≤ ρ < 1} (1/N) [ Σ_c n_c max_{m,k} (Q − ω g'(ρ) t_mk) + ω (ρ g'(ρ) − g(ρ)) ].

Given an assignment p, the sum becomes Σ_m max_k Σ_c n_c p_cm (·). Slices, memory limits and deadlines
only shrink the set of plans: the bounds stay valid, and looser; a memory limit that a model alone exceeds
takes that model out. The joint bound lets every category run a model at its own step count, which is where
most of its looseness comes from (0.4 % in the median, 1.6 % at worst at C = 16, M = 8, K = 50); branching over
intervals of step counts (:mod:`edgesched.branch`) takes that away. In queue mode it also pools the server into
one queue, which no branching mends.
"""

from __future__ import annotations

import torch
from torch import Tensor

from edgesched.branch import Concave, branch_and_bound
from edgesched.dual import minimise, price
from edgesched.errors import PlanError
from edgesched.objective import loads, step_service_times
from edgesched.types import Scenario

_CELLS_AT_ONCE = 2_000_000
_MASKED = -1e15
#: At C = 16, M = 8, K = 50 this brings the median looseness from 0.40 to 0.2 % and the worst from 1.6 to 0.7 %, in
#: about the time of the plain dual.
BRANCHED = 8


def request_cost(scenario: Scenario) -> Tensor:
    """What a request adds to the dual's load: √t_mk in slot mode, t_mk in queue mode, shape (B, M, K)."""
    service = step_service_times(scenario).double()
    return service.sqrt() if scenario.latency == "slot" else service


def upper_bound(scenario: Scenario, assignment: Tensor | None = None, *, nodes: int = BRANCHED) -> Tensor:
    """Upper bound on the utility of every plan, by the equations at the head of this module.

    Args:
        scenario: Batch of B scenarios.
        assignment: If given, shape (B, C, M), the bound is on plans with this assignment only.
        nodes: The joint bound is tightened by branching over step counts until about so many intervals of
            each scenario have been looked at; 1 is the plain dual. It does nothing for a given assignment.

    Returns:
        Bound, shape (B,), float64; −inf where no plan is feasible. Differentiable.

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
        some = scenario[part] if b > at_once else scenario
        if assignment is None:
            parts.append(_joint_bound(some, nodes))
        else:
            parts.append(_bound(some, dual_terms(some, assignment[part])))
    return torch.cat(parts)


def _bound(scenario: Scenario, terms: tuple[Tensor, Tensor, Tensor], x: Tensor | None = None) -> Tensor:
    gain, weight, cost = terms
    if x is None:
        with torch.no_grad():
            x = _minimiser(scenario, gain, weight, cost)
    value = dual_value(scenario, gain, weight, cost, x)[0]
    return value / scenario.demand.double().sum(-1)


def _joint_bound(scenario: Scenario, nodes: int) -> Tensor:
    """The bound of the open node that holds it, computed once more where gradients are wanted."""
    b, c, m, k = scenario.shape
    quality = scenario.quality.double()
    if scenario.memory_gib is not None and scenario.memory_limit_gib is not None:
        too_big = scenario.memory_gib > scenario.memory_limit_gib[:, None]
        quality = quality.masked_fill(too_big[:, None, :, None], -torch.inf)
    demand = scenario.demand.double()
    cost = request_cost(scenario).reshape(b, 1, m * k)
    if nodes <= 1 or k == 1:
        return _bound(scenario, (quality.reshape(b, c, m * k), demand, cost))
    with torch.no_grad():
        weight = scenario.latency_weight.double()
        problem = Concave(quality.clamp(min=_MASKED), cost.reshape(b, m, k), demand, weight, scenario.latency)
        proof = branch_and_bound(problem, nodes=nodes, plans=False)
        low, high, x = (part[proof.row] for part in (proof.nodes.low, proof.nodes.high, proof.nodes.x))
        options = torch.arange(k, device=low.device)
        outside = (options < low[..., None]) | (options > high[..., None])
    gain = quality.masked_fill(outside[:, None], -torch.inf).reshape(b, c, m * k)
    return _bound(scenario, (gain, demand, cost), x)


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


def dual_value(
    scenario: Scenario, gain: Tensor, weight: Tensor, cost: Tensor, x: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """N times the bound at x, the load Σ weight · cost of the choices made there, and the choices (B, G)."""
    coefficient, constant = price(scenario.latency, scenario.latency_weight.double(), x)
    net, choice = (gain - coefficient[:, None, None] * cost).max(-1)
    loaded = weight > 0
    total = torch.where(loaded, weight * torch.where(loaded, net, 0.0), 0.0).sum(-1) + constant
    chosen = cost.expand(*weight.shape, cost.shape[-1]).gather(-1, choice[..., None]).squeeze(-1)
    return total, (weight * chosen).sum(-1), choice


def _minimiser(scenario: Scenario, gain: Tensor, weight: Tensor, cost: Tensor) -> Tensor:
    """The dual variable at the minimum, shape (B,)."""
    finite = gain.clamp(min=_MASKED)
    costs = cost.expand(*weight.shape, cost.shape[-1])

    def choose(y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        choice = torch.addcmul(finite, -y[:, None, None], cost).argmax(-1, keepdim=True)
        pick = [(weight * part.gather(-1, choice).squeeze(-1)).sum(-1) for part in (finite, costs)]
        return pick[0], pick[1], choice.squeeze(-1)

    zero = torch.zeros(len(scenario), dtype=torch.float64, device=scenario.device)
    return minimise(choose, scenario.latency, scenario.latency_weight.double(), zero)[1]


def gap(bound: Tensor, utility: Tensor) -> Tensor:
    """(bound − utility) / max(|bound|, 1), shape (B,); +inf for an infeasible plan."""
    return (bound - utility) / bound.abs().clamp(min=1)


def regret(scenario: Scenario, bound: Tensor, utility: Tensor) -> Tensor:
    """(bound − utility) / (bound − utility of the best single model and step count for everyone), shape (B,)."""
    from edgesched.objective import single_best_utility

    room = bound - single_best_utility(scenario).double()
    return (bound - utility) / room.clamp(min=1e-12)
