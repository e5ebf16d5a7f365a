"""Replay of plans on held-out prompts: measured scores, routing noise in the delay, paired intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgesched.errors import ArgumentError, PlanError, ScoreTableError
from edgesched.feasible import in_time, memory_fits, net_utility
from edgesched.objective import (
    evaluate,
    loads,
    service_times,
    share_for_load,
    step_indices,
    step_service_times,
    total_delay,
)
from edgesched.table import ScoreTable
from edgesched.types import Plan, Scenario

ROUTINGS = ("random", "quota")
DELIVERIES = ("last", "better")


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
    _refuse_shared(planned_on, table)
    categories = matched(scenario, table, models)
    per_prompt = {name: values.nanmean(1) for name, values in prompt_scores(table, models, scenario.steps).items()}
    demand = scenario.demand[0]
    weights = _bootstrap_weights(table, draws, seed)
    results = {}
    for name, made in plans.items():
        plan = Plan(made.assignment.detach(), made.steps, made.share.detach())
        if len(plan) != 1 or plan.assignment.shape[1:] != (len(categories), len(models)):
            raise PlanError(f"plan {name!r}: expected assignment of shape {(1, len(categories), len(models))}, "
                            f"got {tuple(plan.assignment.shape)}")  # fmt: skip
        index = step_indices(scenario, plan.steps)[0].tolist()
        mean, drawn = torch.zeros((), dtype=torch.float64), torch.zeros(draws, dtype=torch.float64)
        for c, category in enumerate(categories):
            for m, model in enumerate(models):
                part = float(demand[c] * plan.assignment[0, c, m] / demand.sum())
                if part <= 0:
                    continue
                scores = per_prompt[category][:, m, index[m]]
                measured = int(scores.isfinite().sum())
                if measured != len(scores):
                    raise ScoreTableError(f"{model!r} at {int(plan.steps[0, m])} steps: measured for {measured} of "
                                          f"{len(scores)} held-out prompts of {category!r}")  # fmt: skip
                mean += part * scores.mean()
                drawn += part * (weights[category] @ scores)
        latency = _latency(scenario, plan, routing)
        spent = float(scenario.latency_weight[0]) * latency if np.isfinite(latency) else float("inf")
        if not bool(evaluate(scenario, plan).feasible):
            spent = float("inf")
        results[name] = Replay(float(mean) - spent, float(mean), latency, drawn - spent, drawn)
    return results


def matched(scenario: Scenario, table: ScoreTable, models: Sequence[str]) -> tuple[str, ...]:
    """The table's categories in the scenario's order, which its names tell; without names the orders must be one.

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


def _refuse_shared(planned_on: ScoreTable | None, table: ScoreTable) -> None:
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


def _bootstrap_weights(table: ScoreTable, draws: int, seed: int) -> dict[str, Tensor]:
    """Category → weights of its prompts in every draw, shape (draws, prompts), rows summing to 1."""
    generator = np.random.default_rng(seed)
    weights = {}
    for category in table.draw_order:
        count = table.frame.loc[table.frame["category"] == category, "prompt_id"].nunique()
        drawn = generator.multinomial(count, np.full(count, 1 / count), size=draws) / count
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


@dataclass(frozen=True, eq=False)
class CascadePlan:
    """A small model draws first; where the judge's score is below the threshold, a large one draws again.

    Args:
        small: Position of the model that serves every request.
        large: Position of the model that repeats.
        steps: Step counts of the two.
        threshold: Score points below which an image is repeated; −inf repeats none.
        share: Shares of the server of the two.
        deliver: ``"last"`` delivers the repeated image, ``"better"`` the one with the higher score of the two.
        judge_s: Seconds that the judge takes for an image with the whole server, spent with the small model.
        utility: Utility in the plan's view, on the prompts that it was planned on.
    """

    small: int
    large: int
    steps: tuple[int, int]
    threshold: float
    share: tuple[float, float]
    deliver: str
    judge_s: float
    utility: float


