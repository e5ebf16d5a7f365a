"""Synthetic problems; their law stands at :meth:`edgesched.Scenario.random`."""

from __future__ import annotations

import numpy as np

from edgesched.errors import ScenarioError


def scenario_arrays(
    batch: int, categories: int, models: int, steps: int, *, seed: int, latency: str
) -> tuple[np.ndarray, ...]:
    """Demand, quality, step counts, step times, overheads and weights of random scenarios, in this order.

    Args:
        batch: Scenarios B.
        categories: Categories C.
        models: Models M.
        steps: Step options K.
        seed: Seed of the draw.
        latency: ``"slot"`` or ``"queue"``.

    Returns:
        Shapes (B, C), (B, C, M, K), (K,), (B, M), (B, M) and (B,).

    Raises:
        ScenarioError: If a size is below 1.
    """
    for name, value in (("batch", batch), ("categories", categories), ("models", models), ("steps", steps)):
        if value < 1:
            raise ScenarioError(f"{name}: expected at least 1, got {value}")
    rng = np.random.default_rng(seed)
    capability = np.arange(models) / max(models - 1, 1)
    demand = rng.gamma(2.0, 10.0 / categories, (batch, categories)) + 0.1
    step_time = 0.05 * 10**capability * np.exp(0.1 * rng.standard_normal((batch, models)))
    overhead = np.broadcast_to(0.02 * 10 ** (capability / 2), (batch, models))
    top = (
        28
        + 4 * capability
        + 2 * rng.standard_normal((batch, categories, 1))
        + 1.5 * rng.standard_normal((batch, categories, models))
    )
    tau = rng.uniform(4, 10, (batch, 1, models)) * np.exp(0.7 * rng.standard_normal((batch, categories, models)))
    counts = np.arange(1, steps + 1)
    quality = top[..., None] - 12 * np.exp(-counts / tau[..., None])
    weight = 10 ** rng.uniform(-2.7, -0.7, batch)
    if latency == "queue":
        service = (overhead + counts[(steps - 1) // 2] * step_time).min(-1)
        load = rng.uniform(0.2, 0.8, batch)
        demand = demand * (load / (demand.sum(-1) * service))[:, None]
    return tuple(np.array(array) for array in (demand, quality, counts, step_time, overhead, weight))
