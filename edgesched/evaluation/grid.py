"""A grid of loads, budgets and weights, and what one method gains over others at the same points of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Grid:
    """What replay gave at every point of the grid.

    Attributes:
        points: (load, budget, weight) of every point, G of them.
        utility: Method → shape (splits, G, draws), the first draw the value itself.
        quality: Method → shape (splits, G, draws).
        latency_s: Method → shape (splits, G).
    """

    points: list[tuple[float, float, float]]
    utility: dict[str, np.ndarray]
    quality: dict[str, np.ndarray]
    latency_s: dict[str, np.ndarray]

    def curve(self, method: str, what: str, along: int, at: Sequence[float], against: str | None = None) -> np.ndarray:
        """Mean over splits with a 95 % interval over splits and prompts along one axis of the grid.

        Args:
            method: Its key.
            what: ``"utility"``, ``"quality"`` or ``"latency_s"``.
            along: The axis: 0 load, 1 budget, 2 weight.
            at: Where the other two axes stay, (load, budget, weight).
            against: A method whose values are taken off, split by split and draw by draw.

        Returns:
            Shape (values, 4): the axis' value, mean, low, high.
        """
        rows = []
        for g, point in enumerate(self.points):
            if all(point[i] == at[i] for i in range(3) if i != along):
                values = getattr(self, what)[method][:, g]
                if against is not None:
                    values = values - getattr(self, what)[against][:, g]
                value = values[:, 0].mean() if values.ndim == 2 else values.mean()
                low, high = np.quantile(values[:, 1:] if values.ndim == 2 else values, [0.025, 0.975])
                rows.append((point[along], value, low, high))
        return np.array(sorted(rows))


def headline(grid: Grid, ours: str, baselines: Sequence[str]) -> dict[str, dict[str, dict[str, Any]]]:
    """Relative quality gain and delay cut of a method over every baseline, both at the same grid points.

    ``median lo hi``: the median over grid points, with a 95 % interval over splits and prompts (over splits only for
    the delay, which does not depend on the prompts replayed). ``best``: at the one grid point where the quality gain
    is largest among those where the delay falls too, or the utility gain where there is none; named in ``best_point``.

    Args:
        grid: What replay gave.
        ours: The method's key.
        baselines: Keys of what it is compared with.

    Returns:
        Baseline → ``quality_gain_pct latency_cut_pct utility_gain best_point``.
    """
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    for name in baselines:
        quality = 100 * (grid.quality[ours] / grid.quality[name] - 1)
        cut = 100 * (1 - grid.latency_s[ours] / grid.latency_s[name])
        gain = grid.utility[ours] - grid.utility[name]
        mean_quality, mean_cut, mean_gain = quality[..., 0].mean(0), cut.mean(0), gain[..., 0].mean(0)
        both = (mean_quality > 0) & (mean_cut > 0)
        best = int(np.where(both, mean_quality, -np.inf).argmax()) if both.any() else int(mean_gain.argmax())
        load, budget, weight = grid.points[best]

        def spread(values: np.ndarray, at: float) -> dict[str, float]:
            median = np.median(values, axis=1)
            drawn = median[:, 1:] if values.ndim == 3 else median
            low, high = np.quantile(drawn, [0.025, 0.975])
            centre = median[:, 0].mean() if values.ndim == 3 else median.mean()
            return {"best": float(at), "median": float(centre), "lo": float(low), "hi": float(high)}

        rows[name] = {
            "quality_gain_pct": spread(quality, mean_quality[best]),
            "latency_cut_pct": spread(cut, mean_cut[best]),
            "utility_gain": spread(gain, mean_gain[best]),
            "best_point": {"load": load, "budget": budget, "latency_weight": weight, "both_better": bool(both.any()),
                           "points_both_better": int(both.sum())},
        }  # fmt: skip
    return rows
