"""The annealing step: pure elementwise arithmetic on structure-of-arrays state.

State is int32 vectors of shape (B, R), one per model and per piece of a category: step indices, model
indices, and *fixed-point* gain and cost. Sums of whole numbers do not depend on their order and the few
floating-point operations left (no exp, no log) are exactly rounded, so that compiled and eager code agree
to the bit and nothing drifts. At one iteration all chains move the same model or category and differ in
where they move it: a move then touches the rows of that model or category only, and no selection over
models is needed. In slot mode with free shares, with S = Σ n_m √t_m,

    utility · N = Σ n_c p_cm Q − ω S²,   Δ = ΔG − ω (S' − S) (S' + S),

needs two table look-ups a proposal. Each function is compiled by :func:`compiled` from this source.
"""

from __future__ import annotations

import functools
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

#: Moves at the end of a recorded iteration by which the acceptance rate is measured, one sweep at most.
MEASURED_MOVES = 8
F = TypeVar("F", bound=Callable[..., object])


def look(table: Tensor, index: Tensor) -> Tensor:
    """Entries of a table (..., B, K) at indices (..., B, R).

    Args:
        table: Shape (..., B, K).
        index: Positions in its rows, shape (..., B, R), of any integer type.
    """
    return table.gather(-1, index.long())


def at_lanes(k: Tensor, model: Tensor, lane: Tensor) -> Tensor:
    """Every chain's entry of ``k`` (M, B, R) at its own model (B, R); ``lane`` counts the chains, (B, R), int32.

    One flat index: a gather along the first dimension ran at a sixth of the speed.

    Args:
        k: Step indices of every model, shape (M, B, R).
        model: Model of every chain, shape (B, R), int32.
        lane: 0, 1, … over all chains, shape (B, R), int32.
    """
    place = model * lane.numel() + lane
    return k.reshape(-1).gather(0, place.reshape(-1).long()).reshape(lane.shape)


def propose(index: Tensor, jump: Tensor, shift: Tensor, options: int) -> Tensor:
    """The option jumped to, or a neighbour of the present one.

    Args:
        index: Present options, shape (B, R), int32.
        jump: Option jumped to, or negative for a neighbour, shape (R,).
        shift: Signed step to the neighbour, shape (R,); it ends at the first and the last option.
        options: Number of options.
    """
    return torch.where(jump >= 0, jump, (index + shift).clamp(0, options - 1))


