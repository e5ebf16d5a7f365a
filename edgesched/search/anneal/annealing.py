"""Simulated annealing over assignment, steps and shares, for many scenarios and chains at once.

Every chain of every scenario is one entry of the leading dimensions (B, R); one iteration proposes one
move in each and accepts by the Metropolis rule (Metropolis et al. 1953; Kirkpatrick et al. 1983). The step
is :mod:`edgesched.search.anneal.kernel` where shares separate and :mod:`edgesched.search.anneal.general` elsewhere.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress as Bar
from torch import Tensor

from edgesched.equations.bounds import upper_bound
from edgesched.equations.shares import best_share
from edgesched.equations.utility import evaluate
from edgesched.errors import ArgumentError, SearchError
from edgesched.search._plans import plan_at
from edgesched.search._result import certified, checked_assignment, checked_share, checked_steps, positive
from edgesched.search.anneal import checkpoint as checkpoints
from edgesched.search.anneal import kernel
from edgesched.search.anneal.chains import Progress, Rules, Run
from edgesched.search.anneal.schedule import Cooling, Stopping
from edgesched.search.anneal.tables import Tables, build, piece_sizes
from edgesched.types import Plan, Scenario, SearchResult

__all__ = ["Progress", "anneal"]

SHARE_MODES = ("closed_form", "annealed")
_NUMBERS_AT_ONCE = 32_000_000
_NUMBERS_A_CELL = 10  # of the tables while they are made
_SHARE_OF_GPU = 64
_SAVE_SECONDS = 10.0
# Proposals that repay compilation, measured on two cores of an EPYC with an empty cache: 18-32 s against 11 ns saved
# a proposal (assignment given), 7-12 s against 29 ns (joint), 25-45 s against 120-170 ns (queues and limits).
_REPAID_GIVEN = 2_500_000_000
_REPAID_JOINT = 400_000_000
_REPAID_GENERAL = 250_000_000


def anneal(
    scenario: Scenario,
    *,
    assignment: Tensor | None = None,
    steps: Tensor | None = None,
    share: Tensor | None = None,
    chains: int = 64,
    iterations: int = 1000,
    seed: int = 0,
    start: Plan | None = None,
    shares: str = "closed_form",
    polish: bool = True,
    cooling: Cooling = Cooling(),  # noqa: B008, for it is frozen
    stopping: Stopping = Stopping(),  # noqa: B008
    restarts: int = 1,
    compile: bool | None = None,
    checkpoint: Path | str | None = None,
    progress: bool = False,
    callback: Callable[[Progress], None] | None = None,
) -> SearchResult:
    """Anneal what is not given.

    A move changes one model's step count (to a neighbour or anywhere), the model of one category or part of
    one, or shifts share from one model to another. On one device the result of a scenario is the same to
    the bit alone, in any batch and order, compiled or not, and after a stop and a resume; a time limit
    excepted.

    Args:
        scenario: Batch of B scenarios.
        assignment: Kept as it is if given, shape (B, C, M).
        steps: Kept as they are if given, step counts of shape (B, M).
        share: Kept as they are if given, shape (B, M).
        chains: Chains R of each scenario.
        iterations: Proposals of each chain.
        seed: Seed of starting points and moves.
        start: A plan that each scenario's first chain starts from, for example that of the slot before: whatever
            comes of the search, it is at least as good as this, rounded to parts of a category and units of compute.
        shares: ``"closed_form"`` takes the best shares for every proposal (slot mode: exact; queue mode: by
            Newton steps; up to 16 slices dealt one by one, more are annealed); ``"annealed"`` makes them part of the search, as published.
        polish: At the end take the best shares for the plan found and, where it is a concave problem, its
            best assignment.
        cooling: How the temperature falls.
        stopping: When to end before the last proposal.
        restarts: Independent runs, each of ``iterations``; the best is returned.
        compile: Whether to compile the step; None decides by the number of proposals, on a GPU always.
        checkpoint: File to save the state to, every 10 seconds and at the end, and to go on from if it exists:
            also where a time limit ended the search before it was over.
        progress: Show a progress bar.
        callback: Called at every recorded iteration.

    Returns:
        Best plan of each scenario, with ``history`` of shape (≤ 201, B).

    Raises:
        ArgumentError: If an argument is out of its range.
        SearchError: If the checkpoint belongs to another problem.

    Example:
        >>> s = Scenario.random(2, seed=0)
        >>> bool((anneal(s, chains=16, iterations=200).gap < 0.01).all())
        True
    """
    started = time.perf_counter()
    for name, count in (("chains", chains), ("iterations", iterations), ("restarts", restarts)):
        positive(name, count)
    if shares not in SHARE_MODES:
        raise ArgumentError(f"shares: {shares!r} is not one of {', '.join(SHARE_MODES)}")
    for name, value, kind in (("cooling", cooling, Cooling), ("stopping", stopping, Stopping)):
        if not isinstance(value, kind):
            raise ArgumentError(f"{name}: expected search.{kind.__name__}(...), got {value!r}")
    max_seconds, target_gap = stopping.max_seconds, stopping.target_gap
    given = checked_assignment(scenario, assignment)
    index = checked_steps(scenario, steps)
    b, c, m, k = scenario.shape
    if max(m, k) > 32_767:
        raise SearchError(f"anneal: at most 32,767 models and step counts, got {m} and {k}")
    share = checked_share(scenario, share)
    if start is not None:
        evaluate(scenario, start)  # says what does not fit
    closed = shares == "closed_form"
    tried = chains * iterations * restarts * b
    simple = closed and share is None
    use = _worth_compiling(scenario, tried, given is not None, simple) if compile is None else compile
    use = use and (scenario.device.type != "cpu" or kernel.compiler())
    rules = Rules(chains, iterations, seed, cooling, stopping, use)
    saved: dict[str, Any] = {"finished": {}, "partial": {}}
    rows = m if given is not None else c * len(piece_sizes(c, True))
    cells = (c if given is not None else rows) * m * k
    numbers = max(chains, 2) * 6 * (rows + m) + _NUMBERS_A_CELL * cells
    at_once = max(1, _numbers_at_once(scenario.device) // numbers)
    path = None if checkpoint is None else Path(checkpoint)
    problem = ""
    if path is not None:
        kept = dataclasses.replace(rules, compile=False, stopping=dataclasses.replace(stopping, max_seconds=None))
        known = [given, index, share, *(() if start is None else (start.assignment, start.steps, start.share))]
        problem = checkpoints.fingerprint(scenario, known, f"{kept} {closed} {restarts} {target_gap} {at_once}")
        saved = checkpoints.load(path, problem, scenario.device) or saved
    jobs = [(slice(i, min(i + at_once, b)), r) for i in range(0, b, at_once) for r in range(restarts)]
    finished: dict[int, dict[str, Any]] = saved["finished"]
    partial: dict[int, dict[str, Tensor]] = saved["partial"]
    saved_at = time.perf_counter()

    def write() -> None:
        if path is not None:
            checkpoints.save(path, {"problem": problem, "finished": finished, "partial": partial})

    plans, histories = [], []
    outcomes: list[dict[str, Any]] = []
    with Bar(disable=not progress) as bar:
        task = bar.add_task("annealing", total=len(jobs) * iterations, completed=len(finished) * iterations)
        for job, (part, restart) in enumerate(jobs):
            piece = scenario[part]
            pad = use and len(piece) == 1
            given_part, index_part, share_part = (
                None if x is None else x[part] for x in (given, index, share)
            )  # fmt: skip
            first = None if start is None else start[part]
            if pad:
                piece = piece.repeat(2)
                given_part, index_part, share_part = (
                    None if x is None else x.repeat(2, *[1] * (x.ndim - 1))
                    for x in (given_part, index_part, share_part)
                )
                if first is not None:
                    first = Plan(first.assignment.repeat(2, 1, 1), first.steps.repeat(2, 1), first.share.repeat(2, 1))
            tables = build(piece, given_part, index_part, share_part, closed).started_at(first)
            if job not in finished:
                own = dataclasses.replace(rules, seed=seed + restart * 0x51ED2701)
                run = Run(tables, own, _target(piece, given_part, target_gap), partial.get(job))
                compiling = time.perf_counter()
                with kernel.tell_apart(run.sizes()):
                    run.warm()
                    started += time.perf_counter() - compiling
                    deadline = None if max_seconds is None else started + max_seconds * (job + 1) / len(jobs)
                    bar.update(task, completed=job * iterations + run.done)
                    while run.advance(deadline, callback, lambda n: bar.advance(task, n)):
                        if path is not None and time.perf_counter() - saved_at > _SAVE_SECONDS:
                            partial[job] = run.state()
                            write()
                            saved_at = time.perf_counter()
                states, energy = run.winners()
                outcome: dict[str, Any] = {
                    "states": states,
                    "energy": energy,
                    "history": torch.stack(run.history),
                    "done": run.done,
                }
                partial.pop(job, None)
                if run.over():
                    finished[job] = outcome
                else:
                    partial[job] = run.state()
                write()
            else:
                outcome = finished[job]
            outcomes.append(outcome)
            if restart == restarts - 1:
                results = outcomes[job + 1 - restarts : job + 1]
                plan, history = _gathered(tables, results, polish)
                real = slice(0, part.stop - part.start)
                plans.append(plan[real])
                histories.append(history[:, real])
    proposals = sum(int(d["done"]) * chains * (p.stop - p.start) for d, (p, _) in zip(outcomes, jobs, strict=True))
    plan = Plan(*(torch.cat([getattr(p, f) for p in plans]) for f in ("assignment", "steps", "share")))
    length = max(len(h) for h in histories)
    history = torch.cat([torch.cat([h, h[-1:].expand(length - len(h), -1)]) for h in histories], 1)
    return certified("anneal", scenario, given, plan, started, proposals, history, index=index, share=share)


def _numbers_at_once(device: torch.device) -> int:
    """Numbers of four bytes that a chunk may hold: what a CPU's caches and memory bear, or a part of a GPU's memory.

    A GPU wants millions of chains a launch; above 2³¹ the kernels' 32-bit indices would overflow.
    """
    if device.type != "cuda":
        return _NUMBERS_AT_ONCE
    memory = torch.cuda.get_device_properties(device).total_memory
    return min(2**31 - 1, max(_NUMBERS_AT_ONCE, memory // _SHARE_OF_GPU))


def _worth_compiling(scenario: Scenario, proposals: int, given: bool, closed: bool) -> bool:
    """Whether the time saved by compiled kernels is more than compilation costs; on a CPU the results are the same."""
    if scenario.device.type != "cpu":
        return True
    limits = (scenario.share_units, scenario.memory_gib, scenario.deadline_s)
    if not closed or scenario.latency != "slot" or any(limit is not None for limit in limits):
        return proposals >= _REPAID_GENERAL
    return proposals >= (_REPAID_GIVEN if given else _REPAID_JOINT)


def _target(scenario: Scenario, given: Tensor | None, target_gap: float | None) -> Tensor | None:
    if target_gap is None:
        return None
    bound = upper_bound(scenario, given)
    return bound - target_gap * bound.abs().clamp(min=1)


def _gathered(tables: Tables, results: list[dict[str, Any]], polish: bool) -> tuple[Plan, Tensor]:
    """Plan and history of a chunk from its restarts."""
    best = torch.stack([r["energy"] for r in results]).argmax(0)
    count = len(results[0]["states"])
    states = []
    for i in range(count):
        every = torch.stack([r["states"][i] for r in results])  # (restarts, rows, B)
        states.append(every.gather(0, best.expand(1, every.shape[1], -1))[0].T.contiguous())
    length = max(len(r["history"]) for r in results)
    padded = [torch.cat([h, h[-1:].expand(length - len(h), -1)]) for h in (r["history"] for r in results)]
    return _finish(tables, states, polish), torch.stack(padded).amax(0)


def _finish(tables: Tables, states: list[Tensor], polish: bool) -> Plan:
    """The plan of each scenario's best state (B, rows), its shares and where possible its assignment made optimal."""
    scenario = tables.scenario
    b, c, m, _ = scenario.shape
    parts = iter(states)
    if tables.given is not None:
        assignment = tables.given
    else:
        chosen = torch.nn.functional.one_hot(next(parts).long(), m).to(scenario.demand.dtype)
        size = tables.pieces.to(scenario.demand.dtype)
        assignment = (chosen.reshape(b, c, len(size), m) * size[:, None]).sum(-2)
    index = next(parts).long()
    steps = scenario.steps[index]
    if tables.share is not None:
        return Plan(assignment, steps, tables.share)
    if tables.units is not None and not polish:
        share = next(parts).to(scenario.demand.dtype) / tables.units
        return Plan(assignment, steps, share)
    plan = Plan(assignment, steps, best_share(scenario, assignment, steps))
    if not polish or tables.given is not None or not tables.separable:
        return plan
    other = plan_at(scenario, index)
    better = evaluate(scenario, other).utility > evaluate(scenario, plan).utility
    return Plan(
        torch.where(better[:, None, None], other.assignment, plan.assignment),
        steps,
        torch.where(better[:, None], other.share, plan.share),
    )
