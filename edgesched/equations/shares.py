"""Best shares for given assignment and steps: closed form in slots, one multiplier in queues, whole units."""

from __future__ import annotations

import torch
from torch import Tensor

from edgesched.equations.delay import queue_delay, queue_slope
from edgesched.equations.utility import check_shapes, loads, service_times, step_indices
from edgesched.types import Scenario

_NEWTON = 6


def best_share(scenario: Scenario, assignment: Tensor, steps: Tensor) -> Tensor:
    """Shares that minimise mean latency for fixed assignment and steps.

    In slot mode the minimiser over the simplex is f_m ∝ n_m √t_m (Cauchy–Schwarz). In queue mode the
    problem is convex with one multiplier, found by Newton's method; where the server is overloaded no share is
    stable and shares follow the loads. With ``share_units`` the units are dealt out one by one to the
    model that gains most, which is optimal for convex delays (Fox 1966). Differentiable, except in units.

    Args:
        scenario: Batch of B scenarios.
        assignment: Probabilities, shape (B, C, M), rows summing to 1.
        steps: Denoising steps, shape (B, M), values out of ``scenario.steps``.

    Returns:
        Shares of the server, shape (B, M), non-negative, rows summing to 1; unloaded models get 0.

    Raises:
        PlanError: If shapes differ or a step count is not one of ``scenario.steps``.

    Example:
        >>> s = Scenario.random(2, seed=0)
        >>> steps = s.steps[-1].expand(2, 3)
        >>> best_share(s, torch.full((2, 4, 3), 1 / 3, dtype=torch.float64), steps).sum(-1)
        tensor([1., 1.], dtype=torch.float64)
    """
    check_shapes(scenario, assignment, steps, None)
    step_indices(scenario, steps)
    return share_for_load(scenario, loads(scenario, assignment), service_times(scenario, steps))


def share_for_load(scenario: Scenario, load: Tensor, service: Tensor) -> Tensor:
    """:func:`best_share` for loads n_m and service times t_m, both of shape (B, M).

    Args:
        scenario: Batch of B scenarios.
        load: n_m, requests per slot or second, shape (B, M).
        service: t_m, seconds per image with the whole server, shape (B, M).

    Returns:
        Shares, shape (B, M), rows summing to 1.
    """
    if scenario.share_units is not None:
        return unit_shares(scenario.latency, load, service, scenario.share_units)
    if scenario.latency == "slot":
        weight = load * service.sqrt()
        return weight / weight.sum(-1, keepdim=True)
    return _queue_shares(load, service)


def _queue_shares(load: Tensor, service: Tensor) -> Tensor:
    """Minimise Σ g(r_m / f_m) over the simplex, r_m = n_m t_m, by Newton's method on the multiplier."""
    work = load * service
    with torch.no_grad():
        loaded = work > 0
        total = work.sum(-1, keepdim=True)
        safe = torch.where(loaded, work, torch.ones_like(work))

        # With w = ρ / (1 − ρ) the conditions g'(ρ) ρ² = μ r read w √(1 + (1 + w)²) / (1 + w) = √r / u, u = 1/√(2μ),
        # and the shares fill the server where Σ r / w = 1 − Σ r. Both are all but straight, in w and in u: Newton.
        slack = (1 - total).clamp(min=1e-300)
        root_work = torch.where(loaded, work.sqrt(), torch.zeros_like(work))
        u = slack / root_work.sum(-1, keepdim=True).clamp(min=1e-300) / 1.2
        w = safe.sqrt() / u
        for _ in range(_NEWTON):
            aim = safe.sqrt() / u
            w = aim
            for _ in range(_NEWTON):
                z = 1 + w
                root = (1 + z.square()).sqrt()
                slope = root / z.square() + w / root
                w = w - (w * root / z - aim) / slope
            need = torch.where(loaded, work / w, torch.zeros_like(work))
            change = (need / w * aim / slope / u).sum(-1, keepdim=True)
            u = u + (slack - need.sum(-1, keepdim=True)) / change.clamp(min=1e-300)
        shares = torch.where(loaded, work * (1 + w) / w, torch.zeros_like(work))
        overloaded = total >= 1
        shares = torch.where(overloaded, work / total, shares / shares.sum(-1, keepdim=True))
    # One Newton step of the optimality conditions, its matrix held fixed, carries the implicit gradient.
    one = torch.ones_like(work)
    usable = loaded & ~overloaded & (safe < shares)
    share0 = torch.where(usable, shares, one)
    work1 = torch.where(usable, work, 0.25 * one)
    rho = work1 / share0
    slope = -queue_slope(rho) * rho / share0
    with torch.no_grad():
        held = rho.detach()
        curvature = (2 * held * queue_slope(held) + held.square() / (1 - held) ** 3) / share0.square()
        level = torch.where(usable, slope, torch.zeros_like(slope)).sum(-1, keepdim=True) / usable.sum(
            -1, keepdim=True
        ).clamp(min=1)
    residual = torch.where(usable, slope - level, torch.zeros_like(slope))
    inverse = torch.where(usable, 1 / curvature, torch.zeros_like(curvature))
    shift = (residual * inverse).sum(-1, keepdim=True) / inverse.sum(-1, keepdim=True).clamp(min=1e-300)
    step = (shift - residual) * inverse
    refined = torch.where(usable, shares + step - step.detach(), shares)
    by_work = work / work.sum(-1, keepdim=True).clamp(min=1e-300)
    return torch.where(overloaded, by_work, refined)


def unit_shares(latency: str, load: Tensor, service: Tensor, units: int) -> Tensor:
    """Deal whole units out to the model whose delay falls most, starting from what each loaded model needs.

    Args:
        latency: ``"slot"`` or ``"queue"``.
        load: n_m, shape (..., M).
        service: t_m in seconds, shape (..., M).
        units: Units of the whole server.

    Returns:
        Shares, shape (..., M), multiples of 1/units; 0 for unloaded models. No gradient.
    """
    with torch.no_grad():
        loaded = load > 0
        work = load * service
        need = torch.ones_like(work) if latency == "slot" else (work * units + 1e-9).floor() + 1
        dealt = torch.where(loaded, need, torch.zeros_like(need))
        # Where even the needs exceed the units nothing is feasible; they are cut down in order of models.
        before = torch.cat([torch.zeros_like(dealt[..., :1]), dealt.cumsum(-1)[..., :-1]], -1)
        dealt = torch.minimum(dealt, (units - before).clamp(min=0))
        left = units - dealt.sum(-1)

        def delay(given: Tensor) -> Tensor:
            busy = work * units / given.clamp(min=1)
            if latency == "slot":
                return load * busy
            calm = busy.clamp(max=1 - 1e-12)
            return torch.where(busy < 1, queue_delay(calm), torch.full_like(busy, torch.inf))

        for _ in range(units):
            gain = torch.where(loaded, (delay(dealt) - delay(dealt + 1)).nan_to_num(0.0), -torch.ones_like(dealt))
            chosen = torch.nn.functional.one_hot(gain.argmax(-1), dealt.shape[-1])
            dealt = dealt + chosen * (left > 0)[..., None]
            left = (left - 1).clamp(min=0)
    return dealt / units
