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


def fit_latency(table: ScoreTable, batched: bool = True) -> Mapping[str, LatencyFit]:
    """Fit every model of a table.

    Times come from the manifest's separate timing pass, where there is one, else from the table's own
    ``latency_s``. A slot's requests run as one batch, a queue's one by one.

    Args:
        table: Score table.
        batched: Take the largest batch size of the timing pass; else the smallest.

    Returns:
        Fit of each model, by name.
    """
    timing = table.manifest.get("timing", [])
    fits = {}
    for model in table.models or ():
        mine = [r for r in timing if r["model"] == model]
        if mine:
            size = (max if batched else min)(r["batch_size"] for r in mine)
            rows = [r for r in mine if r["batch_size"] == size]
            fits[model] = fit_line([r["steps"] for r in rows], [r["latency_s"] for r in rows], int(size))
        else:
            scored = table.frame[table.frame["model"] == model]
            median = scored.groupby("steps")["latency_s"].median()
            fits[model] = fit_line(
                median.index.to_numpy(float), median.to_numpy(float), int(scored["batch_size"].iloc[0])
            )
    return fits
