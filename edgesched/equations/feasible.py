"""What makes a plan feasible, once: every bound, search, simulation and replay asks here, with one tolerance."""

from __future__ import annotations

import torch
from torch import Tensor

from edgesched.types import Scenario

#: Relative tolerance of memory limits and deadlines: more than the rounding of sums, less than anybody can measure.
TOLERANCE = 1e-9
#: How far from a whole number of slices a share may be.
SLICE_TOLERANCE = 1e-5


def memory_fits(scenario: Scenario, resident: Tensor) -> Tensor:
    """Whether the resident models fit into memory.

    Args:
        scenario: Batch of B scenarios.
        resident: Which models are loaded, boolean, shape (B, ..., M).

    Returns:
        Boolean, shape (B, ...).
    """
    if scenario.memory_gib is None or scenario.memory_limit_gib is None:
        return torch.ones(resident.shape[:-1], dtype=torch.bool, device=resident.device)
    between = [1] * (resident.ndim - 2)
    memory = scenario.memory_gib.double().reshape(len(scenario), *between, -1)
    limit = scenario.memory_limit_gib.double().reshape(len(scenario), *between)
    return torch.where(resident, memory, 0.0).sum(-1) <= limit * (1 + TOLERANCE)


def in_time(scenario: Scenario, latency_s: Tensor) -> Tensor:
    """Whether the mean delay, shape (B, ...), meets the deadline; always, where there is none. Boolean, (B, ...).

    Args:
        scenario: Batch of B scenarios.
        latency_s: Mean delays in seconds, shape (B, ...).
    """
    if scenario.deadline_s is None:
        return torch.ones(latency_s.shape, dtype=torch.bool, device=latency_s.device)
    deadline = scenario.deadline_s.reshape(len(scenario), *[1] * (latency_s.ndim - 1))
    return latency_s <= deadline * (1 + TOLERANCE)


def slices_whole(scenario: Scenario, share: Tensor) -> Tensor:
    """Whether every share, shape (B, ..., M), is a whole number of slices; boolean, shape (B, ...).

    Args:
        scenario: Batch of B scenarios.
        share: Shares of the server, shape (B, ..., M).
    """
    if scenario.share_units is None:
        return torch.ones(share.shape[:-1], dtype=torch.bool, device=share.device)
    units = share * scenario.share_units
    return ((units - units.round()).abs() < SLICE_TOLERANCE).all(-1)


def options_allowed(quality: Tensor, weight: Tensor) -> Tensor:
    """Whether no request takes a masked option: Q and the requests that take it, both (..., C, M); boolean, (...).

    Args:
        quality: Q at the chosen step counts, shape (..., C, M), −inf where masked.
        weight: Requests that take each option, of the same shape.
    """
    return ~(torch.isneginf(quality) & (weight > 0)).flatten(-2).any(-1)


def net_utility(quality: Tensor, weight: Tensor, delay: Tensor, feasible: Tensor) -> Tensor:
    """quality − ω · delay where feasible, −inf elsewhere; never the NaN of 0 · inf, whatever ω is.

    All arguments are of one shape or broadcast to it.

    Args:
        quality: Mean score in points.
        weight: ω in points per second.
        delay: Mean delay in seconds, +inf where not served.
        feasible: Boolean.
    """
    spent = weight * torch.where(feasible, delay, torch.zeros_like(delay))
    return torch.where(feasible, quality - spent, torch.full_like(quality - spent, -torch.inf))
