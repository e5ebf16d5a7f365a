"""A search of one's own: a function of a scenario that returns a result, and ``conf/search/hill_climb.yaml``.

    python scripts/run.py --config-dir scripts/examples/conf +experiment=plan search=hill_climb

What to do: take ``(scenario, *, assignment=None, ...)``, keep a given assignment as it is, count every scenario of the
batch, and return :class:`edgesched.SearchResult`. The YAML file has ``_partial_: true`` and your arguments. The result
need not be good, but it has to be honest: utility as :func:`edgesched.evaluate` gives it, the bound beside it.
"""

from __future__ import annotations

import time
from typing import TypeVar

import torch
from torch import Tensor

import edgesched as es
from edgesched.errors import ArgumentError

T = TypeVar("T", es.Plan, es.Outcome)
_RECORDED = 50


def hill_climb(
    scenario: es.Scenario, *, assignment: Tensor | None = None, iterations: int = 2000, seed: int = 0
) -> es.SearchResult:
    """Change one thing at random, give the models their best shares, and keep what is better.

    A change sends one category to another model, or runs one model at another step count, or does both. While a plan is
    not feasible, a change is kept if it does not take longer: feasible first, better after. It ends where no change of
    this kind helps, which need not be the optimum.

    Args:
        scenario: Batch of B scenarios, any latency model and constraints.
        assignment: Shares of every category by model, shape (B, C, M), kept as they are; None leaves them free.
        iterations: Changes tried for each scenario.
        seed: Seed of the changes.

    Returns:
        The last plan, which is the best one met, with ``history`` at 50 moments or fewer.

    Raises:
        ArgumentError: If there is nothing to try.

    Example:
        >>> s = es.Scenario.random(2, seed=0)
        >>> bool((hill_climb(s, iterations=300).gap < 0.2).all())
        True
    """
    if iterations < 1:
        raise ArgumentError(f"iterations: expected at least 1, got {iterations}")
    started = time.perf_counter()
    generator = torch.Generator().manual_seed(seed)
    b, c, m, k = scenario.shape
    rows = torch.arange(b)
    plan = _quickest(scenario, assignment)
    now = es.evaluate(scenario, plan)
    history = []
    for i in range(iterations):
        tried, steps = plan.assignment.clone(), plan.steps.clone()
        model = torch.randint(m, (b,), generator=generator)
        if assignment is None and i % 3 < 2:
            category = torch.randint(c, (b,), generator=generator)
            tried[rows, category] = torch.nn.functional.one_hot(model, m).to(tried)
        if assignment is not None or i % 3 > 0:
            steps[rows, model] = scenario.steps[torch.randint(k, (b,), generator=generator)]
        other = es.Plan(tried, steps, es.best_share(scenario, tried, steps))
        found = es.evaluate(scenario, other)
        better = (found.utility > now.utility) | (~now.feasible & (found.latency_s <= now.latency_s))
        plan, now = _taken(better, other, plan), _taken(better, found, now)
        if i % max(1, iterations // _RECORDED) == 0 or i == iterations - 1:
            history.append(now.utility)
    bound = es.upper_bound(scenario, assignment)
    gap = (bound - now.utility) / bound.abs().clamp(min=1)
    elapsed = time.perf_counter() - started
    return es.SearchResult("hill_climb", plan, now.utility, bound, gap, now.feasible, torch.stack(history),
                           iterations * b, elapsed)  # fmt: skip


def _taken(better: Tensor, new: T, old: T) -> T:
    """The new plan or outcome where it is better, shape (B,), and the old one elsewhere."""
    pairs = zip(vars(new).values(), vars(old).values(), strict=True)
    return type(new)(*(torch.where(better.reshape(-1, *[1] * (a.ndim - 1)), a, b) for a, b in pairs))


def _quickest(scenario: es.Scenario, assignment: Tensor | None) -> es.Plan:
    """Everyone to the model with the least seconds an image, or as given, each model at its smallest step count."""
    b, c, m, _ = scenario.shape
    smallest = scenario.quality.isfinite().any(1).int().argmax(-1)
    steps = scenario.steps[smallest]
    if assignment is None:
        seconds = scenario.overhead_s + steps * scenario.step_time_s
        assignment = torch.nn.functional.one_hot(seconds.argmin(-1), m).to(scenario.demand)[:, None].expand(b, c, m)
    return es.Plan(assignment, steps, es.best_share(scenario, assignment, steps))
