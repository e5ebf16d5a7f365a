"""Assignment policies: which share of each category goes to which model, before any search.

A policy is called with a scenario and the fitted score distributions and returns probabilities of shape
(B, C, M); :class:`Joint` returns None, which leaves the assignment to the search.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from edgesched.assign.thresholds import Below, mixture_quantiles, routed, threshold_assignment, train_thresholds
from edgesched.equations.shares import best_share
from edgesched.equations.utility import evaluate, step_service_times
from edgesched.errors import ArgumentError, PlanError
from edgesched.protocols import Scores
from edgesched.types import Plan, Scenario

__all__ = [
    "AlwaysBest",
    "AlwaysCheapest",
    "Direct",
    "GainPerSecond",
    "Joint",
    "Probabilistic",
    "Random",
    "Scores",
    "Trained",
    "mixture_quantiles",
    "threshold_assignment",
]


def _by_ability(scenario: Scenario) -> Tensor:
    """Models from most capable to least, by their best mean quality over categories, shape (B, M)."""
    best = scenario.quality.amax(-1)
    share = (scenario.demand / scenario.demand.sum(-1, keepdim=True))[..., None]
    return (
        torch.where(share > 0, share * torch.where(share > 0, best, 0.0), 0.0)
        .sum(1)
        .argsort(dim=-1, descending=True, stable=True)
    )


def _one_model(scenario: Scenario, model: Tensor) -> Tensor:
    """Everything to one model, ``model`` of shape (B,) or (B, C)."""
    b, c, m, _ = scenario.shape
    chosen = model[:, None].expand(b, c) if model.ndim == 1 else model
    return torch.nn.functional.one_hot(chosen, m).to(scenario.demand.dtype)


@dataclass(frozen=True)
class Probabilistic:
    """The published assignment: the scores of one reference model, cut at thresholds shared by all categories.

    The lowest band, the hardest prompts, goes to the most capable model. With Gaussian scores this is the
    published method; with another family its own distribution function takes Φ's place.

    Args:
        thresholds: τ_1 < … < τ_{M−1} in score points, set by hand; None takes the quantiles 1/M, 2/M, … of the
            mixture of all categories weighted by demand, so that every model gets an equal part of the
            requests.
        reference: Position of the reference model among the models from cheap to dear.
        reference_steps: Its step count; None for the largest that it was measured at.

    Source:
        arXiv 2409.09072, section on probabilistic model assignment.
    """

    thresholds: Sequence[float] | None = None
    reference: int = 0
    reference_steps: int | None = None

    def __call__(self, scenario: Scenario, scores: Scores | None) -> Tensor:
        """Probabilities, shape (B, C, M).

        Args:
            scenario: Batch of B scenarios.
            scores: Fitted distributions; they are needed.

        Raises:
            PlanError: If there are no distributions, or thresholds or reference do not fit the scenario.
            ArgumentError: If thresholds do not increase.
        """
        below = self._below(scenario, scores)
        return routed(below(self.cuts(scenario, scores)), _by_ability(scenario).argsort(-1))

    def cuts(self, scenario: Scenario, scores: Scores | None) -> Tensor:
        """Thresholds in score points, shape (B, M − 1).

        Args:
            scenario: Batch of B scenarios.
            scores: Fitted distributions; they are needed.

        Raises:
            PlanError: If there are no distributions, or thresholds or reference do not fit the scenario.
            ArgumentError: If thresholds do not increase.
        """
        below, m = self._below(scenario, scores), scenario.shape[2]
        if self.thresholds is None:
            return self._quantiles(scenario, scores, below, torch.arange(1, m) / m)
        if len(self.thresholds) != m - 1:
            raise PlanError(f"thresholds: expected {m - 1} for {m} models, got {len(self.thresholds)}")
        cuts = torch.tensor(list(self.thresholds), dtype=scenario.demand.dtype, device=scenario.device)
        if not bool((cuts.diff() >= 0).all()) or bool(cuts.isnan().any()):
            raise ArgumentError(f"thresholds: expected increasing values, got {list(self.thresholds)}")
        return cuts.expand(len(scenario), m - 1)

    def _below(self, scenario: Scenario, scores: Scores | None) -> Below:
        """Distribution function of the reference model's scores."""
        if scores is None:
            raise PlanError(f"{type(self).__name__}: needs fitted score distributions")
        m = scenario.shape[2]
        if not -m <= self.reference < m:
            raise PlanError(f"reference: {self.reference} is not the position of one of {m} models")
        step, device = self._step(scenario), scores.mean().device

        def below(cuts: Tensor) -> Tensor:
            mass = scores.cdf(cuts[..., None, None, None].to(device))[..., self.reference, step]
            return mass.to(scenario.demand).transpose(-1, -2)

        return below

    def _quantiles(self, scenario: Scenario, scores: Scores | None, below: Below, levels: Tensor) -> Tensor:
        """Quantiles of the reference scores of all requests, shape (B, levels)."""
        assert scores is not None
        step = self._step(scenario)
        mean, std = (t.detach()[:, self.reference, step].double() for t in (scores.mean(), scores.std()))
        low, high = float((mean - 12 * std).min()), float((mean + 12 * std).max())
        return mixture_quantiles(below, scenario.demand.detach(), levels.to(scenario.demand), low, high)

    def _step(self, scenario: Scenario) -> int:
        if self.reference_steps is not None:
            found = (scenario.steps == self.reference_steps).nonzero()
            if not len(found):
                raise PlanError(f"reference_steps: {self.reference_steps} is not one of {scenario.steps.tolist()}")
            return int(found[0])
        runs = scenario.quality[0, :, self.reference].isfinite().any(0)
        return int(runs.nonzero().max())


