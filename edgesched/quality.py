"""Score distributions per category, model and step count, fitted by maximum likelihood with Lightning."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import lightning as L  # noqa: N812
import torch
from lightning.pytorch.callbacks import EarlyStopping
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from edgesched.errors import ScenarioError, ScoreTableError
from edgesched.latency import LatencyFit, fit_latency
from edgesched.table import ScoreTable
from edgesched.types import Scenario

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Observations:
    """Scores as tensors: score (rows,), and the indices (rows,) of category, model and step count."""

    score: Tensor
    category: Tensor
    model: Tensor
    step: Tensor


class QualityModel(L.LightningModule):
    r"""Gaussian scores whose mean saturates in the steps.

    For category c, model m and k steps, with k_0 the smallest measured step count,

        S ~ N(μ(k), σ(k)²),   μ(k) = top − drop · exp(−((k − k_0) / τ)^β),

    drop ≥ 0 and τ > 0, β ∈ (0.3, 1.5), so that the mean grows with the steps and levels off; σ is free for
    every step count. Fitted by maximum likelihood: the joint likelihood of all rows is minimised by Adam
    from a least-squares start.

    Args:
        categories: Category names, C of them.
        models: Model names, M of them, from cheap to dear.
        steps: Measured step counts, K of them, increasing.
        measured: Which (model, step count) pairs were measured, shape (M, K), bool.
        batch_latency: Fitted times by model of whole batches, for slots.
        single_latency: Fitted times by model of single images, for queues.
        learning_rate: Step size of Adam.
    """

    def __init__(
        self,
        categories: tuple[str, ...],
        models: tuple[str, ...],
        steps: tuple[int, ...],
        measured: Tensor,
        batch_latency: Mapping[str, LatencyFit],
        single_latency: Mapping[str, LatencyFit],
        learning_rate: float = 0.03,
    ) -> None:
        super().__init__()
        self.categories, self.models, self.step_counts = categories, models, steps
        self.latency_fits = {"slot": dict(batch_latency), "queue": dict(single_latency)}
        self.learning_rate = learning_rate
        c, m, k = len(categories), len(models), len(steps)
        self.register_buffer("measured", measured)
        self.register_buffer("first", torch.tensor([float(steps[int(row.int().argmax())]) for row in measured]))
        self.top = nn.Parameter(torch.zeros(c, m))
        self.log_drop = nn.Parameter(torch.zeros(c, m))
        self.log_tau = nn.Parameter(torch.full((c, m), 1.0))
        self.shape_logit = nn.Parameter(torch.zeros(c, m))
        self.log_std = nn.Parameter(torch.zeros(c, m, k))

    def mean(self, steps: Tensor | None = None) -> Tensor:
        """Mean scores, shape (C, M, K), at the measured step counts or at others, shape (K,)."""
        counts = torch.tensor(self.step_counts) if steps is None else steps
        beyond = (counts.to(self.top) - self.first[:, None]).clamp(min=0)
        beta = 0.3 + 1.2 * self.shape_logit.sigmoid()
        relative = (beyond / self.log_tau.exp()[..., None]).clamp(min=1e-9)
        return self.top[..., None] - self.log_drop.exp()[..., None] * torch.exp(-(relative ** beta[..., None]))

    def std(self) -> Tensor:
        """Standard deviations at the measured step counts, shape (C, M, K)."""
        return self.log_std.exp()

    def cdf(self, score: Tensor) -> Tensor:
        """P(S ≤ score), shape (C, M, K) for a score that broadcasts to it."""
        return torch.special.ndtr((score - self.mean()) / self.std())

    def log_density(self, score: Tensor, category: Tensor, model: Tensor, step: Tensor) -> Tensor:
        """Log density of scores at indices, all of shape (rows,)."""
        mean, std = self.mean()[category, model, step], self.std()[category, model, step]
        return torch.distributions.Normal(mean, std).log_prob(score)

    def sample(self, draws: int, seed: int = 0) -> Tensor:
        """Independent draws, shape (draws, C, M, K)."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            noise = torch.randn((draws, *self.log_std.shape), generator=generator).to(self.top)
            return self.mean() + self.std() * noise

    def training_step(self, batch: Any, _: int) -> Tensor:
        """Mean negative log-likelihood of the rows."""
        score, category, model, step = batch
        loss = -self.log_density(score, category, model, step).mean()
        self.log("nll", loss, prog_bar=True, batch_size=len(score))
        return loss

    def configure_optimizers(self) -> Any:
        """Adam, its step size falling to a hundredth along a cosine."""
        optimizer = torch.optim.Adam(self.parameters(), lr=self.learning_rate)
        epochs = self.trainer.max_epochs or 1
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs, self.learning_rate / 100)
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    @torch.no_grad()
    def start_at(self, data: Observations) -> None:
        """Start from the measured means and deviations of every cell."""
        shape = self.log_std.shape
        flat = (data.category * shape[1] + data.model) * shape[2] + data.step
        size = int(torch.tensor(shape).prod())
        count = torch.bincount(flat, minlength=size).clamp(min=1)
        total = torch.bincount(flat, data.score, minlength=size)
        square = torch.bincount(flat, data.score.square(), minlength=size)
        mean = (total / count).reshape(shape)
        std = (square / count - (total / count).square()).clamp(min=1e-4).sqrt().reshape(shape)
        self.log_std.copy_(std.log())
        for m, row in enumerate(self.measured):
            here = mean[:, m][:, row]
            low, high = here[:, 0], here.amax(-1)
            self.top[:, m] = high
            self.log_drop[:, m] = (high - low).clamp(min=0.05).log()
            counts = torch.tensor(self.step_counts, dtype=high.dtype)[row]
            reached = ((here - low[:, None]) / (high - low).clamp(min=0.05)[:, None] >= 0.63).int().argmax(-1)
            self.log_tau[:, m] = (counts[reached] - counts[0]).clamp(min=0.3).log()

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


