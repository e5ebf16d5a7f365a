"""Plans before the first image: published times of models and assumed quality curves, told apart from measurements."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from edgesched.data.digests import json_text, text_digest
from edgesched.errors import ConfigError, PlanError
from edgesched.types import Scenario

ALL = "all"
CURVE = ("top", "drop", "tau")
LABEL = "priors, not measurements"
NO_REPLAY = (
    "Priors have no images, so nothing was replayed on held-out prompts and no interval is given: measure a score table "
    "(+experiment=campaign) before relying on this plan."
)
SINGLE = "Times are of single images on the hardware named, and a slot's batch is taken to cost as many single images."


@dataclass(frozen=True)
class ModelTimes:
    """Times of one model as somebody published them.

    Args:
        step_time_s: Seconds a step and image with the whole server.
        overhead_s: Seconds an image besides.
        source: Who measured them, and on what.
    """

    step_time_s: float
    overhead_s: float
    source: str


@dataclass(frozen=True)
class Priors:
    """Quality curves that stand in for a score table.

    Args:
        curves: Model → ``{top, drop, tau}``, score = top − drop · exp(−k / tau) in points at k steps, or step count →
            score; or category → one of the two.
        source: Where the curves come from, for every report.
        categories: Order of the categories; None takes that of the curves.

    Raises:
        ConfigError: If there is no curve, or no source.
    """

    curves: Mapping[str, Any]
    source: str
    categories: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if not self.curves:
            raise ConfigError("data.curves: has no model; give each model a curve")
        if not self.source.strip():
            raise ConfigError("data.source: is empty; say where the curves come from")

    def quality(self, models: Mapping[str, Any]) -> PriorQuality:
        """Curves at the step counts that every model allows, and its published times.

        Args:
            models: Models by name, with ``steps``, ``step_time_s``, ``overhead_s`` and ``timing_source``: attributes,
                or keys of their configuration.

        Raises:
            ConfigError: If a model lacks a time, its source, its step counts or a curve.
        """
        told = {name: _told(model) for name, model in models.items()}
        times = {name: published_times(name, node) for name, node in told.items()}
        names = tuple(sorted(times, key=lambda name: (times[name].step_time_s, name)))
        by_category = {name: self._by_category(name) for name in names}
        categories = self._order(by_category)
        curves = {m: {c: found.get(c, found.get(ALL)) for c in categories} for m, found in by_category.items()}
        scores = {m: {c: _scores(m, c, curve, told[m]) for c, curve in own.items()} for m, own in curves.items()}
        for name, own in scores.items():
            first = next(iter(own))
            differs = next((c for c in own if set(own[c]) != set(own[first])), None)
            if differs is not None:
                raise ConfigError(
                    f"data.curves.{name}: {differs!r} has other step counts than {first!r}; give every category the same"
                )
        steps = tuple(sorted({k for own in scores.values() for at in own.values() for k in at}))
        mean = torch.full((len(categories), len(names), len(steps)), -torch.inf, dtype=torch.float64)
        for m, model in enumerate(names):
            for c, category in enumerate(categories):
                for count, score in scores[model][category].items():
                    mean[c, m, steps.index(count)] = score
        return PriorQuality(categories, names, steps, mean, {name: times[name] for name in names}, self.source)

    def _by_category(self, model: str) -> dict[str, Mapping[Any, Any]]:
        """Category, or :data:`ALL`, → curve of a model."""
        curve = self.curves.get(model)
        if not isinstance(curve, Mapping) or not curve:
            raise ConfigError(f"data.curves.{model}: is missing; give {{top, drop, tau}}, or scores by step count")
        nested = [isinstance(value, Mapping) for value in curve.values()]
        if all(nested):
            return {str(category): own for category, own in curve.items()}
        if any(nested):
            raise ConfigError(f"data.curves.{model}: mixes categories and numbers; expected the one or the other")
        return {ALL: curve}

    def _order(self, curves: Mapping[str, Mapping[str, Any]]) -> tuple[str, ...]:
        """Categories in their order, the same for every model that names any."""
        named = {model: found for model, found in curves.items() if set(found) != {ALL}}
        found = tuple(next(iter(named.values()))) if named else tuple(self.categories or (ALL,))
        for model, own in named.items():
            if set(own) != set(found):
                raise ConfigError(f"data.curves.{model}: its categories are {', '.join(own)}, those of another model "
                                  f"{', '.join(found)}; give every model the same")  # fmt: skip
        order = found if self.categories is None else tuple(map(str, self.categories))
        if set(order) != set(found) or len(set(order)) < len(order) or not order:
            raise ConfigError(f"data.categories: expected each of {', '.join(found)} once, got {', '.join(order)}")
        return order


@dataclass(frozen=True, eq=False)
class PriorQuality:
    """Mean scores from curves and times from publications, in place of fitted ones.

    Args:
        categories: Names, C of them.
        models: Names from cheap to dear, M of them.
        step_counts: K of them, increasing.
        curve: Scores in points, shape (C, M, K), −inf where a model has no score at that count.
        times: Model → published times.
        source: Where the curves come from.
    """

    categories: tuple[str, ...]
    models: tuple[str, ...]
    step_counts: tuple[int, ...]
    curve: Tensor
    times: Mapping[str, ModelTimes]
    source: str

    @property
    def device(self) -> str:
        """What stands wherever a measured plan names its device."""
        told = "; ".join(f"times of {name}: {times.source}" for name, times in self.times.items())
        return f"{LABEL}: {told}; scores: {self.source}"

    def digest(self) -> str:
        """Digest of everything that is planned with, as a score table has one."""
        told = {name: [t.step_time_s, t.overhead_s, t.source] for name, t in self.times.items()}
        scores = self.curve.nan_to_num(neginf=-1e30).tolist()
        return text_digest(json_text([self.source, told, self.categories, self.step_counts, scores]))[:16]

    def mean(self) -> Tensor:
        """Scores of the curves, shape (C, M, K)."""
        return self.curve

    def std(self) -> Tensor:
        """Nothing: a curve has no spread.

        Raises:
            PlanError: Always, so that a method that needs it is left out.
        """
        raise PlanError("priors tell mean scores only; this method needs their distribution, from a score table")

    def cdf(self, score: Tensor) -> Tensor:
        """Nothing, as :meth:`std`.

        Raises:
            PlanError: Always.
        """
        return self.std()

    def remarks(self, latency: str) -> tuple[str, ...]:
        """What a reader of such a plan has to know."""
        return NO_REPLAY, SINGLE

    def scenario(self, demand: Any, latency_weight: float, **options: Any) -> Scenario:
        """The planning problem for a demand; arguments as of ``QualityModel.scenario``.

        Args:
            demand: As of :func:`~edgesched.quality.model.demand_of`.
            latency_weight: ω in points per second.
            **options: Further fields of :class:`~edgesched.types.Scenario`.

        Raises:
            ScenarioError: If the demand names an unknown category, or a value is out of range.
        """
        from edgesched.quality.model import demand_of

        times = [self.times[name] for name in self.models]
        return Scenario(
            demand_of(demand, self.categories),
            self.curve,
            torch.tensor(self.step_counts),
            torch.tensor([t.step_time_s for t in times], dtype=torch.float64),
            torch.tensor([t.overhead_s for t in times], dtype=torch.float64),
            torch.as_tensor(latency_weight, dtype=torch.float64),
            category_names=self.categories,
            model_names=self.models,
            **options,
        )


def _told(model: Any) -> Mapping[str, Any]:
    """What a model, or its configuration, tells of its steps and times."""
    if isinstance(model, Mapping):
        return model
    return {name: getattr(model, name, None) for name in ("steps", "step_time_s", "overhead_s", "timing_source")}


def published_times(name: str, node: Mapping[str, Any]) -> ModelTimes:
    """Times that a model's configuration tells.

    Args:
        name: Model, as messages call it.
        node: Its configuration, with ``step_time_s``, ``overhead_s`` and ``timing_source``.

    Raises:
        ConfigError: If one is missing or out of range, or no source is named.
    """
    for key, least in (("step_time_s", "more than 0"), ("overhead_s", "at least 0")):
        value = node.get(key)
        if value is None:
            raise ConfigError(
                f"model.{name}.{key}: is missing; data=priors needs published seconds, with timing_source"
            )
        if not _is_number(value) or value < 0 or (value == 0 and key == "step_time_s"):
            raise ConfigError(f"model.{name}.{key}: expected {least} seconds, got {value!r}")
    source = node.get("timing_source")
    if not isinstance(source, str) or not source.strip():
        raise ConfigError(f"model.{name}.timing_source: is missing; say who measured step_time_s, and on what")
    return ModelTimes(float(node["step_time_s"]), float(node["overhead_s"]), source)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _scores(model: str, category: str, curve: Any, node: Mapping[str, Any]) -> dict[int, float]:
    """Step count → score of one curve, at counts that the model allows."""
    where = f"data.curves.{model}" + ("" if category == ALL else f".{category}")
    if not isinstance(curve, Mapping) or not curve:
        raise ConfigError(f"{where}: is missing; give {{top, drop, tau}}, or scores by step count")
    wrong = next((key for key, value in curve.items() if not _is_number(value)), None)
    if wrong is not None:
        raise ConfigError(f"{where}.{wrong}: expected a finite number, got {curve[wrong]!r}")
    allowed = node.get("steps")
    if set(curve) == set(CURVE):
        if curve["drop"] < 0 or curve["tau"] <= 0:
            raise ConfigError(
                f"{where}: expected drop of at least 0 and tau above 0, got {curve['drop']}, {curve['tau']}"
            )
        if not allowed:
            raise ConfigError(f"model.{model}.steps: is missing; a curve by formula needs the step counts to plan with")
        return {int(k): curve["top"] - curve["drop"] * math.exp(-k / curve["tau"]) for k in allowed}
    if not all(str(key).isascii() and str(key).isdigit() and int(key) > 0 for key in curve):
        told = ", ".join(map(str, curve))
        raise ConfigError(f"{where}: expected top, drop and tau, or step counts, got {told}")
    found = {int(key): float(value) for key, value in curve.items()}
    refused = next((k for k in found if allowed and k not in allowed), None)
    if refused is not None:
        raise ConfigError(
            f"{where}.{refused}: model.{model}.steps has no {refused}; expected one of {list(allowed or ())}"
        )
    return found
