"""How hard a prompt is for its category, predicted from its text, and categories split by it.

A server that sees the text knows more than the category. A linear map from the text's embedding predicts how far a
prompt scores above or below its category; its predictions cut every category into levels, which the rest of the
chain takes for categories of their own.
"""

from __future__ import annotations

import hashlib
import itertools
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from edgesched.data.bootstrap import prompt_counts
from edgesched.data.table import ScoreTable
from edgesched.errors import ScoreTableError

if TYPE_CHECKING:
    import pandas as pd

LEVELS = {1: ("all",), 2: ("hard", "easy"), 3: ("hard", "middle", "easy")}
_PENALTIES = tuple(10.0**e for e in np.arange(-2, 6.5, 0.5))


@dataclass(frozen=True)
class WordCounts:
    """Hashed counts of the words of a prompt and of pairs of them, with its length; needs no weights.

    Args:
        width: Number of buckets.
        pairs: Count pairs of neighbouring words too.
    """

    width: int = 512
    pairs: bool = False

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Features of prompts, shape (N, width + 1), float32."""
        features = torch.zeros(len(texts), self.width + 1)
        for row, text in enumerate(texts):
            words = re.findall(r"[a-z0-9']+", text.lower())
            tokens = words + [f"{a} {b}" for a, b in itertools.pairwise(words)] * self.pairs
            for token in tokens:
                features[row, zlib.crc32(token.encode()) % self.width] += 1
            features[row, -1] = len(words)
        return features.log1p()


def prompt_offsets(table: ScoreTable) -> pd.DataFrame:
    """How far every prompt scores above its category, in points.

    The scores of a prompt less their category's mean at the same model and step count, averaged over models, step
    counts and seeds.

    Returns:
        Columns ``prompt_id category offset``, one row a prompt.
    """
    frame = table.frame
    over = frame[table.score] - frame.groupby(["category", "model", "steps"])[table.score].transform("mean")
    rows = frame[["prompt_id", "category"]].assign(offset=over)
    return (
        rows.groupby("prompt_id", sort=False)
        .agg(category=("category", "first"), offset=("offset", "mean"))
        .reset_index()
    )


class DifficultyModel(nn.Module):
    """A linear map from a prompt's embedding to its offset within its category, shared by all categories.

    Args:
        categories: Names of the categories.
        centre: Mean embedding of every category, shape (C, D).
        weight: Points for every unit of the embedding, shape (D,).
        penalty: The ridge penalty that it was fitted with, infinite where nothing can be predicted.
    """

    centre: Tensor
    weight: Tensor

    def __init__(self, categories: Sequence[str], centre: Tensor, weight: Tensor, penalty: float) -> None:
        super().__init__()
        self.categories, self.penalty = tuple(categories), penalty
        self.register_buffer("centre", centre)
        self.register_buffer("weight", weight)

    def forward(self, embedding: Tensor, category: Tensor) -> Tensor:
        """Predicted offsets in points, shape (N,).

        Args:
            embedding: Embeddings of N prompts, shape (N, D).
            category: Positions of their categories, shape (N,), int64.
        """
        return (embedding.to(self.weight) - self.centre[category]) @ self.weight


@dataclass(frozen=True)
class DifficultyFit:
    """A fitted model, and what it says of the prompts it was fitted to when they are left out.

    Attributes:
        model: Fitted to all prompts.
        out_of_fold: Prompt → offset predicted by a fit without it, in points.
        explained: Share of the variance within categories that these predictions explain.
    """

    model: DifficultyModel
    out_of_fold: dict[str, float]
    explained: float


def fit_difficulty(table: ScoreTable, embeddings: Mapping[str, Tensor], *, folds: int = 5) -> DifficultyFit:
    """Fit offsets by ridge regression, the penalty by cross-validation over prompts.

    Every penalty is tried by the same folds, those of a hash of the prompt's id; "predict nothing" is one of them.

    Args:
        table: Rows to fit.
        embeddings: Prompt → features, shape (D,).
        folds: Folds.

    Raises:
        ScoreTableError: If a prompt has no embedding, or there are fewer prompts than folds.

    Source:
        Hoerl and Kennard, Technometrics 12 (1970).
    """
    rows = prompt_offsets(table)
    x, category, names = _features(rows, embeddings)
    y = torch.tensor(rows["offset"].to_numpy(float))
    if folds < 2 or len(y) < folds:
        raise ScoreTableError(f"folds: expected 2 to {len(y)} for {len(y)} prompts, got {folds}")
    order = np.argsort([hashlib.sha256(p.encode()).hexdigest() for p in rows["prompt_id"]])
    fold = torch.empty(len(y), dtype=torch.long)
    fold[torch.tensor(order)] = torch.arange(len(y)) % folds
    predicted = torch.zeros(len(_PENALTIES) + 1, len(y), dtype=torch.float64)
    for f in range(folds):
        kept = fold != f
        centre, weights = _ridge(x[kept], y[kept], category[kept], len(names))
        predicted[:-1, ~kept] = ((x[~kept] - centre[category[~kept]]) @ weights).T
    error = (predicted - y).square().mean(-1)
    best = int(error.argmin())
    centre, weights = _ridge(x, y, category, len(names))
    nothing = best == len(_PENALTIES)
    weight = torch.zeros_like(weights[:, 0]) if nothing else weights[:, best]
    model = DifficultyModel(names, centre, weight, float("inf") if nothing else _PENALTIES[best])
    said = dict(zip(rows["prompt_id"].astype(str), predicted[best].tolist(), strict=True))
    return DifficultyFit(model, said, float(1 - error[best] / error[-1]))


def predict_offsets(model: DifficultyModel, table: ScoreTable, embeddings: Mapping[str, Tensor]) -> dict[str, float]:
    """Predicted offset of every prompt of a table, in points.

    Args:
        model: Fitted model.
        table: Rows; their scores are not looked at.
        embeddings: Prompt → features, shape (D,).

    Raises:
        ScoreTableError: If a prompt has no embedding, or its category is unknown to the model.
    """
    rows = prompt_offsets(table)
    unknown = [c for c in rows["category"].unique() if c not in model.categories]
    if unknown:
        raise ScoreTableError(f"category {unknown[0]!r} is not one of {', '.join(model.categories)}")
    x, category, _ = _features(rows, embeddings, model.categories)
    return dict(zip(rows["prompt_id"].astype(str), model(x, category).tolist(), strict=True))


def explained_variance(
    table: ScoreTable, predicted: Mapping[str, float], *, draws: int = 1000, seed: int = 0
) -> dict[str, dict[str, float]]:
    """Share of the variance of offsets within categories that predictions explain, 1 − Σ(y − ŷ)² / Σ(y − ȳ_c)².

    Below zero where predictions are worse than the category's mean. Predictions are compared after removing their
    mean over the category, because only differences within a category can order its prompts.

    Args:
        table: Rows of held-out prompts.
        predicted: Prompt → predicted offset.
        draws: Bootstrap draws over prompts.
        seed: Seed of the draws.

    Returns:
        ``all`` and every category → ``value lo hi``.
    """
    rows = prompt_offsets(table)
    rows["error"] = rows["offset"] - rows["prompt_id"].map(dict(predicted)).astype(float)
    rows["error"] -= rows.groupby("category")["error"].transform("mean")
    rng = np.random.default_rng(seed)
    wrong, whole, result = {}, {}, {}
    for name, mine in rows.groupby("category", sort=False):
        n = len(mine)
        weights = np.vstack([np.ones(n), prompt_counts(rng, n, draws)])
        wrong[str(name)], whole[str(name)] = (weights @ (mine[c].to_numpy() ** 2) for c in ("error", "offset"))
    for name, top, bottom in [("all", sum(wrong.values()), sum(whole.values()))] + [
        (n, wrong[n], whole[n]) for n in wrong
    ]:
        share = 1 - np.asarray(top) / np.maximum(bottom, 1e-12)
        low, high = np.quantile(share[1:], [0.025, 0.975])
        result[name] = {"value": float(share[0]), "lo": float(low), "hi": float(high)}
    return result


def split_by_difficulty(
    fit: ScoreTable,
    held: ScoreTable,
    fit_offsets: Mapping[str, float],
    held_offsets: Mapping[str, float],
    levels: int = 3,
) -> tuple[ScoreTable, ScoreTable, dict[str, list[str]]]:
    """Cut every category into levels of predicted difficulty, at quantiles of the prompts to fit.

    A category whose prompts do not fill every level in both halves with at least two is cut into fewer.

    Args:
        fit: Rows to plan with.
        held: Rows to replay on.
        fit_offsets: Prompt → predicted offset; from fits without the prompt, or levels look wider apart than they are.
        held_offsets: Prompt → predicted offset.
        levels: Levels, 2 or 3.

    Returns:
        Both tables with categories such as ``"Basic, hard"``, and the names of each category's levels.

    Raises:
        ScoreTableError: If ``levels`` is out of range.
    """
    if levels not in LEVELS:
        raise ScoreTableError(f"levels: expected one of {', '.join(map(str, LEVELS))}, got {levels}")
    names: dict[str, list[str]] = {}
    level_of: dict[str, str] = {}
    for category in fit.categories:
        mine = [
            {p: said[p] for p in table.frame.loc[table.frame["category"] == category, "prompt_id"].unique()}
            for table, said in ((fit, fit_offsets), (held, held_offsets))
        ]
        for count in range(levels, 0, -1):
            cuts = np.quantile(list(mine[0].values()), np.arange(1, count) / count)
            placed = [dict(zip(m, np.searchsorted(cuts, list(m.values()), "right"), strict=True)) for m in mine]
            if min(np.bincount(list(p.values()), minlength=count).min() for p in placed) >= 2 or count == 1:
                break
        names[category] = [f"{category}, {level}" if count > 1 else category for level in LEVELS[count]]
        level_of |= {p: names[category][level] for half in placed for p, level in half.items()}
    order = tuple(name for mine in names.values() for name in mine)

    def renamed(table: ScoreTable) -> ScoreTable:
        frame = table.frame.assign(category=table.frame["prompt_id"].map(level_of))
        return table.replaced(frame, order=order)

    return renamed(fit), renamed(held), names


def _features(
    rows: pd.DataFrame, embeddings: Mapping[str, Tensor], categories: Sequence[str] | None = None
) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """Features (N, D) in float64, positions of categories (N,), and their names."""
    missing = [p for p in rows["prompt_id"] if p not in embeddings]
    if missing:
        raise ScoreTableError(
            f"prompt {missing[0]!r} of the table is not among the prompts given ({len(missing)} are missing); "
            "give the prompts that the table was made from"
        )
    names = tuple(categories or dict.fromkeys(rows["category"].astype(str)))
    x = torch.stack([embeddings[p].double().cpu() for p in rows["prompt_id"]])
    return x, torch.tensor([names.index(c) for c in rows["category"]]), names


def _ridge(x: Tensor, y: Tensor, category: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Mean embedding of every category (C, D), and weights for every penalty (D, penalties)."""
    total = torch.zeros(count, x.shape[1], dtype=x.dtype).index_add_(0, category, x)
    size = torch.bincount(category, minlength=count).clamp(min=1)
    centre = total / size[:, None]
    mean = torch.zeros(count, dtype=y.dtype).index_add_(0, category, y) / size
    u, s, vh = torch.linalg.svd(x - centre[category], full_matrices=False)
    penalty = torch.tensor(_PENALTIES, dtype=x.dtype) * float(s.square().mean())
    shrunk = s[:, None] / (s.square()[:, None] + penalty)
    return centre, vh.T @ (shrunk * (u.T @ (y - mean[category]))[:, None])