def observations(table: ScoreTable, models: tuple[str, ...]) -> Observations:
    """The rows of a table as tensors, indices by the table's categories, these models and its step counts."""
    frame = table.frame

    def place(column: str, names: tuple[Any, ...]) -> Tensor:
        position = {name: i for i, name in enumerate(names)}
        return torch.tensor([position[v] for v in frame[column].tolist()])

    score = torch.tensor(frame[table.score].to_numpy("float32"))
    return Observations(score, place("category", table.categories), place("model", models), place("steps", table.steps))


def fit_quality(
    table: ScoreTable,
    *,
    max_epochs: int = 300,
    learning_rate: float = 0.03,
    seed: int = 0,
    logger: Any = False,
    progress: bool = False,
) -> QualityModel:
    """Fit score distributions and times to a table, models ordered from cheap to dear.

    Args:
        table: Rows to fit, usually the fit half.
        max_epochs: Most passes over the table.
        learning_rate: Step size of Adam.
        seed: Seed of the optimiser.
        logger: Lightning logger or False.
        progress: Show a progress bar.

    Returns:
        The fitted model, on the CPU.

    Raises:
        ScoreTableError: If a category was never run by a model.
    """
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
    generator_state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    model = QualityModel(
        table.categories, models, table.steps, measured, latency, fit_latency(table, False), learning_rate
    )
    model.start_at(data)
    rows = TensorDataset(data.score, data.category, data.model, data.step)
    loader = DataLoader(rows, batch_size=None, sampler=_WholeTable(len(rows)))
    trainer = L.Trainer(
        max_epochs=max_epochs,
        accelerator="auto",
        devices=1,
        logger=logger,
        enable_checkpointing=False,
        enable_progress_bar=progress,
        enable_model_summary=False,
        callbacks=[EarlyStopping("nll", min_delta=1e-5, patience=25, check_on_train_epoch_end=True)],
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
