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
from rich.progress import TaskID
from torch import Tensor

from edgesched.equations.bounds import upper_bound
from edgesched.equations.utility import evaluate
from edgesched.errors import ArgumentError, SearchError
from edgesched.search._result import certified, checked_assignment, checked_share, checked_steps, positive
from edgesched.search.anneal import kernel
from edgesched.search.anneal.chains import Progress, Rules, Run
from edgesched.search.anneal.checkpoint import Ledger, fingerprint
from edgesched.search.anneal.finish import gathered
from edgesched.search.anneal.schedule import Cooling, Stopping
from edgesched.search.anneal.tables import Tables, build, piece_sizes
from edgesched.types import Plan, Scenario, SearchResult

__all__ = ["Progress", "anneal"]

SHARE_MODES = ("closed_form", "annealed")
_NUMBERS_AT_ONCE = 32_000_000
_NUMBERS_A_CELL = 10  # of the tables while they are made
_SHARE_OF_GPU = 64
_SEEDS_APART = 0x51ED2701
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
        shares: ``"closed_form"`` takes the best shares for every proposal (slot mode: exact; queue mode: by Newton
            steps; up to 16 slices dealt one by one, more are annealed); ``"annealed"`` makes them part of the search,
            as published.
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
        PlanError: If what is given or started from is no plan of this scenario.

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
    known = _checked(scenario, assignment, steps, share, start)
    closed = shares == "closed_form"
    if compile is None:
        tried = chains * iterations * restarts * len(scenario)
        compile = _worth_compiling(scenario, tried, known.assignment is not None, closed and share is None)
    compile = compile and (scenario.device.type != "cpu" or kernel.compiler())
    rules = Rules(chains, iterations, seed, cooling, stopping, compile)
    at_once = _scenarios_at_once(known, chains)
    ledger = _ledger(known, rules, f"{closed} {restarts} {stopping.target_gap} {at_once}", checkpoint)
    annealing = _Annealing(known, rules, closed, restarts, at_once, ledger, started)
    with Bar(disable=not progress) as bar:
        plan, history = annealing.run(polish, bar, callback)
    return certified("anneal", scenario, known.assignment, plan, annealing.started, annealing.proposals, history,
                     index=known.steps, share=known.share)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Known:
    """A batch of scenarios and what is given in it, as :func:`anneal` takes it; ``steps`` are indices."""

    scenario: Scenario
    assignment: Tensor | None
    steps: Tensor | None
    share: Tensor | None
    start: Plan | None

    def part(self, rows: slice) -> _Known:
        a, k, f = (None if x is None else x[rows] for x in (self.assignment, self.steps, self.share))
        return _Known(self.scenario[rows], a, k, f, None if self.start is None else self.start[rows])

    def twice(self) -> _Known:
        def both(x: Tensor) -> Tensor:
            return x.repeat(2, *[1] * (x.ndim - 1))

        a, k, f = (None if x is None else both(x) for x in (self.assignment, self.steps, self.share))
        start = self.start
        if start is not None:
            start = Plan(both(start.assignment), both(start.steps), both(start.share))
        return _Known(self.scenario.repeat(2), a, k, f, start)

    def tables(self, closed: bool) -> Tables:
        return build(self.scenario, self.assignment, self.steps, self.share, closed).started_at(self.start)

    def target(self, gap: float | None) -> Tensor | None:
        """Utility within ``gap`` of the bound, shape (B,)."""
        if gap is None:
            return None
        bound = upper_bound(self.scenario, self.assignment)
        return bound - gap * bound.abs().clamp(min=1)


