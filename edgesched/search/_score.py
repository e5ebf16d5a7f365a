"""Scoring many candidate plans of every scenario at once, each with its best shares."""

from __future__ import annotations

import torch
from torch import Tensor

from edgesched.equations.delay import total_delay
from edgesched.equations.dual import minimise, price, without_dead
from edgesched.equations.feasible import in_time, memory_fits, net_utility, options_allowed
from edgesched.equations.shares import share_for_load
from edgesched.equations.utility import step_service_times, unmasked
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
    gain = (weight * unmasked(quality)).sum((-2, -1))
    load = weight.sum(-2).expand(b, r, m)
    service = step_service_times(scenario)[:, None].expand(b, r, m, k).gather(-1, index[..., None]).squeeze(-1)
    share = share_for_load(scenario, load, service)
    delay, stable = total_delay(scenario.latency, load, service, share)
    total = scenario.demand.sum(-1)[:, None]
    feasible = (
        options_allowed(quality, weight) & stable & in_time(scenario, delay / total) & memory_fits(scenario, load > 0)
    )
    return net_utility(gain / total, scenario.latency_weight[:, None], delay / total, feasible), share


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
    quality = without_dead(quality.masked_fill(~on[:, :, None], -torch.inf), scenario.demand[:, None].expand(b, r, c))[
        0
    ]
    # A category without demand stays with the first model in use, so that it makes no other one resident.
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
