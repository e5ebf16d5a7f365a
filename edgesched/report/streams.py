"""Figures of requests over time: latencies, waiting, slots, and the measured against the simulated.

Plain arrays in, matplotlib figures out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from edgesched.report.style import COLOURS, FAINT, INK, panels, plain_log


def service(latencies: Mapping[str, np.ndarray], times: np.ndarray, waiting: Mapping[str, np.ndarray]) -> Figure:
    """How long requests take under every plan, and how many are in the system.

    Args:
        latencies: Method → seconds of every request, shape (n,).
        times: Seconds since the start, shape (T,).
        waiting: Method → requests that have come and are not delivered, shape (T,).
    """
    figure, axes = panels(2, width=4.4, height=3.2)
    for i, (name, values) in enumerate(latencies.items()):
        ordered = np.sort(values[np.isfinite(values)])
        colour = COLOURS[i % len(COLOURS)]
        axes[0].plot(
            ordered, 1 - np.arange(len(ordered)) / max(len(ordered), 1), color=colour, linewidth=1.3, label=name
        )
        axes[1].plot(times, waiting[name], color=colour, linewidth=1.0)
    axes[0].set_xscale("log")
    axes[0].set_yscale("log")
    plain_log(axes[0].xaxis)
    axes[0].set_ylim(bottom=1e-3)
    axes[0].set_xlabel("latency (s)")
    axes[0].set_ylabel("share of requests that take longer")
    axes[1].set_yscale("symlog", linthresh=1.0)
    axes[1].yaxis.set_major_formatter("{x:g}")
    axes[1].set_xlabel("time (s)")
    axes[1].set_ylabel("requests in the system")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False, fontsize=8)
    return figure


def slots(demand: np.ndarray, left: Mapping[str, np.ndarray], steps: Mapping[str, np.ndarray], slot_s: float) -> Figure:
    """Demand over time, what is left over at the end of every slot, and the denoising steps chosen.

    Args:
        demand: Requests a second of every slot, shape (slots,).
        left: Way of planning → requests left over, shape (slots,).
        steps: Way of planning → mean denoising steps of the slot's requests, shape (slots,).
        slot_s: Length of a slot in seconds.
    """
    figure, axes = panels(1, width=8.4, height=1.9, rows=3, sharex=True)
    time = np.arange(len(demand)) * slot_s
    axes[0].step(time, demand, where="post", color=INK, linewidth=1.0)
    axes[0].set_ylabel("requests (1/s)")
    for i, name in enumerate(left):
        axes[1].step(time, left[name], where="post", color=COLOURS[i], linewidth=1.1, label=name)
        axes[2].step(time, steps[name], where="post", color=COLOURS[i], linewidth=1.1)
    axes[1].set_yscale("symlog", linthresh=1.0)
    axes[1].yaxis.set_major_formatter("{x:g}")
    axes[1].set_ylabel("left over")
    axes[2].set_yscale("log")
    plain_log(axes[2].yaxis)
    axes[2].set_ylabel("mean steps")
    axes[2].set_xlabel("time (s)")
    figure.legend(*axes[1].get_legend_handles_labels(), loc="outside upper center", ncols=5, frameon=False, fontsize=8)
    return figure


def measured(simulated: np.ndarray, found: np.ndarray, model: np.ndarray, models: Sequence[str]) -> Figure:
    """Latency of every request, measured against simulated, with the line of equality.

    Args:
        simulated: Seconds, shape (n,).
        found: Seconds, shape (n,).
        model: Position of the model of each, shape (n,).
        models: Names.
    """
    figure, axes = panels(1, width=4.6, height=3.8)
    for m, name in enumerate(models):
        mine = model == m
        axes[0].scatter(simulated[mine], found[mine], s=14, color=COLOURS[m], alpha=0.7, linewidths=0, label=name)
    ends = np.array([min(simulated.min(), found.min()), max(simulated.max(), found.max())])
    axes[0].plot(ends, ends, color=FAINT, linewidth=1.0)
    for axis, scale in ((axes[0].xaxis, axes[0].set_xscale), (axes[0].yaxis, axes[0].set_yscale)):
        scale("log")
        plain_log(axis)
    axes[0].set_xlabel("simulated latency (s)")
    axes[0].set_ylabel("measured latency (s)")
    axes[0].legend(frameon=False, fontsize=8)
    return figure
