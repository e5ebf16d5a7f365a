"""Simulated annealing over assignment, steps and shares, for many scenarios and chains at once.

Every chain of every scenario is one entry of the leading dimensions (B, R); one iteration proposes one
move in each and accepts by the Metropolis rule (Metropolis et al. 1953; Kirkpatrick et al. 1983) under
a geometric temperature schedule that starts at measured differences of utility. All scenarios share the
stream of random numbers, so that the result of a scenario does not depend on its batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from edgesched.bounds import upper_bound
from edgesched.errors import SearchError
from edgesched.objective import best_share, evaluate, loads, step_service_times
from edgesched.search._result import certified, checked_assignment, checked_steps, positive
from edgesched.search.exact import best_assignment, quality_by_step
from edgesched.types import Plan, Scenario, SearchResult

SHARE_MODES = ("closed_form", "annealed")
_STATES_AT_ONCE = 4_000_000
_PENALTY = 1e4
_HISTORY = 200


@dataclass(frozen=True)
class Progress:
    """What a callback sees: state of the search at one recorded iteration."""

    iteration: int
    temperature: Tensor
    acceptance: float
    best: Tensor


@dataclass(frozen=True)
class _Problem:
    """Constants of a chunk. ``gain`` is Q of shape (B, M, K, C), or Σ_c n_c p_cm Q of shape (B, M, K) when the
    assignment is given; masked options cost a penalty in it."""

    scenario: Scenario
    gain: Tensor
    service: Tensor
    total: Tensor
    load: Tensor | None
    share: Tensor | None
    closed_form: bool


@dataclass(frozen=True)
class _State:
    """Chains: step indices (B, R, M), assignment (B, R, M, C) or None where given, share logits (B, R, M)."""

    index: Tensor
    assign: Tensor | None
    logit: Tensor

    def where(self, take: Tensor, other: _State) -> _State:
        """``other`` where ``take``, shape (B, R), is set, else this."""
        assign = self.assign
        if assign is not None and other.assign is not None:
            assign = torch.where(take[..., None, None], other.assign, assign)
        one = take[..., None]
        return _State(torch.where(one, other.index, self.index), assign, torch.where(one, other.logit, self.logit))


def anneal(
    scenario: Scenario,
    *,
    assignment: Tensor | None = None,
    steps: Tensor | None = None,
    share: Tensor | None = None,
    chains: int = 64,
    iterations: int = 1000,
    seed: int = 0,
    shares: str = "closed_form",
    polish: bool = True,
    cooling: float = 1e-4,
    max_seconds: float | None = None,
    target_gap: float | None = None,
    callback: Callable[[Progress], None] | None = None,
) -> SearchResult:
    """Anneal what is not given.

    A move changes one model's step count (to a neighbour or anywhere), the assignment of one category (all
    of it, or a part moved between two models) or one model's share.

    Args:
        scenario: Batch of B scenarios.
        assignment: Kept as it is if given, shape (B, C, M).
        steps: Kept as they are if given, step counts of shape (B, M).
        share: Kept as they are if given, shape (B, M).
        chains: Chains R of each scenario.
        iterations: Proposals of each chain.
        seed: Seed of starting points and moves.
        shares: ``"closed_form"`` takes the best shares for every proposal where they have a closed form
            (slot mode without slices); ``"annealed"`` makes them part of the search, as published.
        polish: At the end take the best shares for the plan found and, where it is a concave problem, its
            best assignment.
        cooling: Last temperature relative to the first.
        max_seconds: Stop after this time.
        target_gap: Stop once every scenario's gap to its bound is at most this.
        callback: Called at every recorded iteration.

    Returns:
        Best plan of each scenario, with ``history`` of shape (≤ 200, B).

    Raises:
        SearchError: If an argument is out of its range.

    Example:
        >>> s = Scenario.random(2, seed=0)
        >>> bool((anneal(s, chains=16, iterations=200).gap < 0.01).all())
        True
    """
    started = time.perf_counter()
    positive("chains", chains)
    positive("iterations", iterations)
    if shares not in SHARE_MODES:
        raise SearchError(f"shares: {shares!r} is not one of {', '.join(SHARE_MODES)}")
    if not 0 < cooling < 1:
        raise SearchError(f"cooling: expected a number between 0 and 1, got {cooling}")
    given = checked_assignment(scenario, assignment)
    index = checked_steps(scenario, steps)
    b, c, m, _ = scenario.shape
    if share is not None:
        share = torch.as_tensor(share, dtype=scenario.demand.dtype, device=scenario.device).expand(b, m)
    at_once = max(1, _STATES_AT_ONCE // (chains * m * (c if given is None else 1)))
    plans, histories, proposals = [], [], 0
    for start in range(0, b, at_once):
        rows = slice(start, start + at_once)
        part = scenario[rows]
        problem = _problem(part, None if given is None else given[rows], None if share is None else share[rows],
                           shares == "closed_form")  # fmt: skip
        target = None
        if target_gap is not None:
            bound = upper_bound(part, None if given is None else given[rows])
            target = bound - target_gap * bound.abs().clamp(min=1)
        deadline = None if max_seconds is None else started + max_seconds * min(1.0, (start + at_once) / b)
        state, history, done = _run(
            problem, None if index is None else index[rows], chains, iterations, seed, cooling, deadline,
            target, callback,
        )  # fmt: skip
        plans.append(_finish(problem, state, None if given is None else given[rows], polish))
        histories.append(history)
        proposals += done * chains * len(part)
    plan = Plan(*(torch.cat([getattr(p, f) for p in plans]) for f in ("assignment", "steps", "share")))
    length = max(len(h) for h in histories)
    history = torch.cat([torch.cat([h, h[-1:].expand(length - len(h), -1)]) for h in histories], 1)
    return certified("anneal", scenario, given, plan, started, proposals, history)


def _problem(scenario: Scenario, given: Tensor | None, share: Tensor | None, closed_form: bool) -> _Problem:
    total = scenario.demand.sum(-1)
    if given is None:
        gain = scenario.quality.permute(0, 2, 3, 1).contiguous()
        gain = torch.where(torch.isneginf(gain), -_PENALTY, gain)
    else:
        gain = quality_by_step(scenario, given)
        gain = torch.where(torch.isneginf(gain), -_PENALTY * total[:, None, None], gain)
    simple = scenario.latency == "slot" and scenario.share_units is None and share is None
    load = None if given is None else loads(scenario, given)
    return _Problem(scenario, gain, step_service_times(scenario), total, load, share, closed_form and simple)


def _energy(problem: _Problem, state: _State) -> Tensor:
    """Utility of every chain, shape (B, R); what breaks a constraint costs a penalty that leads back."""
    scenario = problem.scenario
    b, _, m = state.index.shape
    row = torch.arange(b * m, device=state.index.device).reshape(b, 1, m)
    flat = row * problem.service.shape[-1] + state.index
    gain = problem.gain.flatten(0, 2)[flat]
    service = problem.service.flatten()[flat]
    if problem.load is None:
        assert state.assign is not None
        weight = scenario.demand[:, None, None] * state.assign
        load = weight.sum(-1)
        quality = (weight * gain).sum((-2, -1))
    else:
        load = problem.load[:, None]
        quality = gain.sum(-1)
    penalty = torch.zeros_like(quality)
    if problem.closed_form:
        delay = (load * service.sqrt()).sum(-1).square()
    else:
        share = _share(problem, state.logit, load)
        busy = load * service / share.clamp(min=1e-12)
        if scenario.latency == "slot":
            delay = (load * busy).sum(-1)
        else:
            calm = busy.clamp(max=0.999)
            delay = (calm + calm.square() / (2 * (1 - calm))).sum(-1)
            penalty = _PENALTY * (busy - 0.999).clamp(min=0).sum(-1)
    latency = delay / problem.total[:, None]
    if scenario.deadline_s is not None:
        over = (latency / scenario.deadline_s[:, None] - 1).clamp(min=0)
        penalty = penalty + torch.where(over > 0, 100 + _PENALTY * over, 0.0)
    if scenario.memory_gib is not None and scenario.memory_limit_gib is not None:
        resident = (scenario.memory_gib[:, None] * (load > 0)).sum(-1)
        over = (resident / scenario.memory_limit_gib[:, None] - 1).clamp(min=0)
        penalty = penalty + torch.where(over > 0, 100 + _PENALTY * over, 0.0)
    return quality / problem.total[:, None] - scenario.latency_weight[:, None] * latency - penalty


def _share(problem: _Problem, logit: Tensor, load: Tensor) -> Tensor:
    """Shares of every chain: given, or the softmax of the logits of loaded models, in whole units if sliced."""
    if problem.share is not None:
        return problem.share[:, None]
    share = logit.masked_fill(load <= 0, -torch.inf).softmax(-1)
    units = problem.scenario.share_units
    if units is None:
        return share
    # Largest remainders, every loaded model first getting one unit.
    loaded = load > 0
    spare = (units - loaded.sum(-1, keepdim=True)).clamp(min=0)
    ideal = share * spare
    whole = ideal.floor()
    rank = (ideal - whole).masked_fill(~loaded, -1).argsort(-1, descending=True).argsort(-1)
    whole = whole + (rank < (spare - whole.sum(-1, keepdim=True)).round())
    return torch.where(loaded, whole + 1, torch.zeros_like(whole)) / units


def _start(problem: _Problem, index: Tensor | None, chains: int, draw: Callable[..., Tensor]) -> _State:
    """Random starting points from one stream for all scenarios; the first chains start at single models."""
    b, c, m, k = problem.scenario.shape
    drawn = (draw(chains, m) * k).long().clamp(max=k - 1)
    allowed = problem.scenario.quality.isfinite().any(1)
    fallback = allowed.int().argmax(-1)[:, None].expand(b, chains, m)
    start = drawn.expand(b, chains, m)
    start = torch.where(
        allowed[:, None].expand(b, chains, m, k).gather(-1, start[..., None]).squeeze(-1), start, fallback
    )
    if index is not None:
        start = index[:, None].expand(b, chains, m)
    assign = None
    if problem.load is None:
        gumbel = -(-draw(chains, m, c).clamp(1e-9, 1 - 1e-9).log()).log()
        spread = (gumbel * (1 + 5 * draw(chains, 1, 1))).softmax(1)
        first = min(m, chains)
        spread[:first] = torch.eye(m, device=spread.device, dtype=spread.dtype)[:first, :, None]
        assign = spread.expand(b, chains, m, c).clone()
        load = (problem.scenario.demand[:, None, None] * assign).sum(-1)
    else:
        load = problem.load[:, None].expand(b, chains, m)
    middle = problem.service[..., k // 2].sqrt()[:, None]
    logit = (load * middle).clamp(min=1e-9).log() + 0.3 * (draw(chains, m) - 0.5)
    return _State(start.clone(), assign, logit)


def _move(problem: _Problem, state: _State, fixed_steps: bool, draw: Callable[..., Tensor], scale: float) -> _State:
    """One proposal for every chain; kinds of move that nothing is free for are never drawn."""
    _, r, m = state.index.shape
    k = problem.service.shape[-1]
    kinds = [not fixed_steps, problem.load is None, not problem.closed_form and problem.share is None]
    kind = torch.multinomial(torch.tensor(kinds, dtype=torch.float64), r, True, generator=draw.generator)  # type: ignore[attr-defined]
    kind = kind.to(state.index.device)
    u = draw(r, 8)
    model = (u[:, 0] * m).long().clamp(max=m - 1)
    here = torch.nn.functional.one_hot(model, m).bool()
    reach = 1 + (u[:, 1] * max(1.0, scale * k / 2)).floor()
    shift = torch.where(u[:, 2] < 0.5, -reach, reach).long()
    anywhere = (u[:, 1] * k).long().clamp(max=k - 1)
    near = (state.index + shift[:, None]).clamp(0, k - 1)
    moved = torch.where((u[:, 3] < 0.2)[:, None], anywhere[:, None], near)
    index = torch.where(here & (kind == 0)[:, None], moved, state.index)
    assign = state.assign
    if assign is not None:
        c = assign.shape[-1]
        category = torch.nn.functional.one_hot((u[:, 4] * c).long().clamp(max=c - 1), c).bool()
        whole = here[..., None].to(assign.dtype).expand(r, m, c)
        source = torch.nn.functional.one_hot((u[:, 5] * m).long().clamp(max=m - 1), m).to(assign.dtype)
        part = torch.where(u[:, 7] < 0.3, torch.ones_like(u[:, 7]), u[:, 7] * scale)
        amount = (assign * source[..., None]).sum(-2, keepdim=True) * part[:, None, None]
        shifted = assign + amount * (whole - source[..., None])
        new = torch.where((u[:, 6] < 0.35)[:, None, None], whole, shifted)
        assign = torch.where((kind == 1)[:, None, None] & category[:, None], new, assign)
    nudge = (u[:, 1] + u[:, 2] + u[:, 3] - 1.5) * 2 * scale
    logit = state.logit + torch.where(here & (kind == 2)[:, None], nudge[:, None], torch.zeros_like(nudge)[:, None])
    return _State(index, assign, logit)


def _run(
    problem: _Problem,
    index: Tensor | None,
    chains: int,
    iterations: int,
    seed: int,
    cooling: float,
    deadline: float | None,
    target: Tensor | None,
    callback: Callable[[Progress], None] | None,
) -> tuple[_State, Tensor, int]:
    """Anneal one chunk; returns each scenario's best state (R = 1), the history and the iterations done."""
    generator = torch.Generator().manual_seed(seed)
    dtype, device = problem.total.dtype, problem.total.device

    def draw(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64).to(device=device, dtype=dtype)

    draw.generator = generator  # type: ignore[attr-defined]
    state = _start(problem, index, chains, draw)
    fixed = index is not None
    nothing_free = fixed and problem.load is not None and (problem.closed_form or problem.share is not None)
    energy = _energy(problem, state)
    best, best_energy = state, energy
    probes = [(_energy(problem, _move(problem, state, fixed, draw, 1.0)) - energy).abs() for _ in range(8)] if (
        not nothing_free) else [torch.zeros_like(energy)]  # fmt: skip
    deltas = torch.stack(probes).flatten(1, 1).movedim(1, 0).flatten(1)
    ordinary = torch.where(deltas < _PENALTY / 200, deltas, torch.zeros_like(deltas))
    hot = (ordinary.sum(-1) / (ordinary > 0).sum(-1).clamp(min=1)).clamp(min=1e-9)[:, None]
    every = max(1, iterations // _HISTORY)
    history, done = [best_energy.amax(-1)], 0
    for i in range(0 if nothing_free else iterations):
        fraction = i / max(iterations - 1, 1)
        temperature = hot * cooling**fraction
        proposal = _move(problem, state, fixed, draw, max(0.02, 1 - fraction))
        proposed = _energy(problem, proposal)
        chance = draw(chains).log()
        take = (proposed - energy) > temperature * chance
        state = state.where(take, proposal)
        energy = torch.where(take, proposed, energy)
        better = energy > best_energy
        best = best.where(better, state)
        best_energy = torch.maximum(best_energy, energy)
        done = i + 1
        if done % every == 0 or done == iterations:
            history.append(best_energy.amax(-1))
            if callback is not None:
                callback(Progress(done, temperature[:, 0], float(take.double().mean()), history[-1]))
            if target is not None and bool((history[-1] >= target).all()):
                break
            if deadline is not None and time.perf_counter() > deadline:
                break
    winner = best_energy.argmax(-1)
    rows = torch.arange(len(winner), device=device)
    assign = None if best.assign is None else best.assign[rows, winner][:, None]
    return (
        _State(best.index[rows, winner][:, None], assign, best.logit[rows, winner][:, None]),
        torch.stack(history),
        done,
    )


def _finish(problem: _Problem, state: _State, given: Tensor | None, polish: bool) -> Plan:
    """The plan of each scenario's best state, its shares and where possible its assignment made optimal."""
    scenario = problem.scenario
    index = state.index[:, 0]
    steps = scenario.steps[index]
    if given is not None:
        assignment = given
    else:
        assert state.assign is not None
        assignment = state.assign[:, 0].transpose(-1, -2).contiguous()
        assignment = assignment / assignment.sum(-1, keepdim=True)
    load = loads(scenario, assignment)
    if problem.share is not None:
        return Plan(assignment, steps, problem.share)
    if not polish and not problem.closed_form:
        return Plan(assignment, steps, _share(problem, state.logit, load[:, None])[:, 0])
    plan = Plan(assignment, steps, best_share(scenario, assignment, steps))
    separable = problem.closed_form and scenario.memory_gib is None and scenario.deadline_s is None
    if not polish or given is not None or not separable:
        return plan
    refined = best_assignment(scenario, index)
    other = Plan(refined, steps, best_share(scenario, refined, steps))
    better = evaluate(scenario, other).utility > evaluate(scenario, plan).utility
    return Plan(
        torch.where(better[:, None, None], other.assignment, plan.assignment),
        steps,
        torch.where(better[:, None], other.share, plan.share),
    )
