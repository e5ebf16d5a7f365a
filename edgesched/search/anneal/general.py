"""The annealing step where the shares do not separate: queues, slices, given shares, memory, deadlines.

The same moves as in :mod:`edgesched.search.anneal.kernel`, each followed by the utility of the whole plan: one
pass over the models. In queue mode with free shares the total delay is ½ Σ (r_m/f_m + r_m/(f_m − r_m)) with
r_m = n_m t_m; the kernel starts at Kleinrock's shares f = r + (1 − R) √r / Σ √r (Queueing Systems II, 1976),
the minimiser of the second term, and takes Newton steps that keep the sum.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from edgesched.equations.delay import queue_delay
from edgesched.equations.feasible import TOLERANCE
from edgesched.equations.shares import unit_shares
from edgesched.search.anneal.kernel import at_lanes, look, propose

#: Energy of what is infeasible, times 1 + its violation: below every utility, whatever the scale of scores and weights.
#: Between infeasible states the smaller violation wins, between feasible ones the Metropolis rule decides.
INFEASIBLE = -1e30
_BUSIEST = 0.9999
_LATE = 1e-6  # float32 sums are no better: what is within a deadline here is so in float64 too
_NEWTON = 2


class Server(NamedTuple):
    """Constants of the objective, float32 but for ``memory`` and ``limit``.

    Args:
        service: t_mk in seconds, shape (M, B, K).
        unit: Points of one unit of gain, shape (B, 1).
        omega: ω over all requests N, shape (B, 1).
        load_unit: Requests of one unit of load, shape (B, 1).
        per_unit: Share of one unit, a scalar.
        share: Given shares, shape (M, B, 1), or None.
        deadline: One over the deadline times N, shape (B, 1), or None.
        memory: Memory of the models in GiB, shape (M, B, 1), float64, or None.
        limit: One over the memory limit, shape (B, 1), float64, or None.
        dealt: Slices, where they are few enough to be dealt out for every proposal, or None.
    """

    service: Tensor
    unit: Tensor
    omega: Tensor
    load_unit: Tensor
    per_unit: Tensor
    share: Tensor | None
    deadline: Tensor | None
    memory: Tensor | None
    limit: Tensor | None
    dealt: int | None


def _sum(rows: Tensor) -> Tensor:
    """Sum over models in one fixed order, which a reduction does not promise."""
    total = rows[0]
    for m in range(1, rows.shape[0]):
        total = total + rows[m]
    return total


def _root(value: Tensor) -> Tensor:
    """Square root by way of float64: float32 roots of vector libraries are not all exactly rounded."""
    return value.double().sqrt().float()


def queue_shares(work: Tensor) -> Tensor:
    """Shares near the best for the M/D/1 delays of work r_m = n_m t_m, shape (M, ...), summing to 1 if Σ r < 1."""
    slack = (1 - _sum(work)).clamp(min=1 - _BUSIEST)
    root = _root(work)
    spare = slack * root / _sum(root).clamp(min=1e-30)
    for _ in range(_NEWTON):
        y = spare.clamp(min=1e-12)
        f = work + y
        slope = work / (f * f) + work / (y * y)
        curve = 1 / (work / (f * f * f) + work / (y * y * y)).clamp(min=1e-12)
        loaded = work > 0
        curve = torch.where(loaded, curve, 0.0)
        level = _sum(slope * curve) / _sum(curve).clamp(min=1e-30)
        spare = torch.maximum(spare + 0.5 * (slope - level) * curve, 0.2 * spare)
        spare = torch.where(loaded, spare, 0.0)
        spare = spare * (slack / _sum(spare).clamp(min=1e-30))
    return work + spare


def energy(server: Server, latency: str, k: Tensor, n: Tensor, u: Tensor | None, q: Tensor) -> Tensor:
    """Utility less an offset, shape (B, R); below every utility, by how much it breaks constraints, if infeasible.

    Args:
        server: Constants.
        latency: ``"slot"`` or ``"queue"``.
        k: Step indices, shape (M, B, R).
        n: Fixed-point loads, shape (M, B, R or 1).
        u: Units of share, shape (M, B, R), or None where shares are given or follow from the loads.
        q: Fixed-point gain, shape (B, R).
    """
    service = look(server.service, k)
    load = n.float() * server.load_unit + torch.zeros_like(service)
    work = load * service
    violation = torch.zeros_like(work[0])
    if u is None and server.share is None and server.dealt is None and latency == "slot":
        total = _sum(load * _root(service))
        delay = total * total
    else:
        if server.share is not None:
            share = server.share.clamp(min=1e-9)
        elif u is not None:
            share = u.float().clamp(min=0.25) * server.per_unit
            violation = _sum(((load > 0) & (u == 0)).float())
        elif server.dealt is not None:
            rows = unit_shares(latency, load.movedim(0, -1), service.movedim(0, -1), server.dealt)
            share = rows.movedim(-1, 0)
        else:
            share = queue_shares(work)
        busy = torch.where(load > 0, work / share.clamp(min=1e-9), 0.0)
        if latency == "slot":
            delay = _sum(load * busy)
        else:
            calm = busy.clamp(max=_BUSIEST)
            delay = _sum(queue_delay(calm))
            # Shares of an overload sum to more than the server, so that its queues look calm: the whole work tells.
            overload = _sum((busy - _BUSIEST).clamp(min=0)) + (_sum(work) - _BUSIEST).clamp(min=0)
            violation = violation + overload
    if server.deadline is not None:
        violation = violation + (delay * server.deadline - (1 - _LATE)).clamp(min=0)
    if server.memory is not None and server.limit is not None:
        resident = _sum(torch.where(load > 0, server.memory, 0.0))
        violation = violation + (resident * server.limit - (1 + TOLERANCE)).clamp(min=0).float()
    utility = q.float() * server.unit - server.omega * delay
    return torch.where(violation > 0, INFEASIBLE * (1 + violation).clamp(max=1e7), utility)


def _models(k: Tensor) -> Tensor:
    return torch.arange(k.shape[0], dtype=torch.int32, device=k.device)[:, None, None]


def step_general(
    a: Tensor | None, k: Tensor, g: Tensor, n: Tensor, u: Tensor | None, q: Tensor, e: Tensor, gain: Tensor,
    model: Tensor, jump: Tensor, shift: Tensor, threshold: Tensor, beta: Tensor, server: Server, latency: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """One model's step count; rows are pieces, or models where the assignment is given.

    Args:
        a: Models of the pieces, shape (P, B, R), int32, or None where the assignment is given.
        k: Step indices, shape (M, B, R).
        g: Gains, shape (rows, B, R).
        n: Fixed-point loads, shape (M, B, R or 1).
        u: Units of share, shape (M, B, R), or None.
        q: Sum of gains, shape (B, R).
        e: Energy, shape (B, R).
        gain: Fixed-point gain of pieces on this model, or of every model, shape (rows, B, K), negative where masked.
        model: The model, a scalar.
        jump: Proposals, shape (R,), with ``shift`` and ``threshold`` as :func:`rng.draws` gives them.
        shift: Shape (R,).
        threshold: Shape (R,).
        beta: Inverse temperature, shape (B, 1) or (B, R).
        server: Constants.
        latency: ``"slot"`` or ``"queue"``.

    Returns:
        ``k``, ``g``, ``q`` and ``e`` after the move.
    """
    here = _models(k) == model
    new = propose(torch.where(here, k, 0).sum(0, dtype=torch.int32), jump, shift, gain.shape[-1])
    mine = here if a is None else a == model
    g2 = torch.where(mine, look(gain, new.expand(g.shape)), g)
    k2 = torch.where(here, new, k)
    q2 = g2.sum(0, dtype=torch.int32)
    worse = ((g2 < 0) & (g >= 0)).sum(0, dtype=torch.int32)
    e2 = energy(server, latency, k2, n, u, q2)
    take = ((e2 - e) * beta > threshold) & (worse == 0)
    return torch.where(take, k2, k), torch.where(take, g2, g), torch.where(take, q2, q), torch.where(take, e2, e)


def assign_general(
    a: Tensor, k: Tensor, g: Tensor, n: Tensor, u: Tensor | None, q: Tensor, e: Tensor, gain: Tensor, demand: Tensor,
    jump: Tensor, threshold: Tensor, beta: Tensor, lane: Tensor, server: Server, latency: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor]:  # fmt: skip
    """The model of one piece, its load, and a unit of share where its new model has none.

    Args:
        a: Its model, shape (B, R), int32.
        k: Step indices, shape (M, B, R).
        g: Its gain, shape (B, R).
        n: Fixed-point loads, shape (M, B, R).
        u: Units of share, shape (M, B, R), or None.
        q: Sum of gains, shape (B, R).
        e: Energy, shape (B, R).
        gain: Fixed-point gain of the piece, shape (B, M · K), negative where masked.
        demand: Its fixed-point demand, shape (B, 1).
        jump: Models proposed, shape (R,).
        threshold: As :func:`rng.draws` gives it, shape (R,).
        beta: Inverse temperature, shape (B, 1) or (B, R).
        lane: As in :func:`edgesched.search.anneal.kernel.at_lanes`.
        server: Constants.
        latency: ``"slot"`` or ``"queue"``.

    Returns:
        ``a``, ``g``, ``n``, ``u``, ``q`` and ``e`` after the move.
    """
    new, u0 = jump.expand(a.shape), u
    place = new * (gain.shape[-1] // k.shape[0]) + at_lanes(k, new, lane)
    g2 = look(gain, place)
    q2 = q + g2 - g
    models = _models(k)
    to, source = models == new, models == a
    n2 = n + torch.where(to, demand, 0) - torch.where(source, demand, 0)
    if u is not None:
        # A model without a unit gets one from the model that the piece leaves.
        bare = torch.where(to, u, 0).sum(0, dtype=torch.int32) == 0
        u = u + torch.where(bare & to & (new != a), 1, 0) - torch.where(bare & source & (new != a), 1, 0)
    e2 = energy(server, latency, k, n2, u, q2)
    take = ((e2 - e) * beta > threshold) & ((g2 >= 0) | (g < 0))
    if u is not None and u0 is not None:
        take = take & (torch.where(source, u, 0).sum(0, dtype=torch.int32) >= 0)
        u = torch.where(take, u, u0)
    return (
        torch.where(take, new, a), torch.where(take, g2, g), torch.where(take, n2, n), u, torch.where(take, q2, q),
        torch.where(take, e2, e),
    )  # fmt: skip


def share_general(
    k: Tensor, n: Tensor, u: Tensor, q: Tensor, e: Tensor, model: Tensor, jump: Tensor, shift: Tensor,
    threshold: Tensor, beta: Tensor, server: Server, latency: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Units of share from one model to another.

    Args:
        k: Step indices, shape (M, B, R).
        n: Fixed-point loads, shape (M, B, R or 1).
        u: Units of share, shape (M, B, R).
        q: Sum of gains, shape (B, R).
        e: Energy, shape (B, R).
        model: The model that gives, a scalar.
        jump: Models that receive, shape (R,).
        shift: Units given, its sign left out, as far as there are any, shape (R,).
        threshold: As :func:`rng.draws` gives it, shape (R,).
        beta: Inverse temperature, shape (B, 1) or (B, R).
        server: Constants.
        latency: ``"slot"`` or ``"queue"``.

    Returns:
        ``u`` and ``e`` after the move.
    """
    models = _models(k)
    here = models == model
    amount = torch.minimum(shift.abs(), torch.where(here, u, 0).sum(0, dtype=torch.int32))
    u2 = u + torch.where(models == jump, amount, 0) - torch.where(here, amount, 0)
    e2 = energy(server, latency, k, n, u2, q)
    take = (e2 - e) * beta > threshold
    return torch.where(take, u2, u), torch.where(take, e2, e)
