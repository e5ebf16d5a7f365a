"""Score distributions per category, model and step count, fitted by maximum likelihood with Lightning.

Every family is a :class:`QualityModel`: a saturating mean curve, and a standard distribution of
:mod:`edgesched.distributions` around it. They differ in the law and in their shape parameters only.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import lightning as L  # noqa: N812
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from edgesched.distributions import Law, Normal, Quantiles, SkewNormal, StudentT
from edgesched.errors import ScenarioError, ScoreTableError
from edgesched.latency import LatencyFit, fit_latency
from edgesched.table import ScoreTable
from edgesched.types import Scenario

log = logging.getLogger(__name__)
STRENGTHS = (0.0, *(2.0**power for power in range(-2, 11)))
_EVALUATIONS = 20


@dataclass(frozen=True)
class Observations:
    """Scores as tensors: score (rows,), and the indices (rows,) of category, model, step count and prompt.

    ``weight`` (rows,) is one over the rows of the same prompt, model and step count: a prompt counts once,
    however many seeds it has.
    """

    score: Tensor
    category: Tensor
    model: Tensor
    step: Tensor
    prompt: Tensor
    weight: Tensor

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
        again = (t.repeat(categories) for t in (self.model, self.step, self.prompt))
        return Observations(self.score.repeat(categories), target, *again, weight)


class QualityModel(L.LightningModule):
    r"""Scores whose mean saturates in the steps; the base class of the families.

    For category c, model m and k steps, with k_0 the model's smallest measured step count,

        S = μ(k) + s(k) · (Z − E Z),   μ(k) = top − drop · r(k),   r(k) = exp(−((k − k_0) / τ)^β),

    drop ≥ 0 and τ > 0, β ∈ (0.3, 1.5), so that the mean grows with the steps and levels off. Z follows the
    family's standard law; its scale s is free for every step count, and its shape passes from an early to a
    late value with r(k). Fitted by maximum weighted likelihood: L-BFGS over all rows at once, from a moment
    start. Parameters are kept in units of the table's deviation, for conditioning.

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
        self.save_hyperparameters()
        self.categories, self.models, self.step_counts = categories, models, steps
        self.latency_fits = {"slot": dict(batch_latency), "queue": dict(single_latency)}
        self.learning_rate, self.strength = learning_rate, strength
        c, m = len(categories), len(models)
        self.register_buffer("measured", measured)
        self.register_buffer("first", torch.tensor([float(steps[int(row.int().argmax())]) for row in measured]))
        self.register_buffer("counts", torch.tensor([float(k) for k in steps]))
        self.register_buffer("centre", torch.zeros(()))
        self.register_buffer("unit", torch.ones(()))
        self.top = nn.Parameter(torch.zeros(c, m))
        self.log_drop = nn.Parameter(torch.zeros(c, m))
        self.log_tau = nn.Parameter(torch.full((c, m), 1.0))
        self.shape_logit = nn.Parameter(torch.zeros(c, m))
        self._add_shape(c, m, len(steps))
        self.double()

    def _add_shape(self, c: int, m: int, k: int) -> None:
        """Make the parameters around the mean, each of shape (C, M) or (C, M, anything)."""
        self.log_scale = nn.Parameter(torch.zeros(c, m, k))

    def _spread(self, p: Mapping[str, Tensor], rest: Tensor, step: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Scale in units and shape of the law, from parameters gathered at rows of shape ``rest``."""
        return _pick(p["log_scale"], step).exp(), ()

    def gathered(self, category: Tensor, model: Tensor) -> dict[str, Tensor]:
        """Every parameter at indices that broadcast, the parameter's own dimensions last."""
        return {name: value[category, model] for name, value in self.named_parameters()}

    def cells(self, p: Mapping[str, Tensor], model: Tensor, step: Tensor) -> tuple[Tensor, ...]:
        """Mean, location, scale and shape in score points, elementwise in gathered parameters and indices."""
        mean, rest = self._curve(p, self.counts[step] - self.first[model])
        scale, shape = self._spread(p, rest, step)
        offset, _ = self.law.moments(*shape)
        return mean, mean - scale * self.unit * offset, scale * self.unit, *shape

    def _curve(self, p: Mapping[str, Tensor], beyond: Tensor) -> tuple[Tensor, Tensor]:
        """Mean in score points, and what is left of the drop."""
        beta = 0.3 + 1.2 * p["shape_logit"].sigmoid()
        relative = (beyond.clamp(min=0) / p["log_tau"].exp()).clamp(min=1e-9)
        rest = torch.exp(-(relative**beta))
        return self.centre + self.unit * (p["top"] - p["log_drop"].exp() * rest), rest

    def _grid(self) -> tuple[Tensor, Tensor, Tensor]:
        c, m, k = (torch.arange(len(names)) for names in (self.categories, self.models, self.step_counts))
        c, m, k = (index.to(self.top.device) for index in (c, m, k))
        return torch.broadcast_tensors(c[:, None, None], m[:, None], k)

    def _at(self, index: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        """Location, scale and shape of every cell, or at indices of category, model and step count."""
        c, m, k = self._grid()
        every = self.cells(self.gathered(c, m), m, k)[1:]
        if all(i is None for i in index):
            return every
        m_count, k_count = c.shape[1:]
        flat = (index[0] * m_count + index[1]) * k_count + index[2]
        # index_select has a much faster gradient than advanced indexing.
        return tuple(v.flatten(0, 2).index_select(0, flat.flatten()).reshape(*flat.shape, *v.shape[3:]) for v in every)

    def mean(self, steps: Tensor | None = None) -> Tensor:
        """Mean scores, shape (C, M, K), at the measured step counts or at others, shape (K,)."""
        counts = self.counts if steps is None else steps.to(self.counts)
        p = {name: value[..., None] for name, value in self.named_parameters() if value.ndim == 2}
        return self._curve(p, counts - self.first[:, None])[0]

    def std(self) -> Tensor:
        """Standard deviations at the measured step counts, shape (C, M, K)."""
        _, scale, *shape = self._at((None, None, None))
        return scale * self.law.moments(*shape)[1]

    def cdf(
        self, score: Tensor, category: Tensor | None = None, model: Tensor | None = None, step: Tensor | None = None
    ) -> Tensor:
        """P(S ≤ score), for a score that broadcasts to (C, M, K), or at indices that broadcast with the score."""
        location, scale, *shape = self._at((category, model, step))
        return self.law.cdf((score - location) / scale, *shape)

    def quantile(
        self, level: Tensor, category: Tensor | None = None, model: Tensor | None = None, step: Tensor | None = None
    ) -> Tensor:
        """Score below which a share ``level`` ∈ (0, 1) falls; shapes as in :meth:`cdf`."""
        location, scale, *shape = self._at((category, model, step))
        return location + scale * self.law.quantile(level.to(scale), *shape)

    def log_density(self, score: Tensor, category: Tensor, model: Tensor, step: Tensor) -> Tensor:
        """Log density of scores at indices, all of shape (rows,)."""
        location, scale, *shape = self._at((category, model, step))
        return self.law.log_density((score - location) / scale, *shape) - scale.log()

    def crps(self, score: Tensor, category: Tensor, model: Tensor, step: Tensor) -> Tensor:
        """Continuous ranked probability score in score points at indices, all of shape (rows,)."""
        location, scale, *shape = self._at((category, model, step))
        return scale * self.law.crps((score - location) / scale, *shape)

    def sample(self, draws: int, seed: int = 0) -> Tensor:
        """Independent draws, shape (draws, C, M, K)."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            location, scale, *shape = self._at((None, None, None))
            uniform = torch.rand((2, draws, *location.shape), generator=generator, dtype=torch.float64).to(location)
            return location + scale * self.law.draw(uniform[0], uniform[1], *shape)

    def row_loss(self, score: Tensor, cells: Sequence[Tensor]) -> Tensor:
        """What is minimised, for rows at their location, scale and shape: the negative log-likelihood."""
        location, scale, *shape = cells
        return scale.log() - self.law.log_density((score - location) / scale, *shape)

    def training_step(self, batch: Any, _: int) -> Tensor:
        """Weighted mean loss of the rows."""
        score, category, model, step, weight = batch
        rows = self.row_loss(score, self._at((category, model, step)))
        loss = (rows * weight).sum() / weight.sum()
        self.log("loss", loss, prog_bar=True, batch_size=len(score))
        return loss

    def configure_optimizers(self) -> Any:
        """L-BFGS with a line search that meets the strong Wolfe conditions."""
        return torch.optim.LBFGS(
            self.parameters(), self.learning_rate, _EVALUATIONS, history_size=30, tolerance_change=1e-12,
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
        self.unit.copy_(data.score.std(correction=0).clamp(min=1e-3))
        z = (data.score - self.centre) / self.unit
        mean = average(z)
        away = z - mean[flat]
        std = average(away.square()).clamp(min=1e-6).sqrt()
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
        self._start_shape(std, skew, data)

    def _start_shape(self, std: Tensor, skew: Tensor, data: Observations) -> None:
        """Start the parameters around the mean, from deviations in units and skewness of shape (C, M, K)."""
        self.log_scale.copy_(std.log())

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
        if isinstance(demand, Mapping):
            unknown = [c for c in demand if c not in self.categories]
            if unknown:
                raise ScenarioError(f"demand: category {unknown[0]!r} is not one of {', '.join(self.categories)}")
            demand = [float(demand.get(c, 0.0)) for c in self.categories]
        tensor = torch.as_tensor(demand, dtype=torch.float64)
        tensor = tensor.expand(1, len(self.categories)) if tensor.ndim < 2 else tensor
        mean = self.mean().double().cpu()
        mean = mean if differentiable else mean.detach()
        quality = torch.where(self.measured.cpu(), mean, -torch.inf)
        by_model = self.latency_fits.get(latency, self.latency_fits["slot"])
        fits = [by_model[m] for m in self.models]
        return Scenario(
            tensor,
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
        )


def _pick(values: Tensor, step: Tensor) -> Tensor:
    """The entry of the last dimension at each step index."""
    return values.gather(-1, step[..., None])[..., 0]


class GaussianQuality(QualityModel):
    """The published family: S ~ N(μ(k), σ(k)²)."""


class StudentTQuality(QualityModel):
    """Student's t: symmetric, with heavier tails; 2.05 < ν < 200, passing from ν_early to ν_late."""

    law = StudentT

    def _add_shape(self, c: int, m: int, k: int) -> None:
        super()._add_shape(c, m, k)
        self.df_early, self.df_late = nn.Parameter(torch.zeros(c, m)), nn.Parameter(torch.zeros(c, m))

    def _spread(self, p: Mapping[str, Tensor], rest: Tensor, step: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        # Uniform in 1/ν, so that the Gaussian end is not infinitely far away.
        inverse = torch.sigmoid(p["df_late"] + rest * (p["df_early"] - p["df_late"]))
        df = 1 / (1 / 200 + (1 / 2.05 - 1 / 200) * inverse)
        return _pick(p["log_scale"], step).exp(), (df,)

    def _start_shape(self, std: Tensor, skew: Tensor, data: Observations) -> None:
        self.df_early.fill_(-0.8)
        self.df_late.fill_(-0.8)
        p = self.gathered(*self._grid()[:2])
        _, (df,) = self._spread(p, torch.ones(()), self._grid()[2])
        self.log_scale.copy_((std / StudentT.moments(df)[1]).log())


class SkewNormalQuality(QualityModel):
    """Azzalini's skew-normal: one tail longer than the other; |δ| < 0.999, passing from δ_early to δ_late."""

    law = SkewNormal

    def _add_shape(self, c: int, m: int, k: int) -> None:
        super()._add_shape(c, m, k)
        self.skew_early, self.skew_late = nn.Parameter(torch.zeros(c, m)), nn.Parameter(torch.zeros(c, m))

    def _spread(self, p: Mapping[str, Tensor], rest: Tensor, step: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        delta = 0.999 * torch.tanh(p["skew_late"] + rest * (p["skew_early"] - p["skew_late"]))
        # The deviation is free, not the scale: its likelihood hardly depends on the shape.
        return _pick(p["log_scale"], step).exp() / SkewNormal.moments(delta)[1], (delta,)

    def _start_shape(self, std: Tensor, skew: Tensor, data: Observations) -> None:
        # At δ = 0 the likelihood is flat in δ to second order, so the start stays away from it.
        root = (2 * skew.abs().clamp(0.05, 0.9) / (4 - torch.pi)) ** (2 / 3)
        delta = torch.sqrt(torch.pi / 2 * root / (1 + root)) * torch.where(skew < 0, -1.0, 1.0)
        raw = torch.atanh((delta / 0.999).clamp(-0.98, 0.98))
        first, last = self.measured.int().argmax(-1), _last(self.measured)
        for m in range(len(self.models)):
            self.skew_early[:, m], self.skew_late[:, m] = raw[:, m, first[m]], raw[:, m, last[m]]
        self.log_scale.copy_(std.log())


class QuantilesQuality(QualityModel):
    """Empirical quantiles: the whole quantile function passes from an early to a late one with r(k).

        Q(u, k) = μ(k) + r(k) · E(u) + (1 − r(k)) · L(u),   E and L increasing, each with mean 0,

    so that it is smooth in the steps, never crosses, and can be read at any step count. Free quantiles have
    an unbounded likelihood as a density; each level is fitted by the asymmetric Laplace likelihood instead,
    whose negative logarithm is the pinball loss and whose maximum is the empirical quantile (Yu and Moyeed,
    Statistics and Probability Letters 54, 2001), its kink smoothed over 2 % of the table's deviation (Fernandes,
    Guerre and Horta, JBES 39, 2021). The pinball loss averaged over the levels is half the CRPS.
    """

    law = Quantiles
    levels: ClassVar[int] = 24
    smoothing: ClassVar[float] = 0.02
    floor: ClassVar[float] = 2e-3

    def _add_shape(self, c: int, m: int, k: int) -> None:
        self.early = nn.Parameter(torch.zeros(c, m, self.levels - 1))
        self.late = nn.Parameter(torch.zeros(c, m, self.levels - 1))

    def _knots(self, raw: Tensor) -> Tensor:
        knots = nn.functional.pad((self.floor + raw.exp()).cumsum(-1), (1, 0))
        return knots - Quantiles.mean(knots)[..., None]

    def _spread(self, p: Mapping[str, Tensor], rest: Tensor, step: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        part = rest[..., None]
        knots = part * self._knots(p["early"]) + (1 - part) * self._knots(p["late"])
        return torch.ones_like(rest), (knots,)

    def row_loss(self, score: Tensor, cells: Sequence[Tensor]) -> Tensor:
        """Pinball loss in units, averaged over the levels."""
        location, scale, knots = cells
        error = ((score - location) / scale)[..., None] - knots
        h = self.smoothing
        short = (h - error).clamp(0, 2 * h).square() / (4 * h) - (error + h).clamp(max=0)
        return (Quantiles.levels(knots) * error + short).mean(-1)

    def _start_shape(self, std: Tensor, skew: Tensor, data: Observations) -> None:
        levels = Quantiles.levels(torch.zeros(self.levels, dtype=torch.float64))
        for raw, steps in ((self.early, self.measured.int().argmax(-1)), (self.late, _last(self.measured))):
            for c in range(raw.shape[0]):
                for m in range(raw.shape[1]):
                    mine = (data.category == c) & (data.model == m) & (data.step == steps[m])
                    knots = _weighted_quantiles(data.score[mine], data.weight[mine], levels) / self.unit
                    raw[c, m] = (knots.diff() - self.floor).clamp(min=self.floor).log()


def _last(measured: Tensor) -> Tensor:
    """Index of the last measured step count of each model."""
    return measured.shape[1] - 1 - measured.flip(-1).int().argmax(-1)


def _weighted_quantiles(values: Tensor, weight: Tensor, levels: Tensor) -> Tensor:
    """Quantiles of weighted values, linear between the middles of their weights."""
    order = values.argsort()
    values, weight = values[order], weight[order]
    middle = (weight.cumsum(0) - weight / 2) / weight.sum()
    at = torch.searchsorted(middle, levels).clamp(1, max(len(values) - 1, 1))
    if len(values) == 1:
        return values.expand(len(levels))
    part = ((levels - middle[at - 1]) / (middle[at] - middle[at - 1])).clamp(0, 1)
    return torch.lerp(values[at - 1], values[at], part)


FAMILIES: dict[str, type[QualityModel]] = {
    "gaussian": GaussianQuality,
    "student_t": StudentTQuality,
    "skew_normal": SkewNormalQuality,
    "quantiles": QuantilesQuality,
}


def observations(table: ScoreTable, models: tuple[str, ...], categories: tuple[str, ...] | None = None,
                 steps: tuple[int, ...] | None = None) -> Observations:  # fmt: skip
    """The rows of a table as tensors, indices by these models, and the table's own categories and step counts
    unless others are given.

    Raises:
        ScoreTableError: If a row has a category, model or step count that is not among them.
    """
    frame = table.frame
    known: dict[str, tuple[Any, ...]] = {
        "category": table.categories if categories is None else categories,
        "model": models,
        "steps": table.steps if steps is None else steps,
        "prompt_id": tuple(dict.fromkeys(frame["prompt_id"])),
    }
    index = []
    for column, names in known.items():
        position = {name: i for i, name in enumerate(names)}
        strange = next((v for v in frame[column].unique() if v not in position), None)
        if strange is not None:
            raise ScoreTableError(f"{column} {strange!r} is not one of {', '.join(map(str, names))}")
        index.append(torch.tensor([position[v] for v in frame[column].tolist()]))
    score = torch.tensor(frame[table.score].to_numpy("float64"))
    rows = frame.groupby(["prompt_id", "model", "steps"])[table.score].transform("size").to_numpy("float64")
    return Observations(score, *index, torch.tensor(1 / rows))


@torch.no_grad()
def shared_strength(data: Observations, points: int = 96) -> float:
    """How far to shrink every category towards its model, by leave-one-prompt-out cross-validation.

    The distribution of a category with n prompts is (n F_c + a F) / (n + a), F being that of all categories
    under the same model and step count. The strength a, in prompts, is the one of :data:`STRENGTHS` with the
    least CRPS of every prompt's scores under the empirical distributions of all *other* prompts; no family
    is assumed, so it is the same for all.

    Args:
        data: Rows to fit.
        points: Score points at which the distributions are compared.

    Returns:
        Strength in prompts; 0 where there is one category.
    """
    categories, models, steps, prompts = (
        int(index.max()) + 1 for index in (data.category, data.model, data.step, data.prompt)
    )
    if categories == 1:
        return 0.0
    low, high = float(data.score.min()), float(data.score.max())
    grid = torch.linspace(low, high, points, dtype=data.score.dtype)
    risk = torch.zeros(len(STRENGTHS), dtype=torch.float64)
    strength = torch.tensor(STRENGTHS, dtype=torch.float64)[:, None, None]
    for m in range(models):
        for k in range(steps):
            mine = (data.model == m) & (data.step == k)
            if not bool(mine.any()):
                continue
            weight, prompt, category = data.weight[mine], data.prompt[mine], data.category[mine]
            below = (data.score[mine][:, None] <= grid).double()
            share = torch.zeros(prompts, points, dtype=torch.float64).index_add_(0, prompt, weight[:, None] * below)
            present = torch.zeros(prompts, dtype=torch.float64).index_add_(0, prompt, weight)
            home = torch.zeros(prompts, dtype=torch.long).index_copy_(0, prompt, category)
            total = torch.zeros(categories, points, dtype=torch.float64).index_add_(0, home, share)
            count = torch.zeros(categories, dtype=torch.float64).index_add_(0, home, present)
            here = present > 0
            share, home = share[here], home[here]
            own, own_count = total[home] - share, (count[home] - 1)[:, None]
            pool, pool_count = total.sum(0) - share, float(count.sum()) - 1
            if pool_count < 1:
                continue
            mixed = (own + strength * pool / pool_count) / (own_count + strength).clamp(min=1e-9)
            # E over the prompt's rows of (F − 1[y ≤ x])² is F² − 2 F share + share.
            risk += (mixed.square() - 2 * mixed * share + share).sum((-1, -2))
    return float(STRENGTHS[int(risk.argmin())])


def fit_quality(
    table: ScoreTable,
    *,
    family: str | type[QualityModel] = "gaussian",
    strength: float | None = None,
    max_epochs: int = 300,
    learning_rate: float = 1.0,
    seed: int = 0,
    logger: Any = False,
    progress: bool = False,
    checkpoint: Path | str | None = None,
) -> QualityModel:
    """Fit score distributions and times to a table, models ordered from cheap to dear.

    Args:
        table: Rows to fit, usually the fit half.
        family: ``"gaussian"``, ``"student_t"``, ``"skew_normal"``, ``"quantiles"``, or a subclass of
            :class:`QualityModel`.
        strength: Prompts of all categories that every category is given besides its own; None finds it by
            cross-validation (:func:`shared_strength`), 0 is plain maximum likelihood.
        max_epochs: Most epochs, each of up to 20 iterations of L-BFGS over the table.
        learning_rate: First step size of L-BFGS.
        seed: Seed of the optimiser.
        logger: Lightning logger or False.
        progress: Show a progress bar.
        checkpoint: Folder that keeps the best state, to be read by ``load_from_checkpoint`` of the family's
            class; None keeps none.

    Returns:
        The fitted model, on the CPU.

    Raises:
        ScoreTableError: If a category was never run by a model.
        ScenarioError: If the family is unknown or the strength negative.

    Example:
        >>> fit_quality(ScoreTable.load(), family="quantiles", max_epochs=1).mean().shape
        torch.Size([4, 3, 8])
    """
    kind = FAMILIES.get(family) if isinstance(family, str) else family
    if kind is None:
        raise ScenarioError(f"family: {family!r} is not one of {', '.join(FAMILIES)}")
    if strength is not None and not 0 <= strength < float("inf"):
        raise ScenarioError(f"strength: expected at least 0 prompts, got {strength}")
    latency = fit_latency(table)
    models = tuple(sorted(latency, key=lambda name: latency[name].step_time_s))
    data = observations(table, models)
    shape = (len(table.categories), len(models), len(table.steps))
    seen = torch.zeros(shape, dtype=torch.bool)
    seen[data.category, data.model, data.step] = True
    measured = seen.any(0)
    holes = (~seen & measured).nonzero()
    if len(holes):
        c, m, k = holes[0].tolist()
        raise ScoreTableError(
            f"category {table.categories[c]!r} has no score of {models[m]!r} at {table.steps[k]} steps, other categories do"
        )
    strength = shared_strength(data) if strength is None else float(strength)
    data = data.shrunk(strength)
    generator_state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    model = kind(
        table.categories, models, table.steps, measured, latency, fit_latency(table, False), learning_rate, strength
    )
    model.start_at(data)
    rows = TensorDataset(data.score, data.category, data.model, data.step, data.weight)
    loader = DataLoader(rows, batch_size=None, sampler=_WholeTable(len(rows)))
    callbacks: list[Any] = [EarlyStopping("loss", min_delta=1e-5, patience=1, check_on_train_epoch_end=True)]
    if checkpoint is not None:
        name = family if isinstance(family, str) else kind.__name__
        callbacks.append(
            ModelCheckpoint(checkpoint, name, monitor="loss", save_on_train_epoch_end=True,
                            enable_version_counter=False)
        )  # fmt: skip
    trainer = L.Trainer(
        max_epochs=max_epochs,
        accelerator="cuda" if torch.cuda.is_available() else "cpu",
        devices=1,
        logger=logger,
        enable_checkpointing=checkpoint is not None,
        enable_progress_bar=progress,
        enable_model_summary=False,
        callbacks=callbacks,
        log_every_n_steps=1,
    )
    trainer.fit(model, loader)
    torch.random.set_rng_state(generator_state)
    return model.eval().cpu()


class _WholeTable(torch.utils.data.Sampler[Tensor]):
    """One batch an epoch: every row."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Any:
        yield torch.arange(self.rows)
