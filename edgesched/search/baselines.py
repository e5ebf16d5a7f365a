"""The allocation halves of the published baselines; the assignment comes from :mod:`edgesched.assign`."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from edgesched.equations.utility import loads, quality_by_step
from edgesched.errors import SearchError
from edgesched.search._result import checked_assignment
from edgesched.search.anneal import anneal
from edgesched.types import Scenario, SearchResult


def equal_allocation(
    scenario: Scenario, *, assignment: Tensor | None = None, chains: int = 64, iterations: int = 1000, seed: int = 0
) -> SearchResult:
    """Shares equal among the models, steps annealed (baseline "Equal-allocation").

    Args:
        scenario: Batch of B scenarios.
        assignment: Shape (B, C, M).
        chains: Chains of each scenario.
        iterations: Proposals of each chain.
        seed: Seed of the search.

    Raises:
        SearchError: Without an assignment, or if the slices do not divide equally among the models.
        ArgumentError: If an argument is out of its range.
        PlanError: If the assignment's rows are no probabilities.
    """
    given = _needed("equal_allocation", scenario, assignment)
    _, _, m, _ = scenario.shape
    if scenario.share_units is not None and scenario.share_units % m:
        raise SearchError(f"equal_allocation: {scenario.share_units} slices do not divide equally among {m} models")
    share = torch.full((len(scenario), m), 1 / m, dtype=given.dtype, device=given.device)
    result = anneal(scenario, assignment=given, share=share, chains=chains, iterations=iterations, seed=seed)
    return dataclasses.replace(result, method="equal_allocation")


def optimal_step(
    scenario: Scenario, *, assignment: Tensor | None = None, chains: int = 64, iterations: int = 1000, seed: int = 0
) -> SearchResult:
    """Each model at the step count that is best for the quality of its requests, shares annealed ("Optimal-step").

    Args:
        scenario: Batch of B scenarios.
        assignment: Shape (B, C, M).
        chains: Chains of each scenario.
        iterations: Proposals of each chain.
        seed: Seed of the search.

    Raises:
        SearchError: Without an assignment.
        ArgumentError: If an argument is out of its range.
        PlanError: If the assignment's rows are no probabilities.
    """
    given = _needed("optimal_step", scenario, assignment)
    loaded = loads(scenario, given)[..., None] > 0
    everyone = scenario.quality.mean(1)
    best = torch.where(loaded, quality_by_step(scenario, given), everyone).argmax(-1)
    steps = scenario.steps[best]
    result = anneal(scenario, assignment=given, steps=steps, shares="annealed", chains=chains, iterations=iterations,
                    seed=seed)  # fmt: skip
    return dataclasses.replace(result, method="optimal_step")


def _needed(name: str, scenario: Scenario, assignment: Tensor | None) -> Tensor:
    given = checked_assignment(scenario, assignment)
    if given is None:
        raise SearchError(f"{name}: needs an assignment; see edgesched.assign")
    return given
