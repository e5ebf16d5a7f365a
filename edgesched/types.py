"""The nouns of edgesched: prompts, scores, scenarios, plans and results.

Every type is frozen and checks shapes, ranges and finiteness where it is made, so that later
stages can trust it. Dimension names: ``scenario`` B, ``category`` C, ``model`` M, ``step`` K.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from edgesched._checks import floats, names, refuse, rows, shaped, step_counts
from edgesched._random import scenario_arrays
from edgesched.errors import PlanError, PromptError, ScenarioError

LATENCY_MODELS = ("slot", "queue")
ROUTINGS = ("random", "quota")
ROW_SUM_TOLERANCE = 1e-4
#: Rows and shares further off than rounding are normalised, so that no plan hands out more than there is.
_ROUNDING = 1e-12
#: Whether a field has an entry for every model, whether 0 is in its range, and its unit.
_RANGES = {
    "step_time_s": (True, False, "seconds"),
    "overhead_s": (True, True, "seconds"),
    "latency_weight": (False, True, "points per second"),
    "memory_gib": (True, True, "GiB"),
    "memory_limit_gib": (False, False, "GiB"),
    "deadline_s": (False, False, "seconds"),
}


@dataclass(frozen=True)
class PromptSet:
    """Prompts with identifiers and categories, in a fixed order.

    Args:
        ids: Unique prompt identifiers.
        texts: Prompt texts, one per identifier, none empty.
        categories: Category of each prompt.

    Raises:
        PromptError: If lengths differ, an identifier repeats, or a text or category is empty.

    Example:
        >>> len(PromptSet(("a", "b"), ("a red circle", "a blue star"), ("Basic", "Basic")))
        2
    """

    ids: tuple[str, ...]
    texts: tuple[str, ...]
    categories: tuple[str, ...]

    def __post_init__(self) -> None:
        for name in ("ids", "texts", "categories"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not self.ids:
            raise PromptError("ids: a prompt set needs at least one prompt, got none")
        if not len(self.ids) == len(self.texts) == len(self.categories):
            raise PromptError(
                f"ids, texts and categories must have one length, got "
                f"{len(self.ids)}, {len(self.texts)} and {len(self.categories)}"
            )
        seen: set[str] = set()
        for row, (pid, text, category) in enumerate(zip(self.ids, self.texts, self.categories, strict=True)):
            if pid in seen:
                raise PromptError(f"row {row}: prompt id {pid!r} appears twice; ids must be unique")
            seen.add(pid)
            for name, value in (("prompt_id", pid), ("text", text), ("category", category)):
                if not isinstance(value, str) or not value.strip():
                    raise PromptError(f"row {row}: {name} is {value!r}; expected a non-empty string")

    def __len__(self) -> int:
        return len(self.ids)

    def __iter__(self) -> Iterator[tuple[str, str, str]]:
        return iter(zip(self.ids, self.texts, self.categories, strict=True))

    def select(self, keep: Sequence[int]) -> PromptSet:
        """The prompts at the given positions, in that order.

        Raises:
            PromptError: If none is left, or one comes twice.
        """
        return PromptSet(
            tuple(self.ids[i] for i in keep),
            tuple(self.texts[i] for i in keep),
            tuple(self.categories[i] for i in keep),
        )

    def per_category(self, count: int) -> PromptSet:
        """The first ``count`` prompts of every category, in order.

        Raises:
            PromptError: If the count is not positive.
        """
        if count < 1:
            raise PromptError(f"prompts_per_category: expected a positive whole number, got {count}")
        taken: dict[str, int] = {}
        keep = []
        for i, category in enumerate(self.categories):
            if taken.get(category, 0) < count:
                taken[category] = taken.get(category, 0) + 1
                keep.append(i)
        return self.select(keep)


@dataclass(frozen=True, eq=False)
class Scenario:
    r"""A batch of B planning problems: who asks for what, and what each model gives and costs.

    Leading dimensions that are missing are expanded, so one ``step_time_s`` of shape (M,) serves
    every scenario. Tensors keep their gradients.

    Args:
        demand: Requests per slot (per second in queue mode), shape (B, C), ≥ 0, each row with a
            positive sum.
        quality: Score points, shape (B, C, M, K); −inf where model m may not run that step count.
        steps: Denoising steps, K strictly increasing positive integers.
        step_time_s: Seconds per step and image with the whole server, shape (B, M), > 0.
        overhead_s: Seconds per image for text encoding and decoding, shape (B, M), ≥ 0.
        latency_weight: Score points per second ω, shape (B,), ≥ 0.
        latency: ``"slot"`` (one batch per slot) or ``"queue"`` (M/D/1).
        share_units: If set, every share is a multiple of 1/share_units (a sliced GPU).
        memory_gib: Memory of each resident model in GiB, shape (B, M), ≥ 0.
        memory_limit_gib: Memory of the server in GiB, shape (B,); needs ``memory_gib``.
        deadline_s: A mean latency above this is infeasible, shape (B,), > 0: a limit on the mean response delay of
            all requests, not on that of each.
        category_names: Names of the categories in their order; what is given by name is matched by them.
        model_names: Names of the models in their order.

    Raises:
        ScenarioError: Naming the field, the first offending entry and what is allowed.

    Example:
        >>> Scenario([[4.0]], [[[[20.0, 25.0]]]], [1, 8], [[0.1]], [[0.0]], [0.01]).shape
        (1, 1, 1, 2)
    """

    demand: Tensor
    quality: Tensor
    steps: Tensor
    step_time_s: Tensor
    overhead_s: Tensor
    latency_weight: Tensor
    latency: str = "slot"
    share_units: int | None = None
    memory_gib: Tensor | None = None
    memory_limit_gib: Tensor | None = None
    deadline_s: Tensor | None = None
    category_names: tuple[str, ...] | None = None
    model_names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        demand = floats("demand", self.demand, ScenarioError)
        quality = floats("quality", self.quality, ScenarioError)
        if demand.ndim != 2 or 0 in demand.shape:
            raise ScenarioError(f"demand: expected shape (scenarios, categories), got {tuple(demand.shape)}")
        steps = step_counts(self.steps, demand.device)
        batch, categories = demand.shape
        if quality.ndim < 3:
            raise ScenarioError(
                f"quality: expected shape (scenarios, categories, models, steps), got {tuple(quality.shape)}"
            )
        models = quality.shape[-2]
        quality = shaped("quality", quality, (batch, categories, models, len(steps)), ScenarioError)
        refuse("demand", demand, ~demand.isfinite(), "expected a finite number", ScenarioError)
        refuse("demand", demand, demand < 0, "expected at least 0 requests", ScenarioError)
        total = demand.sum(-1)
        refuse("total demand", total, total <= 0, "expected demand in at least one category", ScenarioError)
        masked = "NaN is refused (use -inf for a step count a model may not run)"
        refuse("quality", quality, quality.isnan(), masked, ScenarioError)
        refuse("quality", quality, quality == torch.inf, "+inf is refused", ScenarioError)
        found: dict[str, Any] = {"demand": demand, "quality": quality.to(demand.device), "steps": steps}
        for name in ("step_time_s", "overhead_s", "latency_weight"):
            found[name] = self._number(name, batch, models, demand.device)
        self._check_settings()
        for name in ("memory_gib", "memory_limit_gib", "deadline_s"):
            if getattr(self, name) is not None:
                found[name] = self._number(name, batch, models, demand.device)
        found["category_names"] = names("category_names", self.category_names, categories)
        found["model_names"] = names("model_names", self.model_names, models)
        for name, value in found.items():
            object.__setattr__(self, name, value)

    def _number(self, name: str, batch: int, models: int, device: torch.device) -> Tensor:
        """A field of seconds, points or memory in its full shape, every entry in its range."""
        by_model, zero, unit = _RANGES[name]
        shape = (batch, models) if by_model else (batch,)
        tensor = shaped(name, floats(name, getattr(self, name), ScenarioError), shape, ScenarioError).to(device)
        refuse(name, tensor, ~tensor.isfinite(), "expected a finite number", ScenarioError)
        low, bad = ("at least", tensor < 0) if zero else ("more than", tensor <= 0)
        refuse(name, tensor, bad, f"expected {low} 0 {unit}", ScenarioError)
        return tensor

    def _check_settings(self) -> None:
        if self.latency not in LATENCY_MODELS:
            raise ScenarioError(f"latency: {self.latency!r} is not one of {', '.join(LATENCY_MODELS)}")
        if self.share_units is not None and (
            isinstance(self.share_units, bool) or not isinstance(self.share_units, int) or self.share_units < 1
        ):
            raise ScenarioError(f"share_units: expected a positive integer or None, got {self.share_units!r}")
        if (self.memory_gib is None) != (self.memory_limit_gib is None):
            raise ScenarioError("memory_gib and memory_limit_gib: give both or neither")

    def __len__(self) -> int:
        return self.demand.shape[0]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Sizes (B, C, M, K)."""
        b, c, m, k = self.quality.shape
        return b, c, m, k

    @property
    def device(self) -> torch.device:
        """Device of every tensor."""
        return self.demand.device

    def _map(self, change: Any) -> Scenario:
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return Scenario(**{k: change(v, k) if isinstance(v, Tensor) else v for k, v in fields.items()})

    def to(self, device: torch.device | str) -> Scenario:
        """The same scenarios on another device."""
        return self._map(lambda tensor, _: tensor.to(device))

    def repeat(self, times: int) -> Scenario:
        """The whole batch several times over: B scenarios become times · B, the batch running fastest."""
        return self._map(lambda t, name: t if name == "steps" else t.repeat(times, *[1] * (t.ndim - 1)))

    def __getitem__(self, index: Any) -> Scenario:
        """A part of the batch; the batch dimension stays, also for a single index."""
        index = rows(index, len(self))
        return self._map(lambda tensor, name: tensor if name == "steps" else tensor[index])

    @classmethod
    def random(
        cls,
        batch: int,
        categories: int = 4,
        models: int = 3,
        steps: int = 50,
        *,
        seed: int = 0,
        latency: str = "slot",
    ) -> Scenario:
        """Draw synthetic scenarios with models from cheap and weak to dear and able.

        Capability c_m = m/(M−1); demand ~ Gamma(2, 10/C) + 0.1; step time 0.05·10^c_m·e^{0.1N};
        overhead 0.02·10^{c_m/2}; Q = top − 12 e^{−k/τ} with top = 28 + 4c_m + 2N_c + 1.5N_cm and
        τ = U_m(4, 10)·e^{0.7N_cm}; ω = 10^{U(−2.7, −0.7)}. In queue mode demand is rescaled so
        that the cheapest model at the middle step count would be loaded to U(0.2, 0.8).

        Args:
            batch: Number of scenarios B.
            categories: Number of categories C.
            models: Number of models M.
            steps: Number of step options K; the options are 1, …, K.
            seed: Seed of the draw.
            latency: ``"slot"`` or ``"queue"``.

        Returns:
            Scenarios in float64.

        Raises:
            ScenarioError: If a size is below 1.

        Example:
            >>> Scenario.random(2, seed=0).shape
            (2, 4, 3, 50)
        """
        arrays = scenario_arrays(batch, categories, models, steps, seed=seed, latency=latency)
        d, q, k, a, o, w = (torch.as_tensor(array) for array in arrays)
        return cls(d, q, k, a, o, w, latency=latency)


