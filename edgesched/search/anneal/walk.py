"""Chains of a chunk of scenarios: where they start, the order of their moves, and the state they are in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from edgesched.equations.shares import share_for_load
from edgesched.search.anneal import kernel, rng
from edgesched.search.anneal.general import Server, assign_general, energy, share_general, step_general
from edgesched.search.anneal.tables import Tables

F = TypeVar("F", bound=Callable[..., object])
STEP, ASSIGN, SHARE = 0, 1, 2
_SETTLED_UNITS = 64
_SNAPSHOT_MOVES = 48
_FUSED_MOVES = 8


@dataclass(frozen=True)
class Move:
    """One move that all chains make at the same iteration.

    Args:
        kind: ``STEP``, ``ASSIGN`` or ``SHARE``.
        row: Its model, or its piece.
        options: Number of options.
        reach: Longest step to a neighbouring option at the start of the search.
        far: How many of 8 proposals go anywhere.
    """

    kind: int
    row: int
    options: int
    reach: int
    far: int


def snapshot_moves(moves: int) -> int:
    """Iterations between two looks at the best states: whole sweeps of so many moves, 48 or a few more."""
    return moves * -(-_SNAPSHOT_MOVES // moves)


def sweep(tables: Tables) -> list[Move]:
    """The moves of one sweep: every piece, then every model; none for what is given."""
    _, _, m, k = tables.scenario.shape
    moves: list[Move] = []
    if tables.given is None and m > 1:
        moves += [Move(ASSIGN, row, m, 1, 8) for row in range(len(tables.gain))]
    if tables.units is not None and m > 1:
        moves += [Move(SHARE, row, m, max(1, tables.units // 4), 8) for row in range(m)]
    if tables.steps is None and k > 1:
        moves += [Move(STEP, row, k, max(1, k // 2), 2) for row in range(m)]
    return moves


class Walk:
    """State of B · R chains as int32 vectors of shape (rows, B, R), and one step of the search.

    Args:
        tables: The chunk.
        lanes: Chains R of each scenario.
        seed: Seed of the starting points.
        compile: Whether the kernels are compiled.
    """

    q: Tensor
    n: Tensor
    e: Tensor

    def __init__(self, tables: Tables, lanes: int, seed: int, compile: bool) -> None:
        self.tables, self.lanes, self.compile = tables, lanes, compile
        self.joint = tables.given is None
        self.prepare()
        self.start(seed)

    def prepare(self) -> None:
        """Views of the tables as the kernels take them."""
        t = self.tables
        b, _, m, k = t.scenario.shape
        self.unit, self.weight = t.unit.float(), t.weight.float()
        self.models = torch.arange(m, dtype=torch.int32, device=t.scenario.device)
        self.lane = torch.arange(b * self.lanes, dtype=torch.int32, device=t.scenario.device).reshape(b, self.lanes)
        if self.joint:
            self.gain_piece, self.cost_piece = t.gain.reshape(-1, b, m * k), t.cost.reshape(-1, b, m * k)
            self.gain_model = t.gain.permute(2, 0, 1, 3).contiguous()
            self.cost_model = t.cost.permute(2, 0, 1, 3).contiguous()

    def start(self, seed: int) -> None:
        """Random starting points from one stream for all scenarios; the first chains put all on one model."""
        t, lanes = self.tables, self.lanes
        b, _, m, k = t.scenario.shape
        device = t.scenario.device
        chain = rng.chain_words(lanes, device)
        rows = len(t.gain)
        word, _ = rng.words(chain, rng.iteration_words(seed, -1 - m - rows, m + rows, device))
        drawn = rng.below(word[:m], k)[:, None].expand(m, b, lanes)
        allowed = t.scenario.quality.isfinite().any(1).transpose(0, 1)  # (M, B, K)
        fallback = allowed.int().argmax(-1).to(torch.int32)[..., None]
        self.k = torch.where(allowed.gather(-1, drawn.long()), drawn, fallback).contiguous()
        if t.steps is not None:
            self.k = t.steps.T.to(torch.int32)[..., None].expand(m, b, lanes).contiguous()
        elif not self.joint:
            free = t.gain >= 0
            drawn = torch.where(
                free.gather(-1, self.k.long()), self.k, free.int().argmax(-1).to(torch.int32)[..., None]
            )
            self.k = drawn.contiguous()
        self.a: Tensor | None = None
        if self.joint:
            a = rng.below(word[m:], m)
            first = torch.arange(lanes, device=device) < m
            a = torch.where(first, torch.arange(lanes, device=device, dtype=torch.int32), a)
            a = a[:, None].expand(rows, b, lanes)
            at_k = torch.stack([kernel.look(t.gain[:, :, j], self.k[j].expand(rows, b, lanes)) for j in range(m)])
            best = at_k.argmax(0).to(torch.int32)
            self.a = torch.where(at_k.gather(0, a[None].long())[0] >= 0, a, best).contiguous()
        self.u: Tensor | None = None
        if t.units is not None:
            self.u = self._start_units()
        if t.start is not None:
            state = (self.a, self.k if t.steps is None else None, self.u)
            for mine, at in zip(state, (t.start.a, t.start.k, t.start.u), strict=True):
                if mine is not None and at is not None:
                    mine[..., 0] = at
        self.refresh()
        self.settle()

    def _start_units(self) -> Tensor:
        """Units in proportion to n √t at the middle step count, every model that may be loaded getting one."""
        t = self.tables
        _, b, k = t.server.service.shape
        assert t.units is not None
        load = torch.ones_like(t.server.service[..., :1]) if t.load is None else t.load.float()
        wish = (load * t.server.service[..., k // 2 : k // 2 + 1].sqrt()).double()
        wish = wish / wish.sum(0, keepdim=True)
        whole = (wish * t.units).floor().to(torch.int32)
        whole = torch.where((whole == 0) & (load > 0), 1, whole)
        over = whole.sum(0) - t.units
        richest = whole.argmax(0, keepdim=True)
        whole = whole.scatter_add(0, richest, -over[None].to(torch.int32)).clamp(min=0)
        return whole.expand(len(self.models), b, self.lanes).contiguous()

    def settle(self) -> None:
        """Deal slices out anew where that is better for a chain: exact for its loads and steps (Fox 1966)."""
        t = self.tables
        if self.u is None or t.scenario.share_units is None or t.scenario.share_units > _SETTLED_UNITS:
            return
        load = self.n.float() * t.server.load_unit + torch.zeros_like(self.u, dtype=torch.float32)
        service = kernel.look(t.server.service, self.k)
        share = share_for_load(t.scenario, load.movedim(0, -1), service.movedim(0, -1))
        dealt = (share * t.scenario.share_units).round().to(torch.int32).movedim(-1, 0).contiguous()
        value = energy(t.server, t.scenario.latency, self.k, self.n, dealt, self.q)
        better = value > self.e
        self.u, self.e = torch.where(better, dealt, self.u), torch.where(better, value, self.e)

    def refresh(self) -> None:
        """Everything that follows from assignment, steps and units."""
        t = self.tables
        if self.a is None:
            self.g, self.d = kernel.look(t.gain, self.k), kernel.look(t.cost, self.k)
        else:
            place = self.a * t.scenario.shape[3] + self.k.gather(0, self.a.long())
            self.g, self.d = kernel.look(self.gain_piece, place), kernel.look(self.cost_piece, place)
        self.s = self.d.sum(0, dtype=torch.int32)
        if t.separable:
            return
        self.q = self.g.sum(0, dtype=torch.int32)
        if self.a is None:
            assert t.load is not None
            self.n = t.load
        else:
            assert t.demand is not None
            served = [torch.where(self.a == j, t.demand, 0).sum(0, dtype=torch.int32) for j in range(len(self.models))]
            self.n = torch.stack(served)
        self.e = energy(t.server, t.scenario.latency, self.k, self.n, self.u, self.q)

    def kernel(self, function: F) -> F:
        """The function itself, or its compiled form."""
        return kernel.compiled(function) if self.compile else function

    def move(self, move: Move, jump: Tensor, shift: Tensor, threshold: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
        """One iteration.

        Args:
            move: The move of all chains.
            jump: Proposals, shape (R,), with ``shift`` and ``threshold`` as :func:`rng.draws` gives them.
            shift: Shape (R,).
            threshold: Shape (R,).
            beta: Inverse temperature, shape (B, 1) or (B, R), float32.

        Returns:
            The row moved, shape (B, R), before and after it.
        """
        if not self.tables.separable:
            return self._general(move, jump, shift, threshold, beta)
        if move.kind == ASSIGN:
            return self._assign(move.row, jump, threshold, beta)
        assert self.a is not None
        m, before = move.row, self.k[move.row].clone()
        new, self.g, self.d, self.s = self.kernel(kernel.step_joint)(
            self.a, before, self.g, self.d, self.s, self.gain_model[m], self.cost_model[m], self.models[m], jump, shift,
            threshold, beta, self.unit, self.weight,
        )  # fmt: skip
        self.k[m] = new
        return before, new

    def _assign(self, row: int, jump: Tensor, threshold: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
        assert self.a is not None
        before = self.a[row].clone()
        new, self.g[row], self.d[row], self.s = self.kernel(kernel.assign_joint)(
            self.a[row], self.g[row], self.d[row], self.s, self.k, self.gain_piece[row], self.cost_piece[row], jump,
            threshold, beta, self.unit, self.weight, self.lane,
        )  # fmt: skip
        self.a[row] = new
        return before, new

    def _general(
        self, move: Move, jump: Tensor, shift: Tensor, threshold: Tensor, beta: Tensor
    ) -> tuple[Tensor, Tensor]:
        t = self.tables
        server: Server = t.server
        latency, row = t.scenario.latency, move.row
        if move.kind == STEP:
            before = self.k[row]
            self.k, self.g, self.q, self.e = self.kernel(step_general)(
                self.a, self.k, self.g, self.n, self.u, self.q, self.e,
                t.gain if self.a is None else self.gain_model[row], self.models[row], jump, shift, threshold, beta,
                server, latency,
            )  # fmt: skip
            return before, self.k[row]
        if move.kind == SHARE:
            assert self.u is not None
            before = self.u[row]
            self.u, self.e = self.kernel(share_general)(
                self.k, self.n, self.u, self.q, self.e, self.models[row], jump, shift, threshold, beta, server, latency
            )
            return before, self.u[row]
        assert self.a is not None
        assert t.demand is not None
        before = self.a[row].clone()
        self.a[row], self.g[row], self.n, self.u, self.q, self.e = self.kernel(assign_general)(
            before, self.k, self.g[row], self.n, self.u, self.q, self.e, self.gain_piece[row], t.demand[row], jump,
            threshold, beta, self.lane, server, latency,
        )  # fmt: skip
        return before, self.a[row]

    def energy(self) -> Tensor:
        """Utility of every chain less the scenario's offset, shape (B, R), float64."""
        t = self.tables
        if not t.separable:
            return self.e.double()
        gain = self.g.sum(0, dtype=torch.int32).double() * t.unit
        return gain - t.weight * self.s.double().square()

    def kept(self) -> list[Tensor]:
        """What makes a plan: assignment, steps and units, as far as they are free; rows before (B, R)."""
        return [x for x in (self.a, self.k, self.u) if x is not None]

    def keep(self, best: list[Tensor], energy: Tensor, active: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        """The best states and energies so far of the chains of active scenarios, and their present energies.

        Args:
            best: Best states so far, as :meth:`kept` gives them.
            energy: Their energies, shape (B, R), float64.
            active: Scenarios that still run, shape (B,), boolean.
        """
        now = self.energy()
        better = (now > energy) & active[:, None]
        kept = [torch.where(better, new, old) for new, old in zip(self.kept(), best, strict=True)]
        return kept, torch.where(better, now, energy), now

    def restore(self, kept: list[Tensor]) -> None:
        """Take up a state that :meth:`kept` gave."""
        parts = iter(kept)
        if self.a is not None:
            self.a = next(parts).clone()
        self.k = next(parts).clone()
        if self.u is not None:
            self.u = next(parts).clone()
        self.refresh()


class GivenWalk(Walk):
    """Slot mode with the assignment given and free shares: one list of rows each, so that no move copies another's."""

    def refresh(self) -> None:
        """Gains and costs at the step counts, one tensor a model."""
        super().refresh()
        self.ks, self.gs, self.ds = ([row.clone() for row in x] for x in (self.k, self.g, self.d))
        self.gains, self.costs = ([row.contiguous().clone() for row in x] for x in (self.tables.gain, self.tables.cost))

    def prepare(self) -> None:
        """Constants of the kernels, and how many moves go into one: ``fused``, 0 with too many models."""
        super().prepare()
        _, _, models, options = self.tables.scenario.shape
        sweeps = snapshot_moves(models) // models
        fitting = [n for n in range(1, sweeps + 1) if sweeps % n == 0 and n * models <= _FUSED_MOVES]
        self.fused = models * max(fitting, default=0) if self.tables.steps is None and options > 1 else 0

    def sweeps(self, jump: Tensor, shift: Tensor, threshold: Tensor, beta: list[Tensor]) -> Tensor:
        """``fused`` iterations, from the first model on.

        Args:
            jump: Proposals, shape (fused, R), with ``shift`` and ``threshold`` as :func:`rng.draws` gives them.
            shift: Shape (fused, R).
            threshold: Shape (fused, R).
            beta: Inverse temperature of every sweep, each of shape (B, 1) or (B, R).

        Returns:
            How many of the last iterations changed each chain, shape (B, R), int32.
        """
        self.ks, self.gs, self.ds, self.s, changed = self.kernel(kernel.sweeps_given)(
            self.ks, self.gs, self.ds, self.s, self.gains, self.costs, jump, shift, threshold, beta, self.unit,
            self.weight,
        )  # fmt: skip
        return changed

    def move(self, move: Move, jump: Tensor, shift: Tensor, threshold: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
        """One iteration; compiled only where :meth:`sweeps` cannot be.

        Args:
            move: The move of all chains.
            jump: As in :meth:`Walk.move`.
            shift: As in :meth:`Walk.move`.
            threshold: As in :meth:`Walk.move`.
            beta: As in :meth:`Walk.move`.

        Returns:
            The row moved, shape (B, R), before and after it.
        """
        m, before = move.row, self.ks[move.row]
        step = kernel.step_given if self.fused else self.kernel(kernel.step_given)
        self.ks[m], self.gs[m], self.ds[m], self.s = step(
            before, self.gs[m], self.ds[m], self.s, self.gains[m], self.costs[m], jump, shift, threshold, beta, self.unit,
            self.weight,
        )  # fmt: skip
        return before, self.ks[m]

    def energy(self) -> Tensor:
        """Utility of every chain less the scenario's offset, shape (B, R), float64."""
        return kernel.energy_given(self.gs, self.s, self.tables.unit, self.tables.weight)

    def keep(self, best: list[Tensor], energy: Tensor, active: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        """As :meth:`Walk.keep`, in one kernel.

        Args:
            best: One tensor of step indices, shape (M, B, R).
            energy: As in :meth:`Walk.keep`.
            active: As in :meth:`Walk.keep`.
        """
        kept, best_energy, now = self.kernel(kernel.keep_given)(
            self.ks, self.gs, self.s, best[0], energy, active[:, None], self.tables.unit, self.tables.weight
        )
        return [kept], best_energy, now

    def kept(self) -> list[Tensor]:
        """Step indices, shape (M, B, R)."""
        return [torch.stack(self.ks)]


def walk(tables: Tables, lanes: int, seed: int, compile: bool) -> Walk:
    """The walk that suits a chunk.

    Args:
        tables: The chunk.
        lanes: Chains R of each scenario.
        seed: Seed of the starting points.
        compile: Whether the kernels are compiled.
    """
    fast = tables.separable and tables.given is not None
    return (GivenWalk if fast else Walk)(tables, lanes, seed, compile)
