"""Replay of plans on held-out prompts: measured scores, routing noise in the delay, paired intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgesched.data.bootstrap import prompt_counts
from edgesched.data.table import ScoreTable
from edgesched.equations.delay import total_delay
from edgesched.equations.utility import evaluate, loads, service_times, step_indices
from edgesched.errors import ArgumentError, PlanError, ScoreTableError
from edgesched.types import ROUTINGS, Plan, Scenario


@dataclass(frozen=True, eq=False)
class Replay:
    """Measured outcome of one plan.

    Args:
        utility: Utility in score points; −inf for a plan that is not feasible, as in :func:`edgesched.evaluate`.
        quality: Mean measured score of a request in points.
        latency_s: Mean response delay in seconds, +inf where a loaded model is not served.
        utility_draws: Utility of every bootstrap draw, shape (draws,).
        quality_draws: Quality of every bootstrap draw, shape (draws,).
    """

    utility: float
    quality: float
    latency_s: float
    utility_draws: Tensor
    quality_draws: Tensor

    def interval(self, what: str = "utility") -> tuple[float, float]:
        """95 % interval over prompts of ``"utility"`` or ``"quality"``."""
        draws = {"utility": self.utility_draws, "quality": self.quality_draws}[what]
        return _interval(draws)


def _interval(draws: Tensor) -> tuple[float, float]:
    finite = draws[draws.isfinite()].double()
    if not len(finite):
        return float("-inf"), float("-inf")
    low, high = finite.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def replay(
    plans: Mapping[str, Plan],
    scenario: Scenario,
    table: ScoreTable,
    models: Sequence[str],
    *,
    planned_on: ScoreTable | None = None,
    routing: str = "random",
    draws: int = 1000,
    seed: int = 0,
) -> dict[str, Replay]:
    """Replay plans for one scenario on prompts they were not made from.

    Quality is the mean of the scores measured for the held-out prompts at the plan's models and step counts:
    mean over seeds, then over prompts of a category, weighted by demand and the plan's probabilities. In slot
    mode with ``routing="random"`` the delay counts the randomness of the loads,
    (1/N) Σ_m [n_m² + Σ_c n_c p_cm (1 − p_cm)] t_m / f_m; with ``"quota"`` the server deals requests out evenly.
    Bootstrap draws resample prompts within categories and are the same for every plan and model, so that
    differences between plans are paired.

    Args:
        plans: Plans by name, each for the one scenario.
        scenario: The scenario, batch size 1.
        table: Held-out rows.
        models: Model names in the scenario's order.
        planned_on: The rows that the plans were made from; a shared prompt is an error.
        routing: ``"random"`` or ``"quota"``.
        draws: Bootstrap draws.
        seed: Seed of the draws.

    Returns:
        Replay of each plan, by name.

    Raises:
        ScoreTableError: If prompts are shared with planning, or a (model, step count) of a plan was not measured.
        ArgumentError: If the routing is unknown.
        PlanError: If a plan does not fit.
    """
    if routing not in ROUTINGS:
        raise ArgumentError(f"routing: {routing!r} is not one of {', '.join(ROUTINGS)}")
    if len(scenario) != 1:
        raise PlanError(f"scenario: replay takes one scenario, got {len(scenario)}")
    refuse_shared(planned_on, table)
    categories = matched(scenario, table, models)
    per_prompt = {name: values.nanmean(1) for name, values in prompt_scores(table, models, scenario.steps).items()}
    weights = bootstrap_weights(table, draws, seed)
    results = {}
    for name, made in plans.items():
        plan = Plan(made.assignment.detach(), made.steps, made.share.detach())
        if len(plan) != 1 or plan.assignment.shape[1:] != (len(categories), len(models)):
            raise PlanError(f"plan {name!r}: expected assignment of shape {(1, len(categories), len(models))}, "
                            f"got {tuple(plan.assignment.shape)}")  # fmt: skip
        mean, drawn = _seen(plan, scenario, {c: per_prompt[c] for c in categories}, models, weights)
        latency = _latency(scenario, plan, routing)
        spent = float(scenario.latency_weight[0]) * latency if np.isfinite(latency) else float("inf")
        if not bool(evaluate(scenario, plan).feasible):
            spent = float("inf")
        results[name] = Replay(float(mean) - spent, float(mean), latency, drawn - spent, drawn)
    return results


def _seen(
    plan: Plan,
    scenario: Scenario,
    per_prompt: Mapping[str, Tensor],
    models: Sequence[str],
    weights: Mapping[str, Tensor],
) -> tuple[Tensor, Tensor]:
    """Mean score of a plan's requests, and the same in every draw, shape (draws,); categories in the plan's order."""
    demand, index = scenario.demand[0], step_indices(scenario, plan.steps)[0].tolist()
    mean = torch.zeros((), dtype=torch.float64)
    drawn = torch.zeros(len(next(iter(weights.values()))), dtype=torch.float64)
    for c, (category, values) in enumerate(per_prompt.items()):
        for m, model in enumerate(models):
            part = float(demand[c] * plan.assignment[0, c, m] / demand.sum())
            if part <= 0:
                continue
            scores = values[:, m, index[m]]
            measured = int(scores.isfinite().sum())
            if measured != len(scores):
                raise ScoreTableError(f"{model!r} at {int(plan.steps[0, m])} steps: measured for {measured} of "
                                      f"{len(scores)} held-out prompts of {category!r}")  # fmt: skip
            mean += part * scores.mean()
            drawn += part * (weights[category] @ scores)
    return mean, drawn


def matched(scenario: Scenario, table: ScoreTable, models: Sequence[str]) -> tuple[str, ...]:
    """The table's categories in the scenario's order, which its names tell; without names the orders must be one.

    Args:
        scenario: Scenario, with or without names.
        table: Score table.
        models: Model names in the order in which they are meant.

    Raises:
        ScoreTableError: If the table has other categories than the scenario, or the models are in another order.
    """
    if scenario.model_names is not None and tuple(models) != scenario.model_names:
        raise ScoreTableError(f"models: the scenario's are {', '.join(scenario.model_names)}, got {', '.join(models)}")
    if scenario.category_names is None:
        return tuple(table.categories)
    if set(scenario.category_names) != set(table.categories):
        raise ScoreTableError(f"categories: the scenario's are {', '.join(scenario.category_names)}, the table's "
                              f"{', '.join(table.categories)}")  # fmt: skip
    return scenario.category_names


def refuse_shared(planned_on: ScoreTable | None, table: ScoreTable) -> None:
    """Refuse to replay on prompts that were planned with.

    Args:
        planned_on: Rows that were planned with, or None.
        table: Rows to replay.

    Raises:
        ScoreTableError: Naming how many are shared.
    """
    shared = set() if planned_on is None else set(planned_on.frame["prompt_id"]) & set(table.frame["prompt_id"])
    if shared:
        raise ScoreTableError(f"prompt {min(shared)!r} was used for planning; replay needs prompts of its own")


def prompt_scores(table: ScoreTable, models: Sequence[str], steps: Sequence[int] | Tensor) -> dict[str, Tensor]:
    """Scores of the same prompts under every model, so that they can be resampled together.

    Args:
        table: Score table.
        models: Model names, M of them.
        steps: Step counts, K of them.

    Returns:
        Category → scores, shape (prompts, seeds, M, K), float64, prompts in the order of their ids; NaN where
        nothing was measured.
    """
    import pandas as pd

    frame = table.frame
    names: dict[str, list[Any]] = {
        "seed": sorted(frame["seed"].unique()),
        "model": list(models),
        "steps": [int(k) for k in steps],
    }
    places = [pd.Index(values).get_indexer(frame[column]) for column, values in names.items()]
    known = np.all([place >= 0 for place in places], 0)
    scores = {}
    for category in table.categories:
        here = (frame["category"] == category).to_numpy()
        prompts, place = np.unique(frame["prompt_id"][here].to_numpy(str), return_inverse=True)
        values = np.full((len(prompts), *(len(options) for options in names.values())), np.nan)
        mine = known & here
        values[place[known[here]], *(at[mine] for at in places)] = frame[table.score][mine]
        scores[category] = torch.tensor(values)
    return scores


def bootstrap_weights(table: ScoreTable, draws: int, seed: int) -> dict[str, Tensor]:
    """Category → weights of its prompts in every draw, shape (draws, prompts), rows summing to 1.

    Args:
        table: Score table.
        draws: Bootstrap draws.
        seed: Seed of the draws.
    """
    generator = np.random.default_rng(seed)
    weights = {}
    for category in table.draw_order:
        count = table.frame.loc[table.frame["category"] == category, "prompt_id"].nunique()
        drawn = prompt_counts(generator, count, draws) / count
        weights[category] = torch.tensor(drawn)
    return weights


def _latency(scenario: Scenario, plan: Plan, routing: str) -> float:
    """Mean delay of a plan, the randomness of routing counted in slot mode if asked for."""
    load = loads(scenario, plan.assignment)
    service = service_times(scenario, plan.steps)
    delay, feasible = total_delay(scenario.latency, load, service, plan.share)
    if not bool(feasible.all()):
        return float("inf")
    if scenario.latency == "slot" and routing == "random":
        spread = (scenario.demand[..., None] * plan.assignment * (1 - plan.assignment)).sum(1)
        served = plan.share > 0
        extra = torch.where(served, spread * service / torch.where(served, plan.share, 1.0), 0.0)
        delay = delay + extra.sum(-1)
    return float(delay[0] / scenario.demand[0].sum())


def compare(ours: Replay, other: Replay) -> dict[str, dict[str, float]]:
    """Relative quality gain and delay cut of one plan over another, in per cent, with paired intervals.

    Args:
        ours: Replay of one plan.
        other: Replay of another on the same draws.

    Returns:
        ``quality_gain_pct`` with ``value lo hi`` over prompts, and ``latency_cut_pct`` with ``value``; the
        delay does not depend on the prompts, so it has no interval over them. ``utility_gain`` is in points.
    """
    ratio = 100 * (ours.quality_draws / other.quality_draws - 1)
    difference = ours.utility_draws - other.utility_draws
    low, high = _interval(ratio)
    lower, upper = _interval(difference)
    return {
        "quality_gain_pct": {"value": 100 * (ours.quality / other.quality - 1), "lo": low, "hi": high},
        "latency_cut_pct": {"value": 100 * (1 - ours.latency_s / other.latency_s)},
        "utility_gain": {"value": ours.utility - other.utility, "lo": lower, "hi": upper},
    }
