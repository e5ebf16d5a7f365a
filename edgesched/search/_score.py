"""Scoring many candidate plans of every scenario at once, each with its best shares."""

from __future__ import annotations

import torch
from torch import Tensor

from edgesched.dual import minimise, price
from edgesched.objective import share_for_load, step_service_times, total_delay
from edgesched.types import Scenario

#: Prices of load that :func:`routed` tries, relative to the pooled dual's, from cheap to dear.
_PRICES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0, 5.0, 10.0, 100.0)


def scored(scenario: Scenario, index: Tensor, assignment: Tensor) -> tuple[Tensor, Tensor]:
    """Utility and best shares of candidate plans, constraints included.

    Args:
        scenario: Batch of B scenarios.
        index: Positions of step counts, shape (B, R, M).
        assignment: Probabilities, shape (B, R, C, M) or (B, 1, C, M).

    Returns:
        Utility (B, R), −inf where infeasible, and shares (B, R, M).
    """
    b, r, m = index.shape
    c, k = scenario.quality.shape[1], scenario.quality.shape[3]
    each = scenario.quality[:, None].expand(b, r, c, m, k)
    quality = each.gather(-1, index[:, :, None, :, None].expand(b, r, c, m, 1)).squeeze(-1)
    weight = scenario.demand[:, None, :, None] * assignment
    masked = torch.isneginf(quality)
    feasible = ~(masked & (weight > 0)).flatten(2).any(-1)
    gain = (weight * quality.masked_fill(masked, 0.0)).sum((-2, -1))
    load = weight.sum(-2).expand(b, r, m)
    service = step_service_times(scenario)[:, None].expand(b, r, m, k).gather(-1, index[..., None]).squeeze(-1)
    share = share_for_load(scenario, load, service)
    delay, stable = total_delay(scenario.latency, load, service, share)
    total = scenario.demand.sum(-1)[:, None]
    feasible = feasible & stable
    if scenario.deadline_s is not None:
        feasible = feasible & (delay / total <= scenario.deadline_s[:, None] * (1 + 1e-9))
    if scenario.memory_gib is not None and scenario.memory_limit_gib is not None:
        resident = torch.where(load > 0, scenario.memory_gib[:, None], 0.0).sum(-1)
        feasible = feasible & (resident <= scenario.memory_limit_gib[:, None] * (1 + 1e-9))
    utility = (gain - scenario.latency_weight[:, None] * delay.masked_fill(~stable, 0.0)) / total
    return utility.masked_fill(~feasible, -torch.inf), share


def routed(scenario: Scenario, index: Tensor, on: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Assign categories at fixed step counts where that is no concave problem: the best of a sweep over prices.

    At a price y of load every category goes to argmax_m (Q − y c_m), c = √t in slot mode and t in queue mode; the
    plans of a dozen prices, around the one at which the pooled server would be loaded by just this choice, are
    scored with their best shares and all constraints.

    Args:
        scenario: Batch of B scenarios.
        index: Positions of step counts, shape (B, R, M).
        on: Models that may be used, shape (B, R, M), at least one each.

    Returns:
        Utility (B, R), assignment (B, R, C, M) and shares (B, R, M) of the best.
    """
    b, r, m = index.shape
    c, k = scenario.quality.shape[1], scenario.quality.shape[3]
    each = scenario.quality[:, None].expand(b, r, c, m, k)
    quality = each.gather(-1, index[:, :, None, :, None].expand(b, r, c, m, 1)).squeeze(-1)
    quality = quality.clamp(min=-1e15).masked_fill(~on[:, :, None], -1e16)
    service = step_service_times(scenario)[:, None].expand(b, r, m, k).gather(-1, index[..., None]).squeeze(-1)
    cost = service.sqrt() if scenario.latency == "slot" else service
    demand, weight = scenario.demand[:, None], scenario.latency_weight[:, None].expand(b, r)

    def choose(y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        net, choice = (quality - y[..., None, None] * cost[:, :, None]).max(-1)
        load = (demand * cost.gather(-1, choice)).sum(-1)
        return (demand * net).sum(-1) + y * load, load, choice

    x = minimise(choose, scenario.latency, weight, torch.zeros_like(weight), evaluations=8)[1]
    # A floor on the price lets the sweep find fast plans where latency weighs nothing but a deadline does.
    y = price(scenario.latency, weight, x)[0].clamp(min=1e-3)
    best = torch.full((b, r), -torch.inf, dtype=quality.dtype, device=quality.device)
    assignment = torch.zeros(b, r, c, m, dtype=quality.dtype, device=quality.device)
    assignment[..., 0] = 1
    share = torch.zeros(b, r, m, dtype=quality.dtype, device=quality.device)
    for factor in _PRICES:
        choice = (quality - (factor * y)[..., None, None] * cost[:, :, None]).argmax(-1)
        tried = torch.nn.functional.one_hot(choice, m).to(quality.dtype)
        utility, shares = scored(scenario, index, tried)
        better = utility > best
        best = torch.where(better, utility, best)
        assignment = torch.where(better[..., None, None], tried, assignment)
        share = torch.where(better[..., None], shares, share)
    return best, assignment, share