@dataclass(frozen=True)
class Trained(Probabilistic):
    """Thresholds trained by gradient through the distribution function on utility.

    They start at the quantiles, or at ``thresholds`` where these are given, and at random points besides; see
    :func:`edgesched.assign.thresholds.train_thresholds`. What is planned is never worse than at the start.

    Args:
        thresholds: Starting point by hand, or None for the quantiles.
        reference: As in :class:`Probabilistic`.
        reference_steps: As in :class:`Probabilistic`.
        starts: Starting points.
        iterations: Gradient steps.
        learning_rate: Step size of Adam.
        seed: Seed of the random starting points.

    Raises:
        ArgumentError: If ``starts`` or ``iterations`` is below 1.
    """

    starts: int = 8
    iterations: int = 150
    learning_rate: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("starts", "iterations"):
            if getattr(self, name) < 1:
                raise ArgumentError(f"{name}: expected at least 1, got {getattr(self, name)}")

    def cuts(self, scenario: Scenario, scores: Scores | None) -> Tensor:
        """Trained thresholds in score points, shape (B, M − 1), without gradient.

        Args:
            scenario: Batch of B scenarios.
            scores: Fitted distributions; they are needed.

        Raises:
            PlanError: As :meth:`Probabilistic.cuts`.
            ArgumentError: Likewise.
        """
        below = self._below(scenario, scores)
        start = super().cuts(scenario, scores)
        low, centre, high = self._quantiles(scenario, scores, below, torch.tensor([0.16, 0.5, 0.84])).unbind(-1)
        return train_thresholds(
            scenario, below, _by_ability(scenario).argsort(-1), start, centre, (high - low) / 2,
            starts=self.starts, iterations=self.iterations, learning_rate=self.learning_rate, seed=self.seed,
        )  # fmt: skip


