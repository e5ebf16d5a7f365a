"""A data source of one's own: a function that returns a ``ScoreTable``, and ``conf/data/my_table.yaml``.

    python scripts/run.py --config-dir scripts/examples/conf +experiment=plan data=my_table data.path=results.csv

What to do: read whatever you have into one row per image with the columns of the table's contract, and say in the
manifest where the scores come from. The table checks the rest, and names the row that breaks it. For a CSV that has a
row per image already, ``data=shipped data.path=...`` or :meth:`edgesched.ScoreTable.from_csv` is enough.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from edgesched import ScoreTable
from edgesched.errors import ScoreTableError

_PROMPT = ("prompt_id", "category")


def my_table(path: Path | str, *, seconds: Mapping[str, float], device: str = "my own measurements") -> ScoreTable:
    """Read a sheet with a row per prompt, the columns ``prompt_id`` and ``category``, and one column per model.

    A column ``<model>@<steps>`` holds the score of that model's image at that step count.

    Args:
        path: CSV file.
        seconds: Model → seconds a step, because the sheet has none.
        device: What the scores and seconds were measured on.

    Raises:
        ScoreTableError: If the file cannot be read, or a column has another name, or a model has no seconds.
    """
    try:
        sheet = pd.read_csv(path, dtype=dict.fromkeys(_PROMPT, str))
    except (OSError, ValueError) as exc:
        raise ScoreTableError(f"{path}: cannot be read as CSV ({exc})") from exc
    missing = [name for name in _PROMPT if name not in sheet]
    if missing:
        raise ScoreTableError(f"{path}: column {missing[0]} is missing")
    parts = []
    for column in sheet.columns.drop(list(_PROMPT)):
        model, _, steps = str(column).rpartition("@")
        if not model or not steps.isdecimal():
            raise ScoreTableError(f"{path}: column {column!r} is not <model>@<steps>")
        if model not in seconds:
            raise ScoreTableError(f"data.seconds: {model} has none; the models are those of the columns of {path}")
        rows = sheet[list(_PROMPT)].assign(
            model=model, steps=int(steps), seed=0, clip_score=sheet[column], latency_s=int(steps) * seconds[model],
            batch_size=1,
        )  # fmt: skip
        parts.append(rows)
    if not parts:
        raise ScoreTableError(f"{path}: no column <model>@<steps>")
    return ScoreTable(pd.concat(parts, ignore_index=True), {"device": device, "source": str(path)})
