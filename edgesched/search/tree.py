"""Monte-Carlo tree search over step counts, with a subroutine that solves assignment and shares.

The idea of the journal successor (Gao et al., IEEE TMC 2025, doi 10.1109/TMC.2025.3574065: tree search with a
resource subroutine; its details are ours): one level of the tree for each model, whose branches are its step
counts and, where the assignment is free, leaving it out. Below a new node the plan is completed at random and from the
best plan so far; the subroutine gives every completion its best assignment and shares. Selection follows UCT
(Kocsis and Szepesvári 2006) on utilities scaled to what the scenario has shown so far.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

from edgesched.equations.branching import Concave, value
from edgesched.equations.shares import best_share
from edgesched.search._climb import separable
from edgesched.search._plans import best_assignment
from edgesched.search._result import certified, checked_assignment, number, positive
from edgesched.search._score import routed, scored
from edgesched.search._threads import threads_for
from edgesched.types import Plan, Scenario, SearchResult

_RECORDED = 200
#: Looks at the dual that judge a completion; the plan kept in the end is solved to the last digit.
_LOOKS = 6


def tree(
    scenario: Scenario,
    *,
    assignment: Tensor | None = None,
    iterations: int = 300,
    rollouts: int = 16,
    exploration: float = 0.3,
    seed: int = 0,
) -> SearchResult:
    """Grow one tree per scenario, all of them together.

    The subroutine is exact in slot mode without constraints that do not separate; elsewhere shares are exact and a
    free assignment is the best of a sweep over prices of load (:func:`edgesched.search._score.routed`).

    Args:
        scenario: Batch of B scenarios, any latency model and constraints.
        assignment: Kept as it is if given, shape (B, C, M).
        iterations: Nodes added to each tree.
        rollouts: Completions of each new node; half at random, half from the best plan so far.
        exploration: Weight of the UCT term.
        seed: Seed of the completions, the same for all scenarios.

    Returns:
        The best plan met, with ``history`` at up to 200 iterations.

    Raises:
        ArgumentError: If an argument is out of its range.
        PlanError: If the assignment's rows are no probabilities.

    Example:
        >>> s = Scenario.random(2, seed=0)
        >>> bool((tree(s, iterations=100).gap < 0.05).all())
        True
    """
    started = time.perf_counter()
    positive("iterations", iterations)
    positive("rollouts", rollouts)
    number("exploration", exploration, least=0)
    given = checked_assignment(scenario, assignment)
    b = len(scenario)
    with threads_for(rollouts * b * scenario.shape[1] * scenario.shape[2]):
        search = _Trees(scenario, given, iterations, seed)
        history = []
        every = max(1, iterations // _RECORDED)
        for i in range(iterations):
            search.grow(i + 1, rollouts, exploration)
            if (i + 1) % every == 0 or i + 1 == iterations:
                history.append(search.best)
        plan = search.plan()
        return certified("tree", scenario, given, plan, started, iterations * rollouts * b, torch.stack(history))


class _Trees:
    """One tree per scenario as arrays: visits, summed scores and children of shape (B, nodes, options)."""

    def __init__(self, scenario: Scenario, given: Tensor | None, nodes: int, seed: int) -> None:
        b, _, m, k = scenario.shape
        self.scenario, self.given = scenario, given
        self.solved = separable(scenario)
        self.problem = Concave.of(scenario, given) if self.solved else None
        self.optional = given is None and not self.solved
        self.generator = torch.Generator().manual_seed(seed)
        device, dtype = scenario.device, scenario.demand.dtype
        options = k + self.optional
        shape = (b, nodes + 1, options)
        self.visits = torch.zeros(shape, dtype=dtype, device=device)
        self.scores = torch.zeros(shape, dtype=dtype, device=device)
        self.child = torch.zeros(shape, dtype=torch.int64, device=device)
        self.rows = torch.arange(b, device=device)
        self.best = torch.full((b,), -torch.inf, dtype=dtype, device=device)
        self.worst = torch.full((b,), torch.inf, dtype=dtype, device=device)
        self.choice = torch.zeros(b, m, dtype=torch.int64, device=device)
        barred = ~scenario.quality.isfinite().any(1)
        if self.optional:
            barred = torch.cat([barred, torch.zeros_like(barred[..., :1])], -1)
        everything = barred.all(-1, keepdim=True)
        self.barred = barred & ~everything
        self.allowed = (~self.barred).to(dtype)

    def grow(self, new: int, rollouts: int, exploration: float) -> None:
        """Descend to a node not yet in the tree, add it, complete it, and tell its ancestors."""
        b, _, m, _ = self.scenario.shape
        node = torch.zeros_like(self.rows)
        inside = torch.ones_like(self.rows, dtype=torch.bool)
        path = torch.full((b, m), -1, dtype=torch.int64, device=node.device)
        nodes = torch.zeros_like(path)
        noise = torch.rand((m, self.visits.shape[-1]), generator=self.generator, dtype=torch.float64)
        noise = noise.to(node.device, self.visits.dtype)
        for model in range(m):
            visits = self.visits[self.rows, node]
            mean = self.scores[self.rows, node] / visits.clamp(min=1)
            explore = exploration * ((1 + visits.sum(-1, keepdim=True)).log() / visits.clamp(min=1)).sqrt()
            score = torch.where(visits > 0, mean + explore, 10 + noise[model])
            option = score.masked_fill(self.barred[:, model], -torch.inf).argmax(-1)
            path[:, model] = torch.where(inside, option, -1)
            nodes[:, model] = node
            after = self.child[self.rows, node, option]
            fresh = inside & (after == 0)
            if model + 1 < m:
                at = self.rows[fresh]
                self.child[at, node[fresh], option[fresh]] = new
            inside = inside & ~fresh
            node = torch.where(inside, after, node)
        completed = self._complete(path, rollouts)
        utility = self._judge(completed)
        most, which = utility.max(-1)
        better = most > self.best
        self.best = torch.where(better, most, self.best)
        self.choice = torch.where(better[:, None], completed[self.rows, which], self.choice)
        lowest = utility.masked_fill(utility.isinf(), torch.inf).amin(-1)
        self.worst = torch.minimum(self.worst, lowest)
        span = (self.best - self.worst).clamp(min=1e-12)
        reward = torch.where(most.isfinite() & span.isfinite(), (most - self.worst) / span, 0.0).clamp(0, 1)
        for model in range(m):
            on = path[:, model] >= 0
            at, where, option = self.rows[on], nodes[on, model], path[on, model]
            self.visits[at, where, option] += 1
            self.scores[at, where, option] += reward[on]

    def _complete(self, path: Tensor, rollouts: int) -> Tensor:
        """Completions of partial choices, shape (B, rollouts, M)."""
        b, m = path.shape
        uniform = torch.rand((rollouts, m), generator=self.generator, dtype=torch.float64).to(path.device)
        edges = self.allowed.cumsum(-1)
        aim = uniform[None, :, :, None].to(edges.dtype) * edges[:, None, :, -1:]
        drawn = (edges[:, None] <= aim).sum(-1)
        change = torch.rand((rollouts, m), generator=self.generator, dtype=torch.float64).to(path.device) < 1 / m
        known = self.best.isfinite()[:, None, None]
        kept = known & (torch.arange(rollouts, device=path.device) % 2 == 1)[:, None] & ~change
        drawn = torch.where(kept, self.choice[:, None].expand(b, rollouts, m), drawn)
        return torch.where(path[:, None] >= 0, path[:, None], drawn)

    def _judge(self, completed: Tensor) -> Tensor:
        """Utility of completions with the subroutine's assignment and shares, shape (B, rollouts)."""
        if self.problem is not None:
            start = torch.zeros(completed.shape[:2], dtype=torch.float64, device=completed.device)
            total = value(self.problem, completed, start, _LOOKS)[0]
            utility = total / self.scenario.demand.sum(-1)[:, None]
            return utility.to(self.best.dtype)
        if self.given is not None:
            return scored(self.scenario, completed, self.given[:, None])[0]
        return routed(self.scenario, *self._split(completed))[0]

    def _split(self, completed: Tensor) -> tuple[Tensor, Tensor]:
        """Step positions and which models are in use; with none in use all are."""
        last = self.scenario.shape[3] - 1
        on = completed <= last
        return completed.clamp(max=last), on | ~on.any(-1, keepdim=True)

    def plan(self) -> Plan:
        """The best plan, its assignment and shares solved to the last digit."""
        if self.optional:
            index, on = self._split(self.choice[:, None])
            _, routing, share = routed(self.scenario, index, on)
            return Plan(routing[:, 0], self.scenario.steps[index[:, 0]], share[:, 0])
        assignment = self.given if self.given is not None else best_assignment(self.scenario, self.choice)
        steps = self.scenario.steps[self.choice]
        return Plan(assignment, steps, best_share(self.scenario, assignment, steps))
