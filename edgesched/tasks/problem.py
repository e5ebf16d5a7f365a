"""What a planning task begins with: the table, its halves, the fitted scores, the scenario, and what is believed."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from edgesched.data.table import ScoreTable
from edgesched.errors import ConfigError
from edgesched.protocols import ImageModel
from edgesched.types import Scenario

if TYPE_CHECKING:
    from edgesched.quality import QualityModel

Fit = Callable[[ScoreTable], "QualityModel"]


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """A planning problem as the configuration puts it; each part is made once, when it is first asked for.

    Args:
        data: Score table.
        quality: Fits score distributions to a table.
        workload: ``demand latency_weight latency`` and, where a task honours them, ``share_units memory_limit_gib
            deadline_s``: arguments of :meth:`edgesched.quality.QualityModel.scenario`.
        models: Models by name; their ``memory_gib`` counts where memory is limited.
        estimate: What is planned on instead of the fitted means, or None for these themselves.
    """

    data: ScoreTable
    quality: Fit
    workload: Mapping[str, Any]
    models: Mapping[str, ImageModel] = dataclasses.field(default_factory=dict)
    estimate: Callable[..., Scenario] | None = None

    @functools.cached_property
    def halves(self) -> tuple[ScoreTable, ScoreTable]:
        """The prompts to plan with and those held out.

        Raises:
            ScoreTableError: If a category has prompts in one half only.
        """
        return self.data.split()

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
        """Distributions fitted to the half that is planned with."""
        return self.quality(self.fit_half)

    @functools.cached_property
    def whole(self) -> QualityModel:
        """Distributions fitted to all prompts, for what is not replayed."""
        return self.quality(self.data)

    @functools.cached_property
    def scenario(self) -> Scenario:
        """The planning problem, from the fitted means.

        Raises:
            ConfigError: If memory is limited and a model does not say what it needs.
            ScenarioError: If a value of the workload is out of range.
        """
        return self.at()

    def at(self, scores: QualityModel | None = None, **changes: Any) -> Scenario:
        """The planning problem with some of the workload changed.

        Args:
            scores: Distributions to take instead of the fitted ones.
            **changes: Values that replace the workload's.
        """
        scores = scores or self.fitted
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
        return {"device": self.data.device, "digest": self.data.digest(), "rows": len(self.data)}
