"""How far measured cell means lie off the fitted curve, shrunken by what the noise alone would do."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from edgesched.quality.model import Observations

#: A series of one category and model that is this unlikely under noise alone has a variance of its own.
SIGNIFICANCE = 0.01


def cell_means(data: Observations, shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Weighted means of cells, and their sampling covariance over step counts; the prompt is the unit.

    Args:
        data: Rows, weighted.
        shape: Numbers C, M, K of categories, models and step counts.

    Returns:
        Means (C, M, K) and covariances (C, M, K, K), both 0 where there is no row.
    """
    c, m, k = shape
    prompts = int(data.prompt.max()) + 1
    place = ((data.prompt * c + data.category) * m + data.model) * k + data.step
    size = prompts * c * m * k
    weight = torch.bincount(place, data.weight, minlength=size).view(prompts, c, m, k)
    total = torch.bincount(place, data.weight * data.score, minlength=size).view(prompts, c, m, k)
    whole = weight.sum(0).clamp(min=1e-12)
    mean = total.sum(0) / whole
    influence = (total - weight * mean) / whole
    effective = whole.square() / weight.square().sum(0).clamp(min=1e-12)
    inflation = (effective / (effective - 1).clamp(min=0.5)).sqrt()
    influence = influence * inflation
    return mean, torch.einsum("pcmk,pcml->cmkl", influence, influence)


def shrunken_offsets(residual: Tensor, covariance: Tensor, measured: Tensor) -> tuple[Tensor, Tensor]:
    r"""Offsets of cell means from their curve as a Gaussian random effect, its variance learned (empirical Bayes).

    Within a category and model the residuals less their mean are r ~ N(0, τ² I + A), A the covariance of
    the noise; the offsets are E[d | r] = τ² (τ² I + A)⁻¹ r. τ² is the moment estimate Σ(|r|² − tr A) / Σ(K − 1) of
    the model's categories together, or that of the series alone where that is larger and noise alone explains the
    series at less than 1 in 100.

    Args:
        residual: Cell means less the curve, shape (C, M, K).
        covariance: Sampling covariance of the cell means, shape (C, M, K, K).
        measured: Which (model, step count) pairs were measured, shape (M, K).

    Returns:
        Offsets and their standard errors, each of shape (C, M, K), 0 where nothing was measured.

    Source:
        Morris, Parametric Empirical Bayes Inference, JASA 78 (1983).
    """
    from scipy.stats import chi2

    offset, error = torch.zeros_like(residual), torch.zeros_like(residual)
    for m, here in enumerate(measured):
        count = int(here.sum())
        if count < 2:
            continue
        eye = torch.eye(count, dtype=residual.dtype)
        contrast = eye - 1 / count
        r = residual[:, m][:, here] @ contrast
        noise = contrast @ covariance[:, m][:, here][:, :, here] @ contrast
        excess = (r.square().sum(-1) - noise.diagonal(dim1=-2, dim2=-1).sum(-1)) / (count - 1)
        pooled = excess.mean().clamp(min=0)
        # The level is free in the curve, so that the noise has no variance along it; any does there.
        level = eye.new_full((count, count), 1.0)
        tiny = 1e-12 + 1e-6 * noise.diagonal(dim1=-2, dim2=-1).mean(-1)
        surprise = (r[:, None] @ torch.linalg.solve(noise + level + tiny[:, None, None] * eye, r[..., None])).flatten()
        own = (surprise > chi2.ppf(1 - SIGNIFICANCE, count - 1)) & (excess > pooled)
        variance = torch.where(own, excess, pooled)[:, None, None]
        kept = variance * torch.linalg.inv(variance * eye + noise + 1e-12 * eye)
        offset[:, m, here] = (kept @ r[..., None])[..., 0]
        error[:, m, here] = (kept @ noise).diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    return offset, error
