"""Streams of requests: Poisson, bursty, diurnal, or a trace from a CSV file."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from edgesched.data.reading import Records, read_records
from edgesched.data.timestamps import Times, read_times
from edgesched.errors import ArgumentError, RequestError

log = logging.getLogger(__name__)
_GRID = 4096
_SET_BACK_S = (600, 3600)  # clocks of summer time go back by an hour, less what passed between two requests


class StreamArgumentError(ArgumentError, RequestError):
    """An argument of a stream is out of its range."""


@dataclass(frozen=True)
class RequestStream:
    """Requests in order of arrival, R replicas of n requests each.

    Args:
        arrival_s: Seconds since the start, shape (R, n), float64, not decreasing.
        category: Position of each request's category, shape (R, n), int64.
        categories: Names of the categories.

    Raises:
        RequestError: If shapes differ, times decrease or are not finite, or a category is out of range.
    """

    arrival_s: Tensor
    category: Tensor
    categories: tuple[str, ...]

    def __post_init__(self) -> None:
        arrival = torch.as_tensor(self.arrival_s, dtype=torch.float64)
        category = torch.as_tensor(self.category)
        if category.dtype != torch.int64 and not torch.equal(category.long().to(category.dtype), category):
            raise RequestError("category: expected whole positions")
        category = category.long()
        if arrival.ndim != 2 or arrival.shape != category.shape or arrival.shape[1] < 1:
            raise RequestError(f"requests: expected times and categories of one shape (replicas, requests), got "
                               f"{tuple(arrival.shape)} and {tuple(category.shape)}")  # fmt: skip
        if not bool(arrival.isfinite().all()) or bool((arrival.diff(dim=1) < 0).any()) or bool((arrival < 0).any()):
            raise RequestError("arrival_s: expected finite seconds from 0 that do not decrease")
        if bool((category < 0).any()) or bool((category >= len(self.categories)).any()):
            raise RequestError(f"category: expected positions 0 to {len(self.categories) - 1}")
        object.__setattr__(self, "arrival_s", arrival)
        object.__setattr__(self, "category", category)

    def __len__(self) -> int:
        """Requests of a replica."""
        return self.arrival_s.shape[1]

    @property
    def replicas(self) -> int:
        """Number of replicas."""
        return self.arrival_s.shape[0]

    @property
    def rate(self) -> Tensor:
        """Mean arrivals a second of every category, shape (C,), over all replicas."""
        count = torch.bincount(self.category.flatten(), minlength=len(self.categories)).double()
        return count / self.arrival_s[:, -1].sum().clamp(min=1e-12)

    def to(self, device: torch.device | str) -> RequestStream:
        """The same stream on another device."""
        return RequestStream(self.arrival_s.to(device), self.category.to(device), self.categories)


def poisson(rate: Sequence[float], categories: Sequence[str], *, requests: int = 10_000, replicas: int = 1, seed: int = 0) -> RequestStream:  # fmt: skip
    """Independent Poisson arrivals of every category.

    Args:
        rate: Requests a second of every category, shape (C,).
        categories: Their names.
        requests: Requests of each replica.
        replicas: Independent replicas.
        seed: Seed.
    """
    share, total = _shares(rate, categories)
    rng = np.random.default_rng(seed)
    arrival = np.cumsum(rng.exponential(1 / total, (replicas, requests)), axis=1)
    return _stream(arrival, share, categories, rng)


def bursty(
    rate: Sequence[float],
    categories: Sequence[str],
    *,
    requests: int = 10_000,
    replicas: int = 1,
    burst: float = 4.0,
    burst_share: float = 0.1,
    burst_s: float = 60.0,
    seed: int = 0,
) -> RequestStream:
    """Markov-modulated Poisson arrivals of two states whose mean rate is the given one.

    Args:
        rate: Mean requests a second of every category, shape (C,).
        categories: Their names.
        requests: Requests of each replica.
        replicas: Independent replicas.
        burst: Rate in a burst over the rate outside it.
        burst_share: Share of the time spent in bursts, in (0, 1).
        burst_s: Mean length of a burst in seconds.
        seed: Seed.

    Raises:
        StreamArgumentError: If burst, its share or its length is out of its range.

    Source:
        Fischer and Meier-Hellstern, Performance Evaluation 18 (1993).
    """
    share, total = _shares(rate, categories)
    if not 1 <= burst < math.inf or not 0 < burst_share < 1 or not 0 < burst_s < math.inf:
        raise StreamArgumentError(
            f"bursty: expected burst ≥ 1, 0 < burst_share < 1 and burst_s > 0, got {burst}, {burst_share}, {burst_s}"
        )
    rng = np.random.default_rng(seed)
    calm = total / (1 + burst_share * (burst - 1))
    calm_s = burst_s * (1 - burst_share) / burst_share
    need = requests + 10 * requests**0.5 + 10
    cycles = int(np.ceil(need / (calm * (calm_s + burst * burst_s)))) + 8
    arrival = np.empty((replicas, requests))
    for r in range(replicas):
        first = bool(rng.random() < burst_share)  # the state at the start is drawn from the stationary distribution
        marks, edges = np.zeros(1), np.zeros(1)
        while marks[-1] < need:
            spans = rng.exponential([burst_s, calm_s] if first else [calm_s, burst_s], (cycles, 2)).ravel()
            speeds = np.tile([calm * burst, calm] if first else [calm, calm * burst], cycles)
            edges = np.concatenate([edges, edges[-1] + np.cumsum(spans)])
            marks = np.concatenate([marks, marks[-1] + np.cumsum(spans * speeds)])
        arrival[r] = np.interp(np.cumsum(rng.exponential(1.0, requests)), marks, edges)
    return _stream(arrival, share, categories, rng)


def diurnal(
    rate: Sequence[float],
    categories: Sequence[str],
    *,
    requests: int = 10_000,
    replicas: int = 1,
    swing: float = 0.8,
    period_s: float = 86_400.0,
    seed: int = 0,
) -> RequestStream:
    """Poisson arrivals whose rate swings as a sine: rate · (1 + swing · sin(2πt / period)).

    Args:
        rate: Mean requests a second of every category, shape (C,).
        categories: Their names.
        requests: Requests of each replica.
        replicas: Independent replicas.
        swing: Size of the swing relative to the mean, 0 to 1.
        period_s: Its period in seconds.
        seed: Seed.

    Raises:
        StreamArgumentError: If the swing or the period is out of its range.
    """
    share, total = _shares(rate, categories)
    if not 0 <= swing <= 1 or not 0 < period_s < math.inf:
        raise StreamArgumentError(f"diurnal: expected 0 ≤ swing ≤ 1 and period_s > 0, got {swing} and {period_s}")
    rng = np.random.default_rng(seed)
    marks = np.cumsum(rng.exponential(1.0, (replicas, requests)), axis=1)
    per_period = total * period_s
    phase = np.linspace(0.0, 1.0, _GRID)
    within = phase + swing / (2 * np.pi) * (1 - np.cos(2 * np.pi * phase))
    whole, rest = np.divmod(marks / per_period, 1.0)
    return _stream((whole + np.interp(rest, within, phase)) * period_s, share, categories, rng)


def trace(
    path: Path | str,
    categories: Sequence[str],
    *,
    rate: Sequence[float] | None = None,
    rate_scale: float | None = None,
    tasks: Sequence[str] | None = ("TXT_2_IMG",),
    time_column: str = "gmt_create",
    time_format: str | None = None,
    task_column: str = "predict_type",
    category_column: str | None = None,
    length_column: str | None = "prompt_length",
    limit: int | None = None,
    seed: int = 0,
) -> RequestStream:
    """Requests of a production trace, one CSV row each.

    Where the trace names no category, requests are dealt to the categories by the length of their prompts, the
    shortest to the first, in equal parts; without lengths at random. Rows that are out of order are sorted by time and
    counted in a warning.

    Args:
        path: The file, or a folder of its parts.
        categories: Names of the categories, from easy to hard.
        rate: Requests a second; if given, and no ``rate_scale``, the trace is sped up to their sum.
        rate_scale: Speed-up: 10 lets the requests of ten hours arrive in one.
        tasks: Values of the task column that are kept; None keeps all.
        time_column: Creation time: all seconds, or all dates, in one format.
        time_format: Format of the times, as of :func:`~edgesched.data.timestamps.read_times`; None: the rows decide.
        task_column: Kind of task.
        category_column: Category by name, or None.
        length_column: Length of the prompt, or None.
        limit: Most requests kept, from the start.
        seed: Seed of requests that are dealt at random.

    Returns:
        One replica. Rows without any time or task, or with an unknown category, are skipped and counted in a warning.

    Raises:
        RequestError: If the file cannot be read, a column is missing, a field is of another kind than its column, the
            clock was set back, or nothing is left.
        ArgumentError: If ``rate``, ``rate_scale``, ``time_format`` or ``limit`` is out of its range.
    """
    if rate_scale is not None and not 0 < rate_scale < math.inf:
        raise StreamArgumentError(f"rate_scale: expected a finite number above 0, got {rate_scale}")
    if limit is not None and (isinstance(limit, bool) or limit != int(limit) or limit < 1):
        raise StreamArgumentError(f"limit: expected a whole number from 1, got {limit!r}")
    wanted = None if tasks is None else {tasks} if isinstance(tasks, str) else set(tasks)
    needed = [time_column, *([task_column] if wanted is not None else [])]
    records = read_records(path, [*needed, *([category_column] if category_column else [])], error=RequestError)
    times = read_times(records, time_column, time_format)
    task = records.names(task_column, empty=True) if wanted is not None else [""] * len(records)
    asked = [wanted is None or name in wanted or not name for name in task]
    good = [time is not None and (wanted is None or bool(name)) for time, name in zip(times.seconds, task, strict=True)]
    if category_column:
        named = records.names(category_column, empty=True)
        good = [fine and name in categories for fine, name in zip(good, named, strict=True)]
    keep = [a and g for a, g in zip(asked, good, strict=True)]
    if sum(keep) < sum(asked):
        first = records.places[next(row for row, a in enumerate(asked) if a and not good[row])]
        log.warning("%s: %d of %d rows are malformed and skipped, the first at %s", Path(path).name,
                    sum(asked) - sum(keep), sum(asked), first)  # fmt: skip
    if not any(keep):
        kept = "all" if wanted is None else ", ".join(sorted(wanted))
        raise RequestError(f"{path}: no request is left; tasks kept: {kept}")
    lengths = None
    if category_column is None and length_column is not None:
        if length_column in records:
            lengths = np.array(records.numbers(length_column, least=0.0, empty=True))[keep]
        else:
            log.warning("%s: no column %r; requests are dealt to the categories at random", Path(path).name,
                        length_column)  # fmt: skip
    records = records.where(keep)
    seconds = [time for time, kept in zip(times.seconds, keep, strict=True) if kept and time is not None]
    _tell_order(records, seconds, times, time_column)
    order = sorted(range(len(seconds)), key=seconds.__getitem__)[:limit]
    arrival = np.array([float(seconds[row] - seconds[order[0]]) for row in order])
    if rate_scale is None and rate is not None:
        total = _shares(rate, categories)[1]
        if not arrival[-1] > 0:
            raise RequestError(f"{path}: all requests arrive at once, so there is no rate to scale; give rate_scale")
        rate_scale = total * float(arrival[-1]) / len(arrival)
    arrival = arrival / (1.0 if rate_scale is None else rate_scale)
    rng = np.random.default_rng(seed)
    place = rng.integers(len(categories), size=len(order))
    if category_column:
        position = {category: i for i, category in enumerate(categories)}
        found = records.names(category_column)
        place = np.array([position[found[row]] for row in order])
    elif lengths is not None:
        length = lengths[order]
        known = np.isfinite(length)
        cuts = np.quantile(length[known], np.arange(1, len(categories)) / len(categories)) if known.any() else []
        place[known] = np.searchsorted(cuts, length[known], "right")
    return RequestStream(torch.tensor(arrival[None]), torch.tensor(place[None]), tuple(categories))


def _tell_order(records: Records, seconds: list[Decimal], times: Times, column: str) -> None:
    """Warn of rows out of order, which are sorted; refuse a clock that was set back, after which none can be."""
    back = [row for row in range(1, len(seconds)) if seconds[row] < seconds[row - 1]]
    if not back:
        return
    steps = [float(seconds[row - 1] - seconds[row]) for row in back]
    if not times.dated:
        raise records.wrong(back[0], f"{column} goes back by {steps[0]:g} s, and says no day; give dates")
    least, most = _SET_BACK_S
    days = float(max(seconds) - min(seconds)) / 86_400
    if times.local and len(back) <= 1 + days / 100 and all(least <= step <= most for step in steps):
        raise records.wrong(back[0], f"{column} goes back by {steps[0]:g} s where all else is in order, as clocks that "
                            "are set back do; give offsets, or sort the rows if the times are right")  # fmt: skip
    log.warning("%s: %d of %d rows are earlier than the row before, the first at %s; sorted by time",
                records.path.name, len(back), len(seconds), records.places[back[0]])  # fmt: skip


def _shares(rate: Sequence[float], categories: Sequence[str]) -> tuple[np.ndarray, float]:
    values = np.asarray(rate, dtype=float)
    if values.shape != (len(categories),) or not np.isfinite(values).all() or (values < 0).any() or values.sum() <= 0:
        raise StreamArgumentError(
            f"rate: expected {len(categories)} finite rates from 0, not all 0, got {values.tolist()}"
        )
    return values / values.sum(), float(values.sum())


def _stream(
    arrival: np.ndarray, share: np.ndarray, categories: Sequence[str], rng: np.random.Generator
) -> RequestStream:
    category = np.searchsorted(np.cumsum(share)[:-1], rng.random(arrival.shape), "right")
    return RequestStream(torch.tensor(arrival), torch.tensor(category), tuple(categories))