def plan_cascade(
    scenario: Scenario,
    table: ScoreTable,
    models: Sequence[str],
    *,
    deliver: str = "last",
    judge_s: float = 0.0,
    thresholds: int = 33,
) -> CascadePlan:
    """The cascade with the highest utility on the prompts given, every pair and threshold tried.

    With n requests, of which a share r falls below the threshold, the loads are n on the small model and r n on
    the large one, more than n in all. A repeated request waits for both, so that its delay is the sum of both
    and the mean delay is (1/n) Σ_m n_m T_m, as everywhere, with the loads of both passes.

    Args:
        scenario: The scenario, batch size 1; its own qualities say only what may run.
        table: Rows to plan with, the fit half.
        models: Model names in the scenario's order.
        deliver: ``"last"`` or ``"better"``; the latter is judged by the same score that chose, in its own favour.
        judge_s: Seconds of the judge an image.
        thresholds: Thresholds tried, at even quantiles of the small model's scores, from none to all repeated.

    Returns:
        The best plan; shares in closed form in slot mode, by one multiplier in queue mode.

    Raises:
        ArgumentError: If an argument is out of its range.
        PlanError: If there are fewer than two models.
        ScoreTableError: If a prompt has no image with which every option can be compared.
    """
    if deliver not in DELIVERIES:
        raise ArgumentError(f"deliver: {deliver!r} is not one of {', '.join(DELIVERIES)}")
    if judge_s < 0 or thresholds < 2:
        raise ArgumentError(f"judge_s and thresholds: expected at least 0 and 2, got {judge_s} and {thresholds}")
    if len(scenario) != 1 or len(models) < 2:
        raise PlanError(f"cascade: needs one scenario and two models, got {len(scenario)} and {len(models)}")
    categories = matched(scenario, table, models)
    demand, total = scenario.demand[0].double(), float(scenario.demand.sum())
    options = scenario.quality[0].isfinite().all(0).nonzero().tolist()
    model = torch.tensor([m for m, _ in options])
    seconds = torch.stack([step_service_times(scenario)[0, m, k].double() for m, k in options])
    images, weight = [], []
    by_category = prompt_scores(table, models, scenario.steps)
    for category in categories:
        scores = by_category[category]
        values = torch.stack([scores[..., m, k] for m, k in options], -1)
        rows = _row_weights(values, category)
        images.append(values[rows > 0])
        weight.append(rows[rows > 0] / len(rows))
    level = torch.linspace(0, 1, thresholds, dtype=torch.float64)
    best: tuple[float, int, int, float, float] = (-float("inf"), 0, 0, 0.0, 0.0)
    for first in range(len(options)):
        cuts = torch.cat([v[:, first] for v in images]).quantile(level)
        cuts[0], cuts[-1] = -torch.inf, torch.inf
        quality, repeated = torch.zeros(thresholds, len(options)).double(), torch.zeros(thresholds).double()
        for n, values, rows in zip(demand, images, weight, strict=True):
            own = values[:, first]
            again = (own < cuts[:, None]).double() * rows
            second = values if deliver == "last" else torch.maximum(values, own[:, None])
            quality += n / total * ((rows - again) @ own[:, None] + again @ second)
            repeated += n * again.sum(-1)
        load = torch.stack([torch.full_like(quality, total), repeated[:, None].expand_as(quality)], -1)
        service = torch.stack([seconds[first] + judge_s + 0 * seconds, seconds], -1).expand_as(load)
        share = _ranking_share(scenario, load, service)
        delay, stable = total_delay(scenario.latency, load, service, share)
        latency = delay / total
        used = torch.nn.functional.one_hot(model, scenario.shape[2]).bool()
        resident = used[first] | (used & (repeated[:, None, None] > 0))
        fits = memory_fits(scenario, resident[None])[0] & in_time(scenario, latency[None])[0]
        feasible = stable & fits & (model != model[first])
        value, at = net_utility(quality, scenario.latency_weight[0].double(), latency, feasible).flatten().max(0)
        if float(value) > best[0]:
            cut, second_option = divmod(int(at), len(options))
            best = float(value), first, second_option, float(cuts[cut]), float(repeated[cut])
    _, first, last, threshold, repeats = best
    load = torch.tensor([[total, repeats]], dtype=torch.float64)
    service = torch.stack([seconds[first] + judge_s, seconds[last]])[None]
    first_share, last_share = share_for_load(scenario, load, service)[0].tolist()
    (small, i), (large, j) = options[first], options[last]
    steps = int(scenario.steps[i]), int(scenario.steps[j])
    return CascadePlan(small, large, steps, threshold, (first_share, last_share), deliver, judge_s, best[0])


