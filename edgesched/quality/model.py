"""What every family of score distributions shares: the mean curve and its offsets, the interface, the moment start."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import lightning as L  # noqa: N812
import numpy as np
import torch
from torch import Tensor, nn

from edgesched.data.table import ScoreTable
from edgesched.errors import ScenarioError, ScoreTableError
from edgesched.quality.latency import LatencyFit, latency_remarks
from edgesched.quality.laws import Law, Normal
from edgesched.quality.offsets import cell_means, shrunken_offsets
from edgesched.types import Scenario

ITERATIONS = 20


@dataclass(frozen=True)
class Observations:
    """Scores as tensors, each of shape (rows,).

    Args:
        score: Scores in points.
        category: Position of the category.
        model: Position of the model.
        step: Position of the step count.
        prompt: Number of the prompt.
        weight: One over the rows of the same prompt, model and step count: a prompt counts once, however many seeds
            it has.
    """

    score: Tensor
    category: Tensor
    model: Tensor
    step: Tensor
    prompt: Tensor
    weight: Tensor

    def ordered(self) -> Observations:
        """The rows by model, step count, category, prompt and score: no sum depends on the table's order."""
        keys = (self.score, self.prompt, self.category, self.step, self.model)
        order = torch.from_numpy(np.lexsort([key.numpy() for key in keys]))
        return Observations(*(getattr(self, field.name)[order] for field in fields(self)))

    def shrunk(self, strength: float) -> Observations:
        """The rows with ``strength`` prompts more in every category, drawn from all categories alike.

        Every row is then counted in every category: fully in its own, with weight strength / prompts in all.
        """
        if strength == 0:
            return self
        categories, rows = int(self.category.max()) + 1, len(self.score)
        prompts = int(self.prompt.max()) + 1
        target = torch.arange(categories).repeat_interleave(rows)
        own = target == self.category.repeat(categories)
        weight = self.weight.repeat(categories) * (own + strength / prompts)
        score, model, step, prompt = (t.repeat(categories) for t in (self.score, self.model, self.step, self.prompt))
        return Observations(score, target, model, step, prompt, weight)


