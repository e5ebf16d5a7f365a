"""Delay of the latency models: a slot's batch, and a queue (M/D/1), each with its slope; batched and differentiable.

A model with load n_m, service time t_m and share f_m is busy for ρ_m = n_m t_m / f_m. In a slot its requests take
n_m ρ_m seconds together; in a queue, by Pollaczek and Khinchine, ρ_m + ρ_m² / (2 (1 − ρ_m)) of every second.
"""

from __future__ import annotations

import torch
from torch import Tensor


def queue_delay(busy: Tensor) -> Tensor:
    """Total delay of an M/D/1 queue in seconds a second, ρ + ρ² / (2 (1 − ρ)), for 0 ≤ ρ < 1; any shape.

    Args:
        busy: ρ, the share of its time that the server is busy.
    """
    return busy + busy.square() / (2 * (1 - busy))


def queue_slope(busy: Tensor) -> Tensor:
    """Derivative of :func:`queue_delay` by ρ, for 0 ≤ ρ < 1; any shape."""
    return 1 + (2 * busy - busy.square()) / (2 * (1 - busy).square())


def total_delay(latency: str, load: Tensor, service: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """Σ_m n_m T_m and whether every loaded model is served and stable.

    Args:
        latency: ``"slot"`` or ``"queue"``.
        load: n_m, shape (..., M).
        service: t_m, shape (..., M).
        share: f_m, shape (..., M).

    Returns:
        Total delay, shape (...), +inf where not served, and a boolean of the same shape.
    """
    loaded = load > 0
    served = share > 0
    one = torch.ones_like(share)
    busy = load * service / torch.where(served, share, one)
    if latency == "slot":
        delay, stable = load * busy, served
    else:
        stable = served & (busy < 1)
        calm = torch.where(stable, busy, 0.5 * one)
        delay = queue_delay(calm)
    delay = torch.where(loaded, delay, torch.zeros_like(delay)).sum(-1)
    feasible = (stable | ~loaded).all(-1)
    return torch.where(feasible, delay, torch.full_like(delay, torch.inf)), feasible


def calm_delay(busy: Tensor, limit: float = 0.98) -> Tensor:
    """:func:`queue_delay`, continued along its tangent beyond ``limit``; any shape.

    A gradient search can then start at an overload and find its way back.

    Args:
        busy: ρ ≥ 0, also above 1.
        limit: Where the tangent begins, in (0, 1).
    """
    calm = busy.clamp(max=limit)
    slope = queue_slope(torch.as_tensor(limit, dtype=busy.dtype, device=busy.device))
    return queue_delay(calm) + slope * (busy - limit).clamp(min=0)