def _row_weights(values: Tensor, category: str) -> Tensor:
    """Weight of every image in its prompt's mean, shape (prompts, seeds), 0 where an option is missing."""
    valid = values.isfinite().flatten(2).all(-1)
    if not bool(valid.any(1).all()):
        raise ScoreTableError(f"category {category!r}: a prompt has no seed at which every option was measured")
    return valid / valid.sum(1, keepdim=True).double()


def _ranking_share(scenario: Scenario, load: Tensor, service: Tensor) -> Tensor:
    """Shares to rank plans by: the best ones, in queue mode the square-root rule (Kleinrock 1964)."""
    if scenario.latency == "slot":
        return share_for_load(scenario, load, service)
    busy = load * service
    root = busy.sqrt()
    return busy + (1 - busy.sum(-1, keepdim=True)).clamp(min=0) * root / root.sum(-1, keepdim=True)


def replay_cascade(
    plan: CascadePlan,
    scenario: Scenario,
    table: ScoreTable,
    models: Sequence[str],
    *,
    planned_on: ScoreTable | None = None,
    draws: int = 1000,
    seed: int = 0,
) -> Replay:
    """Replay a cascade on held-out prompts, with the bootstrap draws of :func:`replay`, so that both can be compared.

    Whether a prompt is repeated follows from its measured score, so the large model's load differs from the plan and
    from draw to draw; in slot mode its randomness within a slot is counted, whatever the routing.

    Args:
        plan: The cascade.
        scenario: The scenario, batch size 1.
        table: Held-out rows.
        models: Model names in the scenario's order.
        planned_on: The rows that the plan was made from; a shared prompt is an error.
        draws: Bootstrap draws.
        seed: Seed of the draws.

    Returns:
        Replay; its utility draws hold the delay's changes too.

    Raises:
        ScoreTableError: If prompts are shared with planning, or an option was not measured.
    """
    _refuse_shared(planned_on, table)
    categories = matched(scenario, table, models)
    demand, total = scenario.demand[0].double(), float(scenario.demand.sum())
    index = [int((scenario.steps == k).nonzero()[0]) for k in plan.steps]
    weights = _bootstrap_weights(table, draws, seed)
    quality, repeats = [], []
    by_category = prompt_scores(table, models, scenario.steps)
    for category in categories:
        scores = by_category[category]
        pair = torch.stack([scores[..., plan.small, index[0]], scores[..., plan.large, index[1]]], -1)
        rows = _row_weights(pair, category)
        first, second = pair.nan_to_num(0.0).unbind(-1)
        again = first < plan.threshold
        given = torch.where(again, second if plan.deliver == "last" else torch.maximum(first, second), first)
        draw = torch.cat([torch.full_like(weights[category][:1], 1 / len(rows)), weights[category]])
        quality.append(draw @ (rows * given).sum(1))
        repeats.append(draw @ (rows * again).sum(1))
    score = torch.stack(quality, -1) @ demand / total
    rate = torch.stack(repeats, -1)
    load = torch.stack([torch.full_like(score, total), rate @ demand], -1)
    seconds = step_service_times(scenario)[0].double()
    service = torch.stack([seconds[plan.small, index[0]] + plan.judge_s, seconds[plan.large, index[1]]])
    share = torch.tensor(plan.share, dtype=torch.float64)
    delay = total_delay(scenario.latency, load, service.expand_as(load), share.expand_as(load))[0]
    if scenario.latency == "slot" and plan.share[1] > 0:
        delay = delay + (rate * (1 - rate)) @ demand * service[1] / share[1]
    latency = delay / total
    stable = latency.isfinite() & bool(torch.isfinite(torch.tensor(plan.utility)))
    utility = net_utility(score, scenario.latency_weight[0].double(), latency, stable)
    return Replay(float(utility[0]), float(score[0]), float(latency[0]), utility[1:], score[1:])
