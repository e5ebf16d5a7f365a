"""Seconds per image as overhead + steps × step time, fitted to measured times."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from edgesched.data.table import ScoreTable
from edgesched.errors import ScoreTableError

log = logging.getLogger(__name__)

#: A fit that is further off than this at a measured step count is warned of: plans believe its times.
TOLERANCE = 0.1


@dataclass(frozen=True)
class LatencyFit:
    """Fitted times of one model.

    Args:
        step_time_s: Seconds a step and image with the whole server.
        overhead_s: Seconds an image: text encoding, decoding.
        relative_error: Largest relative error of the fit over the measured step counts.
        batch_size: Batch size that the times were measured at.
        clamped: What least squares alone would make negative, ``"overhead"`` or ``"step time"``, else None.
    """

    step_time_s: float
    overhead_s: float
    relative_error: float
    batch_size: int
    clamped: str | None = None

    @property
    def trusted(self) -> bool:
        """Whether the line is within :data:`TOLERANCE` of every measured time."""
        return self.relative_error <= TOLERANCE

    def remark(self, name: str) -> str:
        """What a reader must know of this fit, in a sentence; empty where it is good."""
        said = f"; a straight line would have a negative {self.clamped}, which is held at 0" if self.clamped else ""
        if not self.trusted:
            return (
                f"times of {name} at batch size {self.batch_size} are up to {100 * self.relative_error:.0f} % off the "
                f"line {self.overhead_s:.3g} s + {self.step_time_s:.3g} s a step (tolerance {100 * TOLERANCE:.0f} %){said}"
            )
        if self.clamped:
            return f"times of {name} at batch size {self.batch_size}{said}"
        return ""


def latency_remarks(fits: Mapping[str, LatencyFit]) -> tuple[str, ...]:
    """Sentences for a report: every model whose times are off the line, or were held at 0.

    Example:
        >>> latency_remarks({"tiny": LatencyFit(0.1, 0.0, 0.01, 1)})
        ()
    """
    return tuple(said for said in (fit.remark(name) for name, fit in fits.items()) if said)


def fit_line(
    steps: Sequence[float], seconds: Sequence[float], batch_size: int = 1, *, name: str = "the model"
) -> LatencyFit:
    """Least squares on relative errors, step time positive and overhead not negative.

    A fit at a bound, or off by more than :data:`TOLERANCE`, is warned of by name.

    Args:
        steps: Step counts.
        seconds: Seconds per image at each.
        batch_size: Batch size of the measurements.
        name: Whose times they are, for messages.

    Raises:
        ScoreTableError: If there is no measurement, a value is not finite, or a step count or time is not positive.

    Example:
        >>> fit = fit_line([1, 2, 4], [0.3, 0.5, 0.9])
        >>> round(fit.step_time_s, 6), round(fit.overhead_s, 6)
        (0.2, 0.1)
    """
    from scipy.optimize import nnls

    k, t = np.asarray(steps, float).reshape(-1), np.asarray(seconds, float).reshape(-1)
    if len(k) == 0 or len(k) != len(t):
        raise ScoreTableError(f"latency of {name}: expected a time for each step count, got {len(t)} for {len(k)}")
    for field, values, allowed in (("steps", k, "step counts of at least 1"), ("latency_s", t, "more than 0 seconds")):
        bad = ~(np.isfinite(values) & (values >= 1 if field == "steps" else values > 0))
        if bad.any():
            raise ScoreTableError(f"latency of {name}: {field} {values[bad][0]:g} is not allowed; expected {allowed}")
    order = np.lexsort((t, k))
    k, t = k[order], t[order]
    if len(np.unique(k)) == 1:
        slope, overhead, clamped = float(t.mean() / k[0]), 0.0, None
    else:
        line = np.column_stack([k, np.ones_like(k)]) / t[:, None]
        free = np.linalg.lstsq(line, np.ones_like(t), rcond=None)[0]
        (slope, overhead), _ = nnls(line, np.ones_like(t))
        clamped = "overhead" if free[1] < -1e-9 * t.min() else None
        if slope <= 0:
            # A scenario needs a step time above 0; the overhead is then the least squares of a constant.
            slope = 1e-6 * t.min() / k.max()
            overhead, clamped = float(((1 - slope * k / t) / t).sum() / (1 / t**2).sum()), "step time"
    error = np.abs((overhead + slope * k) / t - 1).max()
    fit = LatencyFit(float(slope), float(overhead), float(error), batch_size, clamped)
    if said := fit.remark(name):
        log.warning("%s", said)
    return fit


def fit_latency(table: ScoreTable, batched: bool = True) -> Mapping[str, LatencyFit]:
    """Fit every model of a table.

    Times come from the manifest's separate timing pass, where there is one, else from the table's own
    ``latency_s``. A slot's requests run as one batch, a queue's one by one.

    Args:
        table: Score table.
        batched: Take the largest batch size that was timed; else the smallest.

    Returns:
        Fit of each model, by name.

    Raises:
        ScoreTableError: If a time is not finite and positive, by its model's name.
    """
    choose = max if batched else min
    timing = table.manifest.get("timing", [])
    fits = {}
    for model in table.models or ():
        mine = [r for r in timing if r["model"] == model]
        if mine:
            size = choose(r["batch_size"] for r in mine)
            rows = [r for r in mine if r["batch_size"] == size]
            steps, seconds = [r["steps"] for r in rows], [r["latency_s"] for r in rows]
        else:
            scored = table.frame[table.frame["model"] == model]
            # Seconds an image depend on the batch: within a step count those of one batch size are taken.
            same = scored.groupby("steps")["batch_size"].transform("max" if batched else "min")
            scored = scored[scored["batch_size"] == same]
            size = choose(scored["batch_size"])
            median = scored.groupby("steps")["latency_s"].median()
            steps, seconds = median.index.to_list(), median.to_list()
        fits[model] = fit_line(steps, seconds, int(size), name=repr(model))
    return fits


def fit_latencies(table: ScoreTable) -> tuple[Mapping[str, LatencyFit], Mapping[str, LatencyFit]]:
    """Fits by model of whole batches and of single images; the same where the table was timed at one batch size.

    Raises:
        ScoreTableError: As :func:`fit_latency`.
    """
    batched = fit_latency(table)
    sizes = {r["batch_size"] for r in table.manifest.get("timing", [])} | set(table.frame["batch_size"])
    return batched, (fit_latency(table, False) if len(sizes) > 1 else batched)
