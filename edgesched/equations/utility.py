"""Utility of a plan, the best shares for it, and its smooth relative: pure, batched, differentiable.

With loads n_m = Σ_c n_c p_cm, total N = Σ_c n_c and service times t_m = o_m + k_m a_m,

    quality = (1/N) Σ_c Σ_m n_c p_cm Q[c, m, k_m],   latency = (1/N) Σ_m n_m T_m,
    utility = quality − ω · latency,

where T_m = n_m t_m / f_m in slot mode and, in queue mode (M/D/1, Pollaczek–Khinchine),
T_m = s_m (1 + ρ_m / (2 (1 − ρ_m))) with s_m = t_m / f_m and ρ_m = n_m s_m.
"""

from __future__ import annotations

import torch
from torch import Tensor

from edgesched.equations.delay import total_delay
from edgesched.equations.feasible import in_time, memory_fits, net_utility, options_allowed, slices_whole
from edgesched.errors import PlanError
from edgesched.types import Outcome, Plan, Scenario

#: Newton steps, inner and outer: shares agree with 60 nested bisections to 1e-12 for loads from 1e-9 to 1 - 1e-6.


def loads(scenario: Scenario, assignment: Tensor) -> Tensor:
    """Requests that each model receives, n_m = Σ_c n_c p_cm, shape (B, M).

    Args:
        scenario: Batch of B scenarios.
        assignment: Probabilities, shape (B, C, M).
    """
    return (scenario.demand[..., None] * assignment).sum(-2)


def step_indices(scenario: Scenario, steps: Tensor) -> Tensor:
    """Positions of step counts among the scenario's options.

    Args:
        scenario: Batch of B scenarios.
        steps: Step counts, shape (B, M).

    Returns:
        Indices into ``scenario.steps``, shape (B, M), int64.

    Raises:
        PlanError: If a step count is not one of ``scenario.steps``.
    """
    options = scenario.steps
    index = torch.searchsorted(options, steps.to(options.dtype).contiguous()).clamp(max=len(options) - 1)
    wrong = options[index] != steps
    if bool(wrong.any()):
        value = int(steps[wrong][0])
        raise PlanError(f"steps: {value} is not one of the scenario's step counts {options.tolist()}")
    return index


def service_times(scenario: Scenario, steps: Tensor) -> Tensor:
    """Seconds per image with the whole server, t_m = o_m + k_m a_m, shape (B, M).

    Args:
        scenario: Batch of B scenarios.
        steps: Step counts k_m, shape (B, M).
    """
    return scenario.overhead_s + steps.to(scenario.step_time_s.dtype) * scenario.step_time_s


def step_service_times(scenario: Scenario) -> Tensor:
    """Seconds per image of every model at every step count, shape (B, M, K)."""
    return scenario.overhead_s[..., None] + scenario.step_time_s[..., None] * scenario.steps


def check_shapes(scenario: Scenario, assignment: Tensor, steps: Tensor, share: Tensor | None) -> None:
    """Refuse what has not the shape that the scenario needs.

    Args:
        scenario: Batch of B scenarios.
        assignment: To be of shape (B, C, M).
        steps: To be of shape (B, M).
        share: To be of shape (B, M), or None.

    Raises:
        PlanError: Naming the first that has not.
    """
    b, c, m, _ = scenario.shape
    for name, value, shape in (
        ("assignment", assignment, (b, c, m)),
        ("steps", steps, (b, m)),
        ("share", share, (b, m)),
    ):
        if value is not None and value.shape != shape:
            raise PlanError(f"{name}: the scenario needs shape {shape}, got {tuple(value.shape)}")


def at_steps(values: Tensor, index: Tensor) -> Tensor:
    """Values (B, C, M, K) at positions of step counts (B, M), shape (B, C, M).

    Args:
        values: Any values, shape (B, C, M, K).
        index: Positions among the K options, shape (B, M), int64.
    """
    c = values.shape[1]
    return values.gather(-1, index[:, None, :, None].expand(-1, c, -1, 1)).squeeze(-1)


def unmasked(quality: Tensor) -> Tensor:
    """Q with 0 in place of −inf, so that products with it and their gradients stay finite; any shape."""
    return torch.where(torch.isneginf(quality), torch.zeros_like(quality), quality)


def quality_by_step(scenario: Scenario, assignment: Tensor) -> Tensor:
    """Σ_c n_c p_cm Q[c, m, k], −inf where a category with load may not run it, shape (B, M, K).

    Args:
        scenario: Batch of B scenarios.
        assignment: Probabilities p, shape (B, C, M).
    """
    weight = (scenario.demand[..., None] * assignment)[..., None]
    barred = ((weight > 0) & torch.isneginf(scenario.quality)).any(1)
    return (weight * unmasked(scenario.quality)).sum(1).masked_fill(barred, -torch.inf)


