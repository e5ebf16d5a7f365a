"""Streams of requests: Poisson, bursty, diurnal, or a trace from a CSV file."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from edgesched.data.reading import read_records
from edgesched.data.timestamps import read_times
from edgesched.errors import ArgumentError, RequestError

log = logging.getLogger(__name__)
_GRID = 4096


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
        category = torch.as_tensor(self.category, dtype=torch.int64)
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

    Raises:
        RequestError: If a rate is out of range.
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
        RequestError: If a rate, the burst, its share or its length is out of range.

    Source:
        Fischer and Meier-Hellstern, Performance Evaluation 18 (1993).
    """
    share, total = _shares(rate, categories)
    if burst < 1 or not 0 < burst_share < 1 or burst_s <= 0:
        raise RequestError(
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
        RequestError: If a rate, the swing or the period is out of range.
    """
    share, total = _shares(rate, categories)
    if not 0 <= swing <= 1 or period_s <= 0:
        raise RequestError(f"diurnal: expected 0 ≤ swing ≤ 1 and period_s > 0, got {swing} and {period_s}")
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
    task_column: str = "predict_type",
    category_column: str | None = None,
    length_column: str | None = "prompt_length",
    limit: int | None = None,
    time_format: str | None = None,
    seed: int = 0,
) -> RequestStream:
    """Requests of a production trace, one CSV row each.

    Where the trace names no category, requests are dealt to the categories by the length of their prompts, the
    shortest to the first, in equal parts; without lengths at random.

    Args:
        path: The file.
        categories: Names of the categories, from easy to hard.
        rate: Requests a second; if given, and no ``rate_scale``, the trace is sped up to their sum.
        rate_scale: Speed-up: 10 lets the requests of ten hours arrive in one.
        tasks: Values of the task column that are kept; None keeps all.
        time_column: Creation time, as a date or in seconds.
        task_column: Kind of task.
        category_column: Category by name, or None.
        length_column: Length of the prompt, or None.
        limit: Most requests kept, from the start.
        time_format: Format of the times where the column leaves it open, as in
            :func:`edgesched.data.timestamps.read_times`.
        seed: Seed of requests that are dealt at random.

    Returns:
        One replica. Rows without a readable time, or with an unknown category, are skipped and counted in a warning.

    Raises:
        ArgumentError: If ``rate_scale`` or ``time_format`` is none.
        RequestError: If the file cannot be read, a column is missing, a row has another number of fields or another
            format of time, or nothing is left.
    """
    if rate_scale is not None and not (math.isfinite(rate_scale) and rate_scale > 0):
        raise ArgumentError(f"rate_scale: expected a number above 0, got {rate_scale}")
    needed = [
        time_column,
        *([task_column] if tasks is not None else []),
        *([category_column] if category_column else []),
    ]
    records = read_records(path, needed, error=RequestError)
    times = read_times(records, time_column, time_format)
    kept = list(range(len(records)))
    if tasks is not None:
        task = records.names(task_column, empty=True)
        kept = [row for row in kept if task[row] in tasks or not task[row]]
    readable = [row for row in kept if times.seconds[row] is not None and (tasks is None or task[row])]
    if category_column:
        names = records.names(category_column, empty=True)
        readable = [row for row in readable if names[row] in categories]
    if len(readable) < len(kept):
        log.warning(
            "%s: %d of %d rows are malformed and skipped", Path(path).name, len(kept) - len(readable), len(kept)
        )
    if not readable:
        raise RequestError(f"{path}: no request is left; tasks kept: {'all' if tasks is None else ', '.join(tasks)}")
    came = {row: second for row in readable if (second := times.seconds[row]) is not None}
    back = [row for before, row in itertools.pairwise(readable) if came[row] < came[before]]
    if back and not times.dated:
        raise records.wrong(back[0], f"{time_column} is earlier than in the row before; clock times need the day")
    if back:
        log.warning("%s: %d rows are earlier than the row before, the first at %s; requests are put in order of their times",
                    Path(path).name, len(back), records.places[back[0]])  # fmt: skip
    order = sorted(readable, key=lambda row: came[row])[:limit]  # stable: what comes at once stays in the file's order
    first = came[order[0]]
    arrival = np.array([float(came[row] - first) for row in order])
    if rate_scale is None:
        rate_scale = 1.0 if rate is None else float(np.sum(rate)) * float(arrival[-1]) / len(arrival)
    arrival = arrival / max(rate_scale, 1e-12)
    rng = np.random.default_rng(seed)
    place = rng.integers(len(categories), size=len(order))
    if category_column:
        place = np.array([list(categories).index(names[row]) for row in order])
    elif length_column is not None and length_column in records:
        every = records.numbers(length_column, least=0, empty=True)
        length = np.array([every[row] for row in order])
        known = np.isfinite(length)
        cuts = np.quantile(length[known], np.arange(1, len(categories)) / len(categories)) if known.any() else []
        place[known] = np.searchsorted(cuts, length[known], "right")
    return RequestStream(torch.tensor(arrival[None]), torch.tensor(place[None]), tuple(categories))


def _shares(rate: Sequence[float], categories: Sequence[str]) -> tuple[np.ndarray, float]:
    values = np.asarray(rate, dtype=float)
    if values.shape != (len(categories),) or not np.isfinite(values).all() or (values < 0).any() or values.sum() <= 0:
        raise RequestError(f"rate: expected {len(categories)} finite rates from 0, not all 0, got {values.tolist()}")
    return values / values.sum(), float(values.sum())


def _stream(
    arrival: np.ndarray, share: np.ndarray, categories: Sequence[str], rng: np.random.Generator
) -> RequestStream:
    category = np.searchsorted(np.cumsum(share)[:-1], rng.random(arrival.shape), "right")
    return RequestStream(torch.tensor(arrival), torch.tensor(category), tuple(categories))
