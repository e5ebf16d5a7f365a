"""Requests served under a plan, in closed form: no loop over requests, many plans and replicas at once.

Each request is drawn to a model by the plan and served first come, first served at the model's share. With service
times s_i and arrivals a_i of one model, the Lindley recursion W_{i+1} = max(0, W_i + s_i − (a_{i+1} − a_i)) has the
closed form

    finish_i = S_i + max_{j ≤ i} (a_j − S_{j−1}),   S_i = s_1 + … + s_i,

a cumulative sum and a running maximum, in float64: in float32 two million requests were a quarter of a second off.
Source: Lindley, Proc. Cambridge Phil. Soc. 48 (1952).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from edgesched.equations.utility import service_times
from edgesched.errors import PlanError, RequestError
from edgesched.streams.arrivals import RequestStream
from edgesched.types import ROUTINGS, Plan, Scenario

DISCIPLINES = ("queue", "slot")
_GOLDEN = 0.6180339887498949
_AT_ONCE = 2**24


@dataclass(frozen=True)
class Served:
    """What became of every request, for P plans and R replicas of n requests.

    Attributes:
        model: Model that served it, shape (P, R, n).
        latency_s: Seconds from arrival to delivery, shape (P, R, n); infinite where the model has no share.
        busy_s: Seconds that each model worked, shape (P, R, M).
        finish_s: Time of delivery, shape (P, R, n).
    """

    model: Tensor
    latency_s: Tensor
    busy_s: Tensor
    finish_s: Tensor


def route(stream: RequestStream, assignment: Tensor, *, routing: str = "random", seed: int = 0) -> Tensor:
    """Model of every request: drawn from its category's probabilities, the same draws for every plan.

    Args:
        stream: R replicas of n requests.
        assignment: Probabilities, shape (P, C, M).
        routing: ``"random"`` draws independently; ``"quota"`` deals the requests of a category out evenly, by the
            golden-ratio sequence.
        seed: Seed of the draws.

    Returns:
        Positions of models, shape (P, R, n).

    Raises:
        RequestError: If the routing is unknown, or the categories do not fit.
    """
    if routing not in ROUTINGS:
        raise RequestError(f"routing: {routing!r} is not one of {', '.join(ROUTINGS)}")
    p, c, m = assignment.shape
    if c != len(stream.categories):
        raise RequestError(f"assignment: expected {len(stream.categories)} categories, got {c}")
    shape = stream.category.shape
    if routing == "random":
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.rand(shape, generator=generator, dtype=torch.float64).to(assignment.device)
    else:
        number = torch.zeros(shape, dtype=torch.float64, device=assignment.device)
        for category in range(c):
            mine = stream.category == category
            number = torch.where(mine, mine.to(torch.float64).cumsum(-1), number)
        drawn = (number * _GOLDEN + 0.5).remainder(1.0)
    edges = assignment.to(torch.float64).cumsum(-1)[..., :-1] / assignment.to(torch.float64).sum(-1, keepdim=True)
    model = torch.zeros((p, *shape), dtype=torch.int64, device=assignment.device)
    for edge in range(m - 1):
        model += drawn >= edges[:, :, edge][:, stream.category]
    # A probability of 0 at the end is never drawn, not even by a last edge a rounding below 1.
    last = (assignment > 0).to(torch.int64).mul(torch.arange(m, device=assignment.device)).amax(-1)
    return torch.minimum(model, last[:, stream.category])


def simulate(
    stream: RequestStream,
    scenario: Scenario,
    plan: Plan,
    *,
    discipline: str | None = None,
    slot_s: float = 1.0,
    routing: str = "random",
    seed: int = 0,
) -> Served:
    """Serve a stream under plans.

    Args:
        stream: R replicas of n requests.
        scenario: P scenarios, or one for all plans: their step times, overheads and step counts are used.
        plan: P plans.
        discipline: ``"queue"``: a request at a time, first come, first served; ``"slot"``: the requests of a slot are
            one batch for every model, begun at the slot's end and delivered whole. None takes the scenario's.
        slot_s: Length of a slot in seconds.
        routing: As in :func:`route`.
        seed: Seed of the routing.

    Raises:
        RequestError: If the discipline or routing is unknown, a slot is not positive, or sizes or names do not fit.
        PlanError: If there are other numbers of plans and scenarios.

    Example:
        >>> from edgesched.streams.arrivals import poisson
        >>> s = Scenario.random(1, categories=1, models=2, steps=4, latency="queue", seed=0)
        >>> plan = Plan([[[1.0, 0.0]]], [[1, 1]], [[1.0, 0.0]])
        >>> simulate(poisson([0.1], ["all"], requests=5), s, plan).latency_s.shape
        torch.Size([1, 1, 5])
    """
    discipline, plans = discipline or scenario.latency, len(plan)
    _check_service(discipline, slot_s, scenario, plans)
    if len(scenario) != plans:
        scenario = scenario.repeat(plans)
    assignment, share = _by_name(scenario, stream, plan.assignment.detach()), plan.share.detach().to(torch.float64)
    service = service_times(scenario, plan.steps).detach().to(torch.float64) / share
    model = route(stream, assignment, routing=routing, seed=seed)
    finish = torch.full(model.shape, torch.inf, dtype=torch.float64, device=model.device)
    busy = torch.zeros((plans, stream.replicas, service.shape[1]), dtype=torch.float64, device=model.device)
    rows = max(1, _AT_ONCE // (stream.replicas * len(stream)))
    for start in range(0, plans, rows):
        part = slice(start, start + rows)
        for m in range(service.shape[1]):
            mine = model[part] == m
            if not bool(mine.any()):
                continue
            served = service[part, m, None, None].isfinite()  # no share: never delivered, and never busy
            seconds = torch.where(served, service[part, m, None, None], 0.0)
            if discipline == "queue":
                done = lindley(stream.arrival_s, torch.where(mine, seconds, 0.0), mine)
            else:
                done = _batches(stream.arrival_s, seconds, mine, slot_s)
            finish[part] = torch.where(mine & served, done, finish[part])
            busy[part, :, m] = torch.where(mine, seconds, 0.0).sum(-1)
    return Served(model, finish - stream.arrival_s, busy, finish)


def _check_service(discipline: str, slot_s: float, scenario: Scenario, plans: int) -> None:
    if discipline not in DISCIPLINES:
        raise RequestError(f"discipline: {discipline!r} is not one of {', '.join(DISCIPLINES)}")
    if slot_s <= 0:
        raise RequestError(f"slot_s: expected more than 0 seconds, got {slot_s}")
    if len(scenario) not in (1, plans):
        raise PlanError(f"scenario: expected 1 or {plans} for {plans} plans, got {len(scenario)}")


def _by_name(scenario: Scenario, stream: RequestStream, assignment: Tensor) -> Tensor:
    """The assignment (P, C, M) with its categories in the stream's order, which the names of both tell."""
    names = scenario.category_names
    if names is None or names == tuple(stream.categories):
        return assignment
    if set(names) != set(stream.categories):
        raise RequestError(f"categories: the scenario's are {', '.join(names)}, the stream's "
                           f"{', '.join(stream.categories)}")  # fmt: skip
    return assignment[:, [names.index(name) for name in stream.categories]]


