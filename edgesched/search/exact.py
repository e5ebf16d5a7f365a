"""Exact optima: branch and bound over step counts, enumeration, and dynamic programming over slices.

With step counts fixed, the joint problem in slot mode is concave in the assignment: maximise a linear quality minus ω
(Σ n_m √t_m)² / N. Its one-dimensional dual (see :mod:`edgesched.equations.bounds`) has no gap, and the optimal
assignment mixes at most two neighbouring choices. Over step counts branch and bound closes the rest
(:mod:`edgesched.equations.branching`). With whole slices and the assignment given, every model's loss depends on its
own step count and slices alone, and dynamic programming over the slices is exact for any number of models.
"""

from __future__ import annotations

import itertools
import time

import torch
from torch import Tensor

from edgesched.equations.branching import Concave, branch_and_bound
from edgesched.equations.delay import queue_delay, total_delay
from edgesched.equations.feasible import in_time, memory_fits, net_utility
from edgesched.equations.shares import best_share, share_for_load
from edgesched.equations.utility import loads, quality_by_step, step_service_times
from edgesched.errors import SearchError
from edgesched.search._climb import climb, separable, start
from edgesched.search._plans import plan_at, plan_of
from edgesched.search._result import certified, checked_assignment, positive
from edgesched.search._threads import threads_for
from edgesched.types import Plan, Scenario, SearchResult

_CELLS_AT_ONCE = 12_000_000
_MAX_COMBINATIONS = 250_000
_MAX_QUEUE_COMBINATIONS = 20_000
_MAX_SUBSETS = 256
_PROOF = 1e-9


def combinations(models: int, options: int, device: torch.device | str = "cpu") -> Tensor:
    """Every choice of one of ``options`` for each of ``models``, shape (options^models, models).

    Args:
        models: M.
        options: K.
        device: Where they go.
    """
    axes = [torch.arange(options, device=device)] * models
    return torch.cartesian_prod(*axes).reshape(-1, models)


def exact(scenario: Scenario, *, assignment: Tensor | None = None, nodes: int = 50_000, seed: int = 0) -> SearchResult:
    """The exact optimum, joint or with the assignment given; it refuses what it cannot solve exactly.

    | problem | joint | assignment given |
    |---|---|---|
    | slot mode | branch and bound | branch and bound |
    | with a memory limit | the same for every largest set of models that fits | as without |
    | whole slices (slot or queue mode) | refused | dynamic programming over slices |
    | queue mode | refused | enumeration, K^M ≤ 20,000, shares solved for each |
    | a deadline | refused | enumeration, K^M ≤ 250,000 in slot mode, otherwise 20,000 |

    The result's ``bound`` is its utility, but for a relative 1e-9, where branch and bound proves it.

    Args:
        scenario: Batch of B scenarios.
        assignment: Shape (B, C, M), or None for the joint optimum.
        nodes: Most nodes of a proof.
        seed: Taken for the common signature; nothing is random here.

    Returns:
        A result whose utility no plan exceeds.

    Raises:
        SearchError: If the optimum cannot be had exactly by these means; it says what can be used.
        ArgumentError: If an argument is out of its range.
        PlanError: If the assignment's rows are no probabilities.

    Example:
        >>> s = Scenario.random(1, categories=8, models=5, seed=0)
        >>> bool(exact(s).gap < 1e-6)
        True
    """
    started = time.perf_counter()
    positive("nodes", nodes)
    given = checked_assignment(scenario, assignment)
    slot = scenario.latency == "slot" and scenario.share_units is None and scenario.deadline_s is None
    with threads_for(scenario.quality.numel()):
        if separable(scenario) or (slot and given is not None):
            index, bound, opened, history = proven(scenario, given, nodes, 0.0, None)
            plan = plan_of(scenario, given, index)
            result = certified("exact", scenario, given, plan, started, opened, history, bound)
            _refuse_open(result, nodes)
            return result
        if given is None:
            return _resident(scenario, nodes, started)
        if scenario.share_units is not None and scenario.deadline_s is None:
            plan, tried = _sliced(scenario, given, scenario.share_units)
        else:
            plan, tried = _enumerated(scenario, given)
        return certified("exact", scenario, given, plan, started, tried)


