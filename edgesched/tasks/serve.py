"""The serve task: a short stream really served by the pipelines on this machine, held against the equations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from edgesched.data.table import ScoreTable
from edgesched.generation.campaign import device_name
from edgesched.report import streams
from edgesched.report.page import Cell, Page, Section
from edgesched.runs.run import Run
from edgesched.serving.measure import Measured, ServedForReal
from edgesched.tasks.pictures import Album
from edgesched.tasks.problem import Fit


def serve(run: Run, *, data: ScoreTable, quality: Fit, served: ServedForReal) -> None:
    """Serve a short stream for real; measured against simulated on the same arrivals, and against theory.

    Args:
        run: Where the results go.
        data: Score table: its models are served.
        quality: Fits score distributions to it.
        served: The stream and how it is served.

    Raises:
        ConfigError: If none of the models is in the table.
    """
    found, names, counts = served.measure(quality(data))
    errors = found.errors()
    per_model = _per_model(found, names, counts)
    device = device_name(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    words = _served_words(errors, {n: r["load"] for n, r in per_model.items()}, len(found.model), device)
    metrics = {"agreement": errors, "models": per_model, "source": {"device": device}, "words": words}
    run.save(metrics)
    album = Album(run.figures)
    album.keep("measured", streams.measured(found.simulated_s.numpy(), found.measured_s.numpy(), found.model.numpy(), names),
               "Latency of every request, measured against simulated on the same arrivals.")  # fmt: skip
    columns = ("model", "requests", "steps", "share", "share realised", "alone (s)", "in service (s)", "measured (s)", "simulated (s)",
               "predicted (s)")  # fmt: skip
    rows: list[list[Cell]] = [
        [n, r["requests"], r["steps"], r["share"], r["share_realised"], r["alone_s"], r["inside_s"], r["measured_s"], r["simulated_s"],
         "overloaded" if r["predicted_s"] is None else r["predicted_s"]]
        for n, r in per_model.items()
    ]  # fmt: skip
    run.publish(
        Page({"Device": device}, [Section("Served for real", words, columns, rows, album.of("measured"), key="serve")])
    )


def _per_model(found: Measured, names: tuple[str, ...], counts: list[int]) -> dict[str, dict[str, Any]]:
    per_model: dict[str, dict[str, Any]] = {}
    for m, name in enumerate(names):
        mine = found.model == m
        if bool(mine.any()):
            per_model[name] = {
                "requests": int(mine.sum()), "measured_s": float(found.measured_s[mine].mean()),
                "simulated_s": float(found.simulated_s[mine].mean()),
                "predicted_s": float(found.predicted_s[m]) if found.load[m] < 1 else None, "load": float(found.load[m]),
                "alone_s": float(found.alone_s[m]), "inside_s": float(found.inside_s[m]), "share": float(found.share[m]),
                "share_realised": float(found.worked_s[m] / found.worked_s.sum()), "steps": counts[m],
            }  # fmt: skip
    return per_model


def _served_words(
    errors: Mapping[str, float | None], load: Mapping[str, float], requests: int, device: str
) -> list[str]:
    """What a service that was measured says, in words; an overload has no predicted mean, and is told as such."""
    words = [f"{requests} requests were served on {device}: mean latency measured {errors['measured_s']:.3f} s, simulated on the "
             f"same arrivals {errors['simulated_s']:.3f} s ({errors['measured_vs_simulated_pct']:.1f} % apart). With the seconds an image "
             f"as they were during the service, not beforehand, the simulation is {errors['measured_vs_resimulated_pct']:.1f} % off."]  # fmt: skip
    if errors["predicted_s"] is not None:
        return [
            *words,
            f"The equations predicted {errors['predicted_s']:.3f} s ({errors['measured_vs_predicted_pct']:.1f} % apart).",
        ]
    over = [
        f"{name} was asked for {value:.2f} times what its share can make" for name, value in load.items() if value >= 1
    ]
    return [*words, f"{'; '.join(over)}: its queue grows as long as requests come, so the equations know no mean, and the "
            f"measured one is that of these {requests} requests alone."]  # fmt: skip
