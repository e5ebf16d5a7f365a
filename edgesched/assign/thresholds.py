"""Thresholds on the score axis: the masses between them, their quantiles, and training them on utility.

Thresholds τ_1 ≤ … ≤ τ_{M−1}, shared by all categories, cut the scores of one reference model into M bands;
the mass of category c in a band is the probability that its prompts go to the band's model (arXiv 2409.09072).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from edgesched.equations.delay import calm_delay
from edgesched.equations.utility import step_service_times
from edgesched.errors import ArgumentError
from edgesched.search.solve import solve
from edgesched.types import Scenario

Below = Callable[[Tensor], Tensor]
"""Distribution function of the reference scores: thresholds (R, J) → mass below them (R, C, J)."""

#: What a masked option costs in the relaxed utility, in spans of the scores: more than any other choice can regain.
_MASKED_SPANS = 1e3
_NEGLIGIBLE = 1e-6
_EDGE = 1e-7


def threshold_assignment(mean: Tensor, std: Tensor, thresholds: Tensor) -> Tensor:
    """Probability mass of Gaussian scores between thresholds, differentiable in all three.

    P(band j | c) = Φ((τ_j − μ_c)/σ_c) − Φ((τ_{j−1} − μ_c)/σ_c) with τ_0 = −∞ and τ_M = ∞; the lowest band,
    the hardest prompts, comes first.

    Args:
        mean: μ, shape (..., C).
        std: σ, shape (..., C); at 0 all mass falls into the band that holds the mean.
        thresholds: τ_1 ≤ … ≤ τ_{M−1}, shape (..., M − 1).

    Returns:
        Probabilities, shape (..., C, M), rows summing to 1.

    Raises:
        ArgumentError: If the thresholds are not in order.

    Source:
        arXiv 2409.09072, section on probabilistic model assignment.

    Example:
        >>> threshold_assignment(torch.tensor([0.0]), torch.tensor([1.0]), torch.tensor([0.0]))
        tensor([[0.5000, 0.5000]])
    """
    if not bool((thresholds[..., 1:] >= thresholds[..., :-1]).all()) or bool(thresholds.isnan().any()):
        raise ArgumentError(f"thresholds: expected increasing values, got {thresholds.tolist()}")
    scaled = (thresholds[..., None, :] - mean[..., :, None]) / std.clamp(min=1e-6)[..., :, None]
    return bands(torch.special.ndtr(scaled))


def bands(below: Tensor) -> Tensor:
    """Masses between thresholds, shape (..., J + 1), from the masses below each of them, shape (..., J)."""
    edge = below.new_zeros(*below.shape[:-1], 1)
    return torch.diff(torch.cat([edge, below, edge + 1], -1), dim=-1).clamp(min=0)


def mixture_quantiles(below: Below, demand: Tensor, levels: Tensor, low: float, high: float) -> Tensor:
    """Quantiles of the scores of all requests, the categories' distributions weighted by demand, by bisection.

    Args:
        below: Distribution function.
        demand: Shape (B, C).
        levels: Shape (J,), in (0, 1).
        low: Score under every quantile.
        high: Score above every quantile.

    Returns:
        Shape (B, J).
    """
    weight = (demand / demand.sum(-1, keepdim=True))[..., None]
    bottom = torch.full((len(demand), len(levels)), low, dtype=demand.dtype, device=demand.device)
    top = torch.full_like(bottom, high)
    with torch.no_grad():
        for _ in range(60):
            middle = (bottom + top) / 2
            short = (weight * below(middle)).sum(1) < levels
            bottom, top = torch.where(short, middle, bottom), torch.where(short, top, middle)
    return top


def routed(below: Tensor, place: Tensor) -> Tensor:
    """Assignment from masses below thresholds: bands dealt to models, negligible ones closed.

    Args:
        below: Shape (B, C, M − 1).
        place: Position of each model's band, shape (B, M).

    Returns:
        Probabilities, shape (B, C, M); bands under a millionth of a category are 0.
    """
    mass = bands(below).gather(-1, place[:, None].expand(-1, below.shape[1], -1))
    mass = mass.masked_fill(mass < _NEGLIGIBLE, 0)
    return mass / mass.sum(-1, keepdim=True)


def train_thresholds(
    scenario: Scenario,
    below: Below,
    place: Tensor,
    start: Tensor,
    centre: Tensor,
    width: Tensor,
    *,
    starts: int = 8,
    iterations: int = 150,
    learning_rate: float = 0.1,
    seed: int = 0,
) -> Tensor:
    """Thresholds that maximise utility, by gradient through the distribution function, from several starts.

    Thresholds are τ_j = centre + width · Φ⁻¹(Σ_{i≤j} softmax(z)_i), in order whatever z is, and z climbs the
    gradient of the utility (Adam) at the step counts that are best for the current assignment and, in slot
    mode, the closed-form shares; the step counts follow one model at a time. In queue mode the shares climb
    along. The best point of every start, the starting thresholds and everything to one model are then planned by
    :func:`edgesched.search.solve`, and the best of them is returned: never worse than where it started.

    Args:
        scenario: Batch of B scenarios.
        below: Distribution function of the reference scores.
        place: Position of each model's band, shape (B, M).
        start: Thresholds of the first start, shape (B, M − 1).
        centre: Typical score, shape (B,).
        width: Typical spread of scores, shape (B,).
        starts: Starting points of each scenario.
        iterations: Gradient steps.
        learning_rate: Step size of Adam.
        seed: Seed of the other starting points, the same for every scenario of a batch.

    Returns:
        Thresholds, shape (B, M − 1), without gradient.
    """
    b, c, m, _ = scenario.shape
    if m == 1:
        return start.detach()
    fixed = dataclasses.replace(scenario, demand=scenario.demand.detach(), quality=scenario.quality.detach())
    wide = fixed.repeat(starts)
    middle, spread = (t.repeat(starts)[:, None] for t in (centre, width))
    order = place.repeat(starts, 1)
    mass = bands(torch.special.ndtr((start - centre[:, None]) / width[:, None])).clamp(min=_EDGE)
    generator = torch.Generator().manual_seed(seed)
    drawn = 2 * torch.randn((starts - 1, 1, m), generator=generator, dtype=torch.float64).to(start)
    z = torch.cat([mass.log()[None], drawn.expand(-1, b, m)]).reshape(-1, m).clone().requires_grad_()
    share = torch.zeros_like(z).requires_grad_()
    optimizer = torch.optim.Adam([z, share], lr=learning_rate)
    index = _cheapest(wide)
    best = torch.full_like(middle[:, 0], -torch.inf)
    kept = start.repeat(starts, 1)
    for _ in range(iterations):
        level = z.softmax(-1).cumsum(-1)[..., :-1].clamp(_EDGE, 1 - _EDGE)
        cuts = middle + spread * torch.special.ndtri(level)
        p = bands(below(cuts)).gather(-1, order[:, None].expand(-1, c, -1))
        utility, index = _utility(wide, p, index, share)
        with torch.no_grad():
            better = utility > best
            best, kept = torch.where(better, utility, best), torch.where(better[:, None], cuts, kept)
        z.grad, share.grad = torch.autograd.grad(-utility.sum(), (z, share), allow_unused=True)
        optimizer.step()
    with torch.no_grad():
        far = torch.tensor([-40.0, 40.0]).to(width)
        alone = [
            (centre[:, None] + width[:, None] * far[(torch.arange(m - 1, device=start.device) >= j).long()])
            for j in range(m)
        ]
        tried = torch.cat([start[None], kept.reshape(starts, b, m - 1), torch.stack(alone)])
        rows = len(tried)
        p = routed(below(tried.flatten(0, 1)), place.repeat(rows, 1))
        planned = solve(fixed.repeat(rows), assignment=p, seed=seed).utility.reshape(rows, b)
        return tried[planned.argmax(0), torch.arange(b, device=start.device)]


def _cheapest(scenario: Scenario) -> Tensor:
    """Position of the smallest step count that each model may run for every category, shape (B, M)."""
    return scenario.quality.isfinite().all(1).int().argmax(-1)


def _utility(scenario: Scenario, p: Tensor, index: Tensor, share_logit: Tensor) -> tuple[Tensor, Tensor]:
    """Utility (B,), differentiable in p, at step positions (B, M) improved one model at a time."""
    weight = scenario.demand[..., None] * p
    load = weight.sum(1)
    masked = torch.isneginf(scenario.quality)
    low = scenario.quality.masked_fill(masked, torch.inf).flatten(1).amin(-1)
    high = scenario.quality.flatten(1).amax(-1)
    floor = (low - _MASKED_SPANS * (high - low + 1))[:, None, None, None]
    gain = (weight[..., None] * torch.where(masked, floor, scenario.quality)).sum(1)
    service = step_service_times(scenario)
    price = scenario.latency_weight[:, None]
    share = share_logit.softmax(-1)
    with torch.no_grad():
        if scenario.latency == "slot":
            root = load[..., None] * service.sqrt()
            for model in range(load.shape[1]):
                part = root.gather(-1, index[..., None]).squeeze(-1)
                rest = (part.sum(-1) - part[:, model])[:, None]
                value = gain[:, model] - price * (rest + root[:, model]).square()
                index = index.index_copy(1, torch.tensor([model], device=index.device), value.argmax(-1)[:, None])
        else:
            busy = load[..., None] * service / share[..., None].clamp(min=1e-9)
            index = (gain - price[..., None] * calm_delay(busy)).argmax(-1)
    quality = gain.gather(-1, index[..., None]).squeeze(-1).sum(-1)
    seconds = service.gather(-1, index[..., None]).squeeze(-1)
    if scenario.latency == "slot":
        delay = (load * seconds.sqrt()).sum(-1).square()
    else:
        delay = calm_delay(load * seconds / share.clamp(min=1e-9)).sum(-1)
    return (quality - scenario.latency_weight * delay) / scenario.demand.sum(-1), index
