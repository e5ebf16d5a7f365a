"""The campaign task: prompts × models × steps × seeds, generated, scored and timed into a score table."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgesched.data.table import ScoreTable
from edgesched.generation.campaign import UnfinishedError, run_campaign
from edgesched.generation.scores import SampleScore
from edgesched.protocols import ImageModel
from edgesched.report.page import Cell, Page, Section
from edgesched.runs.run import Run
from edgesched.tasks.pictures import family_rows
from edgesched.types import PromptSet


def campaign(
    run: Run,
    *,
    prompts: PromptSet,
    models: Mapping[str, ImageModel],
    scores: Mapping[str, SampleScore],
    out: str,
    prompts_per_category: int,
    **options: Any,
) -> None:
    """Generate, score and time, into ``out``; stopped and started again, it goes on.

    Args:
        run: Where the results go.
        prompts: Where the prompts are taken from.
        models: Models by name.
        scores: Scores by the column that they fill.
        out: Folder of the table and its shards.
        prompts_per_category: Prompts of each category.
        **options: Passed on to :func:`edgesched.generation.campaign.run_campaign`.

    Raises:
        CampaignError: If nothing could be made, or a step count was refused: told at the end, after the report.
    """
    unfinished = None
    try:
        table = run_campaign(prompts.per_category(prompts_per_category), models, scores, out=Path(out), **options)
    except UnfinishedError as exc:  # told at the end: what could be made is reported first
        if exc.table is None:
            raise
        table, unfinished = exc.table, exc
    run.tracker.score_table(table)
    run.save(_metrics(table))
    run.publish(_page(table, out))
    print(f"Score table: {out}", flush=True)
    if unfinished is not None:
        raise unfinished


def _metrics(table: ScoreTable) -> dict[str, Any]:
    mean = table.frame.groupby(["model", "category", "steps"], sort=False)[table.score].mean()
    return {
        "rows": len(table),
        "device": table.device,
        "digest": table.digest(),
        "mean_score": {f"{m}/{c}/{k}": float(v) for (m, c, k), v in mean.items()},
    }


def _page(table: ScoreTable, out: str) -> Page:
    columns: list[str]
    rows: list[list[Cell]]
    columns, rows = family_rows(table)
    facts = {"Scores come from": table.device, "Images": str(len(table)), "Table": out}
    return Page(facts, [Section("Mean score at each model's best step count", (), columns, rows, key="family")])
