"""Assignment policies: which share of each category goes to which model, before any search.

A policy is called with a scenario and the fitted score distributions and returns probabilities of shape
(B, C, M); :class:`Joint` returns None, which leaves the assignment to the search.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from edgesched.errors import PlanError
from edgesched.objective import step_service_times
from edgesched.types import Scenario


class Distributions(Protocol):
    """What a policy may ask of fitted scores: means and deviations, shape (C, M, K)."""

    def mean(self) -> Tensor:
        """Mean scores."""
        ...

    def std(self) -> Tensor:
        """Standard deviations."""
        ...


def threshold_assignment(mean: Tensor, std: Tensor, thresholds: Tensor) -> Tensor:
    """Probability mass of Gaussian scores between thresholds, differentiable in all three.

    P(band j | c) = Φ((τ_j − μ_c)/σ_c) − Φ((τ_{j−1} − μ_c)/σ_c) with τ_0 = −∞ and τ_M = ∞; the lowest band,
    the hardest prompts, comes first.

    Args:
        mean: μ, shape (..., C).
        std: σ, shape (..., C); at 0 all mass falls into the band that holds the mean.
        thresholds: τ_1 ≤ … ≤ τ_{M−1}, shape (..., M − 1).

    Returns:
        Probabilities, shape (..., C, M), rows summing to 1.

    Raises:
        PlanError: If the thresholds are not in order.

    Source:
        arXiv 2409.09072, section on probabilistic model assignment.

    Example:
        >>> threshold_assignment(torch.tensor([0.0]), torch.tensor([1.0]), torch.tensor([0.0]))
        tensor([[0.5000, 0.5000]])
    """
    if bool((thresholds[..., 1:] < thresholds[..., :-1]).any()):
        raise PlanError(f"thresholds: expected increasing values, got {thresholds.tolist()}")
    scaled = (thresholds[..., None, :] - mean[..., :, None]) / std.clamp(min=1e-6)[..., :, None]
    below = torch.special.ndtr(scaled)
    edge = torch.zeros_like(mean)[..., None]
    return torch.diff(torch.cat([edge, below, edge + 1], -1), dim=-1).clamp(min=0)


def _by_ability(scenario: Scenario) -> Tensor:
    """Models from most capable to least, by their best mean quality over categories, shape (B, M)."""
    best = scenario.quality.amax(-1)
    share = scenario.demand / scenario.demand.sum(-1, keepdim=True)
    return (share[..., None] * best).sum(1).argsort(dim=-1, descending=True, stable=True)


def _one_model(scenario: Scenario, model: Tensor) -> Tensor:
    """Everything to one model, ``model`` of shape (B,) or (B, C)."""
    b, c, m, _ = scenario.shape
    chosen = model[:, None].expand(b, c) if model.ndim == 1 else model
    return torch.nn.functional.one_hot(chosen, m).to(scenario.demand.dtype)


@dataclass(frozen=True)
class Probabilistic:
    """The published assignment: Gaussian scores under one reference model, cut at shared thresholds.

    Args:
        thresholds: τ_1 < … < τ_{M−1} in score points, set by hand; None takes the quantiles 1/M, 2/M, … of the
            mixture of all categories weighted by demand, so that every model gets an equal part of the
            requests.
        reference: Position of the reference model among the models from cheap to dear.
        reference_steps: Its step count; None for the largest that it was measured at.
    """

    thresholds: Sequence[float] | None = None
    reference: int = 0
    reference_steps: int | None = None

    def __call__(self, scenario: Scenario, scores: Distributions | None) -> Tensor:
        """Probabilities, shape (B, C, M)."""
        if scores is None:
            raise PlanError("Probabilistic: needs fitted score distributions")
        b, _, m, _ = scenario.shape
        if not -m <= self.reference < m:
            raise PlanError(f"reference: {self.reference} is not the position of one of {m} models")
        step = self._step(scenario)
        mean = scores.mean()[:, self.reference, step].to(scenario.demand)
        std = scores.std()[:, self.reference, step].to(scenario.demand)
        if self.thresholds is None:
            cuts = mixture_quantiles(mean.detach(), std.detach(), scenario.demand, m)
        else:
            if len(self.thresholds) != m - 1:
                raise PlanError(f"thresholds: expected {m - 1} for {m} models, got {len(self.thresholds)}")
            cuts = torch.tensor(list(self.thresholds), dtype=mean.dtype).expand(b, m - 1)
        bands = threshold_assignment(mean.expand(b, -1), std.expand(b, -1), cuts)
        place = _by_ability(scenario).argsort(-1)
        return bands.gather(-1, place[:, None].expand_as(bands))

    def _step(self, scenario: Scenario) -> int:
        if self.reference_steps is not None:
            found = (scenario.steps == self.reference_steps).nonzero()
            if not len(found):
                raise PlanError(f"reference_steps: {self.reference_steps} is not one of {scenario.steps.tolist()}")
            return int(found[0])
        runs = scenario.quality[0, :, self.reference].isfinite().any(0)
        return int(runs.nonzero().max())


def mixture_quantiles(mean: Tensor, std: Tensor, demand: Tensor, parts: int) -> Tensor:
    """Quantiles 1/parts, 2/parts, … of Gaussians weighted by demand, by bisection, shape (B, parts − 1).

    Args:
        mean: Shape (C,).
        std: Shape (C,).
        demand: Shape (B, C).
        parts: Number of equal parts.
    """
    weight = demand / demand.sum(-1, keepdim=True)
    level = torch.arange(1, parts, dtype=mean.dtype, device=mean.device) / parts
    low = (mean - 12 * std).amin().expand(len(demand), parts - 1)
    high = (mean + 12 * std).amax().expand(len(demand), parts - 1)
    for _ in range(60):
        mid = (low + high) / 2
        mass = (weight[:, None] * torch.special.ndtr((mid[..., None] - mean) / std.clamp(min=1e-6))).sum(-1)
        low, high = torch.where(mass < level, mid, low), torch.where(mass < level, high, mid)
    return high


@dataclass(frozen=True)
class Joint:
    """No policy: the assignment is left to the search, which plans it together with steps and shares."""

    def __call__(self, scenario: Scenario, scores: Distributions | None = None) -> None:
        """Nothing given."""


@dataclass(frozen=True)
class Direct:
    """Each category to the model with the best mean quality at its best step count."""

    def __call__(self, scenario: Scenario, scores: Distributions | None = None) -> Tensor:
        """Probabilities, shape (B, C, M)."""
        return _one_model(scenario, scenario.quality.amax(-1).argmax(-1))


@dataclass(frozen=True)
class Random:
    """Every request to any model with equal probability."""

    def __call__(self, scenario: Scenario, scores: Distributions | None = None) -> Tensor:
        """Probabilities, shape (B, C, M)."""
        b, c, m, _ = scenario.shape
        return torch.full((b, c, m), 1 / m, dtype=scenario.demand.dtype, device=scenario.device)


@dataclass(frozen=True)
class AlwaysBest:
    """Everything to the model with the best mean quality over the demand."""

    def __call__(self, scenario: Scenario, scores: Distributions | None = None) -> Tensor:
        """Probabilities, shape (B, C, M)."""
        return _one_model(scenario, _by_ability(scenario)[:, 0])


@dataclass(frozen=True)
class AlwaysCheapest:
    """Everything to the model with the least time per image at its cheapest step count."""

    def __call__(self, scenario: Scenario, scores: Distributions | None = None) -> Tensor:
        """Probabilities, shape (B, C, M)."""
        allowed = scenario.quality.isfinite().any(1)
        seconds = step_service_times(scenario).masked_fill(~allowed, torch.inf)
        return _one_model(scenario, seconds.amin(-1).argmin(-1))