@dataclass(frozen=True, eq=False)
class Plan:
    """Decisions for a batch of B scenarios.

    Args:
        assignment: Probability that a request of category c goes to model m, shape (B, C, M),
            ≥ 0, rows summing to 1 within 1e-4; they are normalised.
        steps: Denoising steps of each model (values, not indices), shape (B, M), int64.
        share: Share of the server of each model, shape (B, M), ≥ 0, rows summing to at most 1 within 1e-6; they
            are normalised where they sum to more.

    Raises:
        PlanError: Naming the field, the first offending entry and what is allowed.
    """

    assignment: Tensor
    steps: Tensor
    share: Tensor

    def __post_init__(self) -> None:
        assignment = floats("assignment", self.assignment, PlanError)
        share = floats("share", self.share, PlanError)
        steps = torch.as_tensor(self.steps)
        if assignment.ndim != 3:
            raise PlanError(
                f"assignment: expected shape (scenarios, categories, models), got {tuple(assignment.shape)}"
            )
        expected = (assignment.shape[0], assignment.shape[2])
        for name, tensor in (("steps", steps), ("share", share)):
            if tensor.shape != expected:
                raise PlanError(f"{name}: expected shape {expected}, got {tuple(tensor.shape)}")
        if steps.is_floating_point():
            refuse("steps", steps, steps != steps.round(), "expected whole numbers", PlanError)
        refuse("assignment", assignment, ~(assignment >= 0), "expected probabilities of at least 0", PlanError)
        sums = assignment.sum(-1)
        refuse(
            "assignment row sum",
            sums,
            ~((sums - 1).abs() <= ROW_SUM_TOLERANCE),
            "expected rows that sum to 1",
            PlanError,
        )
        refuse("share", share, ~(share >= 0), "expected shares of at least 0", PlanError)
        total = share.sum(-1)
        refuse("share sum", total, ~(total <= 1 + 1e-6), "expected shares that sum to at most 1", PlanError)
        off = (sums - 1).abs() > _ROUNDING
        over = total > 1 + _ROUNDING
        object.__setattr__(self, "assignment", assignment / torch.where(off, sums, 1.0)[..., None])
        object.__setattr__(self, "steps", steps.to(torch.int64))
        object.__setattr__(self, "share", share / torch.where(over, total, 1.0)[..., None])

    def __len__(self) -> int:
        return self.assignment.shape[0]

    def __getitem__(self, index: Any) -> Plan:
        """Plans of a part of the batch; the batch dimension stays, also for a single index."""
        index = rows(index, len(self))
        return Plan(self.assignment[index], self.steps[index], self.share[index])

    def to(self, device: torch.device | str) -> Plan:
        """The same plan on another device; itself if it is there."""
        if torch.device(device) == self.share.device:
            return self
        return Plan(self.assignment.to(device), self.steps.to(device), self.share.to(device))


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a plan gives, one value per scenario, each of shape (B,).

    Args:
        utility: quality − ω · latency in score points; −inf where infeasible.
        quality: Mean score of a request in points.
        latency_s: Mean response delay in seconds; +inf where a loaded model gets nothing or its
            queue is unstable.
        feasible: Whether every constraint holds.
    """

    utility: Tensor
    quality: Tensor
    latency_s: Tensor
    feasible: Tensor

    def __len__(self) -> int:
        return len(self.utility)

    def __getitem__(self, index: Any) -> Outcome:
        """Outcomes of a part of the batch; the batch dimension stays, also for a single index."""
        index = rows(index, len(self))
        return Outcome(*(getattr(self, f.name)[index] for f in dataclasses.fields(self)))


@dataclass(frozen=True, eq=False)
class SearchResult:
    """What a search found, with its certificate.

    Args:
        method: Name of the method.
        plan: Best plan of each scenario.
        utility: Its utility, shape (B,), as :func:`edgesched.evaluate` gives it.
        bound: Upper bound on the utility of every plan the search could have chosen, shape (B,).
        gap: (bound − utility) / max(|bound|, 1), shape (B,).
        feasible: Shape (B,).
        history: Best utility so far at recorded iterations, shape (iterations', B).
        proposals: Plans examined, over all scenarios.
        elapsed_s: Wall-clock seconds, compilation left out.
    """

    method: str
    plan: Plan
    utility: Tensor
    bound: Tensor
    gap: Tensor
    feasible: Tensor
    history: Tensor
    proposals: int
    elapsed_s: float

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, index: Any) -> SearchResult:
        """Results of a part of the batch; method, proposals and seconds stay those of the whole search."""
        index = rows(index, len(self))
        own = {name: getattr(self, name)[index] for name in ("plan", "utility", "bound", "gap", "feasible")}
        return dataclasses.replace(self, **own, history=self.history[:, index])
