"""Slot by slot: forecast the demand, plan anew, carry the backlog over.

A model's server runs at its share of the machine, which changes from slot to slot. In the model's own virtual time
V(t) = ∫ share dt its requests need their full-server seconds, so first come, first served is one Lindley recursion in
virtual time, whatever the shares do; interpolating V gives the real times back.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from edgesched.errors import RequestError
from edgesched.objective import service_times, step_indices
from edgesched.queueing import route
from edgesched.requests import RequestStream
from edgesched.types import Plan, Scenario, SearchResult

FORECASTS = ("last", "ewma", "once", "known")
_FLOOR = 0.05
_MOST_TO_BACKLOG = 0.9


@dataclass(frozen=True)
class SlotRun:
    """What became of a stream that was planned for slot by slot.

    Attributes:
        latency_s: Seconds from arrival to delivery, shape (n,).
        model: Model of every request, shape (n,).
        step: Position of its step count, shape (n,).
        slot: Slot that it arrived in, shape (n,).
        backlog: Requests not delivered at the end of every slot, shape (slots,).
        plan: Plans of all slots, batch size slots, before backlog is given its part.
        planning_s: Seconds that planning took for all slots together.
    """

    latency_s: Tensor
    model: Tensor
    step: Tensor
    slot: Tensor
    backlog: Tensor
    plan: Plan
    planning_s: float


def demand_of_slots(stream: RequestStream, slot_s: float) -> Tensor:
    """Requests of every slot and category, shape (slots, C), of a stream of one replica.

    Raises:
        RequestError: If a slot is not positive, or there are several replicas.
    """
    if slot_s <= 0:
        raise RequestError(f"slot_s: expected more than 0 seconds, got {slot_s}")
    if stream.replicas != 1:
        raise RequestError(f"requests: expected one replica, got {stream.replicas}")
    slot = (stream.arrival_s[0] / slot_s).long()
    count = torch.zeros(int(slot[-1]) + 1, len(stream.categories), dtype=torch.float64)
    return count.index_put_((slot, stream.category[0]), torch.ones(len(slot), dtype=torch.float64), accumulate=True)


def forecast(demand: Tensor, how: str, *, ewma: float = 0.3) -> Tensor:
    """What is expected of every slot before it begins.

    Args:
        demand: What came, shape (slots, C).
        how: ``"last"`` slot; ``"ewma"``, exponentially weighted mean of the slots so far; ``"once"``, the mean of all
            slots, for planning once with full knowledge of the mean; ``"known"``, what will come. The first slot
            expects the mean.
        ewma: Weight of the newest slot.

    Returns:
        Shape (slots, C), at least a twentieth of the mean demand, so that no category is planned away.

    Raises:
        RequestError: If ``how`` is unknown or the weight is not in (0, 1].
    """
    if how not in FORECASTS:
        raise RequestError(f"forecast: {how!r} is not one of {', '.join(FORECASTS)}")
    if not 0 < ewma <= 1:
        raise RequestError(f"ewma: expected a weight above 0 and up to 1, got {ewma}")
    mean = demand.mean(0, keepdim=True)
    floor = _FLOOR * mean.clamp(min=float(mean.mean()) * _FLOOR)
    if how == "known":
        return demand.maximum(floor)
    if how == "once":
        return mean.expand_as(demand).maximum(floor)
    if how == "last":
        return torch.cat([mean, demand[:-1]]).maximum(floor)
    level, rows = mean[0], []
    for row in demand:
        rows.append(level)
        level = (1 - ewma) * level + ewma * row
    return torch.stack(rows).maximum(floor)


def plan_slots(scenario: Scenario, expected: Tensor, slot_s: float, search: Callable[[Scenario], SearchResult]) -> Plan:
    """A plan for every slot, all in one batch.

    In queue mode a slot whose demand no plan can keep up with is planned as one batch instead, which always can.

    Args:
        scenario: One scenario; its demand is replaced.
        expected: Requests expected of every slot, shape (slots, C).
        slot_s: Length of a slot in seconds.
        search: Called with a batch of scenarios.
    """
    rows, where = expected.unique(dim=0, return_inverse=True)
    wide = scenario.repeat(len(rows))
    demand = rows.to(scenario.demand)
    if scenario.latency != "queue":
        plan = search(dataclasses.replace(wide, demand=demand)).plan
        return Plan(plan.assignment[where], plan.steps[where], plan.share[where])
    found = search(dataclasses.replace(wide, demand=demand / slot_s))
    fields = [found.plan.assignment.clone(), found.plan.steps.clone(), found.plan.share.clone()]
    over = ~found.feasible
    if bool(over.any()):
        batch = dataclasses.replace(scenario.repeat(int(over.sum())), demand=demand[over], latency="slot")
        instead = search(batch).plan
        for field, value in zip(fields, (instead.assignment, instead.steps, instead.share), strict=True):
            field[over] = value
    return Plan(*(field[where] for field in fields))


def run_slots(
    stream: RequestStream,
    scenario: Scenario,
    search: Callable[[Scenario], SearchResult],
    *,
    slot_s: float = 15.0,
    how: str = "ewma",
    ewma: float = 0.3,
    routing: str = "random",
    seed: int = 0,
) -> SlotRun:
    """Plan for every slot on what is expected of it, and serve what comes.

    At the start of a slot the work left over, in full-server seconds, gets the part of the machine that it would take
    of the slot (up to nine tenths), in proportion to the models' work; the plan's shares divide the rest.

    Args:
        stream: One replica.
        scenario: One scenario; its demand is replaced by the forecast.
        search: Search method.
        slot_s: Length of a slot in seconds.
        how: Forecast, as in :func:`forecast`.
        ewma: Weight of the newest slot.
        routing: As in :func:`edgesched.queueing.route`.
        seed: Seed of the routing.

    Raises:
        RequestError: If an argument is out of its range.
    """
    demand = demand_of_slots(stream, slot_s)
    began = time.perf_counter()
    plan = plan_slots(scenario, forecast(demand, how, ewma=ewma), slot_s, search)
    planning_s = time.perf_counter() - began
    slots, models = plan.share.shape
    arrival = stream.arrival_s[0]
    slot = (arrival / slot_s).long()
    model = _route_by_slot(stream, plan.assignment, slot, routing, seed)
    seconds = service_times(scenario.repeat(slots), plan.steps).to(torch.float64)
    work_of = seconds[slot, model].numpy()
    edges = np.searchsorted(slot.numpy(), np.arange(slots + 1))
    came, of = arrival.numpy(), model.numpy()
    now, free = np.zeros(models), np.zeros(models)  # virtual times: reached, and when the work so far is done
    clock = np.zeros((slots + 1, models))
    done = np.empty(len(came))
    shares = plan.share.to(torch.float64).numpy()
    for k in range(slots):
        left = np.maximum(free - now, 0.0)
        part = min(_MOST_TO_BACKLOG, float(left.sum()) / slot_s)
        share = shares[k] * (1 - part) + (part * left / left.sum() if left.sum() > 0 else 0.0)
        rows = slice(edges[k], edges[k + 1])
        for m in range(models):
            mine = of[rows] == m
            if not mine.any():
                continue
            at = now[m] + share[m] * (came[rows][mine] - k * slot_s)
            need = work_of[rows][mine]
            total = np.cumsum(need)
            finish = total + np.maximum(np.maximum.accumulate(at - (total - need)), free[m])
            done[np.flatnonzero(mine) + edges[k]] = finish
            free[m] = finish[-1]
        now = now + share * slot_s
        clock[k + 1] = now
    finish_s = _real_time(done, of, clock, free, slot_s)
    ends = (torch.arange(slots, dtype=torch.float64) + 1) * slot_s
    ordered = torch.tensor(np.sort(finish_s))
    backlog = torch.searchsorted(arrival, ends) - torch.searchsorted(ordered, ends, right=True)
    step = step_indices(scenario.repeat(slots), plan.steps)[slot, model]
    return SlotRun(torch.tensor(finish_s) - arrival, model, step, slot, backlog, plan, planning_s)


def _route_by_slot(stream: RequestStream, assignment: Tensor, slot: Tensor, routing: str, seed: int) -> Tensor:
    """Model of every request by the plan of its slot, shape (n,)."""
    c = len(stream.categories)
    joint = RequestStream(stream.arrival_s, (slot * c + stream.category[0])[None],
                          tuple(str(i) for i in range(len(assignment) * c)))  # fmt: skip
    return route(joint, assignment.reshape(1, -1, assignment.shape[-1]), routing=routing, seed=seed)[0, 0]


def _real_time(done: np.ndarray, of: np.ndarray, clock: np.ndarray, free: np.ndarray, slot_s: float) -> np.ndarray:
    """Real times of virtual ones; after the last slot the work left has the machine in proportion to itself."""
    slots = len(clock) - 1
    left = np.maximum(free - clock[-1], 0.0)
    knots = np.arange(slots + 1) * slot_s
    real = np.empty(len(done))
    for m in range(len(free)):
        mine = of == m
        virtual, times = clock[:, m], knots
        if left[m] > 0:
            virtual, times = np.append(virtual, free[m]), np.append(times, slots * slot_s + left.sum())
        # The first knot that reaches it: where the server stands still, virtual time repeats.
        reached = np.searchsorted(virtual, done[mine], "left").clip(1, len(virtual) - 1)
        gone = (done[mine] - virtual[reached - 1]) / (virtual[reached] - virtual[reached - 1])
        real[mine] = times[reached - 1] + gone * (times[reached] - times[reached - 1])
    return real
