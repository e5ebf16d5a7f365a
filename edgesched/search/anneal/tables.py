"""A scenario as the annealing kernels read it: pieces of categories, fixed-point tables, constants."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from edgesched.equations.utility import loads, quality_by_step, step_indices, step_service_times
from edgesched.search.anneal.general import Server
from edgesched.types import Plan, Scenario

_GAIN_RANGE = 1 << 24
_COST_RANGE = 1 << 29
_LOAD_RANGE = 1 << 24
_MASK_RANGE = 1 << 30
FINE_UNITS = 1024
# Dealing slices out for every proposal takes as many rounds; beyond this, units are annealed.
_DEALT_UNITS = 16


@dataclass(frozen=True)
class Start:
    """A plan as the first chain's starting point.

    Args:
        a: Models of the pieces, shape (P, B), int32, or None where the assignment is given.
        k: Step indices, shape (M, B), int32.
        u: Units of share, shape (M, B), int32, or None where shares follow from the loads.
    """

    a: Tensor | None
    k: Tensor
    u: Tensor | None


@dataclass(frozen=True)
class Tables:
    """Tables of a chunk of B scenarios; rows are pieces of categories, or models where the assignment is given.

    Args:
        scenario: The chunk.
        given: Assignment, shape (B, C, M), or None.
        steps: Step indices, shape (B, M), or None.
        share: Shares, shape (B, M), or None.
        pieces: Parts into which every category is split, summing to 1.
        gain: Fixed-point quality, shape (rows, B, M, K) or, assignment given, (M, B, K); negative where masked.
        cost: Fixed-point Σ n √t, of the same shape.
        unit: Points of one unit of gain, shape (B, 1), float64.
        weight: Points of one squared unit of cost, shape (B, 1), float64.
        offset: Utility of zero gain, shape (B,).
        demand: Fixed-point requests of the pieces, shape (P, B, 1), or None where the assignment is given.
        load: Those of the models, shape (M, B, 1), where it is given.
        units: Units of share that are annealed, or None where shares are given or follow from the loads.
        server: Constants of the objective where shares do not separate.
        separable: Slot mode, shares in closed form, no other constraint.
        start: The first chain's starting point, or None.
    """

    scenario: Scenario
    given: Tensor | None
    steps: Tensor | None
    share: Tensor | None
    pieces: Tensor
    gain: Tensor
    cost: Tensor
    unit: Tensor
    weight: Tensor
    offset: Tensor
    demand: Tensor | None
    load: Tensor | None
    units: int | None
    server: Server
    separable: bool
    start: Start | None = None

    def started_at(self, plan: Plan | None) -> Tables:
        """The same tables with a starting point, as near to a plan of B scenarios as pieces and units allow."""
        if plan is None:
            return self
        m = self.scenario.shape[2]
        a = u = None
        if self.given is None:
            left, chosen = plan.assignment.double().clone(), []
            for size in self.pieces:
                most = left.argmax(-1)
                chosen.append(most)
                left -= size * torch.nn.functional.one_hot(most, m)
            a = torch.stack(chosen, -1).flatten(1).T.to(torch.int32)
        k = step_indices(self.scenario, plan.steps).T.to(torch.int32)
        if self.units is not None:
            wish = plan.share.double().T * self.units
            u = wish.floor().to(torch.int32)
            spare = (wish.sum(0).clamp(max=self.units).round().to(torch.int32) - u.sum(0)).clamp(min=0)
            order = (wish - u).argsort(0, descending=True).argsort(0)
            u = u + (order < spare).to(torch.int32)
        return replace(self, start=Start(a, k, u))


def piece_sizes(categories: int, separable: bool) -> list[float]:
    """Parts into which every category is split, so that assignments can be fractional.

    Halves, quarters, … reach every multiple of the smallest part. With many categories whole ones are fine
    enough: at most one is split at the optimum of slot mode, and the polish finds that split.

    Args:
        categories: Categories C.
        separable: As in :class:`Tables`.
    """
    wanted = (16 if separable else 24) / categories
    count = int(min(5, max(1, -(-wanted // 1))))
    return [2.0**-j for j in range(1, count)] + [2.0 ** -(count - 1)]


def build(scenario: Scenario, given: Tensor | None, steps: Tensor | None, share: Tensor | None, closed: bool) -> Tables:
    """Tables of a chunk.

    Args:
        scenario: Batch of B scenarios.
        given: Assignment, shape (B, C, M), or None.
        steps: Step indices, shape (B, M), or None.
        share: Shares, shape (B, M), or None.
        closed: Whether shares follow from the loads where they can; else they are annealed.
    """
    c = scenario.shape[1]
    device = scenario.device
    free = scenario.memory_gib is None and scenario.deadline_s is None
    sliced = scenario.share_units is not None
    dealt = closed and sliced and (scenario.share_units or 0) <= _DEALT_UNITS and share is None
    closed = (closed and not sliced and share is None) or dealt
    separable = closed and not dealt and free and scenario.latency == "slot"
    total = scenario.demand.double().sum(-1)
    service = step_service_times(scenario).double()
    root = service.sqrt()
    sizes = torch.tensor(piece_sizes(c, separable), dtype=torch.float64, device=device)
    if given is None:
        part = (scenario.demand.double()[:, :, None] * sizes).flatten(1).T  # (P, B)
        quality = scenario.quality.double().permute(1, 0, 2, 3).repeat_interleave(len(sizes), 0)
        used = (part > 0)[..., None, None]
        value = torch.where(used, part[..., None, None] * torch.where(used, quality, 0.0), 0.0) / total[:, None, None]
        spent = part[..., None, None] * root
    else:
        value = (quality_by_step(scenario, given).double() / total[:, None, None]).transpose(0, 1)
        spent = (loads(scenario, given).double()[..., None] * root).transpose(0, 1)
    allowed = ~torch.isneginf(value)
    flat, fine = value.flatten(2), allowed.flatten(2)
    low = flat.masked_fill(~fine, torch.inf).amin(-1)
    low = torch.where(low.isfinite(), low, 0.0)
    high = flat.masked_fill(~fine, -torch.inf).amax(-1)
    unit = ((torch.where(high.isfinite(), high, 0.0) - low).sum(0) / _GAIN_RANGE).clamp(min=1e-30)[:, None]
    shape = (slice(None),) + (None,) * (value.ndim - 2)
    gain = (torch.where(allowed, value - low[(..., *shape[1:])], 0.0) / unit[:, 0][shape]).round()
    gain = torch.where(allowed, gain, -float(_MASK_RANGE // len(value))).to(torch.int32)
    step = (spent.flatten(2).amax(-1).sum(0) / _COST_RANGE).clamp(min=1e-300)
    cost = (spent / step[shape]).round().to(torch.int32)
    weight = (scenario.latency_weight.double() / total * step.square())[:, None]
    demand = load = None
    if given is None:
        demand = (part / total * _LOAD_RANGE).round().to(torch.int32)[..., None]
    else:
        load = (loads(scenario, given).double() / total[:, None] * _LOAD_RANGE).ceil().to(torch.int32).T[..., None]
    units = None
    if not closed and share is None:
        units = scenario.share_units if sliced else FINE_UNITS
    column = total[:, None]

    def per_model(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.float().T[..., None].contiguous()

    server = Server(
        service.float().transpose(0, 1).contiguous(),
        unit.float(),
        (scenario.latency_weight.double()[:, None] / column).float(),
        (column / _LOAD_RANGE).float(),
        torch.tensor(1 / (units or 1), dtype=torch.float32, device=device),
        per_model(share),
        None if scenario.deadline_s is None else (1 / (scenario.deadline_s[:, None] * column)).float(),
        None if scenario.memory_gib is None else scenario.memory_gib.double().T[..., None].contiguous(),
        None if scenario.memory_limit_gib is None else 1 / scenario.memory_limit_gib.double()[:, None],
        scenario.share_units if dealt else None,
    )
    return Tables(
        scenario,
        given,
        steps,
        share,
        sizes,
        gain,
        cost,
        unit,
        weight,
        low.sum(0),
        demand,
        load,
        units,
        server,
        separable,
    )
