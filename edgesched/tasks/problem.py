"""What a planning task begins with: the table, its halves, the fitted scores, the scenario, and what is believed."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from edgesched.data.table import ScoreTable
from edgesched.errors import ConfigError
from edgesched.protocols import ImageModel
from edgesched.quality.priors import PriorQuality, Priors
from edgesched.streams.arrivals import RequestStream
from edgesched.types import Scenario

if TYPE_CHECKING:
    from edgesched.quality import QualityModel

Fit = Callable[[ScoreTable], "QualityModel"]


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """A planning problem as the configuration puts it; each part is made once, when it is first asked for.

    Args:
        data: Score table; or priors, where a task can plan without measurements.
        quality: Fits score distributions to a table.
        workload: ``demand latency_weight latency`` and, where a task honours them, ``share_units memory_limit_gib
            deadline_s``: arguments of :meth:`edgesched.quality.QualityModel.scenario`.
        models: Models by name; their ``memory_gib`` counts where memory is limited.
        estimate: What is planned on instead of the fitted means, or None for these themselves.
    """

    data: ScoreTable | Priors
    quality: Fit
    workload: Mapping[str, Any]
    models: Mapping[str, ImageModel] = dataclasses.field(default_factory=dict)
    estimate: Callable[..., Scenario] | None = None

    @property
    def table(self) -> ScoreTable:
        """The score table.

        Raises:
            ConfigError: If there are priors in its place.
        """
        if isinstance(self.data, Priors):
            raise ConfigError(
                "data: priors are no measurements; this task needs a score table, only plans can do without"
            )
        return self.data

    @functools.cached_property
    def halves(self) -> tuple[ScoreTable, ScoreTable]:
        """The prompts to plan with and those held out.

        Raises:
            ScoreTableError: If a category has prompts in one half only.
        """
        return self.table.split()

    @property
    def fit_half(self) -> ScoreTable:
        """Rows of the prompts that are planned with."""
        return self.halves[0]

    @property
    def held(self) -> ScoreTable:
        """Rows of the prompts that plans are replayed on."""
        return self.halves[1]

    @functools.cached_property
    def fitted(self) -> QualityModel:
        """Distributions fitted to the half that is planned with.

        Raises:
            ConfigError: If there are priors in place of a score table.
        """
        return self.quality(self.fit_half)

    @functools.cached_property
    def scores(self) -> QualityModel | PriorQuality:
        """What the scenario is made of: fitted distributions, or the curves of priors.

        Raises:
            ConfigError: If priors and the models' configurations do not fit.
        """
        return self.data.quality(self.models) if isinstance(self.data, Priors) else self.fitted

    @functools.cached_property
    def whole(self) -> QualityModel:
        """Distributions fitted to all prompts, for what is not replayed.

        Raises:
            ConfigError: If there are priors in place of a score table.
        """
        return self.quality(self.table)

    @functools.cached_property
    def scenario(self) -> Scenario:
        """The planning problem, from the fitted means.

        Raises:
            ConfigError: If memory is limited and a model does not say what it needs.
            ScenarioError: If a value of the workload is out of range.
        """
        return self.at()

    def at(self, scores: QualityModel | PriorQuality | None = None, **changes: Any) -> Scenario:
        """The planning problem with some of the workload changed.

        Args:
            scores: Distributions to take instead of the fitted ones.
            **changes: Values that replace the workload's.

        Raises:
            ConfigError: If memory is limited and a model does not say what it needs.
            ScenarioError: If a value is out of range.
        """
        scores = scores or self.scores
        workload = {**self.workload, **changes}
        if workload.get("memory_limit_gib") is not None:
            needed = {name: getattr(self.models.get(name), "memory_gib", None) for name in scores.models}
            missing = [name for name, gib in needed.items() if gib is None]
            if missing:
                raise ConfigError(f"workload.memory_limit_gib: model.{missing[0]}.memory_gib is needed too")
            workload["memory_gib"] = [float(gib) for gib in needed.values() if gib is not None]
        return scores.scenario(**workload)

    @functools.cached_property
    def believed(self) -> Scenario:
        """What is planned on: the scenario, or a careful estimate of it."""
        return self.believe(self.scenario)

    def believe(self, scenario: Scenario) -> Scenario:
        """A careful estimate of a scenario, as the configuration asks for it."""
        return scenario if self.estimate is None else self.estimate(scenario, self.fit_half, self.fitted.models)

    @functools.cached_property
    def source(self) -> dict[str, Any]:
        """Where the scores come from: device, digest and rows."""
        return {"device": self.table.device, "digest": self.table.digest(), "rows": len(self.table)}


class Arrivals(Protocol):
    """Makes a stream of requests."""

    def __call__(self, *, rate: Sequence[float], categories: Sequence[str], seed: int) -> RequestStream:
        """A stream of requests.

        Args:
            rate: Mean requests a second of every category, shape (C,).
            categories: Their names.
            seed: Seed of the stream.
        """
        ...


def stream_of(problem: Problem, arrivals: Arrivals | None, categories: Sequence[str], seed: int) -> RequestStream:
    """Requests at the mean rate that the workload's demand says.

    Args:
        problem: Its workload's demand is the rate, in requests a second.
        arrivals: Makes the stream; None where the workload has none.
        categories: Category names, C of them.
        seed: Seed of the stream.

    Raises:
        ConfigError: If the workload has no arrivals, or names an unknown category.
    """
    if arrivals is None:
        raise ConfigError(
            "workload.arrivals: this experiment needs a stream; choose workload=poisson, bursty, diurnal or trace"
        )
    demand = problem.workload["demand"]
    if isinstance(demand, Mapping):
        unknown = [c for c in demand if c not in categories]
        if unknown:
            raise ConfigError(f"workload.demand: category {unknown[0]!r} is not one of {', '.join(categories)}")
        rates = [float(demand.get(c, 0.0)) for c in categories]
    else:
        rates = [float(demand)] * len(categories)
    return arrivals(rate=rates, categories=categories, seed=seed)
