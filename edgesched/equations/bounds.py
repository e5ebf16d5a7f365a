"""Upper bounds on utility by weak duality, and how far a utility is from them.

Completing the square, (Σ n_m √t_m)² ≥ 2x Σ n_m √t_m − x² for every x, so that in slot mode

    U ≤ min_{0 ≤ x ≤ N √t_max} (1/N) [ Σ_c n_c max_{m,k} (Q[c,m,k] − 2ωx √t_mk) + ωx² ],

and in queue mode, with ρ the total load and g(ρ) = ρ + ρ² / (2 (1 − ρ)) convex,

    U ≤ min_{0 ≤ ρ < 1} (1/N) [ Σ_c n_c max_{m,k} (Q − ω g'(ρ) t_mk) + ω (ρ g'(ρ) − g(ρ)) ].

Given an assignment p, the sum becomes Σ_m max_k Σ_c n_c p_cm (·). Slices, memory limits and deadlines only shrink the
set of plans: the bounds stay valid, and looser; a memory limit that a model alone exceeds takes that model out. The
joint bound lets every category run a model at its own step count, which is where most of its looseness comes from
(0.4 % in the median, 1.6 % at worst at C = 16, M = 8, K = 50); branching over intervals of step counts
(:mod:`edgesched.equations.branching`) takes that away. In queue mode it also pools the server into one queue, which no
branching mends.
"""

from __future__ import annotations

import torch
from torch import Tensor

from edgesched.equations.branching import Concave, branch_and_bound
from edgesched.equations.dual import minimise, price, without_dead
from edgesched.equations.feasible import memory_fits
from edgesched.equations.utility import loads, quality_by_step, step_service_times
from edgesched.errors import PlanError
from edgesched.types import Plan, Scenario

