"""Where the variance of scores lies, and so how much a category label can be worth."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgesched.data.bootstrap import prompt_counts
from edgesched.data.table import ScoreTable
from edgesched.errors import ScoreTableError
from edgesched.evaluation.replay import prompt_scores

SOURCES = ("category", "prompt", "model", "category x model", "prompt x model")


def variance_table(table: ScoreTable, *, draws: int = 1000, seed: int = 0) -> list[dict[str, Any]]:
    """Of the variance of scores, what belongs to category, prompt, model and their interactions.

    Every model is taken at its best step count, seeds are averaged, and the sums of squares of

        score = mean + category + prompt in category + model + category × model + prompt × model

    are split; since every model has every prompt, they do not depend on the order. A category label can help to
    choose a model by its interaction with the model only. Intervals are by bootstrap over prompts within
    categories, jointly across models.

    Args:
        table: Table in which every prompt was given to every model.
        draws: Bootstrap draws.
        seed: Seed of the draws.

    Returns:
        For every source of :data:`SOURCES`: ``share`` of the sum of squares with ``lo`` and ``hi`` (95 %), the share
        ``by_chance`` that noise alone would give it, and ``variance``, the unbiased component in points².

    Raises:
        ScoreTableError: If a prompt lacks a model, or there are fewer than two models.
    """
    models = table.models or ()
    if len(models) < 2:
        raise ScoreTableError(f"variance table: needs at least two models, got {len(models)}")
    rng = np.random.default_rng(seed)
    found = prompt_scores(table, models, table.steps)
    scores = [found[name].nanmean(1) for name in table.draw_order]
    mean = torch.cat(scores).nanmean(0)
    best = mean.nan_to_num(-torch.inf).argmax(-1)
    cells = [values[:, torch.arange(len(models)), best] for values in scores]
    if not all(bool(values.isfinite().all()) for values in cells):
        raise ScoreTableError("variance table: every prompt needs a score under every model at its best step count")
    n, m, c = sum(map(len, cells)), len(models), len(cells)
    square, by_model, by_category, by_prompt = torch.zeros(draws + 1).double(), [], [], torch.zeros(draws + 1).double()
    for values in cells:
        count = len(values)
        drawn = torch.tensor(prompt_counts(rng, count, draws), dtype=torch.float64)
        weight = torch.cat([torch.ones(1, count, dtype=torch.float64), drawn])
        square += (weight @ values.square()).sum(-1)
        by_prompt += m * weight @ values.mean(-1).square()
        by_model.append(weight @ values)
        by_category.append(m * (weight @ values.mean(-1)).square() / count)
    sums = torch.stack(by_model)
    grand = sums.sum((0, -1)).square() / (n * m)
    category_sum = torch.stack(by_category).sum(0)
    model_sum = sums.sum(0).square().sum(-1) / n
    cell_sum = sum(((s.square().sum(-1)) / len(v) for s, v in zip(sums, cells, strict=True)), torch.zeros(()))
    parts = torch.stack([
        category_sum - grand,
        by_prompt - category_sum,
        model_sum - grand,
        cell_sum - category_sum - model_sum + grand,
        square - by_prompt - cell_sum + category_sum,
    ])  # fmt: skip
    return _variance_rows(parts, cells, n, m, c)


def _variance_rows(parts: Tensor, cells: list[Tensor], n: int, m: int, c: int) -> list[dict[str, Any]]:
    """Rows from the sums of squares, shape (sources, 1 + draws), the first column being the table itself."""
    freedom = [c - 1, n - c, m - 1, (c - 1) * (m - 1), (n - c) * (m - 1)]
    squares = [float(ss) / max(df, 1) for ss, df in zip(parts[:, 0], freedom, strict=True)]
    prompt, noise = squares[1], squares[4]
    # Mean number of prompts a category that counts where their sizes differ.
    size = (n - sum(len(v) ** 2 for v in cells) / n) / max(c - 1, 1)
    variance = [
        (squares[0] - prompt) / (size * m), (prompt - noise) / m, (squares[2] - noise) / n,
        (squares[3] - noise) / size if c > 1 else 0.0, noise,
    ]  # fmt: skip
    error = [prompt, noise, noise, noise, noise]
    share = parts / parts.sum(0)
    low, high = share[:, 1:].quantile(torch.tensor([0.025, 0.975], dtype=torch.float64), dim=1)
    total = float(parts[:, 0].sum())
    return [
        {
            "source": name,
            "share": float(share[i, 0]),
            "lo": float(low[i]),
            "hi": float(high[i]),
            "by_chance": freedom[i] * error[i] / total,
            "variance": max(variance[i], 0.0) if freedom[i] else 0.0,
        }
        for i, name in enumerate(SOURCES)
    ]