def lindley(arrival_s: Tensor, service_s: Tensor, mine: Tensor, free_s: Tensor | float = 0.0) -> Tensor:
    """When each request of one first-come-first-served server is done, by the closed form above.

    Args:
        arrival_s: Times in order, shape (..., n), float64.
        service_s: Seconds of service, shape (..., n), 0 for requests of other servers.
        mine: Which requests are this server's, shape (..., n).
        free_s: When the server is first free, shape (..., 1).

    Returns:
        Times, shape (..., n), float64; meaningless where ``mine`` is not set.
    """
    total = service_s.cumsum(-1)
    begun = torch.where(mine, arrival_s - (total - service_s), -torch.inf)
    latest = begun.cummax(-1).values
    floor = free_s if isinstance(free_s, Tensor) else torch.as_tensor(free_s, dtype=total.dtype, device=total.device)
    return total + torch.maximum(latest, floor)


def _batches(arrival_s: Tensor, seconds: Tensor, mine: Tensor, slot_s: float) -> Tensor:
    """When each request is done if a slot's requests are one batch, begun at the slot's end or after the one before."""
    slot = (arrival_s / slot_s).floor().to(torch.int64).expand(mine.shape)
    slots = int(slot.max()) + 1
    count = torch.zeros((*mine.shape[:-1], slots), dtype=torch.float64, device=mine.device)
    count.scatter_add_(-1, slot, mine.to(torch.float64))
    work = torch.where(count > 0, count * seconds, 0.0)
    end = (torch.arange(slots, dtype=torch.float64, device=mine.device) + 1) * slot_s
    return lindley(end.expand_as(work), work, count > 0).gather(-1, slot)


def summary(
    stream: RequestStream, served: Served, *, deadline_s: float | None = None, warm_up: float = 0.0
) -> dict[str, Tensor]:
    """Latency and use of the machine over the requests of every plan and replica.

    Args:
        stream: What arrived.
        served: What became of it.
        deadline_s: Seconds within which a request should be done.
        warm_up: Share of the requests, from the start, that are left out of the latencies.

    Returns:
        ``mean_s p50_s p95_s p99_s`` and ``missed`` (share beyond the deadline, if one is given), each of shape (P, R);
        ``utilisation``, shape (P, R, M): busy seconds over the time from the first arrival to the last delivery.

    Raises:
        RequestError: If the warm-up leaves nothing, or the deadline is not positive.
    """
    if not 0 <= warm_up < 1:
        raise RequestError(f"warm_up: expected a share from 0 and below 1, got {warm_up}")
    if deadline_s is not None and deadline_s <= 0:
        raise RequestError(f"deadline_s: expected more than 0 seconds, got {deadline_s}")
    latency = served.latency_s[..., int(warm_up * len(stream)) :]
    ordered = latency.sort(-1).values
    size = ordered.shape[-1]
    found = {"mean_s": latency.mean(-1)}
    for name, level in (("p50_s", 0.5), ("p95_s", 0.95), ("p99_s", 0.99)):
        found[name] = ordered[..., min(size - 1, int(level * size))]
    if deadline_s is not None:
        found["missed"] = (latency > deadline_s).double().mean(-1)
    last = served.finish_s.masked_fill(served.finish_s.isinf(), 0.0).amax(-1)
    span = (torch.maximum(last, stream.arrival_s[:, -1]) - stream.arrival_s[:, 0]).clamp(min=1e-12)
    found["utilisation"] = served.busy_s / span[..., None]
    return found


