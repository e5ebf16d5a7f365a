"""Seconds per image as overhead + steps × step time, fitted to measured times."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from edgesched.errors import ScoreTableError
from edgesched.table import ScoreTable


@dataclass(frozen=True)
class LatencyFit:
    """Fitted times of one model.

    Args:
        step_time_s: Seconds a step and image with the whole server.
        overhead_s: Seconds an image: text encoding, decoding.
        relative_error: Largest relative error of the fit over the measured step counts.
        batch_size: Batch size that the times were measured at.
    """

    step_time_s: float
    overhead_s: float
    relative_error: float
    batch_size: int


def fit_line(steps: Sequence[float], seconds: Sequence[float], batch_size: int = 1) -> LatencyFit:
    """Least squares on relative errors, step time positive and overhead not negative.

    Args:
        steps: Step counts.
        seconds: Seconds per image at each.
        batch_size: Batch size of the measurements.

    Raises:
        ScoreTableError: If there is no measurement, or a time is not positive.

    Example:
        >>> fit = fit_line([1, 2, 4], [0.3, 0.5, 0.9])
        >>> round(fit.step_time_s, 6), round(fit.overhead_s, 6)
        (0.2, 0.1)
    """
    from scipy.optimize import nnls

    k, t = np.asarray(steps, float), np.asarray(seconds, float)
    if len(k) == 0 or not (t > 0).all():
        raise ScoreTableError("latency_s: expected at least one measurement, all of more than 0 seconds")
    if len(np.unique(k)) == 1:
        mean = float(t.mean())
        return LatencyFit(mean / float(k[0]), 0.0, float(np.abs(t / mean - 1).max()), batch_size)
    (slope, overhead), _ = nnls(np.column_stack([k, np.ones_like(k)]) / t[:, None], np.ones_like(t))
    if slope <= 0:
        slope, overhead = 1e-6 * t.min() / k.max(), float(np.median(t))
    error = np.abs((overhead + slope * k) / t - 1).max()
    return LatencyFit(float(slope), float(overhead), float(error), batch_size)


def fit_latency(table: ScoreTable, batch_size: int | None = 1) -> Mapping[str, LatencyFit]:
    """Fit every model of a table.

    Times come from the manifest's separate timing pass at the batch size asked for, where there is one,
    else from the table's own ``latency_s``.

    Args:
        table: Score table.
        batch_size: Batch size of the timing pass; None takes the table's own column.

    Returns:
        Fit of each model, by name.
    """
    timing = table.manifest.get("timing", []) if batch_size is not None else []
    fits = {}
    for model in table.models or ():
        rows = [r for r in timing if r["model"] == model and r["batch_size"] == batch_size]
        if rows:
            fits[model] = fit_line([r["steps"] for r in rows], [r["latency_s"] for r in rows], int(batch_size or 1))
        else:
            mine = table.frame[table.frame["model"] == model]
            median = mine.groupby("steps")["latency_s"].median()
            fits[model] = fit_line(
                median.index.to_numpy(float), median.to_numpy(float), int(mine["batch_size"].iloc[0])
            )
    return fits
