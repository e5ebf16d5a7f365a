"""Decisions that hold when the estimate is wrong: bootstrap draws of the quality table, and plans made on them.

Prompts are resampled within their category and jointly across models and step counts, because the scores of one
prompt under different models are correlated: what all models share cancels in a comparison, and independent draws
would overstate how unsure it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgesched.data.bootstrap import prompt_counts
from edgesched.data.table import ScoreTable
from edgesched.equations.utility import evaluate
from edgesched.errors import ScenarioError, ScoreTableError
from edgesched.evaluation.replay import matched, prompt_scores
from edgesched.search.solve import solve
from edgesched.types import Plan, Scenario, SearchResult

RULES = ("mean", "lower_bound", "safest")
Search = Callable[[Scenario], SearchResult]


def prompt_means(
    table: ScoreTable,
    models: Sequence[str],
    steps: Sequence[int] | Tensor,
    categories: Sequence[str] | None = None,
) -> list[Tensor]:
    """Mean over seeds of every prompt, a tensor of shape (prompts, M, K) for each category, NaN where unmeasured.

    Categories come in the order given, or in the table's.

    Args:
        table: Score table.
        models: Model names, M of them.
        steps: Step counts, K of them.
        categories: Categories and their order; None takes the table's.
    """
    scores = prompt_scores(table, models, steps)
    return [scores[name].nanmean(1) for name in (categories or scores)]


def resampled_quality(prompts: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """Mean scores under weights of the prompts, −inf where nothing was measured.

    Args:
        prompts: For each category the scores, shape (..., P, M, K).
        weights: For each category the weights, shape (..., D, P).

    Returns:
        Shape (..., D, C, M, K).

    Raises:
        ScoreTableError: If an option was measured for some prompts only.
    """
    means = []
    for scores, weight in zip(prompts, weights, strict=True):
        known = scores.isfinite()
        if bool((known.any(-3) != known.all(-3)).any()):
            raise ScoreTableError("bootstrap: an option was measured for some prompts only; measure it for all or none")
        flat = weight @ scores.nan_to_num(0.0).flatten(-2) / weight.sum(-1, keepdim=True)
        mean = flat.unflatten(-1, scores.shape[-2:])
        means.append(mean.masked_fill(~known.all(-3).unsqueeze(-3), -torch.inf))
    return torch.stack(means, -3)


def bootstrap_quality(
    table: ScoreTable,
    models: Sequence[str],
    steps: Sequence[int] | Tensor,
    *,
    draws: int = 200,
    seed: int = 0,
    categories: Sequence[str] | None = None,
) -> Tensor:
    """Bootstrap draws of the mean scores, prompts resampled within categories, jointly across models and steps.

    Args:
        table: Rows to plan with.
        models: Model names, M of them.
        steps: Step counts, K of them.
        draws: Draws D.
        seed: Seed of the draws.
        categories: Their order, or None for the table's.

    Returns:
        Shape (D, C, M, K), −inf where a model was not measured.

    Raises:
        ScoreTableError: If an option was measured for some prompts of a category only.

    Source:
        Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 8.
    """
    rng = np.random.default_rng(seed)
    names = tuple(categories or table.categories)
    prompts = prompt_means(table, models, steps, names)
    size = dict(zip(names, map(len, prompts), strict=True))
    drawn = {name: torch.tensor(prompt_counts(rng, size[name], draws).astype(float)) for name in table.draw_order}
    return resampled_quality(prompts, [drawn[name] for name in names])


def lower_quality(quality: Tensor, draws: Tensor, level: float) -> Tensor:
    """Lower confidence bound of qualities: their estimate, moved by what the draws' quantile is below their mean.

    Args:
        quality: Estimate, shape (..., C, M, K).
        draws: Bootstrap draws, shape (D, ..., C, M, K).
        level: Level of the quantile in (0, 1); 0.5 hardly moves it.

    Returns:
        Shape of ``quality``; −inf where that is −inf.
    """
    finite = draws.nan_to_num(neginf=0.0)
    shift = finite.quantile(level, dim=0) - finite.mean(0)
    return quality + shift


@dataclass(frozen=True)
class Mean:
    """Plan on the estimate itself."""

    def __call__(self, scenario: Scenario, table: ScoreTable, models: Sequence[str]) -> Scenario:
        """The scenario as it is.

        Args:
            scenario: The scenario.
            table: Not looked at.
            models: Not looked at.
        """
        return scenario


@dataclass(frozen=True)
class LowerBound:
    """Plan on a lower confidence bound of every quality.

    Args:
        level: Level of the bound.
        draws: Bootstrap draws.
        seed: Seed of the draws.

    Raises:
        ScenarioError: If the level is not between 0 and 1, or there are fewer than 2 draws.
    """

    level: float = 0.1
    draws: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.level < 1:
            raise ScenarioError(f"level: expected a number between 0 and 1, got {self.level}")
        if self.draws < 2:
            raise ScenarioError(f"draws: expected at least 2, got {self.draws}")

    def __call__(self, scenario: Scenario, table: ScoreTable, models: Sequence[str]) -> Scenario:
        """The scenario with lower qualities.

        Args:
            scenario: Batch of B scenarios.
            table: Scores that are drawn from.
            models: Model names in the scenario's order.

        Raises:
            ScoreTableError: If the table does not fit the scenario.
        """
        draws = bootstrap_quality(
            table, models, scenario.steps, draws=self.draws, seed=self.seed, categories=matched(scenario, table, models)
        )
        return dataclasses.replace(
            scenario, quality=lower_quality(scenario.quality, draws.to(scenario.quality), self.level)
        )


def safest(scenario: Scenario, draws: Tensor, plans: Sequence[Plan], level: float) -> Plan:
    """Of several plans for each scenario, the one whose utility over the draws has the highest lower quantile.

    A lower bound on each quality by itself ignores that the errors of two models move together; this bound is on the
    utility of a whole plan.

    Args:
        scenario: Batch of B scenarios.
        draws: Qualities, shape (D, B, C, M, K).
        plans: Candidates, each for the B scenarios.
        level: Level of the quantile.

    Returns:
        A plan for each scenario.

    Raises:
        PlanError: If a plan does not fit the scenarios.
    """
    d, b = draws.shape[:2]
    wide = dataclasses.replace(scenario.repeat(d), quality=draws.flatten(0, 1))
    lower = []
    for plan in plans:
        fields = (plan.assignment.repeat(d, 1, 1), plan.steps.repeat(d, 1), plan.share.repeat(d, 1))
        utility = evaluate(wide, Plan(*fields)).utility.reshape(d, b)
        lower.append(utility.nan_to_num(neginf=-1e9).quantile(level, dim=0))
    winner, rows = torch.stack(lower).argmax(0), torch.arange(b)
    return Plan(*(torch.stack([getattr(p, f) for p in plans])[winner, rows] for f in ("assignment", "steps", "share")))


def compare_decisions(
    scenario: Scenario,
    fit: ScoreTable,
    held: ScoreTable,
    models: Sequence[str],
    *,
    counts: Sequence[int | None] = (8, 16, 32, None),
    repeats: int = 40,
    level: float = 0.1,
    draws: int = 100,
    candidates: int = 4,
    seed: int = 0,
    search: Search = solve,
) -> list[dict[str, Any]]:
    """Plan from few prompts and from many, by every rule, and replay on held-out prompts.

    For every count, prompts are drawn from the fit half with replacement, as often as ``repeats`` says; the rules see
    their mean scores and bootstrap draws of them. ``mean`` plans on the mean, ``lower_bound`` on a lower bound of every
    quality, ``safest`` takes of these two plans, and of plans for some of the draws, the one whose utility has the
    highest lower quantile over all draws.

    Args:
        scenario: The scenario, batch size 1; its qualities say only what may run.
        fit: Rows to plan with.
        held: Rows to replay on.
        models: Model names in the scenario's order.
        counts: Prompts a category; None for as many as there are.
        repeats: Draws of the prompts.
        level: Level of the lower bounds.
        draws: Bootstrap draws of each estimate.
        candidates: Plans made for single draws, for ``safest``.
        seed: Seed of all draws.
        search: Search method.

    Returns:
        One row for every count and rule: ``prompts`` (None for all), ``rule``, mean ``utility`` replayed, its ``std``
        and its ``p10`` over the repeats, ``optimism`` (planned less replayed utility, on average), ``regret`` (below
        the best plan had the held-out qualities been known), and ``gain`` over ``mean`` in the same repeats with its
        standard error ``gain_se``.

    Raises:
        ScoreTableError: If prompts are shared, or an option was measured for some prompts only.
    """
    if set(fit.frame["prompt_id"]) & set(held.frame["prompt_id"]):
        raise ScoreTableError("compare_decisions: fit and held-out tables share prompts")
    rng = np.random.default_rng(seed)
    names = matched(scenario, fit, models)
    prompts, unseen = (prompt_means(t, models, scenario.steps, matched(scenario, t, models)) for t in (fit, held))
    turn = [names.index(name) for name in fit.draw_order]
    place = [turn.index(c) for c in range(len(names))]
    truth = resampled_quality(unseen, [torch.ones(1, len(p), dtype=torch.float64) for p in unseen])
    real = dataclasses.replace(scenario, quality=truth)
    best = float(search(real).utility)
    wide = scenario.repeat(repeats)
    rows: list[dict[str, Any]] = []
    for count in counts:
        sizes = [count or len(p) for p in prompts]
        rows_of = [torch.tensor(rng.integers(len(prompts[c]), size=(repeats, sizes[c]))) for c in turn]
        drawn = [p[rows_of[place[c]]] for c, p in enumerate(prompts)]
        even = [torch.ones(repeats, 1, n, dtype=torch.float64) for n in sizes]
        counted = [torch.tensor(prompt_counts(rng, sizes[c], repeats * draws).astype(float)) for c in turn]
        again = [counted[place[c]].reshape(repeats, draws, n) for c, n in enumerate(sizes)]
        mean = resampled_quality(drawn, even)[:, 0]
        boot = resampled_quality(drawn, again).transpose(0, 1)
        views = [mean, lower_quality(mean, boot, level), *boot[:candidates]]
        plans = [search(dataclasses.replace(wide, quality=view)).plan for view in views]
        chosen = dict(zip(RULES, [plans[0], plans[1], safest(wide, boot, plans, level)], strict=True))
        replayed = {n: evaluate(dataclasses.replace(wide, quality=truth), plan).utility for n, plan in chosen.items()}
        for name, utility in replayed.items():
            planned = evaluate(dataclasses.replace(wide, quality=mean), chosen[name]).utility
            rows.append({"prompts": count, "rule": name, **_told(utility, planned, replayed["mean"], best)})
    return rows


def _told(utility: Tensor, planned: Tensor, plain: Tensor, best: float) -> dict[str, float]:
    """Figures of one rule from utilities of all repeats: replayed, planned, and replayed by plans on the mean."""
    gain = utility - plain
    return {
        "utility": float(utility.mean()),
        "std": float(utility.std()),
        "p10": float(utility.quantile(0.1)),
        "optimism": float((planned - utility).mean()),
        "regret": best - float(utility.mean()),
        "gain": float(gain.mean()),
        "gain_se": float(gain.std() / len(gain) ** 0.5),
    }