def step_given(
    k: Tensor, g: Tensor, d: Tensor, s: Tensor, gain: Tensor, cost: Tensor, jump: Tensor, shift: Tensor,
    threshold: Tensor, beta: Tensor, unit: Tensor, weight: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """One model's step count, the assignment given.

    Args:
        k: Step index, shape (B, R); ``g`` and ``d`` its gain and cost, ``s`` the sum of costs over models.
        gain: Fixed-point Σ_c n_c p_cm Q of the model, shape (B, K), negative where masked.
        cost: Fixed-point n_m √t_m, shape (B, K).
        jump: Proposals of the chains, with ``shift`` and ``threshold`` as :func:`rng.draws` gives them, shape (R,).
        beta: Inverse temperature, shape (B, 1) or (B, R).
        unit: Points of one unit of gain, shape (B, 1).
        weight: Points of one squared unit of cost, shape (B, 1).

    Returns:
        The four vectors after the move.
    """
    new = propose(k, jump, shift, gain.shape[-1])
    g2, d2 = look(gain, new), look(cost, new)
    change = d2 - d
    s2 = s + change
    delta = (g2 - g).float() * unit - weight * change.float() * (s2 + s).float()
    take = (delta * beta > threshold) & ((g2 >= 0) | (g < 0))
    return torch.where(take, new, k), torch.where(take, g2, g), torch.where(take, d2, d), torch.where(take, s2, s)


def sweeps_given(
    k: list[Tensor], g: list[Tensor], d: list[Tensor], s: Tensor, gain: list[Tensor], cost: list[Tensor], jump: Tensor,
    shift: Tensor, threshold: Tensor, beta: list[Tensor], unit: Tensor, weight: Tensor,
) -> tuple[list[Tensor], list[Tensor], list[Tensor], Tensor, Tensor]:  # fmt: skip
    """Several sweeps of :func:`step_given` over all models; compiled, state stays in registers between the moves.

    Args:
        k: Step indices, M of them, each of shape (B, R); ``g`` and ``d`` likewise, ``s`` as in :func:`step_given`.
        gain: M of shape (B, K); ``cost`` likewise.
        jump: Proposals, shape (sweeps · M, R), with ``shift`` and ``threshold``.
        beta: Inverse temperature of every sweep.
        unit: As in :func:`step_given`, with ``weight``.

    Returns:
        The state after the last sweep, and how many of its last moves changed a chain, shape (B, R), int32.
    """
    k, g, d = list(k), list(g), list(d)
    models = len(k)
    moves = models * len(beta)
    changed = torch.zeros_like(s)
    for t in range(moves):
        m, before = t % models, k[t % models]
        k[m], g[m], d[m], s = step_given(
            before, g[m], d[m], s, gain[m], cost[m], jump[t], shift[t], threshold[t], beta[t // models], unit, weight
        )
        if t >= moves - min(models, MEASURED_MOVES):
            changed = changed + (k[m] != before).to(torch.int32)
    return k, g, d, s, changed


def energy_given(g: list[Tensor], s: Tensor, unit: Tensor, weight: Tensor) -> Tensor:
    """Utility of every chain less the scenario's offset, shape (B, R); ``unit`` and ``weight`` in float64.

    Args:
        g: Fixed-point gains, M of shape (B, R).
        s: Sums of costs, shape (B, R).
        unit: Points of one unit of gain, shape (B, 1), float64.
        weight: Points of one squared unit of cost, shape (B, 1), float64.
    """
    gain = g[0]
    for other in g[1:]:
        gain = gain + other
    return gain.double() * unit - weight * s.double().square()


def keep_given(
    k: list[Tensor], g: list[Tensor], s: Tensor, best: Tensor, best_energy: Tensor, active: Tensor, unit: Tensor,
    weight: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The best states of active scenarios so far.

    Args:
        k: Step indices, M of shape (B, R).
        g: Their gains, M of shape (B, R).
        s: Sums of costs, shape (B, R).
        best: Best step indices so far, shape (M, B, R).
        best_energy: Their energies, shape (B, R), float64.
        active: Scenarios that still run, shape (B, 1), boolean.
        unit: As in :func:`energy_given`.
        weight: As in :func:`energy_given`.

    Returns:
        Best step indices (M, B, R), their energies (B, R), and the present energies (B, R).
    """
    energy = energy_given(g, s, unit, weight)
    better = (energy > best_energy) & active
    kept = torch.stack([torch.where(better, new, best[i]) for i, new in enumerate(k)])
    return kept, torch.where(better, energy, best_energy), energy


def assign_joint(
    a: Tensor, g: Tensor, d: Tensor, s: Tensor, k: Tensor, gain: Tensor, cost: Tensor, jump: Tensor,
    threshold: Tensor, beta: Tensor, unit: Tensor, weight: Tensor, lane: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The model of one piece.

    Args:
        a: Its model, shape (B, R), int32.
        g: Its gain, shape (B, R).
        d: Its cost, shape (B, R).
        s: Sum of costs over pieces, shape (B, R).
        k: Step indices of all models, shape (M, B, R).
        gain: Fixed-point gain of the piece, shape (B, M · K), negative where masked.
        cost: Fixed-point cost, shape (B, M · K).
        jump: Models proposed, shape (R,).
        threshold: As :func:`rng.draws` gives it, shape (R,).
        beta: Inverse temperature, shape (B, 1) or (B, R).
        unit: Points of one unit of gain, shape (B, 1).
        weight: Points of one squared unit of cost, shape (B, 1).
        lane: As in :func:`at_lanes`.

    Returns:
        ``a``, ``g``, ``d`` and ``s`` after the move.
    """
    new = jump.expand(a.shape)
    options = gain.shape[-1] // k.shape[0]
    place = new * options + at_lanes(k, new, lane)
    g2, d2 = look(gain, place), look(cost, place)
    change = d2 - d
    s2 = s + change
    delta = (g2 - g).float() * unit - weight * change.float() * (s2 + s).float()
    take = (delta * beta > threshold) & ((g2 >= 0) | (g < 0))
    return torch.where(take, new, a), torch.where(take, g2, g), torch.where(take, d2, d), torch.where(take, s2, s)


def step_joint(
    a: Tensor, k: Tensor, g: Tensor, d: Tensor, s: Tensor, gain: Tensor, cost: Tensor, model: Tensor, jump: Tensor,
    shift: Tensor, threshold: Tensor, beta: Tensor, unit: Tensor, weight: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """One model's step count, with all pieces that run on it.

    Args:
        a: Models of the pieces, shape (P, B, R), int32.
        k: Step index of the model, shape (B, R).
        g: Gains of the pieces, shape (P, B, R).
        d: Their costs, shape (P, B, R).
        s: Sum of costs over pieces, shape (B, R).
        gain: Fixed-point gain of every piece on this model, shape (P, B, K), negative where masked.
        cost: Fixed-point cost, shape (P, B, K).
        model: The model, a scalar.
        jump: Proposals, shape (R,), with ``shift`` as :func:`rng.draws` gives them.
        shift: Shape (R,).
        threshold: Shape (R,).
        beta: Inverse temperature, shape (B, 1) or (B, R).
        unit: Points of one unit of gain, shape (B, 1).
        weight: Points of one squared unit of cost, shape (B, 1).

    Returns:
        ``k``, ``g``, ``d`` and ``s`` after the move.
    """
    new = propose(k, jump, shift, gain.shape[-1])
    where = new.expand(a.shape)
    mine = a == model
    g2, d2 = torch.where(mine, look(gain, where), g), torch.where(mine, look(cost, where), d)
    change = (d2 - d).sum(0, dtype=torch.int32)
    rise = (g2 - g).sum(0, dtype=torch.int32)
    worse = ((g2 < 0) & (g >= 0)).sum(0, dtype=torch.int32)
    s2 = s + change
    delta = rise.float() * unit - weight * change.float() * (s2 + s).float()
    take = (delta * beta > threshold) & (worse == 0)
    return torch.where(take, new, k), torch.where(take, g2, g), torch.where(take, d2, d), torch.where(take, s2, s)


@functools.cache
def compiler() -> bool:
    """Whether TorchInductor can build CPU kernels here; without a C++ compiler it warns, once."""
    from torch._inductor import config

    names = [
        name for name in (*((config.cpp.cxx,) if isinstance(config.cpp.cxx, str) else config.cpp.cxx), "g++") if name
    ]
    if any(shutil.which(name) for name in names):
        return True
    warnings.warn("no C++ compiler was found: annealing runs uncompiled, with the same results", stacklevel=2)
    return False


#: Indices are in range by construction, so that Inductor's checks of them are left out; a kernel of many moves has to
#: become one loop, however long; and on a GPU no product and sum are contracted, no division approximated.
COMPILER_OPTIONS: dict[str, Any] = {
    "assert_indirect_indexing": False,
    "max_fusion_size": 4096,
    "emulate_precision_casts": True,
    "eager_numerics.division_rounding": True,
    "eager_numerics.disable_ftz": True,
}


@functools.cache
def compiled(function: F) -> F:
    """A kernel of this package compiled for every shape; Inductor keeps its code on disk between processes."""
    return torch.compile(function, dynamic=True, options=COMPILER_OPTIONS)  # type: ignore[return-value]


@contextmanager
def tell_apart(sizes: list[int]) -> Iterator[None]:
    """While this is entered, code is compiled without taking sizes for the same that happen to be equal.

    Where none are, the compiler may look for equal ones: knowing that two inputs are of one shape, it makes code that
    runs 1.5 times as fast. A number of models has code of its own, so that more variants than usual are kept.
    """
    from torch._dynamo import config as dynamo
    from torch.fx.experimental import _config as shapes

    alike = len(set(sizes)) == len(sizes)
    with shapes.patch(use_duck_shape=alike), dynamo.patch(recompile_limit=64):  # type: ignore[attr-defined]
        yield