def evaluate(scenario: Scenario, plan: Plan) -> Outcome:
    """Utility, quality and latency of a plan, by the equations at the head of this module.

    Differentiable in demand, quality, times, weight, assignment and share. An unloaded model adds nothing;
    a loaded model without a share, at a masked step count or with an unstable queue, a share off the
    slice grid, resident models over the memory limit, or a mean latency over the deadline make a plan
    infeasible: utility −inf, never NaN.

    Args:
        scenario: Batch of B scenarios.
        plan: Plans for them.

    Returns:
        Outcome with one value per scenario.

    Raises:
        PlanError: If shapes differ or a step count is not one of the scenario's.

    Example:
        >>> s = Scenario([[4.0]], [[[[20.0, 25.0]]]], [1, 8], [[0.1]], [[0.0]], [0.5])
        >>> evaluate(s, Plan([[[1.0]]], [[8]], [[1.0]])).utility  # 25 - 0.5 * 4 * 0.8
        tensor([23.4000], dtype=torch.float64)
    """
    check_shapes(scenario, plan.assignment, plan.steps, plan.share)
    chosen = at_steps(scenario.quality, step_indices(scenario, plan.steps))
    weight = scenario.demand[..., None] * plan.assignment
    total = scenario.demand.sum(-1)
    quality = (weight * unmasked(chosen)).sum((-2, -1)) / total
    load = loads(scenario, plan.assignment)
    delay, stable = total_delay(scenario.latency, load, service_times(scenario, plan.steps), plan.share)
    latency = delay / total
    feasible = (
        options_allowed(chosen, weight)
        & stable
        & slices_whole(scenario, plan.share)
        & memory_fits(scenario, load > 0)
        & in_time(scenario, latency)
    )
    return Outcome(net_utility(quality, scenario.latency_weight, latency, feasible), quality, latency, feasible)


def soft_utility(scenario: Scenario, assignment: Tensor, step_weights: Tensor, share: Tensor) -> Tensor:
    """Utility with weights over step options in place of steps; equal to :func:`evaluate` at one-hot weights.

    Quality and service time become their means under the weights. Masked options add nothing to quality:
    give them no weight.

    Args:
        scenario: Batch of B scenarios.
        assignment: Probabilities, shape (B, C, M).
        step_weights: Weights over step options, shape (B, M, K), rows summing to 1.
        share: Shares, shape (B, M).

    Returns:
        Utility, shape (B,), −inf where a loaded model is not served or its queue is unstable.

    Raises:
        PlanError: If shapes differ.
    """
    check_shapes(scenario, assignment, share, share)
    if step_weights.shape != (scenario.shape[0], *scenario.shape[2:]):
        raise PlanError(f"step_weights: expected shape {(scenario.shape[0], *scenario.shape[2:])}, "
                        f"got {tuple(step_weights.shape)}")  # fmt: skip
    mean_quality = (unmasked(scenario.quality) * step_weights[:, None]).sum(-1)
    total = scenario.demand.sum(-1)
    quality = (scenario.demand[..., None] * assignment * mean_quality).sum((-2, -1)) / total
    service = (step_service_times(scenario) * step_weights).sum(-1)
    delay, stable = total_delay(scenario.latency, loads(scenario, assignment), service, share)
    return net_utility(quality, scenario.latency_weight, delay / total, stable)


def single_best_utility(scenario: Scenario) -> Tensor:
    """Utility of the best single model and step count for everyone, with the whole server, shape (B,)."""
    return evaluate(scenario, single_best_plan(scenario)).utility


def single_best_plan(scenario: Scenario, index: Tensor | None = None, share: Tensor | None = None) -> Plan:
    """The plan that sends every request to one model at one step count, the best such pair that is feasible.

    Args:
        scenario: Batch of B scenarios.
        index: If given, positions of the step counts that the models are held at, shape (B, M).
        share: If given, shares of the server that the models are held at, shape (B, M); otherwise the whole server.

    Returns:
        Plans; where no pair is feasible, that of the first one.
    """
    b, c, m, k = scenario.shape
    total = scenario.demand.sum(-1)[:, None, None]
    everyone = torch.full((b, c, m), 1.0, dtype=scenario.demand.dtype, device=scenario.device)
    quality = quality_by_step(scenario, everyone) / total
    service = step_service_times(scenario)
    load = total[..., None].expand(b, m, k, 1)
    own = torch.ones_like(load) if share is None else share[:, :, None, None].expand(b, m, k, 1)
    delay, stable = total_delay(scenario.latency, load, service[..., None], own)
    alone = torch.eye(m, dtype=torch.bool, device=scenario.device).expand(b, m, m)
    feasible = stable & in_time(scenario, delay / total) & memory_fits(scenario, alone)[..., None]
    if index is not None:
        feasible = feasible & torch.nn.functional.one_hot(index, k).bool()
    utility = net_utility(quality, scenario.latency_weight[:, None, None], delay / total, feasible)
    best = utility.flatten(1).argmax(-1)
    chosen = torch.nn.functional.one_hot(best // k, m).to(scenario.demand.dtype)
    steps = scenario.steps[best % k][:, None].expand(b, m) if index is None else scenario.steps[index]
    return Plan(chosen[:, None].expand(b, c, m), steps, chosen if share is None else share)
