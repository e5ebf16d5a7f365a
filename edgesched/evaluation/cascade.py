"""Cascades: a small model first, a large one where the small one's image is not good enough."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from edgesched.data.table import ScoreTable
from edgesched.equations.delay import total_delay
from edgesched.equations.feasible import in_time, memory_fits, net_utility
from edgesched.equations.shares import share_for_load
from edgesched.equations.utility import step_service_times
from edgesched.errors import ArgumentError, PlanError, ScoreTableError
from edgesched.evaluation.replay import Replay, bootstrap_weights, matched, prompt_scores, refuse_shared, replay
from edgesched.types import Plan, Scenario

DELIVERIES = ("last", "better")


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
    _check_cascade(scenario, models, deliver, judge_s, thresholds)
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
        quality, repeated = _delivered(demand, total, images, weight, first, cuts, deliver)
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


def _check_cascade(scenario: Scenario, models: Sequence[str], deliver: str, judge_s: float, thresholds: int) -> None:
    if deliver not in DELIVERIES:
        raise ArgumentError(f"deliver: {deliver!r} is not one of {', '.join(DELIVERIES)}")
    if judge_s < 0 or thresholds < 2:
        raise ArgumentError(f"judge_s and thresholds: expected at least 0 and 2, got {judge_s} and {thresholds}")
    if len(scenario) != 1 or len(models) < 2:
        raise PlanError(f"cascade: needs one scenario and two models, got {len(scenario)} and {len(models)}")


def _delivered(
    demand: Tensor, total: float, images: Sequence[Tensor], weight: Sequence[Tensor], first: int, cuts: Tensor,
    deliver: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Mean score delivered, shape (thresholds, options), and requests repeated, shape (thresholds,)."""
    quality = torch.zeros(len(cuts), images[0].shape[-1], dtype=torch.float64)
    repeated = torch.zeros(len(cuts), dtype=torch.float64)
    for n, values, rows in zip(demand, images, weight, strict=True):
        own = values[:, first]
        again = (own < cuts[:, None]).double() * rows
        second = values if deliver == "last" else torch.maximum(values, own[:, None])
        quality += n / total * ((rows - again) @ own[:, None] + again @ second)
        repeated += n * again.sum(-1)
    return quality, repeated


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
    refuse_shared(planned_on, table)
    categories = matched(scenario, table, models)
    demand, total = scenario.demand[0].double(), float(scenario.demand.sum())
    index = [int((scenario.steps == k).nonzero()[0]) for k in plan.steps]
    weights = bootstrap_weights(table, draws, seed)
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


def replay_all(
    scenario: Scenario,
    plans: Mapping[str, Plan],
    fit: ScoreTable,
    held: ScoreTable,
    models: Sequence[str],
    *,
    cascade: Sequence[str] = DELIVERIES,
    judge_s: float = 0.0,
    routing: str = "random",
    draws: int = 1000,
    seed: int = 0,
) -> dict[str, Replay]:
    """Replay plans and cascades at one load, with the same bootstrap draws of the prompts.

    Args:
        scenario: One scenario.
        plans: Plans by name.
        fit: The half that was planned with.
        held: The half that is replayed on.
        models: Models in the scenario's order.
        cascade: Which image a cascade delivers, for each cascade.
        judge_s: Seconds of the judge an image.
        routing: How a request comes to its model.
        draws: Bootstrap draws.
        seed: Their seed.

    Returns:
        Replays by name, those of the cascades included.

    Raises:
        ScoreTableError: If prompts are shared with planning, or an option was not measured.
        ArgumentError: If an argument is out of its range.
        PlanError: If a plan does not fit.
    """
    outcomes = replay(plans, scenario, held, models, planned_on=fit, routing=routing, draws=draws, seed=seed)
    for deliver in cascade if len(models) > 1 else ():
        plan = plan_cascade(scenario, fit, models, deliver=deliver, judge_s=judge_s)
        outcomes[f"cascade_{deliver}"] = replay_cascade(
            plan, scenario, held, models, planned_on=fit, draws=draws, seed=seed
        )
    return outcomes