@dataclass(frozen=True)
class GainPerSecond:
    """A router by predicted score gain per second of service.

    A category moves up from one model to the next only where the score that it gains for every second more is
    above a price λ, that is, it goes to the model with the most Q[c, m, k_m] − λ t_m, and every model runs the
    step count that is best for all requests at that price.

    Args:
        price: λ in score points a second; None tries a grid of prices and keeps the one with the highest utility.
        prices: Number of prices tried.

    Raises:
        ArgumentError: If the price is negative, or fewer than 2 prices are to be tried.
    """

    price: float | None = None
    prices: int = 96

    def __post_init__(self) -> None:
        if self.price is not None and self.price < 0:
            raise ArgumentError(f"price: expected at least 0 points a second, got {self.price}")
        if self.prices < 2:
            raise ArgumentError(f"prices: expected at least 2, got {self.prices}")

    def __call__(self, scenario: Scenario, scores: Scores | None = None) -> Tensor:
        """Probabilities, shape (B, C, M), each 0 or 1.

        Args:
            scenario: Batch of B scenarios.
            scores: Not looked at.
        """
        b = len(scenario)
        seconds = step_service_times(scenario)
        if self.price is not None:
            return self._routes(scenario, seconds, torch.full_like(scenario.latency_weight, self.price))[0]
        finite = scenario.quality.masked_fill(~scenario.quality.isfinite(), torch.nan).flatten(1)
        span = finite.nan_to_num(-torch.inf).amax(-1) - finite.nan_to_num(torch.inf).amin(-1)
        top = (span / seconds.flatten(1).amin(-1)).clamp(min=1e-9)
        best, chosen = torch.full((b,), -torch.inf).to(top), self._routes(scenario, seconds, torch.zeros_like(top))[0]
        for part in torch.cat([torch.zeros(1), torch.logspace(-6, 0, self.prices - 1)]).tolist():
            p, steps = self._routes(scenario, seconds, part * top)
            utility = evaluate(scenario, Plan(p, steps, best_share(scenario, p, steps))).utility.detach()
            better = utility > best
            best, chosen = torch.where(better, utility, best), torch.where(better[:, None, None], p, chosen)
        return chosen

    @staticmethod
    def _routes(scenario: Scenario, seconds: Tensor, price: Tensor) -> tuple[Tensor, Tensor]:
        """Assignment and step counts at a price of shape (B,)."""
        cost = price[:, None, None] * seconds
        part = (scenario.demand / scenario.demand.sum(-1, keepdim=True))[..., None, None]
        mean = torch.where(part > 0, part * torch.where(part > 0, scenario.quality, 0.0), 0.0).sum(1)
        index = (mean - cost).argmax(-1)
        at = index[:, None, :, None].expand(-1, scenario.shape[1], -1, 1)
        net = scenario.quality.gather(-1, at).squeeze(-1) - cost.gather(-1, index[..., None]).squeeze(-1)[:, None]
        return _one_model(scenario, net.argmax(-1)), scenario.steps[index]


@dataclass(frozen=True)
class Joint:
    """No policy: the assignment is left to the search, which plans it together with steps and shares."""

    def __call__(self, scenario: Scenario, scores: Scores | None = None) -> None:
        """Nothing given.

        Args:
            scenario: Not looked at.
            scores: Not looked at.
        """


@dataclass(frozen=True)
class Direct:
    """Each category to the model with the best mean quality at its best step count."""

    def __call__(self, scenario: Scenario, scores: Scores | None = None) -> Tensor:
        """Probabilities, shape (B, C, M).

        Args:
            scenario: Batch of B scenarios.
            scores: Not looked at.
        """
        return _one_model(scenario, scenario.quality.amax(-1).argmax(-1))


@dataclass(frozen=True)
class Random:
    """Every request to any model with equal probability."""

    def __call__(self, scenario: Scenario, scores: Scores | None = None) -> Tensor:
        """Probabilities, shape (B, C, M).

        Args:
            scenario: Batch of B scenarios.
            scores: Not looked at.
        """
        b, c, m, _ = scenario.shape
        return torch.full((b, c, m), 1 / m, dtype=scenario.demand.dtype, device=scenario.device)


@dataclass(frozen=True)
class AlwaysBest:
    """Everything to the model with the best mean quality over the demand."""

    def __call__(self, scenario: Scenario, scores: Scores | None = None) -> Tensor:
        """Probabilities, shape (B, C, M).

        Args:
            scenario: Batch of B scenarios.
            scores: Not looked at.
        """
        return _one_model(scenario, _by_ability(scenario)[:, 0])


@dataclass(frozen=True)
class AlwaysCheapest:
    """Everything to the model with the least time per image at its cheapest step count."""

    def __call__(self, scenario: Scenario, scores: Scores | None = None) -> Tensor:
        """Probabilities, shape (B, C, M).

        Args:
            scenario: Batch of B scenarios.
            scores: Not looked at.
        """
        allowed = scenario.quality.isfinite().any(1)
        seconds = step_service_times(scenario).masked_fill(~allowed, torch.inf)
        return _one_model(scenario, seconds.amin(-1).argmin(-1))
