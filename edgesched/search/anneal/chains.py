"""One annealing run of a chunk of scenarios: iterations, best states, stopping, and what a checkpoint holds."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from edgesched.search.anneal import rng
from edgesched.search.anneal.kernel import MEASURED_MOVES
from edgesched.search.anneal.schedule import Cooling, Stopping, Temperature, block, starting_temperature
from edgesched.search.anneal.tables import Tables
from edgesched.search.anneal.walk import GivenWalk, snapshot_moves, sweep, walk

HISTORY = 200
_DRAWN_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class Progress:
    """What a callback sees: state of the search at one recorded iteration.

    Args:
        iteration: Proposals of each chain so far.
        temperature: Of each scenario of the chunk (of the hottest chain, tempered), shape (B,).
        acceptance: Share of the latest proposals that changed a chain, over all scenarios.
        best: Best utility so far, shape (B,).
    """

    iteration: int
    temperature: Tensor
    acceptance: float
    best: Tensor


@dataclass(frozen=True)
class Rules:
    """When a run stops and how it cools; see :func:`edgesched.search.anneal`.

    Args:
        chains: Chains of each scenario.
        iterations: Proposals of each chain.
        seed: Seed of the search.
        cooling: How it cools.
        stopping: When it ends early.
        compile: Whether the kernels are compiled.
    """

    chains: int
    iterations: int
    seed: int
    cooling: Cooling
    stopping: Stopping
    compile: bool


class Run:
    """Annealing of one chunk from one seed.

    Args:
        tables: The chunk.
        rules: How to run.
        target: Utility at which a scenario is done, shape (B,), or None.
        saved: What :meth:`state` gave, to go on from there.
    """

    def __init__(self, tables: Tables, rules: Rules, target: Tensor | None, saved: dict[str, Tensor] | None) -> None:
        self.tables, self.rules, self.target = tables, rules, target
        self.moves = sweep(tables)
        # Compiled code is made for sizes of 2 or more: a lone chain gets a companion that is not counted.
        self.lanes = max(rules.chains, 2)
        self.walk = walk(tables, self.lanes, rules.seed, rules.compile)
        self.iterations = rules.iterations if self.moves else 0
        count = max(1, len(self.moves))
        self.stride = snapshot_moves(count)
        self.every = self.stride * -(-rules.iterations // (HISTORY * self.stride))
        hot = starting_temperature(tables, self.moves, self.lanes, rules.seed)
        rungs = self.lanes if rules.cooling.tempering else 0
        self.temperature = Temperature(
            hot, rules.cooling.last, rules.cooling.schedule, rungs, self.iterations // self.every
        )
        self.best = [x.clone() for x in self.walk.kept()]
        self.best_energy = self.walk.energy()
        self.active = torch.ones(len(tables.scenario), dtype=torch.bool, device=hot.device)
        self.stale = torch.zeros(len(tables.scenario), dtype=torch.int64, device=hot.device)
        self.history = [self.utility()]
        self.done = 0
        self.chain, self.logs = rng.chain_words(self.lanes, hot.device), rng.log_table(hot.device)
        self._block: tuple[int, int, tuple[Tensor, ...]] = (0, -1, ())
        if saved is not None:
            self._load(saved)

    def utility(self) -> Tensor:
        """Best utility so far as the kernel sees it, shape (B,), float64."""
        return self.best_energy[:, : self.rules.chains].amax(-1) + self.tables.offset

    def sizes(self) -> list[int]:
        """Sizes of the dimensions that compiled code sees."""
        b, c, m, k = self.tables.scenario.shape
        fused = self.walk.fused if isinstance(self.walk, GivenWalk) else 0
        rows = [fused] if fused else [len(self.tables.gain), c]
        return [2, b, self.lanes, m, k, *rows, rng.LEVELS]

    def warm(self) -> None:
        """Have every kernel compiled by moves of a copy that is thrown away."""
        if not self.rules.compile:
            return
        other = walk(self.tables, self.lanes, self.rules.seed, True)
        beta = self._beta(0)
        if isinstance(other, GivenWalk) and other.fused:
            times = other.fused // len(self.moves)
            drawn = block(self.chain, self.logs, self.moves * times, [0.0] * other.fused, self.rules.seed, 0, True)
            other.sweeps(*drawn, [beta] * times)
            other.keep(other.kept(), other.energy(), self.active)
            return
        for kind in sorted({move.kind for move in self.moves}):
            move = next(m for m in self.moves if m.kind == kind)
            jump, shift, threshold = block(self.chain, self.logs, [move], [0.0], self.rules.seed, 0, True)
            other.move(move, jump[0].clone(), shift[0].clone(), threshold[0].clone(), beta)

    def over(self) -> bool:
        """Whether every scenario has stopped or all iterations are done."""
        return self.done >= self.iterations or not bool(self.active.any())

    def advance(
        self, deadline: float | None, callback: Callable[[Progress], None] | None, tick: Callable[[int], None] | None
    ) -> bool:
        """Go on to the next recorded iteration; False once the run is over.

        Args:
            deadline: Time by ``time.perf_counter`` after which the run ends, or None.
            callback: Called with the progress at every recorded iteration.
            tick: Called with how many iterations were made.
        """
        if self.over():
            return False
        first, last = self.done, min(self.iterations, (self.done // self.every + 1) * self.every)
        count = len(self.moves)
        measured = max(first, last - min(count, MEASURED_MOVES))
        accepted = torch.zeros_like(self.stale)
        given = self.walk if isinstance(self.walk, GivenWalk) and self.walk.fused else None
        beta, i = self._beta(first), first
        while i < last:
            if given is not None and i % given.fused == 0 and i + given.fused <= last:
                betas = [self._beta(j) for j in range(i, i + given.fused, count)]
                changed = given.sweeps(*self._drawn(i, given.fused), betas)
                i += given.fused
                if i == last:
                    accepted += changed.sum(-1)
            else:
                if i % count == 0:
                    beta = self._beta(i)
                jump, shift, threshold = (x[0] for x in self._drawn(i, 1))
                before, after = self.walk.move(self.moves[i % count], jump, shift, threshold, beta)
                if i >= measured:
                    accepted += (before != after).sum(-1)
                i += 1
            if i % self.stride == 0 or i == last:
                self._snapshot((i - 1) // self.stride)
                if self.temperature.rung is not None:
                    beta = self._beta(i - 1)
        self.done = last
        self._record(accepted.double() / (self.lanes * (last - measured)), callback)
        if tick is not None:
            tick(last - first)
        return deadline is None or time.perf_counter() < deadline

    def _drawn(self, first: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Proposals of the next ``count`` iterations, shape (count, R) each; many are drawn at once and kept."""
        start, stop, drawn = self._block
        if not start <= first <= first + count <= stop:
            size = max(1, _DRAWN_AT_ONCE // self.lanes) // count * count or count
            start, stop = first, min(first + size, self.iterations)
            rows = range(start, stop)
            chosen = [self.moves[i % len(self.moves)] for i in rows]
            fractions = [i / self.iterations for i in rows]
            drawn = block(self.chain, self.logs, chosen, fractions, self.rules.seed, start, self.rules.compile)
            self._block = start, stop, drawn
        # Copies: a view's offset would be compiled into the kernel.
        jump, shift, threshold = (x[first - start : first - start + count].clone() for x in drawn)
        return jump, shift, threshold

    def _beta(self, iteration: int) -> Tensor:
        count = max(1, len(self.moves))
        return (1 / self.temperature.now(iteration // count * count / max(self.iterations, 1))).float()

    def _snapshot(self, round_: int) -> None:
        """Keep what is better than the best of each chain, and exchange tempered chains."""
        self.walk.settle()
        self.best, self.best_energy, energy = self.walk.keep(self.best, self.best_energy, self.active)
        self.temperature.exchange(energy, self.chain, self.rules.seed, round_)

    def _record(self, acceptance: Tensor, callback: Callable[[Progress], None] | None) -> None:
        fraction = self.done / self.iterations
        hottest = self.temperature.now(fraction).amax(-1)
        self.temperature.adapt(fraction, acceptance)
        self.history.append(self.utility())
        risen = self.history[-1] > self.history[-2]
        self.stale = torch.where(risen, 0, self.stale + self.every)
        if self.target is not None:
            self.active &= self.history[-1] < self.target
        if self.rules.stopping.patience is not None:
            self.active &= self.stale < self.rules.stopping.patience
        if callback is not None:
            callback(Progress(self.done, hottest, float(acceptance.mean()), self.history[-1]))

    def winners(self) -> tuple[list[Tensor], Tensor]:
        """Best state of each scenario, tensors (rows, B), and its utility less the offset, shape (B,)."""
        energy, chain = self.best_energy[:, : self.rules.chains].max(-1)
        return [x.gather(-1, chain[None, :, None].expand(len(x), -1, 1))[..., 0] for x in self.best], energy

    def state(self) -> dict[str, Tensor]:
        """All that :class:`Run` needs to go on, by name."""
        saved = {
            "done": torch.tensor(self.done),
            "best_energy": self.best_energy,
            "active": self.active,
            "stale": self.stale,
            "history": torch.stack(self.history),
            "factor": self.temperature.factor,
        }
        if self.temperature.rung is not None:
            saved["rung"] = self.temperature.rung
        for name, tensors in (("walk", self.walk.kept()), ("best", self.best)):
            saved |= {f"{name}_{i}": x for i, x in enumerate(tensors)}
        return saved

    def _load(self, saved: dict[str, Tensor]) -> None:
        count = len(self.best)
        self.walk.restore([saved[f"walk_{i}"] for i in range(count)])
        self.best = [saved[f"best_{i}"] for i in range(count)]
        self.best_energy, self.active, self.stale = saved["best_energy"], saved["active"], saved["stale"]
        self.history = list(saved["history"].unbind(0))
        self.temperature.factor = saved["factor"]
        self.temperature.rung = saved.get("rung")
        self.done = int(saved["done"])