def proven(
    scenario: Scenario, given: Tensor | None, nodes: int, tolerance: float, max_seconds: float | None
) -> tuple[Tensor, Tensor, int, Tensor]:
    """Climb, then branch and bound, in chunks bounded in memory.

    Args:
        scenario: Batch of B separable scenarios.
        given: Assignment, shape (B, C, M), or None where it is free.
        nodes: About the most nodes of a scenario.
        tolerance: Relative gap at which a scenario is finished, 1e-9 at least.
        max_seconds: Stop after this time, over all scenarios; None is never.

    Returns:
        Positions of step counts (B, M), bounds (B,), nodes opened, history of utilities (2, B).
    """
    b, _, m, k = scenario.shape
    cells = m * m * k if given is not None else scenario.quality[0].numel()
    at_once = max(1, _CELLS_AT_ONCE // cells)
    indices, bounds, histories, opened = [], [], [], 0
    began = time.perf_counter()
    for first in range(0, b, at_once):
        rows = slice(first, first + at_once)
        part = scenario[rows] if at_once < b else scenario
        problem = Concave.of(part, None if given is None else given[rows])
        index, x = start(problem, 1, 0)
        found, index, _, _ = climb(problem, index, x, 50 * m)
        left = None if max_seconds is None else max_seconds * min(1.0, (first + at_once) / b)
        proof = branch_and_bound(
            problem, nodes=nodes, index=index, found=found, start=x, tolerance=max(tolerance, _PROOF),
            max_seconds=None if left is None else left - (time.perf_counter() - began),
        )  # fmt: skip
        total = part.demand.double().sum(-1)
        indices.append(proof.index)
        bounds.append(proof.bound / total)
        histories.append(torch.stack([found, proof.value]) / total)
        opened += proof.opened
    return torch.cat(indices), torch.cat(bounds), opened, torch.cat(histories, 1)


def _refuse_open(result: SearchResult, nodes: int) -> None:
    open_ = result.feasible & (result.gap > 1e-6)
    if bool(open_.any()):
        raise SearchError(
            f"exact: {int(open_.sum())} of {len(open_)} optima are not proven within {nodes} nodes each; give more "
            "nodes, or take the bound of search.branch or search.coordinate"
        )


def _resident(scenario: Scenario, nodes: int, started: float) -> SearchResult:
    """The joint optimum under a memory limit: the best over every largest set of models that fits."""
    b, _, m, _ = scenario.shape
    kinds = {
        "queue mode": scenario.latency != "slot",
        "sliced shares": scenario.share_units is not None,
        "a deadline": scenario.deadline_s is not None,
        f"a memory limit on {m} models": 2**m > _MAX_SUBSETS,
    }
    for kind, present in kinds.items():
        if present:
            raise SearchError(f"exact: the joint optimum with {kind} is not solved exactly; give an assignment "
                              "or use search.anneal")  # fmt: skip
    assert scenario.memory_gib is not None
    assert scenario.memory_limit_gib is not None
    sets = torch.tensor(list(itertools.product([False, True], repeat=m)), device=scenario.device)
    some = sets.expand(b, *sets.shape)
    fits = memory_fits(scenario, some)
    # A set is worth trying if no other model fits in beside it.
    wider = some[:, :, None] | torch.eye(m, dtype=torch.bool, device=scenario.device)
    largest = fits & (some | ~memory_fits(scenario, wider)).all(-1)
    row, which = largest.nonzero(as_tuple=True)
    problem = Concave.of(scenario).take(row).without(~sets[which][:, None, :, None])
    index, x = start(problem, 1, 0)
    found, index, _, _ = climb(problem, index, x, 50 * m)
    proof = branch_and_bound(problem, nodes=nodes, index=index, found=found, start=x, tolerance=_PROOF)
    best = torch.full((b,), -torch.inf, dtype=torch.float64, device=scenario.device)
    bound = best.scatter_reduce(0, row, proof.bound, "amax")
    best = best.scatter_reduce(0, row, proof.value, "amax")
    winner = torch.zeros(b, dtype=torch.int64, device=scenario.device)
    hit = proof.value >= best[row]
    winner[row[hit]] = hit.nonzero().squeeze(1)
    keep = sets[which][winner]
    allowed = scenario.quality.masked_fill(~keep[:, None, :, None], -torch.inf)
    masked = Scenario(scenario.demand, allowed, scenario.steps, scenario.step_time_s, scenario.overhead_s,
                      scenario.latency_weight)  # fmt: skip
    plan = plan_at(masked, proof.index[winner])
    bound = torch.where(best.isfinite(), bound / scenario.demand.double().sum(-1), -torch.inf)
    result = certified("exact", scenario, None, plan, started, proof.opened, None, bound)
    _refuse_open(result, nodes)
    return result


def _sliced(scenario: Scenario, assignment: Tensor, units: int) -> tuple[Plan, int]:
    """Dynamic programming over slices: the best step count and slices of each model, one model after the other."""
    load = loads(scenario, assignment)
    gains = quality_by_step(scenario, assignment)
    b, m, k = gains.shape
    given = torch.arange(1, units + 1, dtype=gains.dtype, device=gains.device)
    busy = (load[..., None] * step_service_times(scenario))[..., None] * units / given
    if scenario.latency == "slot":
        delay = load[..., None, None] * busy
    else:
        calm = busy.clamp(max=1 - 1e-12)
        delay = torch.where(busy < 1, queue_delay(calm), torch.inf)
    weight = scenario.latency_weight[:, None, None, None]
    lost = torch.where(weight > 0, weight * delay, torch.where(delay.isinf(), torch.inf, 0.0))
    own, count = (gains[..., None] - lost).max(-2)
    idle = torch.where(load > 0, -torch.inf, 0.0)[..., None]
    own = torch.cat([idle, own], -1)
    count = torch.cat([torch.zeros_like(count[..., :1]), count], -1)
    value = torch.zeros(b, units + 1, dtype=gains.dtype, device=gains.device)
    slices = torch.arange(units + 1, device=gains.device)
    left = slices[:, None] - slices
    choices = []
    for model in range(m):
        before = value[:, left.clamp(min=0)].masked_fill(left < 0, -torch.inf)
        value, choice = (before + own[:, model, None]).max(-1)
        choices.append(choice)
    rest = torch.full((b, 1), units, device=gains.device)
    taken = []
    for model in reversed(range(m)):
        taken.append(choices[model].gather(1, rest))
        rest = rest - taken[-1]
    share = torch.cat(taken[::-1], 1)
    index = count.gather(-1, share[..., None]).squeeze(-1)
    return Plan(assignment, scenario.steps[index], share.to(gains.dtype) / units), b * m * k * units


def _enumerated(scenario: Scenario, assignment: Tensor) -> tuple[Plan, int]:
    """Every combination of step counts, each with its best shares."""
    b, _, m, k = scenario.shape
    closed = scenario.latency == "slot" and scenario.share_units is None
    most = _MAX_COMBINATIONS if closed else _MAX_QUEUE_COMBINATIONS
    if k**m > most:
        raise SearchError(
            f"exact: {k} step counts for {m} models are {float(k) ** m:.3g} combinations, more than {most}; "
            "use search.anneal"
        )
    combos = combinations(m, k, scenario.device)
    service = step_service_times(scenario)
    load = loads(scenario, assignment)
    total = scenario.demand.sum(-1)
    gains = quality_by_step(scenario, assignment)
    models = torch.arange(m, device=scenario.device)
    best: list[Tensor] = []
    at_once = max(1, _CELLS_AT_ONCE // (len(combos) * m))
    for first in range(0, b, at_once):
        rows = slice(first, first + at_once)
        quality = gains[rows][:, models, combos].sum(-1)
        chosen = service[rows][:, models, combos]
        weight = load[rows, None].expand_as(chosen)
        if closed:
            delay = (weight * chosen.sqrt()).sum(-1).square()
            stable = torch.ones_like(delay, dtype=torch.bool)
        else:
            share = share_for_load(scenario, weight, chosen)
            delay, stable = total_delay(scenario.latency, weight, chosen, share)
        mean = delay / total[rows, None]
        feasible = stable & in_time(scenario[rows], mean)
        utility = net_utility(quality / total[rows, None], scenario.latency_weight[rows, None], mean, feasible)
        best.append(utility.argmax(-1))
    steps = scenario.steps[combos[torch.cat(best)]]
    return Plan(assignment, steps, best_share(scenario, assignment, steps)), b * len(combos)
