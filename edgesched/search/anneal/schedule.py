"""Temperatures: where they start, how they fall, and how tempered chains exchange them."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from edgesched.errors import ArgumentError
from edgesched.search._result import number, positive
from edgesched.search.anneal import rng
from edgesched.search.anneal.general import INFEASIBLE
from edgesched.search.anneal.tables import Tables
from edgesched.search.anneal.walk import Move, walk

SCHEDULES = ("geometric", "adaptive")
_PROBES = 32
_PROBE_ITERATION = -(1 << 24)
_SWAP_ITERATION = -(1 << 30)
_FIXED_POINT = float(1 << 24)


def starting_temperature(tables: Tables, moves: list[Move], lanes: int, seed: int) -> Tensor:
    """Mean |change of utility| of accepted proposals from random starts, shape (B, 1), float64.

    Proposals of an infeasible state, from or to it, are left out. Sums are over whole numbers, so that a
    scenario's temperature does not depend on its batch.

    Args:
        tables: A chunk of B scenarios.
        moves: One sweep.
        lanes: Chains R of each scenario.
        seed: Seed of the search.
    """
    state = walk(tables, lanes, seed, False)
    device = tables.scenario.device
    count, total = (torch.zeros(len(tables.scenario), dtype=torch.int64, device=device) for _ in range(2))
    free = torch.zeros(len(tables.scenario), 1, dtype=torch.float32, device=device)
    chain, logs = rng.chain_words(lanes, device), rng.log_table(device)
    before = state.energy()
    probed = moves[:: max(1, len(moves) // _PROBES)]
    for i, move in enumerate(probed):
        jump, shift, threshold = block(chain, logs, [move], [0.0], seed, _PROBE_ITERATION + i)
        state.move(move, jump[0], shift[0], threshold[0], free)
        after = state.energy()
        change = torch.where(torch.minimum(before, after) > INFEASIBLE / 2, (after - before).abs(), 0.0)
        usual = (change > 0) & (change < -INFEASIBLE / 2)
        total += torch.where(usual, (change * _FIXED_POINT).round(), 0.0).long().sum(-1)
        count += usual.sum(-1)
        before = after
    return (total.double() / _FIXED_POINT / count.clamp(min=1)).clamp(min=1e-9)[:, None]


def block(
    chain: Tensor, logs: Tensor, moves: list[Move], fractions: list[float], seed: int, first: int, compile: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Proposals of consecutive iterations, each of shape (len(moves), R); their reach shrinks with the fraction done.

    Args:
        chain: Words of the chains, shape (R,).
        logs: :func:`rng.log_table`.
        moves: Move of each iteration.
        fractions: Fraction of the search done at each iteration, 0 to 1.
        seed: Seed of the search.
        first: Number of the first iteration.
        compile: Whether the kernel is compiled.
    """
    from edgesched.search.anneal.kernel import compiled

    device = chain.device

    def column(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)[:, None]

    # Two rows at least: a dimension of size 1 would be compiled for itself.
    pad = [moves[-1]] * (len(moves) == 1)
    moves, fractions = moves + pad, fractions + [0.0] * len(pad)
    draw = compiled(rng.draws) if compile else rng.draws
    return draw(
        chain, rng.iteration_words(seed, first, len(moves), device), column([m.options for m in moves]),
        column([max(1, round(m.reach * (1 - f))) for m, f in zip(moves, fractions, strict=True)]),
        column([m.far for m in moves]), logs,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Cooling:
    """How an annealing cools.

    Args:
        last: Last temperature relative to the first.
        schedule: ``"geometric"``, or ``"adaptive"`` to follow an acceptance rate.
        tempering: Hold the chains at a ladder of temperatures and exchange neighbours, in place of cooling.

    Raises:
        ArgumentError: If a value is out of its range.
    """

    last: float = 1e-4
    schedule: str = "geometric"
    tempering: bool = False

    def __post_init__(self) -> None:
        number("cooling.last", self.last, above=0, below=1)
        if self.schedule not in SCHEDULES:
            raise ArgumentError(f"cooling.schedule: {self.schedule!r} is not one of {', '.join(SCHEDULES)}")


@dataclasses.dataclass(frozen=True)
class Stopping:
    """When an annealing ends before its last proposal.

    Args:
        max_seconds: After this time, over all scenarios.
        patience: A scenario, after this many proposals of each chain without a better plan.
        target_gap: A scenario, once its gap to its bound is at most this.

    Raises:
        ArgumentError: If a value is out of its range.
    """

    max_seconds: float | None = None
    patience: int | None = None
    target_gap: float | None = None

    def __post_init__(self) -> None:
        if self.patience is not None:
            positive("stopping.patience", self.patience)
        number("stopping.max_seconds", self.max_seconds, least=0)
        number("stopping.target_gap", self.target_gap, least=0)


class Temperature:
    """Inverse temperatures of a chunk.

    ``geometric`` falls from the start to ``cooling`` times it by equal factors. ``adaptive`` (modified Lam
    schedule: Boyan 1998; Cicirello, Algorithms 2020) raises or lowers it so that the acceptance rate follows
    1 → 0.44 over the first 15 %, 0.44 until 65 %, then → 0.001. ``tempering`` keeps one ladder of
    temperatures over the chains of a scenario, which neighbours exchange (Swendsen and Wang 1986).

    Args:
        hot: Starting temperature, shape (B, 1).
        cooling: Last temperature relative to the first.
        schedule: One of ``SCHEDULES``.
        rungs: Chains of the ladder, or 0 without tempering.
        updates: How often :meth:`adapt` will be called.
    """

    def __init__(self, hot: Tensor, cooling: float, schedule: str, rungs: int, updates: int) -> None:
        self.hot, self.cooling, self.schedule = hot, cooling, schedule
        self.factor = torch.ones_like(hot)
        self.speed = 3 * math.log(1 / cooling) / max(updates, 1)
        self.rung = torch.arange(rungs, device=hot.device).expand(len(hot), rungs).contiguous() if rungs else None

    def now(self, fraction: float) -> Tensor:
        """Temperature at a fraction of the iterations, shape (B, 1) or, tempered, (B, R); float64."""
        if self.rung is not None:
            ladder = self.cooling ** (self.rung.double() / max(self.rung.shape[1] - 1, 1))
            return self.hot * ladder
        if self.schedule == "adaptive":
            return self.hot * self.factor
        return self.hot * self.cooling**fraction

    def adapt(self, fraction: float, acceptance: Tensor) -> None:
        """Follow the acceptance rate, shape (B,).

        Args:
            fraction: Fraction of the iterations done.
            acceptance: Share of the latest proposals taken, shape (B,).
        """
        if self.schedule != "adaptive" or self.rung is not None:
            return
        if fraction < 0.15:
            wanted = 0.44 + 0.56 * 560.0 ** (-fraction / 0.15)
        elif fraction < 0.65:
            wanted = 0.44
        else:
            wanted = 0.44 * 440.0 ** (-(fraction - 0.65) / 0.35)
        change = math.exp(self.speed)
        self.factor = (self.factor * torch.where(acceptance[:, None] > wanted, 1 / change, change)).clamp(
            min=self.cooling**2, max=1 / self.cooling
        )

    def exchange(self, energy: Tensor, chain: Tensor, seed: int, round_: int) -> None:
        """Neighbouring rungs swap temperatures with probability min(1, exp((β_i − β_j)(E_j − E_i))).

        Args:
            energy: Utility of every chain, shape (B, R).
            chain: Words of the chains, shape (R,).
            seed: Seed of the search.
            round_: Number of the exchange: even ones pair rungs 0 and 1, odd ones 1 and 2, and so on.
        """
        if self.rung is None:
            return
        rungs = self.rung.shape[1]
        order = self.rung.argsort(-1)
        pairs = torch.arange(round_ % 2, rungs - 1, 2, device=energy.device)
        if len(pairs) == 0:
            return
        beta = 1 / self.now(0.0)
        hot, cold = order[:, pairs], order[:, pairs + 1]
        gain = (beta.gather(-1, cold) - beta.gather(-1, hot)) * (energy.gather(-1, hot) - energy.gather(-1, cold))
        word, _ = rng.words(chain[pairs], rng.iteration_words(seed, _SWAP_ITERATION + round_, 1, energy.device))
        take = gain > rng.log_table(energy.device)[(word & 0xFFFF).long()]
        rung = self.rung.scatter(-1, hot, torch.where(take, pairs + 1, pairs.expand_as(hot)))
        self.rung = rung.scatter(-1, cold, torch.where(take, pairs, (pairs + 1).expand_as(hot)))
