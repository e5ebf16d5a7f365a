"""A task of one's own: a function of a run and plain arguments, and ``conf/task/table_summary.yaml``.

    python scripts/run.py --config-dir scripts/examples/conf task=table_summary name=table_summary

What to do: take ``(run, *, ...)``, where every argument is named in the YAML file and refers to what the configuration
builds (``${data}``, ``${quality}``, ``${model}``, ...); compute, then ``run.save`` the numbers, then ``run.publish`` a
page. Return what a sweep should maximise, or nothing. The file begins with ``# @package _global_`` and has the node
``task``; keys of the task's own stand beside it. A key of the command line that the task does not refer to is refused.
"""

from __future__ import annotations

from typing import Any

from edgesched import ScoreTable
from edgesched.report.page import Cell, Page, Section
from edgesched.runs.run import Run


def table_summary(run: Run, *, data: ScoreTable) -> None:
    """Say what a score table holds: images, mean score and seconds of every model.

    Args:
        run: Where the results go.
        data: Score table.
    """
    models = {str(name): _summary(data, rows) for name, rows in data.frame.groupby("model", sort=False)}
    run.save({"models": models, "source": {"device": data.device, "digest": data.digest(), "rows": len(data)}})
    facts = {
        "Scores come from": data.device,
        "Categories": ", ".join(data.categories),
        "Step counts": ", ".join(map(str, data.steps)),
    }
    columns = ("model", "images", f"mean {data.score}", "best step count", "seconds an image there")
    rows: list[list[Cell]] = [[name, *told.values()] for name, told in models.items()]
    run.publish(Page(facts, [Section("What the table holds", (), columns, rows, key="table")]))


def _summary(data: ScoreTable, rows: Any) -> dict[str, Any]:
    by_steps = rows.groupby("steps")[[data.score, "latency_s"]].mean()
    best = by_steps[data.score].idxmax()
    return {
        "images": len(rows),
        "mean": float(rows[data.score].mean()),
        "best_steps": int(best),
        "latency_s": float(by_steps.loc[best, "latency_s"]),
    }