class _Annealing:
    """The jobs of one call: every chunk of scenarios, every restart of it.

    Args:
        known: The whole batch.
        rules: How a job runs; each restart has a seed of its own.
        closed: Whether shares follow from the loads where they can.
        restarts: Restarts of each chunk.
        at_once: Scenarios of a chunk.
        ledger: What is done already, and where to keep it.
        started: Start of the clock; compilation moves it on.
    """

    def __init__(
        self, known: _Known, rules: Rules, closed: bool, restarts: int, at_once: int, ledger: Ledger, started: float
    ) -> None:
        self.known, self.rules, self.closed, self.restarts = known, rules, closed, restarts
        batch = len(known.scenario)
        self.chunks = [slice(i, min(i + at_once, batch)) for i in range(0, batch, at_once)]
        self.ledger, self.started = ledger, started
        self.proposals = 0

    def run(self, polish: bool, bar: Bar, callback: Callable[[Progress], None] | None) -> tuple[Plan, Tensor]:
        """Best plan of each scenario, and history of shape (≤ 201, B)."""
        iterations = self.rules.iterations
        total = len(self.chunks) * self.restarts * iterations
        task = bar.add_task("annealing", total=total, completed=len(self.ledger.finished) * iterations)
        plans, histories = [], []
        for i, rows in enumerate(self.chunks):
            part, real = self.known.part(rows), slice(0, rows.stop - rows.start)
            # Compiled code is made for sizes of 2 or more: a lone scenario gets a companion that is not counted.
            if self.rules.compile and real.stop == 1:
                part = part.twice()
            tables = part.tables(self.closed)
            results = [self._job(i, restart, part, tables, bar, task, callback) for restart in range(self.restarts)]
            self.proposals += sum(int(found["done"]) for found in results) * self.rules.chains * real.stop
            plan, history = gathered(tables, results, polish)
            plans.append(plan[real])
            histories.append(history[:, real])
        plan = Plan(*(torch.cat([getattr(p, f) for p in plans]) for f in ("assignment", "steps", "share")))
        length = max(len(h) for h in histories)
        return plan, torch.cat([torch.cat([h, h[-1:].expand(length - len(h), -1)]) for h in histories], 1)

    def _job(
        self, chunk: int, restart: int, part: _Known, tables: Tables, bar: Bar, task: TaskID,
        callback: Callable[[Progress], None] | None,
    ) -> dict[str, Any]:  # fmt: skip
        """States, energy, history and proposals of one restart of a chunk: run, gone on with or read."""
        job, ledger, stopping = chunk * self.restarts + restart, self.ledger, self.rules.stopping
        if job in ledger.finished:
            return ledger.finished[job]
        rules = dataclasses.replace(self.rules, seed=self.rules.seed + restart * _SEEDS_APART)
        run = Run(tables, rules, part.target(stopping.target_gap), ledger.partial.get(job))
        compiling = time.perf_counter()
        with kernel.tell_apart(run.sizes()):
            run.warm()
            self.started += time.perf_counter() - compiling
            deadline = None
            if stopping.max_seconds is not None:
                deadline = self.started + stopping.max_seconds * (job + 1) / (len(self.chunks) * self.restarts)
            bar.update(task, completed=job * rules.iterations + run.done)
            while run.advance(deadline, callback, lambda n: bar.advance(task, n)):
                if ledger.due():
                    ledger.partial[job] = run.state()
                    ledger.write()
        states, energy = run.winners()
        found = {"states": states, "energy": energy, "history": torch.stack(run.history), "done": run.done}
        ledger.partial.pop(job, None)
        if run.over():
            ledger.finished[job] = found
        else:
            ledger.partial[job] = run.state()
        ledger.write()
        return found


def _checked(
    scenario: Scenario, assignment: Tensor | None, steps: Tensor | None, share: Tensor | None, start: Plan | None
) -> _Known:
    given = checked_assignment(scenario, assignment)
    index = checked_steps(scenario, steps)
    _, _, m, k = scenario.shape
    if max(m, k) > 32_767:
        raise SearchError(f"anneal: at most 32,767 models and step counts, got {m} and {k}")
    share = checked_share(scenario, share)
    if start is not None:
        evaluate(scenario, start)  # says what does not fit
    return _Known(scenario, given, index, share, start)


def _ledger(known: _Known, rules: Rules, more: str, checkpoint: Path | str | None) -> Ledger:
    """What a checkpoint holds of the same search; compilation and a time limit change no result."""
    device = known.scenario.device
    if checkpoint is None:
        return Ledger(None, "", device)
    kept = dataclasses.replace(rules, compile=False, stopping=dataclasses.replace(rules.stopping, max_seconds=None))
    start = () if known.start is None else (known.start.assignment, known.start.steps, known.start.share)
    parts = [known.assignment, known.steps, known.share, *start]
    return Ledger(Path(checkpoint), fingerprint(known.scenario, parts, f"{kept} {more}"), device)


def _scenarios_at_once(known: _Known, chains: int) -> int:
    """Scenarios of a chunk, by the numbers that their chains and tables hold."""
    _, c, m, k = known.scenario.shape
    given = known.assignment is not None
    rows = m if given else c * len(piece_sizes(c, True))
    cells = (c if given else rows) * m * k
    numbers = max(chains, 2) * 6 * (rows + m) + _NUMBERS_A_CELL * cells
    return max(1, _numbers_at_once(known.scenario.device) // numbers)


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