_CELLS_AT_ONCE = 2_000_000
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
    if assignment is not None:
        assignment = _normalised(assignment, (b, c, m))
    at_once = max(1, _CELLS_AT_ONCE // (c * m * k if assignment is None else m * k))
    parts = []
    for start in range(0, b, at_once):
        part = slice(start, start + at_once)
        some = scenario[part] if b > at_once else scenario
        if assignment is None:
            parts.append(_joint_bound(some, nodes))
        else:
            fits = memory_fits(some, loads(some, assignment[part]) > 0)
            parts.append(_bound(some, dual_terms(some, assignment[part])).masked_fill(~fits, -torch.inf))
    return torch.cat(parts)


def _normalised(assignment: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A given assignment with rows that sum to 1, as a plan has them: a bound is on what a plan can be."""
    if assignment.shape != shape:
        raise PlanError(f"assignment: the scenario needs shape {shape}, got {tuple(assignment.shape)}")
    b, _, m = shape
    idle = torch.zeros(b, m, dtype=assignment.dtype, device=assignment.device)
    return Plan(assignment, idle.long(), idle).assignment


def _bound(scenario: Scenario, terms: tuple[Tensor, Tensor, Tensor], x: Tensor | None = None) -> Tensor:
    gain, weight, cost = terms
    gain, infeasible = without_dead(gain, weight)
    if x is None:
        with torch.no_grad():
            x = _minimiser(scenario, gain, weight, cost)
    total = dual_value(scenario, gain, weight, cost, x) / scenario.demand.double().sum(-1)
    return total.masked_fill(infeasible, -torch.inf)


def _joint_bound(scenario: Scenario, nodes: int) -> Tensor:
    """The bound of the open node that holds it, computed once more where gradients are wanted."""
    b, c, m, k = scenario.shape
    alone = torch.eye(m, dtype=torch.bool, device=scenario.device).expand(b, m, m)
    too_big = ~memory_fits(scenario, alone)[:, None, :, None]
    quality = scenario.quality.double().masked_fill(too_big, -torch.inf)
    demand = scenario.demand.double()
    cost = request_cost(scenario).reshape(b, 1, m * k)
    if nodes <= 1 or k == 1:
        return _bound(scenario, (quality.reshape(b, c, m * k), demand, cost))
    with torch.no_grad():
        proof = branch_and_bound(Concave.of(scenario).without(too_big), nodes=nodes, plans=False)
        if not len(proof.nodes.row):
            return torch.full((b,), -torch.inf, dtype=torch.float64, device=scenario.device)
        low, high, x = (part[proof.row] for part in (proof.nodes.low, proof.nodes.high, proof.nodes.x))
        options = torch.arange(k, device=low.device)
        outside = (options < low[..., None]) | (options > high[..., None])
        # Every node of a scenario was closed as infeasible: there is none to compute again.
        closed = proof.row < 0
    gain = quality.masked_fill(outside[:, None], -torch.inf).reshape(b, c, m * k)
    return _bound(scenario, (gain, demand, cost), x).masked_fill(closed, -torch.inf)


def dual_terms(scenario: Scenario, assignment: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Groups that choose freely: their gains (B, G, choices), weights (B, G) and costs (B, G or 1, choices).

    Args:
        scenario: Batch of B scenarios.
        assignment: If given, shape (B, C, M): the groups are models then, each choosing its step count; otherwise they
            are categories, each choosing a model and a step count.
    """
    b, c, m, k = scenario.shape
    cost = request_cost(scenario)
    if assignment is None:
        return scenario.quality.double().reshape(b, c, m * k), scenario.demand.double(), cost.reshape(b, 1, m * k)
    load = loads(scenario, assignment).double()
    gain = quality_by_step(scenario, assignment).double()
    barred = torch.isneginf(gain)
    mean = gain.masked_fill(barred, 0.0) / torch.where(load > 0, load, torch.ones_like(load))[..., None]
    return mean.masked_fill(barred, -torch.inf), load, cost


def dual_value(scenario: Scenario, gain: Tensor, weight: Tensor, cost: Tensor, x: Tensor) -> Tensor:
    """N times the bound at x, shape (B,); every group needs a finite gain.

    The gradient is that of the choices made (Danskin), so that masked options have no part in it.

    Args:
        scenario: Batch of B scenarios.
        gain: Points of every choice, shape (B, G, choices).
        weight: Requests of every group, shape (B, G).
        cost: √t (slot) or t (queue) of every choice, shape (B, G or 1, choices).
        x: Dual variable, shape (B,).
    """
    coefficient, constant = price(scenario.latency, scenario.latency_weight.double(), x)
    choice = (gain - coefficient[:, None, None] * cost).detach().argmax(-1, keepdim=True)
    chosen = cost.expand(*weight.shape, cost.shape[-1]).gather(-1, choice).squeeze(-1)
    net = gain.gather(-1, choice).squeeze(-1) - coefficient[:, None] * chosen
    return (weight * net).sum(-1) + constant


def _minimiser(scenario: Scenario, gain: Tensor, weight: Tensor, cost: Tensor) -> Tensor:
    """The dual variable at the minimum, shape (B,)."""
    costs = cost.expand(*weight.shape, cost.shape[-1])

    def choose(y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        choice = torch.addcmul(gain, -y[:, None, None], cost).argmax(-1, keepdim=True)
        pick = [(weight * part.gather(-1, choice).squeeze(-1)).sum(-1) for part in (gain, costs)]
        return pick[0], pick[1], choice.squeeze(-1)

    zero = torch.zeros(len(scenario), dtype=torch.float64, device=scenario.device)
    return minimise(choose, scenario.latency, scenario.latency_weight.double(), zero)[1]


def gap(bound: Tensor, utility: Tensor) -> Tensor:
    """(bound − utility) / max(|bound|, 1), shape (B,); +inf for an infeasible plan.

    Args:
        bound: Upper bound on the utility, shape (B,).
        utility: Utility found, shape (B,).
    """
    return (bound - utility) / bound.abs().clamp(min=1)


def regret(scenario: Scenario, bound: Tensor, utility: Tensor) -> Tensor:
    """(bound − utility) / (bound − utility of the best single model and step count for everyone), shape (B,).

    Args:
        scenario: Batch of B scenarios.
        bound: Upper bound on the utility, shape (B,).
        utility: Utility found, shape (B,).

    Raises:
        PlanError: As :func:`~edgesched.equations.utility.evaluate`.
    """
    from edgesched.equations.utility import single_best_utility

    room = bound - single_best_utility(scenario).double()
    return (bound - utility) / room.clamp(min=1e-12)