def backlog(stream: RequestStream, served: Served, times_s: Tensor) -> Tensor:
    """Requests that have arrived and are not delivered, at given times.

    Args:
        stream: What arrived.
        served: What became of it.
        times_s: Times, shape (T,).

    Returns:
        Shape (P, R, T), int64.
    """
    times = times_s.to(stream.arrival_s)
    came = torch.searchsorted(stream.arrival_s, times.expand(stream.replicas, -1).contiguous(), right=True)
    finish = served.finish_s.sort(-1).values
    gone = torch.searchsorted(finish, times.expand(*finish.shape[:-1], -1).contiguous(), right=True)
    return came - gone


def pollaczek_khinchine(rate: Tensor, service_s: Tensor) -> Tensor:
    """Mean time in an M/D/1 queue, s (1 + ρ / (2 (1 − ρ))) with ρ = rate · s; infinite where ρ ≥ 1.

    Args:
        rate: Arrivals a second.
        service_s: Seconds of service.

    Source:
        Pollaczek, Math. Z. 32 (1930); Khinchine, Mat. Sbornik 39 (1932).
    """
    rho = rate * service_s
    stable = rho < 1
    calm = torch.where(stable, rho, 0.0)
    return torch.where(stable, service_s * (1 + calm / (2 * (1 - calm))), torch.inf)


def simpy_latency(arrival_s: Tensor, service_s: Tensor, model: Tensor) -> Tensor:
    """The same stream, event by event, by SimPy: an independent check on :func:`simulate`.

    Args:
        arrival_s: Times in order, shape (n,).
        service_s: Seconds of service of every model, shape (M,).
        model: Model of every request, shape (n,).

    Returns:
        Seconds from arrival to delivery, shape (n,), float64.

    Raises:
        ImportError: If SimPy is not installed (extra ``test``).
    """
    import simpy

    world = simpy.Environment()
    servers = [simpy.Resource(world) for _ in range(len(service_s))]
    seconds = service_s.tolist()
    latency = torch.empty(len(arrival_s), dtype=torch.float64)

    def one(number: int, came: float, m: int):  # type: ignore[no-untyped-def]
        yield world.timeout(came)
        with servers[m].request() as turn:
            yield turn
            yield world.timeout(seconds[m])
        latency[number] = world.now - came

    for number, (came, m) in enumerate(zip(arrival_s.tolist(), model.tolist(), strict=True)):
        world.process(one(number, came, m))
    world.run()
    return latency


def agreement(
    scenario: Scenario, plan: Plan, *, requests: int = 20_000, replicas: int = 32, checked: int = 5_000, seed: int = 0
) -> dict[str, float | None]:
    """The simulator against theory, and against an event-by-event simulation where SimPy is installed.

    Args:
        scenario: One scenario in queue mode.
        plan: Its plan.
        requests: Requests of each replica.
        replicas: Replicas.
        checked: Requests that SimPy serves too.
        seed: Seed.

    Returns:
        ``simpy_max_abs_s``, the largest difference of any request's latency (None without SimPy); ``pk_relative``,
        the relative difference of the mean from Pollaczek and Khinchine, with ``pk_halfwidth``, the relative half
        width of the simulation's own 95 % interval over replicas.

    Raises:
        RequestError: If the plan is overloaded, so that there is no mean to compare.
    """
    from edgesched.equations.utility import evaluate
    from edgesched.streams.arrivals import poisson

    expected = float(evaluate(scenario, plan).latency_s) if scenario.latency == "queue" else float("inf")
    if not expected < float("inf"):
        raise RequestError("agreement: expected a scenario in queue mode and a plan that is not overloaded")
    names = scenario.category_names or tuple(str(c) for c in range(scenario.shape[1]))
    stream = poisson(scenario.demand[0].tolist(), names, requests=requests, replicas=replicas, seed=seed)
    served = simulate(stream, scenario, plan, seed=seed)
    mean = summary(stream, served, warm_up=0.2)["mean_s"][0]
    halfwidth = 1.96 * float(mean.std()) / replicas**0.5
    found: dict[str, float | None] = {
        "simpy_max_abs_s": None,
        "pk_relative": abs(float(mean.mean()) - expected) / expected,
        "pk_halfwidth": halfwidth / expected,
    }
    try:
        service = (service_times(scenario, plan.steps) / plan.share)[0].double()
        again = simpy_latency(stream.arrival_s[0, :checked], service, served.model[0, 0, :checked])
    except ImportError:
        return found
    found["simpy_max_abs_s"] = float((again - served.latency_s[0, 0, :checked]).abs().max())
    return found