class QualityModel(L.LightningModule):
    r"""Scores whose mean saturates in the steps, up to offsets; the base class of the families.

    For category c, model m and k steps, with k_0 the model's smallest measured step count,

        S = μ(k) + s(k) · (Z − E Z),   μ(k) = top − drop · r(k) + d(k),   r(k) = exp(−((k − k_0) / τ)^β),

    drop > 0 and τ > 0 bounded, β ∈ (0.3, 1.5), so that the curve grows with the steps and levels off. Means that do not
    (distilled models fall and peak) keep their offsets d(k) from it, shrunken by a learned variance
    (:func:`edgesched.quality.offsets.shrunken_offsets`), so that they vanish where the curve is right. Z follows the
    family's standard law; its scale s is free for every step count within a factor of 7 of the cell's own deviation,
    and its shape passes from an early to a late value with r(k). Fitted by maximum weighted likelihood: L-BFGS over all
    rows at once, from a moment start. Parameters are kept in units of the table's deviation, for conditioning.

    Args:
        categories: Category names, C of them.
        models: Model names, M of them, from cheap to dear.
        steps: Measured step counts, K of them, increasing.
        measured: Which (model, step count) pairs were measured, shape (M, K), bool.
        batch_latency: Fitted times by model of whole batches, for slots.
        single_latency: Fitted times by model of single images, for queues.
        learning_rate: First step size of L-BFGS.
        strength: Prompts by which every category was shrunk towards its model, for the record.
    """

    law: ClassVar[type[Law]] = Normal

    def __init__(
        self,
        categories: tuple[str, ...],
        models: tuple[str, ...],
        steps: tuple[int, ...],
        measured: Tensor,
        batch_latency: Mapping[str, LatencyFit],
        single_latency: Mapping[str, LatencyFit],
        learning_rate: float = 1.0,
        strength: float = 0.0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)
        self.categories, self.models, self.step_counts = categories, models, steps
        self.latency_fits = {"slot": dict(batch_latency), "queue": dict(single_latency)}
        self.learning_rate, self.strength = learning_rate, strength
        c, m = len(categories), len(models)
        self.register_buffer("measured", measured)
        self.register_buffer("first", torch.tensor([float(steps[int(row.int().argmax())]) for row in measured]))
        self.register_buffer("counts", torch.tensor([float(k) for k in steps]))
        self.register_buffer("centre", torch.zeros(()))
        self.register_buffer("unit", torch.ones(()))
        every = (len(categories), len(models), len(steps))
        self.register_buffer("offset", torch.zeros(every))
        self.register_buffer("offset_error", torch.zeros(every))
        self.register_buffer("log_std", torch.zeros(every))
        self.converged = False
        self.top = nn.Parameter(torch.zeros(c, m))
        self.log_drop = nn.Parameter(torch.zeros(c, m))
        self.log_tau = nn.Parameter(torch.full((c, m), 1.0))
        self.shape_logit = nn.Parameter(torch.zeros(c, m))
        self._add_shape(c, m, len(steps))
        self.double()

    def _add_shape(self, c: int, m: int, k: int) -> None:
        """Make the parameters around the mean, each of shape (C, M) or (C, M, anything)."""
        self.log_scale = nn.Parameter(torch.zeros(c, m, k))

    def reorder(self, categories: tuple[str, ...]) -> None:
        """Put the categories into another order, and everything that is known of them.

        Args:
            categories: The same categories, in the order wanted.
        """
        index = torch.tensor([self.categories.index(name) for name in categories])
        with torch.no_grad():
            for own in (*self.parameters(), self.offset, self.offset_error, self.log_std):
                own.copy_(own[index.to(own.device)].clone())
        self.categories = categories
        self.hparams["categories"] = categories

    def _spread(self, p: Mapping[str, Tensor], rest: Tensor, step: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Scale in units and shape of the law, from parameters gathered at rows of shape ``rest``."""
        return self._scale(p, step), ()

    def _scale(self, p: Mapping[str, Tensor], step: Tensor) -> Tensor:
        """Free scales in units, within a factor e² of the cell's deviation: a constant cell's likelihood has no end."""
        near = pick(p["log_std"], step)
        return (near + bounded(pick(p["log_scale"], step) - near, -2.0, 2.0)).exp()

    @property
    def fixed(self) -> dict[str, Tensor]:
        """What :meth:`cells` needs beside the free parameters, each of shape (C, M, K)."""
        return {"offset": self.offset, "log_std": self.log_std}

    def gathered(self, category: Tensor, model: Tensor) -> dict[str, Tensor]:
        """Every parameter, and what is fixed, at indices that broadcast; dimensions of its own stay last.

        Args:
            category: Positions of categories.
            model: Positions of models, broadcast against them.
        """
        return {name: value[category, model] for name, value in (*self.named_parameters(), *self.fixed.items())}

    def cells(self, p: Mapping[str, Tensor], model: Tensor, step: Tensor) -> tuple[Tensor, ...]:
        """Mean, location, scale and shape in score points, elementwise in gathered parameters and indices.

        Args:
            p: Parameters, from :meth:`gathered` at the same indices.
            model: Positions of models.
            step: Positions of step counts, of the same shape.
        """
        mean, rest = self._curve(p, self.counts[step] - self.first[model])
        scale, shape = self._spread(p, rest, step)
        mean = mean + self.unit * pick(p["offset"], step)
        centre, _ = self.law.moments(*shape)
        return mean, mean - scale * self.unit * centre, scale * self.unit, *shape

    def _curve(self, p: Mapping[str, Tensor], beyond: Tensor) -> tuple[Tensor, Tensor]:
        """The curve in score points, and what is left of the drop."""
        beta = 0.3 + 1.2 * p["shape_logit"].sigmoid()
        widest = 20 * max(self.step_counts[-1] - self.step_counts[0], 1)
        tau = bounded(p["log_tau"], math.log(0.05), math.log(widest)).exp()
        drop = bounded(p["log_drop"], math.log(1e-3), math.log(20.0)).exp()
        relative = (beyond.clamp(min=0) / tau).clamp(min=1e-9)
        rest = torch.exp(-(relative**beta))
        return self.centre + self.unit * (p["top"] - drop * rest), rest

    def _grid(self) -> tuple[Tensor, Tensor, Tensor]:
        c, m, k = (torch.arange(len(names)) for names in (self.categories, self.models, self.step_counts))
        c, m, k = (index.to(self.top.device) for index in (c, m, k))
        return torch.broadcast_tensors(c[:, None, None], m[:, None], k)

    def _at(self, *index: Tensor | None) -> tuple[Tensor, ...]:
        """Location, scale and shape of every cell, or at indices of category, model and step count."""
        c, m, k = self._grid()
        every = self.cells(self.gathered(c, m), m, k)[1:]
        category, model, step = index or (None, None, None)
        if category is None or model is None or step is None:
            return every
        flat = (category * c.shape[1] + model) * c.shape[2] + step
        # index_select has a much faster gradient than advanced indexing.
        return tuple(v.flatten(0, 2).index_select(0, flat.flatten()).reshape(*flat.shape, *v.shape[3:]) for v in every)

    def mean(self, steps: Tensor | None = None) -> Tensor:
        """Mean scores, shape (C, M, K), at the measured step counts or at others, shape (K,).

        In between, offsets are linear in the logarithm of the count; beyond, they stay.
        """
        counts = self.counts if steps is None else steps.to(self.counts)
        p = {name: value[..., None] for name, value in self.named_parameters() if value.ndim == 2}
        curve = self._curve(p, counts - self.first[:, None])[0]
        offset = [
            _interpolated(counts, self.counts[row], self.offset[:, m, row]) for m, row in enumerate(self.measured)
        ]
        return curve + self.unit * torch.stack(offset, 1)

    def std(self) -> Tensor:
        """Standard deviations at the measured step counts, shape (C, M, K)."""
        _, scale, *shape = self._at()
        return scale * self.law.moments(*shape)[1]

    def cdf(
        self, score: Tensor, category: Tensor | None = None, model: Tensor | None = None, step: Tensor | None = None
    ) -> Tensor:
        """P(S ≤ score), for a score that broadcasts to (C, M, K), or at indices that broadcast with the score.

        Args:
            score: Scores in points.
            category: Positions of categories, with ``model`` and ``step``; None, all three, for every cell.
            model: Positions of models.
            step: Positions of step counts.
        """
        location, scale, *shape = self._at(category, model, step)
        return self.law.cdf((score - location) / scale, *shape)

    def quantile(
        self, level: Tensor, category: Tensor | None = None, model: Tensor | None = None, step: Tensor | None = None
    ) -> Tensor:
        """Score below which a share ``level`` falls, in points; shapes as in :meth:`cdf`.

        Args:
            level: Shares in (0, 1).
            category: Positions of categories, with ``model`` and ``step``; None, all three, for every cell.
            model: Positions of models.
            step: Positions of step counts.
        """
        location, scale, *shape = self._at(category, model, step)
        return location + scale * self.law.quantile(level.to(scale), *shape)

    def log_density(self, score: Tensor, category: Tensor, model: Tensor, step: Tensor) -> Tensor:
        """Log density of scores at indices, all of shape (rows,).

        Args:
            score: Scores in points.
            category: Positions of categories.
            model: Positions of models.
            step: Positions of step counts.
        """
        location, scale, *shape = self._at(category, model, step)
        return self.law.log_density((score - location) / scale, *shape) - scale.log()

    def density(self, scores: Any, category: int, model: int, step: int) -> Any:
        """Density of one cell at score points, for figures: an array of the same shape.

        Args:
            scores: Scores in points, any shape.
            category: Position of the category.
            model: Position of the model.
            step: Position of the step count.
        """
        points = torch.as_tensor(scores, dtype=torch.float64)
        index = (torch.full(points.shape, i) for i in (category, model, step))
        with torch.no_grad():
            return self.log_density(points, *index).exp().numpy()

    def crps(self, score: Tensor, category: Tensor, model: Tensor, step: Tensor) -> Tensor:
        """Continuous ranked probability score in score points at indices, all of shape (rows,).

        Args:
            score: Scores in points.
            category: Positions of categories.
            model: Positions of models.
            step: Positions of step counts.
        """
        location, scale, *shape = self._at(category, model, step)
        return scale * self.law.crps((score - location) / scale, *shape)

    def sample(self, draws: int, seed: int = 0) -> Tensor:
        """Independent draws in points, shape (draws, C, M, K); no gradient.

        Args:
            draws: Draws of every cell.
            seed: Seed of the draws.
        """
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            location, scale, *shape = self._at()
            uniform = torch.rand((2, draws, *location.shape), generator=generator, dtype=torch.float64).to(location)
            return location + scale * self.law.draw(uniform[0], uniform[1], *shape)

    def row_loss(self, score: Tensor, cells: Sequence[Tensor]) -> Tensor:
        """What is minimised, the negative log-likelihood, shape (rows,).

        Args:
            score: Scores in points, shape (rows,).
            cells: Location, scale and shape of their cells, each of shape (rows,).
        """
        location, scale, *shape = cells
        return scale.log() - self.law.log_density((score - location) / scale, *shape)

    def training_step(self, batch: Any, _: int) -> Tensor:
        """Weighted mean loss of the rows.

        Args:
            batch: Scores, positions of category, model and step count, and weights, each of shape (rows,).
            _: Number of the batch.
        """
        score, category, model, step, weight = batch
        rows = self.row_loss(score, self._at(category, model, step))
        loss = (rows * weight).sum() / weight.sum()
        self.log("loss", loss, prog_bar=True, batch_size=len(score))
        return loss

    def configure_optimizers(self) -> Any:
        """L-BFGS with a line search that meets the strong Wolfe conditions."""
        return torch.optim.LBFGS(
            self.parameters(), self.learning_rate, ITERATIONS, history_size=30, tolerance_change=1e-12,
            tolerance_grad=1e-9, line_search_fn="strong_wolfe",
        )  # fmt: skip

    @torch.no_grad()
    def start_at(self, data: Observations) -> None:
        """Start from the weighted moments of every cell."""
        shape = (len(self.categories), len(self.models), len(self.step_counts))
        flat = (data.category * shape[1] + data.model) * shape[2] + data.step
        size = shape[0] * shape[1] * shape[2]
        count = torch.bincount(flat, data.weight, minlength=size).clamp(min=1e-12)

        def average(values: Tensor) -> Tensor:
            return torch.bincount(flat, data.weight * values, minlength=size) / count

        self.centre.copy_(data.score.mean())
        self.unit.copy_(data.score.std(correction=0).clamp(min=1e-3 * max(1.0, abs(float(self.centre)))))
        z = (data.score - self.centre) / self.unit
        mean = average(z)
        away = z - mean[flat]
        std = average(away.square()).clamp(min=0).sqrt()
        # Scores that do not vary are given a little of the others' variation, or their density has no end.
        varied = std[std > 1e-6]
        std = std.clamp(min=max(1e-3, 0.02 * float(varied.median()) if len(varied) else 0.0))
        skew = (average(away**3) / std**3).reshape(shape)
        mean, std = mean.reshape(shape), std.reshape(shape)
        for m, row in enumerate(self.measured):
            here = mean[:, m][:, row]
            low, high = here[:, 0], here.amax(-1)
            drop = (high - low).clamp(min=0.02)
            self.top[:, m] = low + drop if len(here[0]) > 1 else low + 0.02
            self.log_drop[:, m] = drop.log()
            counts = self.counts[row]
            reached = ((here - low[:, None]) / drop[:, None] >= 0.63).int().argmax(-1)
            self.log_tau[:, m] = (counts[reached] - counts[0]).clamp(min=0.3).log()
        self.log_std.copy_(std.log())
        self._start_offsets(data, shape)
        self._start_shape(std, skew, data)

    def _start_offsets(self, data: Observations, shape: tuple[int, int, int]) -> None:
        """Put the curve through the cell means by weighted least squares; keep shrunken offsets of what it misses."""
        points, covariance = cell_means(data, shape)
        mean, covariance = (points - self.centre) / self.unit, covariance / self.unit.square()
        variance = covariance.diagonal(dim1=-2, dim2=-1)
        seen = self.measured.expand(shape)
        precision = seen / variance.clamp(min=max(1e-6, 0.1 * float(variance[seen].median())))
        precision = precision / precision.sum()
        curve = [self.top, self.log_drop, self.log_tau, self.shape_logit]
        solver = torch.optim.LBFGS(curve, 1.0, 300, history_size=30, tolerance_change=1e-12, tolerance_grad=1e-9,
                                   line_search_fn="strong_wolfe")  # fmt: skip
        beyond = self.counts - self.first[:, None]

        def fitted() -> Tensor:
            p = {name: getattr(self, name)[..., None] for name in ("top", "log_drop", "log_tau", "shape_logit")}
            return (self._curve(p, beyond)[0] - self.centre) / self.unit

        def loss() -> Any:
            solver.zero_grad()
            with torch.enable_grad():
                value = (precision * (fitted() - mean).square()).sum()
                value.backward()
            return value

        solver.step(loss)
        solver.zero_grad()
        offset, error = shrunken_offsets(mean - fitted(), covariance, self.measured)
        self.offset.copy_(offset)
        self.offset_error.copy_(error)

    def _start_shape(self, std: Tensor, skew: Tensor, data: Observations) -> None:
        """Start the parameters around the mean, from deviations in units and skewness of shape (C, M, K)."""
        self.log_scale.copy_(std.log())

    def remarks(self, latency: str) -> tuple[str, ...]:
        """What a reader of a plan has to know of these fits: times off their line, scores that did not settle.

        Args:
            latency: The latency model whose lines are planned with.
        """
        unsettled = () if self.converged else ("The fit of the scores did not settle; raise quality.max_epochs.",)
        return (*latency_remarks(self.latency_fits.get(latency, self.latency_fits["slot"])), *unsettled)

    def scenario(
        self,
        demand: Any,
        latency_weight: float | Tensor,
        *,
        latency: str = "slot",
        share_units: int | None = None,
        memory_gib: Any = None,
        memory_limit_gib: Any = None,
        deadline_s: Any = None,
        differentiable: bool = False,
    ) -> Scenario:
        """The planning problem for a demand: fitted means at exactly the measured step counts, fitted times.

        The scenario carries the names of categories and models in the order of its dimensions.

        Args:
            demand: Requests a slot (a second in queue mode): a mapping of categories, a number for each, or
                a tensor of shape (B, C) or (C,).
            latency_weight: Score points a second.
            latency: ``"slot"`` or ``"queue"``.
            share_units: Passed on to the scenario.
            memory_gib: Passed on.
            memory_limit_gib: Passed on.
            deadline_s: Passed on.
            differentiable: Keep the gradient back to the fitted parameters.

        Raises:
            ScenarioError: If the demand names an unknown category, or a value is out of range.
        """
        mean = self.mean().double().cpu()
        mean = mean if differentiable else mean.detach()
        quality = torch.where(self.measured.cpu(), mean, -torch.inf)
        by_model = self.latency_fits.get(latency, self.latency_fits["slot"])
        fits = [by_model[m] for m in self.models]
        return Scenario(
            demand_of(demand, self.categories),
            quality,
            torch.tensor(self.step_counts),
            torch.tensor([f.step_time_s for f in fits], dtype=torch.float64),
            torch.tensor([f.overhead_s for f in fits], dtype=torch.float64),
            torch.as_tensor(latency_weight, dtype=torch.float64),
            latency=latency,
            share_units=share_units,
            memory_gib=memory_gib,
            memory_limit_gib=memory_limit_gib,
            deadline_s=deadline_s,
            category_names=self.categories,
            model_names=self.models,
        )


def demand_of(demand: Any, categories: Sequence[str]) -> Tensor:
    """Demand by name, as a number for every category, or as a tensor: shape (B, C).

    Args:
        demand: Category → requests, those left out 0; one number; or numbers of shape (C,) or (B, C).
        categories: Category names, C of them.

    Raises:
        ScenarioError: If it names an unknown category.
    """
    if isinstance(demand, Mapping):
        unknown = [c for c in demand if c not in categories]
        if unknown:
            raise ScenarioError(f"demand: category {unknown[0]!r} is not one of {', '.join(categories)}")
        demand = [float(demand.get(c, 0.0)) for c in categories]
    tensor = torch.as_tensor(demand, dtype=torch.float64)
    return tensor.expand(1, len(categories)) if tensor.ndim < 2 else tensor


def bounded(value: Tensor, low: float, high: float) -> Tensor:
    """A free number held between two bounds, smoothly, and nearly itself in the middle.

    Args:
        value: Any shape.
        low: Lower bound.
        high: Upper bound.
    """
    middle, half = (low + high) / 2, (high - low) / 2
    return middle + half * torch.tanh((value - middle) / half)


def _interpolated(at: Tensor, counts: Tensor, values: Tensor) -> Tensor:
    """Values (C, K) at counts (K,), linear in the logarithm of the count and held beyond: (C, points)."""
    if len(counts) == 1:
        return values.expand(-1, len(at))
    x, known = at.clamp(min=1e-9).log().contiguous(), counts.log()
    right = torch.searchsorted(known, x).clamp(1, len(known) - 1)
    part = ((x - known[right - 1]) / (known[right] - known[right - 1])).clamp(0, 1)
    return torch.lerp(values[:, right - 1], values[:, right], part)


def pick(values: Tensor, step: Tensor) -> Tensor:
    """The entry of the last dimension at each step index.

    Args:
        values: Shape (..., K).
        step: Positions in the last dimension, shape (...), int64.
    """
    return values.gather(-1, step[..., None])[..., 0]


def observations(table: ScoreTable, models: tuple[str, ...], categories: tuple[str, ...] | None = None,
                 steps: tuple[int, ...] | None = None) -> Observations:  # fmt: skip
    """The rows of a table as tensors.

    Args:
        table: Rows.
        models: Model names in the order of their indices.
        categories: Category names in that order; None takes the table's.
        steps: Step counts in that order; None takes the table's.

    Raises:
        ScoreTableError: If a row has a category, model or step count that is not among them.
    """
    frame = table.frame
    known: dict[str, tuple[Any, ...]] = {
        "category": table.categories if categories is None else categories,
        "model": models,
        "steps": table.steps if steps is None else steps,
        "prompt_id": tuple(sorted(frame["prompt_id"].unique())),
    }
    index = []
    for column, names in known.items():
        position = {name: i for i, name in enumerate(names)}
        strange = next((v for v in frame[column].unique().tolist() if v not in position), None)
        if strange is not None:
            raise ScoreTableError(f"{column} {strange!r} is not one of {', '.join(map(str, names))}")
        index.append(torch.tensor([position[v] for v in frame[column].tolist()]))
    score = torch.tensor(frame[table.score].to_numpy("float64"))
    rows = frame.groupby(["prompt_id", "model", "steps"])[table.score].transform("size").to_numpy("float64")
    category, model, step, prompt = index
    return Observations(score, category, model, step, prompt, torch.tensor(1 / rows))
