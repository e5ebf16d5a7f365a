"""Slot by slot: forecast the demand, plan anew, carry the backlog over.

Requests that have not begun when a slot ends are demand of the next one: they are planned for, and dealt to models
anew. What has begun is finished where it is. Within a slot a model works at its share of the machine, so its requests
are one Lindley recursion in full-server seconds: a loop over slots, none over requests.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from edgesched.equations.utility import service_times, step_indices, step_service_times
from edgesched.errors import RequestError
from edgesched.streams.arrivals import RequestStream
from edgesched.streams.clock import WALL, Clock
from edgesched.streams.queues import route
from edgesched.types import Plan, Scenario, SearchResult

FORECASTS = ("last", "ewma", "once", "known")
_FLOOR = 0.05
_MOST_TO_BACKLOG = 0.9
_MOST_SLOTS = 100_000


@dataclass(frozen=True)
class SlotRun:
    """What became of a stream that was planned for slot by slot.

    Attributes:
        latency_s: Seconds from arrival to delivery, shape (n,).
        model: Model that served each request, shape (n,).
        step: Position of its step count, shape (n,).
        slot: Slot that it began in, shape (n,).
        backlog: Requests not begun at the end of every slot, shape (slots,); slots go on until all are served.
        plan: Plans of all slots, batch size slots.
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

    Args:
        stream: Requests of one replica.
        slot_s: Length of a slot in seconds.

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


def plan_slot(
    scenario: Scenario,
    expected: Tensor,
    slot_s: float,
    search: Callable[..., SearchResult],
    before: Plan | None = None,
) -> Plan:
    """A plan for one slot.

    In queue mode a demand that no plan can keep up with is planned as one batch instead, which always can be.

    Args:
        scenario: One scenario; its demand is replaced.
        expected: Requests expected in the slot, shape (C,).
        slot_s: Length of a slot in seconds.
        search: Called with one scenario, and with ``start=before`` if it takes that.
        before: The plan of the slot before.
    """
    warm = {}
    if before is not None and "start" in inspect.signature(search).parameters:
        warm = {"start": before.to(scenario.device)}
    demand = expected.to(scenario.demand)[None]
    least = (
        step_service_times(scenario)[0]
        .expand(scenario.quality.shape[1:])
        .masked_fill(~scenario.quality[0].isfinite(), torch.inf)
    )
    busy = float((demand[0] / slot_s * least.flatten(1).amin(-1)).sum())  # by the quickest that each category may have
    if scenario.latency == "queue" and busy < 1:
        found = search(dataclasses.replace(scenario, demand=demand / slot_s), **warm)
        if bool(found.feasible.all()):
            return found.plan
    return search(dataclasses.replace(scenario, demand=demand, latency="slot"), **warm).plan


def run_slots(
    stream: RequestStream,
    scenario: Scenario,
    search: Callable[..., SearchResult],
    *,
    slot_s: float = 15.0,
    how: str = "ewma",
    ewma: float = 0.3,
    routing: str = "random",
    seed: int = 0,
    clock: Clock = WALL,
) -> SlotRun:
    """Plan for every slot on what is expected of it and what is left over, and serve what comes.

    With ``how="once"`` the plan for the mean demand is kept throughout. An image that has begun on a model that the new
    plan gives no share is finished first, on up to nine tenths of the machine.

    Args:
        stream: One replica.
        scenario: One scenario, on the device to plan on; its demand is replaced by the forecast.
        search: Search method.
        slot_s: Length of a slot in seconds.
        how: Forecast, as in :func:`forecast`.
        ewma: Weight of the newest slot.
        routing: As in :func:`edgesched.streams.queues.route`.
        seed: Seed of the routing.
        clock: What time it is, for ``planning_s`` alone.

    Raises:
        RequestError: If an argument is out of its range, or requests pile up for ever.
    """
    stream, server = stream.to("cpu"), scenario.to("cpu")
    demand = demand_of_slots(stream, slot_s)
    expected = forecast(demand, how, ewma=ewma)
    came, category = stream.arrival_s[0].numpy(), stream.category[0].numpy()
    edges = np.searchsorted((came / slot_s).astype(int), np.arange(len(demand) + 1))
    categories = len(stream.categories)
    machine = _Machine(came, scenario.shape[2], slot_s)
    pending = np.empty(0, int)
    backlog: list[int] = []
    plans: list[Plan] = []
    planning_s, plan, k = 0.0, None, 0
    quiet = expected.mean(0) * _FLOOR
    while k < len(demand) or len(pending) or machine.busy():
        if k > _MOST_SLOTS * len(demand) + _MOST_SLOTS:
            raise RequestError(
                f"slots: {len(pending)} requests are still waiting {k - len(demand)} slots after the last came"
            )
        begun = clock.now()
        if plan is None or how != "once":
            waiting = torch.bincount(torch.tensor(category[pending]), minlength=categories).double()
            wanted = (expected[k] if k < len(demand) else quiet) + waiting
            plan = plan_slot(scenario, wanted, slot_s, search, plan).to("cpu")
        planning_s += clock.now() - begun
        plans.append(plan)
        seconds = service_times(server, plan.steps)[0].double().numpy()
        index = step_indices(server, plan.steps)[0].numpy()
        here = np.concatenate([pending, np.arange(edges[k], edges[k + 1])]) if k < len(demand) else pending
        chosen = _routed(here, category, plan.assignment, stream.categories, routing, seed + k)
        pending = machine.serve(k, here, chosen, plan.share[0].double().numpy(), seconds, index)
        backlog.append(len(pending))
        k += 1
    together = Plan(*(torch.cat([getattr(p, f) for p in plans]) for f in ("assignment", "steps", "share")))
    found = (machine.finish - came, machine.model, machine.step, machine.slot, np.array(backlog))
    latency, model, step, slot, left = (torch.tensor(values) for values in found)
    return SlotRun(latency, model, step, slot, left, together, planning_s)


