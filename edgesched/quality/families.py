"""Score distributions per category, model and step count, fitted by maximum likelihood with Lightning.

Every family is a :class:`QualityModel`: a saturating mean curve with shrunken offsets, and a standard distribution of
:mod:`edgesched.quality.laws` around it. They differ in the law and in their shape parameters only.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import lightning as L  # noqa: N812
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from edgesched.data.table import ScoreTable
from edgesched.errors import ScenarioError, ScoreTableError
from edgesched.quality.latency import fit_latencies
from edgesched.quality.laws import Quantiles, SkewNormal, StudentT
from edgesched.quality.model import Observations, QualityModel, observations

log = logging.getLogger(__name__)

STRENGTHS = (0.0, *(2.0**power for power in range(-2, 11)))


class GaussianQuality(QualityModel):
    """The published family: S ~ N(μ(k), σ(k)²)."""


class StudentTQuality(QualityModel):
    """Student's t: symmetric, with heavier tails; 2.5 < ν < 200, passing from ν_early to ν_late."""

    law = StudentT

    def _add_shape(self, c: int, m: int, k: int) -> None:
        super()._add_shape(c, m, k)
        self.df_early, self.df_late = nn.Parameter(torch.zeros(c, m)), nn.Parameter(torch.zeros(c, m))

    def _spread(self, p: Mapping[str, Tensor], rest: Tensor, step: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        # Uniform in 1/ν, so that the Gaussian end is not infinitely far away.
        inverse = torch.sigmoid(p["df_late"] + rest * (p["df_early"] - p["df_late"]))
        df = 1 / (1 / 200 + (1 / 2.5 - 1 / 200) * inverse)
        return self._scale(p, step), (df,)

    def _start_shape(self, std: Tensor, skew: Tensor, data: Observations) -> None:
        self.df_early.fill_(-0.8)
        self.df_late.fill_(-0.8)
        p = self.gathered(*self._grid()[:2])
        _, (df,) = self._spread(p, torch.ones(()), self._grid()[2])
        self.log_scale.copy_((std / StudentT.moments(df)[1]).log())


class SkewNormalQuality(QualityModel):
    """Azzalini's skew-normal: one tail longer than the other; |δ| < 0.995, passing from δ_early to δ_late."""

    law = SkewNormal

    def _add_shape(self, c: int, m: int, k: int) -> None:
        super()._add_shape(c, m, k)
        self.skew_early, self.skew_late = nn.Parameter(torch.zeros(c, m)), nn.Parameter(torch.zeros(c, m))

    def _spread(self, p: Mapping[str, Tensor], rest: Tensor, step: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        delta = 0.995 * torch.tanh(p["skew_late"] + rest * (p["skew_early"] - p["skew_late"]))
        # The deviation is free, not the scale: its likelihood hardly depends on the shape.
        return self._scale(p, step) / SkewNormal.moments(delta)[1], (delta,)

    def _start_shape(self, std: Tensor, skew: Tensor, data: Observations) -> None:
        # At δ = 0 the likelihood is flat in δ to second order, so the start stays away from it.
        root = (2 * skew.abs().clamp(0.05, 0.9) / (4 - torch.pi)) ** (2 / 3)
        delta = torch.sqrt(torch.pi / 2 * root / (1 + root)) * torch.where(skew < 0, -1.0, 1.0)
        raw = torch.atanh((delta / 0.995).clamp(-0.98, 0.98))
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
    Statistics and Probability Letters 54, 2001), its kink smoothed over a tenth of the table's deviation (Fernandes,
    Guerre and Horta, JBES 39, 2021). The pinball loss averaged over the levels is half the CRPS.
    """

    law = Quantiles
    levels: ClassVar[int] = 16
    smoothing: ClassVar[float] = 0.1
    floor: ClassVar[float] = 2e-3

    def _add_shape(self, c: int, m: int, k: int) -> None:
        self.early = nn.Parameter(torch.zeros(c, m, self.levels - 1))
        self.late = nn.Parameter(torch.zeros(c, m, self.levels - 1))

    def _knots(self, raw: Tensor) -> Tensor:
        knots = nn.functional.pad((self.floor + raw.clamp(max=4.0).exp()).cumsum(-1), (1, 0))
        return knots - Quantiles.mean(knots)[..., None]

    def _spread(self, p: Mapping[str, Tensor], rest: Tensor, step: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        part = rest[..., None]
        knots = part * self._knots(p["early"]) + (1 - part) * self._knots(p["late"])
        return torch.ones_like(rest), (knots,)

    def row_loss(self, score: Tensor, cells: Sequence[Tensor]) -> Tensor:
        """Pinball loss in units, averaged over the levels, shape (rows,).

        Args:
            score: Scores in points, shape (rows,).
            cells: Location and scale of their cells, shape (rows,), and quantiles, shape (rows, J).
        """
        location, scale, knots = cells
        z = ((score - location) / scale)[..., None].expand_as(knots)
        # Σ u e + max(−e, 0) = Σ |e| / 2 + (u − ½) e, and the levels less a half sum to nothing: z drops out.
        away = nn.functional.huber_loss(knots, z, reduction="none", delta=self.smoothing).mean(-1) / self.smoothing
        return away / 2 - knots @ (Quantiles.levels(knots) - 0.5) / self.levels

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
        logger: Lightning logger or False.
        progress: Show a progress bar.
        checkpoint: Folder that keeps the latest state (the loss only falls), to be read by ``load_from_checkpoint`` of
            the family's class; None keeps none.

    Returns:
        The fitted model, on the CPU; ``converged`` says whether the loss levelled off, and a warning if not.

    Raises:
        ScoreTableError: If a category was never run by a model, or the fit diverges.
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
    asked, table = (
        table.categories,
        table.replaced(table.frame, order=tuple(sorted(table.categories))),
    )  # sums are in one order
    latency, single = fit_latencies(table)
    models = tuple(sorted(latency, key=lambda name: (latency[name].step_time_s, name)))
    data = observations(table, models).ordered()
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
    model = kind(table.categories, models, table.steps, measured, latency, single, learning_rate, strength)
    model.start_at(data)
    rows = TensorDataset(data.score, data.category, data.model, data.step, data.weight)
    loader = DataLoader(rows, batch_size=None, sampler=_WholeTable(len(rows)))
    settled = EarlyStopping("loss", min_delta=1e-5, patience=1, check_on_train_epoch_end=True)
    callbacks: list[Any] = [settled]
    name = family if isinstance(family, str) else kind.__name__
    if checkpoint is not None:
        callbacks.append(
            ModelCheckpoint(checkpoint, name, save_on_train_epoch_end=True, enable_version_counter=False)
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
    # Lightning and the loader draw from the global state, though nothing of the fit is random.
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # The folder keeps the latest state: what an earlier fit left there is meant to be replaced.
        warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
        trainer.fit(model, loader)
    model = model.eval().cpu()
    with torch.no_grad():
        lost = (~(model.mean().isfinite() & model.std().isfinite()) & measured).nonzero()
    if len(lost):
        c, m, k = lost[0].tolist()
        raise ScoreTableError(
            f"family {name}: the fit diverged, {table.categories[c]!r} under {models[m]!r} at {table.steps[k]} steps "
            "has no finite mean and deviation; choose another family"
        )
    model.reorder(asked)
    if checkpoint is not None:
        trainer.save_checkpoint(Path(checkpoint) / f"{name}.ckpt")  # in the order asked for, as what is returned
    model.converged = settled.stopped_epoch > 0
    if not model.converged:
        log.warning("family %s: the fit did not converge in %d epochs; raise max_epochs", name, max_epochs)
    return model


class _WholeTable(torch.utils.data.Sampler[Tensor]):
    """One batch an epoch: every row."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Any:
        yield torch.arange(self.rows)
