"""Branch and bound over intervals of step counts: tighter bounds, and joint optima that are proven.

The dual bound of :mod:`edgesched.equations.bounds` lets every category run a model at its own step count, where a plan
has one count per model. A node restricts every model to an interval of its options; its bound is the same
dual over what is left. It is split at the model whose categories disagree most, between the counts they
want, so that the disagreement, and with it the looseness, goes away (Land and Doig 1960; best first).
In slot mode a node also offers a plan: one count per model, the best common one for the categories that chose
it, with assignment and shares solved exactly (:func:`value`).
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from edgesched.equations.dual import minimise, price, without_dead
from edgesched.equations.utility import loads, quality_by_step, step_service_times
from edgesched.types import Scenario

_CELLS_AT_ONCE = 500_000
#: Nodes opened per round and scenario. Fixed, so that a scenario's result does not depend on its batch.
_WIDTH = 8
#: Looks at the dual of a node from its parent's x: a fourth tightened the bound by less than 1e-5.
_LOOKS = 3


@dataclass(frozen=True)
class Concave:
    """Problems whose optimum is found over step counts alone, assignment and shares following.

    Args:
        quality: Q, −inf where masked and 0 for categories without demand, shape (R, C, M, K).
        cost: √t (slot) or t (queue), shape (R, M, K).
        demand: n, shape (R, C).
        weight: ω, shape (R,).
        latency: ``"slot"`` or ``"queue"``.
    """

    quality: Tensor
    cost: Tensor
    demand: Tensor
    weight: Tensor
    latency: str

    @classmethod
    def of(cls, scenario: Scenario, assignment: Tensor | None = None) -> Concave:
        """The problems of a scenario's batch; a given assignment becomes one category per model, tied to it.

        Args:
            scenario: Batch of B scenarios, which become R = B problems.
            assignment: Shape (B, C, M), or None where it is free.
        """
        quality = scenario.quality.double()
        demand = scenario.demand.double()
        service = step_service_times(scenario).double()
        if assignment is not None:
            gain = quality_by_step(scenario, assignment).double()
            demand = loads(scenario, assignment).double()
            mean = torch.where(demand[..., None] > 0, gain / demand.clamp(min=1e-300)[..., None], 0.0)
            own = torch.eye(demand.shape[1], dtype=torch.bool, device=scenario.device)[None, :, :, None]
            quality = torch.where(own, mean[:, :, None], -torch.inf)
        cost = service.sqrt() if scenario.latency == "slot" else service
        return cls(_demanded(quality, demand), cost, demand, scenario.latency_weight.double(), scenario.latency)

    def __len__(self) -> int:
        return self.quality.shape[0]

    def take(self, rows: Tensor | slice) -> Concave:
        """Some of the problems, possibly several times over."""
        return Concave(self.quality[rows], self.cost[rows], self.demand[rows], self.weight[rows], self.latency)

    def without(self, barred: Tensor) -> Concave:
        """The same problems without some options, a boolean that broadcasts to (R, C, M, K)."""
        quality = _demanded(self.quality.masked_fill(barred, -torch.inf), self.demand)
        return dataclasses.replace(self, quality=quality)

    @property
    def cells(self) -> int:
        """Numbers in the quality of one problem."""
        return self.quality[0].numel()


def _demanded(quality: Tensor, demand: Tensor) -> Tensor:
    """Q (R, C, M, K) with 0 for categories without demand, which may choose anything."""
    return torch.where((demand > 0)[..., None, None], quality, torch.zeros_like(quality))


def value(problem: Concave, index: Tensor, start: Tensor, evaluations: int = 60) -> tuple[Tensor, Tensor]:
    """N times the best utility over assignments and shares at fixed step counts (slot mode).

    Args:
        problem: R problems.
        index: Positions of the step counts, shape (R, T, M): T choices for each problem.
        start: First dual variable, shape (R, T).
        evaluations: Most looks at the dual; fewer can only overstate the value.

    Returns:
        Values and dual variables, each of shape (R, T).
    """
    c = problem.demand.shape[1]
    each = problem.quality[:, None].expand(-1, index.shape[1], -1, -1, -1)
    quality = each.gather(-1, index[:, :, None, :, None].expand(-1, -1, c, -1, 1)).squeeze(-1)
    cost = problem.cost[:, None].expand(-1, index.shape[1], -1, -1).gather(-1, index[..., None]).squeeze(-1)
    return fixed_value(quality, cost, problem.demand[:, None], problem.weight[:, None].expand_as(start), start,
                       evaluations)[:2]  # fmt: skip


def fixed_value(
    quality: Tensor, cost: Tensor, demand: Tensor, weight: Tensor, start: Tensor, evaluations: int = 60
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`value` at fixed step counts, problems in any leading dimensions; also the choices left and right.

    −inf where a category with demand may not run any model at its step count.

    Args:
        quality: Q at the step counts, shape (..., C, M), −inf where masked.
        cost: √t there, shape (..., M).
        demand: n, shape (..., C).
        weight: ω, shape (...).
        start: First dual variable, shape (...).
        evaluations: Most looks at the dual.

    Returns:
        Value times N and dual variable, each of shape (...), and the model of every category to the left (more load)
        and to the right (less load) of the minimum, each of shape (..., C).
    """
    quality, dead = without_dead(quality, demand)

    def choose(y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        net, choice = torch.addcmul(quality, -y[..., None, None], cost[..., None, :]).max(-1)
        b = (demand * cost.gather(-1, choice)).sum(-1)
        return (demand * net).sum(-1) + y * b, b, choice

    found, x, left, right = minimise(choose, "slot", weight, start, evaluations=evaluations)
    return found.masked_fill(dead, -torch.inf), x, left, right


@dataclass(frozen=True)
class Nodes:
    """Open nodes of branch and bound, P of them; positions are places among the K step options.

    Args:
        row: Problem of each node, shape (P,).
        low: First allowed position of every model, shape (P, M).
        high: Last allowed position, shape (P, M).
        bound: Upper bound times N, shape (P,); −inf where infeasible.
        x: Dual variable there, shape (P,).
        model: Model to split at, shape (P,).
        split: Position after which its interval is split, shape (P,).
        spread: How far apart the positions wanted of one model lie, shape (P,); a node with 0 is not split.
        common: One position for every model, the best for the categories that chose it, shape (P, M).
    """

    row: Tensor
    low: Tensor
    high: Tensor
    bound: Tensor
    x: Tensor
    model: Tensor
    split: Tensor
    spread: Tensor
    common: Tensor

    def take(self, rows: Tensor) -> Nodes:
        """Some of the nodes."""
        return Nodes(*(getattr(self, name)[rows] for name in self.__dataclass_fields__))

    @staticmethod
    def join(parts: list[Nodes]) -> Nodes:
        """Nodes of several lists as one."""
        return Nodes(*(torch.cat([getattr(p, name) for p in parts]) for name in Nodes.__dataclass_fields__))


def relaxed(problem: Concave, row: Tensor, low: Tensor, high: Tensor, start: Tensor, looks: int = _LOOKS) -> Nodes:
    """Bounds of nodes, in chunks bounded in memory.

    Args:
        problem: R problems.
        row: Problem of each node, shape (P,).
        low: First allowed position of every model, shape (P, M).
        high: Last allowed position, shape (P, M).
        start: First dual variable, shape (P,).
        looks: Looks at the dual; every one is valid.

    Returns:
        The P nodes, in the order given.
    """
    at_once = max(1, _CELLS_AT_ONCE // problem.cells)
    parts = []
    for i in range(0, len(row), at_once):
        part = slice(i, i + at_once)
        parts.append(_relaxed(problem.take(row[part]), row[part], low[part], high[part], start[part], looks))
    return Nodes.join(parts)


def _relaxed(problem: Concave, row: Tensor, low: Tensor, high: Tensor, start: Tensor, looks: int) -> Nodes:
    _, c, m, k = problem.quality.shape
    options = torch.arange(k, device=low.device)
    outside = (options < low[..., None]) | (options > high[..., None])
    demand = problem.demand
    usual = problem.quality.masked_fill(outside[:, None] & (demand > 0)[..., None, None], -torch.inf)
    flat, dead = without_dead(usual.flatten(2), demand)
    quality = flat.reshape(usual.shape)
    costs = problem.cost.flatten(1)

    def choose(y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        net = torch.addcmul(quality, -y[:, None, None, None], problem.cost[:, None])
        best, choice = net.flatten(2).max(-1)
        b = (demand * costs.gather(-1, choice)).sum(-1)
        return (demand * best).sum(-1) + y * b, b, choice

    bound, x, left, right = minimise(choose, problem.latency, problem.weight, start, evaluations=looks)
    wanted = torch.cat([left, right], 1)
    weight = (demand.repeat(1, 2)[..., None] * torch.nn.functional.one_hot(wanted // k, m)).transpose(1, 2)
    at = wanted % k
    used = weight > 0
    lowest = torch.where(used, at[:, None], k).amin(-1)
    highest = torch.where(used, at[:, None], -1).amax(-1)
    spread = (highest - lowest).clamp(min=0)
    # What each model's categories lose when they share one of its counts, at the quality-cost trade-off at x.
    y, _ = price(problem.latency, problem.weight, x)
    both = weight[..., :c] + weight[..., c:]
    net = torch.addcmul(quality, -y[:, None, None, None], problem.cost[:, None])
    masked = torch.isneginf(net)
    barred = torch.einsum("pmc,pcmk->pmk", (both > 0).to(net.dtype), masked.to(net.dtype)) > 0
    together = torch.einsum("pmc,pcmk->pmk", both, net.masked_fill(masked, 0.0)).masked_fill(barred, -torch.inf)
    most_alone = net.amax(-1).transpose(1, 2)
    alone = torch.where(both > 0, both * most_alone, 0.0).sum(-1)
    most, common = together.max(-1)
    busy = used.any(-1)
    common = torch.where(busy, common, (low + high) // 2)
    loss = (alone - most).clamp(min=0) + 1e-12 * bound.abs()[:, None] * spread
    bound = bound.masked_fill(dead, -torch.inf)
    model = torch.where(spread > 0, loss, -1.0).argmax(-1, keepdim=True)
    chosen = weight.gather(1, model[..., None].expand(-1, 1, 2 * c)).squeeze(1)
    mean = ((chosen * at).sum(-1) / chosen.sum(-1).clamp(min=1e-300)).long()
    first, last = lowest.gather(1, model).squeeze(1), highest.gather(1, model).squeeze(1)
    split = torch.minimum(torch.maximum(mean, first), last - 1)
    return Nodes(row, low, high, bound, x, model.squeeze(1), split, spread.amax(-1), common)


@dataclass(frozen=True)
class Proof:
    """What branch and bound leaves of R problems.

    Args:
        bound: Upper bound times N, shape (R,).
        index: Positions of the best step counts found, shape (R, M).
        value: Their value times N, shape (R,); −inf where none was found.
        opened: Nodes opened, over all problems.
        nodes: Nodes that are still open.
        row: The node in ``nodes`` that holds each bound, shape (R,); −1 where the best plan itself does.
    """

    bound: Tensor
    index: Tensor
    value: Tensor
    opened: int
    nodes: Nodes
    row: Tensor


def branch_and_bound(
    problem: Concave,
    *,
    nodes: int,
    plans: bool = True,
    index: Tensor | None = None,
    found: Tensor | None = None,
    start: Tensor | None = None,
    tolerance: float = 1e-10,
    max_seconds: float | None = None,
) -> Proof:
    """Open the most promising nodes of every problem until the bound meets the best plan or a limit.

    Args:
        problem: R problems.
        nodes: About the most nodes of a problem.
        plans: Look for plans too, which lets nodes be closed (slot mode only); otherwise bounds alone.
        index: Step counts to start from (positions), shape (R, M).
        found: Their values times N, shape (R,).
        start: First dual variable, shape (R,).
        tolerance: A problem is finished when its bound is within this share of the best value.
        max_seconds: Stop after this time.

    Returns:
        Bounds, the best step counts found and the nodes left open.
    """
    began = time.perf_counter()
    r, _, m, k = problem.quality.shape
    device = problem.demand.device
    row = torch.arange(r, device=device)
    low = torch.zeros(r, m, dtype=torch.int64, device=device)
    start = torch.zeros_like(problem.weight) if start is None else start
    best = torch.full_like(problem.weight, -torch.inf) if found is None else found.clone()
    index = low.clone() if index is None else index.clone()
    open_ = relaxed(problem, row, low, low + (k - 1), start, 60)
    if plans:
        _improve(problem, open_, best, index)
    used = torch.ones(r, dtype=torch.int64, device=device)
    opened = r
    while True:
        enough = torch.where(best.isfinite(), best + tolerance * best.abs(), best)
        open_ = open_.take(open_.bound > enough[open_.row])
        able = (open_.spread > 0) & (used[open_.row] < nodes)
        late = max_seconds is not None and time.perf_counter() - began > max_seconds
        if late or not bool(able.any()):
            break
        picked = able & (_rank(open_.row, open_.bound.masked_fill(~able, -torch.inf)) < _WIDTH)
        parent = open_.take(picked)
        at = parent.model[:, None]
        below = parent.high.scatter(1, at, parent.split[:, None])
        above = parent.low.scatter(1, at, parent.split[:, None] + 1)
        child = relaxed(
            problem,
            parent.row.repeat(2),
            torch.cat([parent.low, above]),
            torch.cat([below, parent.high]),
            parent.x.repeat(2),
        )
        # Few looks may end where all agree, and yet above the value of the plan they agree on.
        loose = (child.spread == 0) & (child.bound > enough[child.row])
        if bool(loose.any()):
            again = child.take(loose)
            again = relaxed(problem, again.row, again.low, again.high, again.x, 60)
            order = torch.argsort(torch.cat([(~loose).nonzero(), loose.nonzero()]).squeeze(1))
            child = Nodes.join([child.take(~loose), again]).take(order)
        limit = torch.minimum(child.bound, parent.bound.repeat(2))
        child = Nodes(**{**vars(child), "bound": limit})
        if plans:
            _improve(problem, child, best, index)
        used = used + torch.bincount(child.row, minlength=r)
        opened += len(child.row)
        open_ = Nodes.join([open_.take(~picked), child])
    bound = best.clone().scatter_reduce_(0, open_.row, open_.bound, "amax")
    holds = torch.full_like(row, -1)
    which = (open_.bound >= bound[open_.row]).nonzero().squeeze(1)
    holds[open_.row[which]] = which
    return Proof(bound, index, best, opened, open_, holds)


def _rank(row: Tensor, bound: Tensor) -> Tensor:
    """Place of every node among those of its problem, the largest bound first."""
    order = bound.argsort(descending=True, stable=True)
    order = order[row[order].argsort(stable=True)]
    ordered = row[order]
    place = torch.arange(len(row), device=row.device) - torch.searchsorted(ordered, ordered)
    return torch.empty_like(place).scatter_(0, order, place)


def _improve(problem: Concave, nodes: Nodes, best: Tensor, index: Tensor) -> None:
    """Solve the common step counts of nodes and keep what is better, in place."""
    row = nodes.row[:, None]
    models = torch.arange(nodes.common.shape[1], device=row.device)
    quality = problem.quality[row, :, models, nodes.common].transpose(1, 2)
    cost = problem.cost[row, models, nodes.common]
    found = fixed_value(quality, cost, problem.demand[nodes.row], problem.weight[nodes.row], nodes.x)[0]
    most = torch.full_like(best, -torch.inf).scatter_reduce_(0, nodes.row, found, "amax")
    hit = (found >= most[nodes.row]) & (found > best[nodes.row])
    index[nodes.row[hit]] = nodes.common[hit]
    best.copy_(torch.maximum(best, most))
