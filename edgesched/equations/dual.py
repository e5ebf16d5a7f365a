"""One-dimensional duals of the utility, minimised by cutting planes.

Both latency models have utilities whose dual is the upper envelope of pieces

    F(x) = max_i (a_i − y(x) b_i) + h(x),

one piece for every choice of a model and a step count per category: a is the quality gained, b the load
(Σ n √t in slot mode, Σ n t in queue mode), y the price of load and h a convex constant. In slot mode
y = 2ωx and h = ωx²; in queue mode y = ω g'(ρ) and h = ω (ρ g'(ρ) − g(ρ)) with g(ρ) = ρ + ρ²/(2(1 − ρ)).
A piece has its minimum at x = b, and two pieces cross at y = (a₁ − a₂)/(b₁ − b₂): the cutting-plane method
(Kelley 1960) needs a handful of evaluations where bisection needs fifty, and ends at the exact minimum.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from edgesched.equations.delay import queue_delay, queue_slope

#: Most evaluations of a dual; ten are usual, and each at least moves to another piece.
_EVALUATIONS = 60
_FULL = 1 - 1e-9


def without_dead(gain: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gains that a maximum over choices can be taken of, and where there is none to take.

    A group without weight chooses for nothing, and one with weight but no allowed choice makes its problem
    infeasible, however little the weight: both get gains of 0, and the latter is told.

    Args:
        gain: Gains, −inf where a choice is masked, shape (..., G, choices).
        weight: Weights of the groups, shape (..., G).

    Returns:
        Gains, shape (..., G, choices), every group with a finite one; whether a problem is infeasible, shape (...).
    """
    idle = weight <= 0
    dead = ~idle & torch.isneginf(gain).all(-1)
    return torch.where((idle | dead)[..., None], torch.zeros_like(gain), gain), dead.any(-1)


def price(latency: str, weight: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Price of load y(x) and constant h(x) for ω and x of one shape.

    Args:
        latency: ``"slot"`` or ``"queue"``.
        weight: ω, any shape.
        x: Dual variable, of the same shape; below 1 in queue mode.
    """
    if latency == "slot":
        return 2 * weight * x, weight * x.square()
    slope = queue_slope(x)
    return weight * slope, weight * (x * slope - queue_delay(x))


def at_price(latency: str, weight: Tensor, y: Tensor) -> Tensor:
    """The x at which load has price y, the inverse of :func:`price`.

    Args:
        latency: ``"slot"`` or ``"queue"``.
        weight: ω, any shape.
        y: Price of load, of the same shape.
    """
    ratio = y / weight.clamp(min=1e-300)
    if latency == "slot":
        return ratio / 2
    return 1 - (2 * ratio - 1).clamp(min=1).rsqrt()


def minimise(
    choose: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]],
    latency: str,
    weight: Tensor,
    start: Tensor,
    *,
    evaluations: int = _EVALUATIONS,
    tolerance: float = 1e-13,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Minimise F over x for many problems at once.

    Args:
        choose: For prices y, of the shape of ``weight``, the best choice there: its a and b, of that shape, and
            the choice itself, of that shape with any further dimensions.
        latency: ``"slot"`` or ``"queue"``.
        weight: ω, any shape.
        start: First x, of the shape of ``weight``; the nearer, the fewer evaluations.
        evaluations: Most evaluations; every value met is a valid upper bound, so that stopping early is safe.
        tolerance: Stop where F is this close, relative to its size, to the crossing of its two best pieces.

    Returns:
        Smallest value met and its x, each of the shape of ``weight``, and the choices to the left (more load) and
        to the right (less load) of the minimum.
    """
    limit = torch.inf if latency == "slot" else _FULL

    def look(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        y, constant = price(latency, weight, x)
        a, b, choice = choose(y)
        return a - y * b + constant, a, b, choice

    def where(take: Tensor, new: Tensor, old: Tensor) -> Tensor:
        return torch.where(take.reshape(*take.shape, *[1] * (new.ndim - take.ndim)), new, old)

    best, left_a, left_b, left = look(start)
    x = start
    more = left_b > start
    second = left_b.clamp(max=limit)
    value, right_a, right_b, right = look(second)
    x, best = torch.where(value < best, second, x), torch.minimum(best, value)
    # The load falls as x grows, so that the two looks lie on the two sides of the minimum.
    left_a, right_a = where(more, left_a, right_a), where(more, right_a, left_a)
    left_b, right_b = where(more, left_b, right_b), where(more, right_b, left_b)
    left, right = where(more, left, right), where(more, right, left)
    for _ in range(evaluations - 2):
        apart = left_b - right_b
        crossing = at_price(latency, weight, (left_a - right_a) / apart.clamp(min=1e-300))
        crossing = torch.where((apart > 0) & (weight > 0), crossing, left_b)
        at = torch.minimum(torch.maximum(crossing, right_b), left_b).clamp(max=limit)
        y, constant = price(latency, weight, at)
        model = left_a - y * left_b + constant
        value, a, b, choice = look(at)
        x, best = torch.where(value < best, at, x), torch.minimum(best, value)
        more = b > at
        open_ = value - model > tolerance * value.abs().clamp(min=1)
        if not bool(open_.any()):
            break
        up, down = open_ & more, open_ & ~more
        left_a, left_b, left = where(up, a, left_a), where(up, b, left_b), where(up, choice, left)
        right_a, right_b, right = where(down, a, right_a), where(down, b, right_b), where(down, choice, right)
    return best, x, left, right
