"""Search over step counts alone, assignment and shares solved exactly at every point (slot mode)."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from edgesched.errors import SearchError
from edgesched.objective import best_share, loads, step_service_times
from edgesched.search._result import certified, checked_assignment, positive
from edgesched.search.exact import concave_value, plan_at, quality_by_step
from edgesched.types import Plan, Scenario, SearchResult


def coordinate(
    scenario: Scenario, *, assignment: Tensor | None = None, starts: int = 4, sweeps: int = 8, seed: int = 0
) -> SearchResult:
    """Coordinate ascent over step counts in slot mode, from several starts, to a local optimum.

    One model's step count at a time takes the best of its K options while the others stay; for each option
    assignment and shares are optimal. With the assignment given and M = 1 it is exact.

    Args:
        scenario: Batch of B scenarios in slot mode, without slices, memory limit or deadline.
        assignment: Shape (B, C, M), or None for a joint search.
        starts: Starting points; the first takes every model at its best trade-off alone.
        sweeps: Most sweeps over the models.
        seed: Seed of the other starting points.

    Raises:
        SearchError: In queue mode or under constraints that do not separate.

    Example:
        >>> s = Scenario.random(2, categories=16, models=8, seed=0)
        >>> bool((coordinate(s).gap < 0.02).all())
        True
    """
    started = time.perf_counter()
    positive("starts", starts)
    positive("sweeps", sweeps)
    limits = (scenario.share_units, scenario.memory_gib, scenario.deadline_s)
    if scenario.latency != "slot" or any(limit is not None for limit in limits):
        raise SearchError("coordinate: needs slot mode without slices, memory limit or deadline; use search.anneal")
    given = checked_assignment(scenario, assignment)
    b, _, m, k = scenario.shape
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(0, k, (starts, m), generator=generator).to(scenario.device)
    index = drawn[:, None].expand(starts, b, m).clone()
    alone = _alone(scenario)
    index[0] = alone
    allowed = scenario.quality.isfinite().any(1)
    index = torch.where(allowed.expand(starts, b, m, k).gather(-1, index[..., None]).squeeze(-1), index, alone)
    best = torch.full((starts, b), -torch.inf, dtype=scenario.demand.dtype, device=scenario.device)
    history = []
    for _ in range(sweeps):
        before = best
        for model in range(m):
            values = _values(scenario, given, index, model)
            best, choice = values.max(-1)
            index[..., model] = choice
        history.append(best.amax(0) / scenario.demand.sum(-1))
        if bool((best <= before + 1e-12 * best.abs()).all()):
            break
    chosen = index.gather(0, best.argmax(0)[None, :, None].expand(1, b, m))[0]
    if given is None:
        plan = plan_at(scenario, chosen)
    else:
        steps = scenario.steps[chosen]
        plan = Plan(given, steps, best_share(scenario, given, steps))
    proposals = len(history) * starts * b * m * k
    return certified("coordinate", scenario, given, plan, started, proposals, torch.stack(history))


def _alone(scenario: Scenario) -> Tensor:
    """Best step count of each model if it served everyone, positions of shape (B, M)."""
    total = scenario.demand.sum(-1)
    share = (scenario.demand / total[:, None])[..., None, None]
    quality = torch.where(share > 0, share * torch.where(share > 0, scenario.quality, 0.0), 0.0).sum(1)
    delay = total[:, None, None] * step_service_times(scenario)
    return (quality - scenario.latency_weight[:, None, None] * delay).argmax(-1)


def _values(scenario: Scenario, given: Tensor | None, index: Tensor, model: int) -> Tensor:
    """N times the best utility for each option of one model, the others kept, shape (starts, B, K)."""
    starts, b, m = index.shape
    _, c, _, k = scenario.shape
    tried = index[:, :, None].expand(starts, b, k, m).clone()
    tried[..., model] = torch.arange(k, device=index.device)
    service = step_service_times(scenario)
    cost = service[None, :, None].expand(starts, b, k, m, k).gather(-1, tried[..., None]).squeeze(-1).sqrt()
    weight = scenario.latency_weight
    if given is not None:
        gains = quality_by_step(scenario, given)
        quality = gains[None, :, None].expand(starts, b, k, m, k).gather(-1, tried[..., None]).squeeze(-1).sum(-1)
        return quality - weight[:, None] * (loads(scenario, given)[:, None] * cost).sum(-1).square()
    rows = torch.arange(b, device=index.device)[None, :, None, None]
    models = torch.arange(m, device=index.device)
    quality = scenario.quality.permute(0, 2, 3, 1)[rows, models, tried].transpose(-1, -2)
    value, _, _ = concave_value(
        quality.reshape(-1, c, m),
        cost.reshape(-1, m),
        scenario.demand[None, :, None].expand(starts, b, k, c).reshape(-1, c),
        weight[None, :, None].expand(starts, b, k).reshape(-1),
    )
    return value.reshape(starts, b, k)
