"""Random search: the yardstick that every other method should beat."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from edgesched.search._result import certified, checked_assignment, positive
from edgesched.search._score import scored
from edgesched.types import Plan, Scenario, SearchResult

_CELLS_AT_ONCE = 4_000_000
_RECORDED = 50


def random_search(
    scenario: Scenario, *, assignment: Tensor | None = None, samples: int = 4096, seed: int = 0
) -> SearchResult:
    """Draw plans, give each its best shares, and keep the best.

    Step counts are uniform over the options. A free assignment is drawn in turn as one model for everyone, one
    model for each category, and at random from the simplex.

    Args:
        scenario: Batch of B scenarios, any latency model and constraints.
        assignment: Kept as it is if given, shape (B, C, M).
        samples: Plans drawn for each scenario, the same draws for all.
        seed: Seed of the draws.

    Returns:
        The best plan drawn, with ``history`` at up to 50 moments.

    Raises:
        ArgumentError: If an argument is out of its range.
        PlanError: If the assignment's rows are no probabilities.

    Example:
        >>> s = Scenario.random(2, seed=0)
        >>> bool((random_search(s, samples=500).gap < 0.2).all())
        True
    """
    started = time.perf_counter()
    positive("samples", samples)
    given = checked_assignment(scenario, assignment)
    b, c, m, k = scenario.shape
    dtype, device = scenario.demand.dtype, scenario.device
    generator = torch.Generator().manual_seed(seed)
    at_once = max(1, min(_CELLS_AT_ONCE // (b * c * m), -(-samples // _RECORDED)))
    best = torch.full((b,), -torch.inf, dtype=dtype, device=device)
    index = torch.zeros(b, m, dtype=torch.int64, device=device)
    share = torch.zeros(b, m, dtype=dtype, device=device)
    routing = torch.eye(m, dtype=dtype, device=device)[0].expand(b, c, m).clone() if given is None else given
    rows = torch.arange(b, device=device)
    history = []
    for first in range(0, samples, at_once):
        r = min(at_once, samples - first)
        drawn = torch.randint(0, k, (r, m), generator=generator).to(device).expand(b, r, m)
        tried = given[:, None] if given is not None else _assignments(first, r, c, m, generator).to(device, dtype)
        utility, shares = scored(scenario, drawn, tried.expand(b, -1, c, m))
        most, which = utility.max(-1)
        better = most > best
        best = torch.where(better, most, best)
        index = torch.where(better[:, None], drawn[rows, which], index)
        share = torch.where(better[:, None], shares[rows, which], share)
        if given is None:
            routing = torch.where(better[:, None, None], tried[0, which], routing)
        history.append(best)
    plan = Plan(routing, scenario.steps[index], share)
    return certified("random_search", scenario, given, plan, started, samples * b, torch.stack(history))


def _assignments(first: int, count: int, categories: int, models: int, generator: torch.Generator) -> Tensor:
    """Assignments of ``count`` draws, shape (1, count, C, M); every third draw of one kind."""
    eye = torch.eye(models, dtype=torch.float64)
    alone = eye[torch.randint(0, models, (count, 1), generator=generator)].expand(count, categories, models)
    sharp = eye[torch.randint(0, models, (count, categories), generator=generator)]
    uniform = torch.rand((count, categories, models), generator=generator, dtype=torch.float64).clamp(min=1e-12)
    spread = -uniform.log()
    spread = spread / spread.sum(-1, keepdim=True)
    kind = (torch.arange(first, first + count) % 3)[:, None, None]
    return torch.where(kind == 0, alone, torch.where(kind == 1, sharp, spread))[None]
