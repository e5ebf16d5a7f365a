"""Climbing over step counts, assignment and shares solved exactly at every point (slot mode).

With step counts k fixed the best assignment and shares are a concave problem whose value V(k) is a
one-dimensional dual (:func:`edgesched.equations.branching.value`). The search climbs V by single-model changes. At the
current dual variable the value of *every* change is bounded from above at once: with A_c the best that
category c has without model m,

    V(k with k_m → j) ≤ Σ_c n_c max(A_c, Q[c,m,j] − 2ωx √t_mj) + ωx²,

so that only the few changes with the largest bounds are solved (lazy evaluation, Minoux 1978). It starts from
the dual's own choice, each model at the step count best for the categories that choose it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from edgesched.equations.branching import Concave, fixed_value, relaxed
from edgesched.errors import SearchError
from edgesched.types import Scenario

_CELLS_AT_ONCE = 2_000_000
#: Changes solved exactly in a round. With 8 the climb ended at the same point as with 64 on 256 scenarios.
_SOLVED = 8
#: Looks at the dual of a tried change, from the current x: enough for 1e-9, the rest is made up when it is taken.
_LOOKS = 8


def needs_separable(name: str, scenario: Scenario) -> None:
    """Refuse what does not separate.

    Args:
        name: The method, as the message calls it.
        scenario: Batch of B scenarios.

    Raises:
        SearchError: If they are not :func:`separable`.
    """
    if not separable(scenario):
        raise SearchError(f"{name}: needs slot mode without slices, memory limit or deadline; use search.anneal")


def separable(scenario: Scenario) -> bool:
    """Slot mode without slices, memory limit or deadline: at fixed step counts the rest is solved exactly."""
    limits = (scenario.share_units, scenario.memory_gib, scenario.deadline_s)
    return scenario.latency == "slot" and all(limit is None for limit in limits)


def climbed(
    scenario: Scenario, given: Tensor | None, starts: int, sweeps: int, seed: int
) -> tuple[Tensor, Tensor, int]:
    """Climb from several starting points, in chunks bounded in memory; the best of each scenario.

    Args:
        scenario: Batch of B separable scenarios.
        given: Assignment, shape (B, C, M), or None where it is free.
        starts: Starting points of each scenario.
        sweeps: Most changes of each model.
        seed: Seed of the starting points after the first.

    Returns:
        Positions of step counts (B, M), history of utilities (rounds, B), and how many changes were bounded.
    """
    b, _, m, k = scenario.shape
    cells = (m * m * k) if given is not None else scenario.quality[0].numel()
    at_once = max(1, _CELLS_AT_ONCE // (starts * cells))
    indices, histories, bounded = [], [], 0
    for first in range(0, b, at_once):
        rows = slice(first, first + at_once)
        part = scenario[rows] if at_once < b else scenario
        problem = Concave.of(part, None if given is None else given[rows])
        index, x = start(problem, starts, seed)
        whole = problem.take(torch.arange(len(part), device=scenario.device).repeat(starts)) if starts > 1 else problem
        best, index, history, rounds = climb(whole, index, x, sweeps * m)
        best = best.reshape(starts, -1)
        winner = best.argmax(0)
        indices.append(index.reshape(starts, -1, m)[winner, torch.arange(len(winner), device=winner.device)])
        history = history.reshape(len(history), starts, -1).amax(1)
        histories.append(history / part.demand.sum(-1))
        bounded += rounds * m * k
    length = max(len(h) for h in histories)
    history = torch.cat([torch.cat([h, h[-1:].expand(length - len(h), -1)]) for h in histories], 1)
    return torch.cat(indices), history, bounded


def start(problem: Concave, starts: int, seed: int) -> tuple[Tensor, Tensor]:
    """The dual's choice and random changes of it: positions (starts · R, M), the problems running fastest, and x.

    A model that no category chooses stands at the count that would serve everyone best.

    Args:
        problem: R problems.
        starts: Starting points of each; the first is the dual's own.
        seed: Seed of the others.
    """
    r, _, m, k = problem.quality.shape
    low = torch.zeros(r, m, dtype=torch.int64, device=problem.demand.device)
    root = relaxed(
        problem, torch.arange(r, device=low.device), low, low + (k - 1), torch.zeros_like(problem.weight), 60
    )
    net = torch.addcmul(problem.quality, (-2 * problem.weight * root.x)[:, None, None, None], problem.cost[:, None])
    alone = torch.einsum("rc,rcmk->rmk", problem.demand, net).argmax(-1)
    middle = (low + (k - 1)) // 2
    index = torch.where(root.common == middle, alone, root.common)
    if starts == 1:
        return index, root.x
    generator = torch.Generator().manual_seed(seed)
    shape = (starts - 1, m)
    other = torch.randint(0, k, shape, generator=generator)[:, None].to(index.device)
    change = (torch.rand(shape, generator=generator) < 0.5)[:, None].to(index.device)
    reach = problem.quality.amax(1).isfinite()
    other = other.expand(starts - 1, r, m)
    change = change & reach.expand(starts - 1, r, m, k).gather(-1, other[..., None]).squeeze(-1)
    more = torch.where(change, other, index)
    return torch.cat([index[None], more]).reshape(starts * r, m), root.x.repeat(starts)


def climb(problem: Concave, index: Tensor, x: Tensor, rounds: int) -> tuple[Tensor, Tensor, Tensor, int]:
    """Take the best single-model change of every problem until none helps.

    Args:
        problem: R problems.
        index: Positions to start from, shape (R, M).
        x: Dual variables to start from, shape (R,).
        rounds: Most changes of each problem.

    Returns:
        Values times N (R,), positions (R, M), history of values (rounds', R), rows looked at in all rounds.
    """
    index = index.clone()
    r, c, m, k = problem.quality.shape
    models = torch.arange(m, device=index.device)

    def at(rows: Concave, where: Tensor) -> tuple[Tensor, Tensor]:
        quality = rows.quality.gather(-1, where[:, None, :, None].expand(-1, c, -1, 1)).squeeze(-1)
        return quality, rows.cost.gather(-1, where[..., None]).squeeze(-1)

    best, x, _, _ = fixed_value(*at(problem, index), problem.demand, problem.weight, x)
    history, looked = [best.clone()], 0
    active = torch.arange(r, device=index.device)
    solved = min(_SOLVED, m * k - 1)
    for _ in range(rounds if solved else 0):
        rows = problem if len(active) == r else problem.take(active)
        looked += len(active)
        here, at_x, now = index[active], x[active], best[active]
        quality, cost = at(rows, here)
        y = 2 * rows.weight * at_x
        top, place = torch.addcmul(quality, -y[:, None, None], cost[:, None]).topk(min(2, m), -1)
        runner_up = top[..., -1:] if m > 1 else torch.full_like(top, -torch.inf)
        without = torch.where(models == place[..., :1], runner_up, top[..., :1])
        net = torch.addcmul(rows.quality, -y[:, None, None, None], rows.cost[:, None])
        net = torch.maximum(net, without[..., None])
        bound = torch.bmm(rows.demand[:, None], net.reshape(len(active), c, m * k)).reshape(-1, m, k)
        bound += (rows.weight * at_x**2)[:, None, None]
        bound.scatter_(-1, here[..., None], -torch.inf)
        change = bound.flatten(1).topk(solved, -1).indices
        model, option = change // k, change % k
        each = torch.arange(len(active), device=index.device)[:, None]
        replaced = (models == model[..., None])[:, :, None]
        tried = torch.where(replaced, rows.quality[each, :, model, option][..., None], quality[:, None])
        prices = torch.where(replaced[:, :, 0], rows.cost[each, model, option][..., None], cost[:, None])
        weight = rows.weight[:, None].expand(-1, solved)
        values, xs, _, _ = fixed_value(
            tried, prices, rows.demand[:, None], weight, at_x[:, None].expand(-1, solved), _LOOKS
        )
        most, which = values.max(-1)
        better = most > torch.where(now.isfinite(), now + 1e-10 * now.abs(), now)
        if not bool(better.any()):
            break
        active, which = active[better], which[better]
        row = torch.arange(len(better), device=index.device)[better]
        index[active, model[row, which]] = option[row, which]
        best[active], x[active] = most[better], xs[row, which]
        history.append(best.clone())
    return best, index, torch.stack(history), looked