class _Machine:
    """The models on one machine, slot after slot, and what became of every request.

    Args:
        came: Arrivals in seconds, shape (n,).
        models: Models.
        slot_s: Length of a slot in seconds.
    """

    def __init__(self, came: np.ndarray, models: int, slot_s: float) -> None:
        self.came, self.slot_s = came, slot_s
        self.finish = np.full(len(came), np.nan)
        self.model, self.step, self.slot = (np.zeros(len(came), int) for _ in range(3))
        self._left = np.zeros(models)  # full-server seconds of what has begun
        self._unfinished: list[int | None] = [None] * models

    def busy(self) -> bool:
        """Whether a request has begun and is not done."""
        return any(request is not None for request in self._unfinished)

    def serve(
        self, k: int, here: np.ndarray, chosen: np.ndarray, share: np.ndarray, seconds: np.ndarray, step: np.ndarray
    ) -> np.ndarray:
        """Serve slot ``k``; returns the requests that have not begun at its end, in the order of arrival.

        Args:
            k: Number of the slot.
            here: Requests that wait or come, in the order of arrival.
            chosen: Model of each of them.
            share: Share of every model, shape (M,).
            seconds: Full-server seconds of an image of every model, shape (M,).
            step: Position of every model's step count, shape (M,).
        """
        share = self._with_stranded(share)
        again = [self._serve_model(m, k, here[chosen == m], share[m], seconds[m], step[m]) for m in range(len(share))]
        return np.sort(np.concatenate(again))

    def _with_stranded(self, share: np.ndarray) -> np.ndarray:
        """Shares, after a part for models that the plan gives none and that have begun an image."""
        stranded = np.where((self._left > 0) & (share <= 0), self._left, 0.0)
        if not stranded.any():
            return share
        part = min(_MOST_TO_BACKLOG, stranded.sum() / self.slot_s)
        return share * (1 - part) + part * stranded / stranded.sum()

    def _serve_model(
        self, m: int, k: int, mine: np.ndarray, share: np.floating, seconds: np.floating, step: np.integer
    ) -> np.ndarray:
        start, unfinished = k * self.slot_s, self._unfinished[m]
        open_at = self._left[m] / share if self._left[m] > 0 else 0.0
        if unfinished is not None and open_at <= self.slot_s:
            self.finish[unfinished], self._unfinished[m] = start + open_at, None
        self._left[m] = max(self._left[m] - share * self.slot_s, 0.0)
        if not len(mine) or share <= 0:
            return mine
        need = seconds / share
        order = np.arange(1, len(mine) + 1) * need
        done = order + np.maximum(
            np.maximum.accumulate(np.maximum(self.came[mine] - start, 0.0) - (order - need)), open_at
        )
        started = done - need < self.slot_s
        now = mine[started]
        self.finish[now], self.model[now], self.step[now], self.slot[now] = start + done[started], m, step, k
        if len(now) and done[started][-1] > self.slot_s:
            last = int(now[-1])
            self._left[m] = (done[started][-1] - self.slot_s) * share
            self._unfinished[m], self.finish[last] = last, np.nan
        return mine[~started]


def _routed(
    here: np.ndarray, category: np.ndarray, assignment: Tensor, names: tuple[str, ...], routing: str, seed: int
) -> np.ndarray:
    """Model of every request of a slot, shape (requests,)."""
    if not len(here):
        return np.empty(0, int)
    some = RequestStream(torch.zeros(1, len(here)), torch.tensor(category[here])[None], names)
    return route(some, assignment, routing=routing, seed=seed)[0, 0].numpy()
