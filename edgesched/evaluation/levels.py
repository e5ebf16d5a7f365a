"""Score levels: what every model makes of prompts that a reference model finds hard, middling or easy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from edgesched.data.bootstrap import prompt_counts
from edgesched.data.table import ScoreTable
from edgesched.errors import ScoreTableError


def score_levels(
    table: ScoreTable, models: Sequence[str], *, levels: int = 3, draws: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """What every model makes of prompts that a reference model finds hard, middling or easy.

    The scores of the first model at its largest step count cut all prompts into levels of equal size, as thresholds
    shared by all categories do. Where there are several seeds, the first one makes the levels and the others are
    compared: otherwise the reference's own luck would look like ability.

    Args:
        table: Score table.
        models: Models in order, the reference first.
        levels: Number of levels.
        draws: Bootstrap draws over prompts, the same for every model.
        seed: Seed of the draws.

    Returns:
        ``reference``, ``cuts`` in points, ``own_scores`` (whether levels were made from other images than are
        compared), and ``levels``: for every level ``prompts`` and ``models``, model → ``mean lo hi`` at its largest
        step count.

    Raises:
        ScoreTableError: If fewer prompts than levels were scored by every model.
    """
    frame = table.frame.merge(
        table.frame.groupby("model")["steps"].max().rename("most"), left_on="model", right_index=True
    )
    frame = frame[frame["steps"] == frame["most"]]
    seeds = sorted(frame["seed"].unique())
    judged = frame[frame["seed"] != seeds[0]] if len(seeds) > 1 else frame
    first = frame[(frame["model"] == models[0]) & (frame["seed"] == seeds[0])]
    reference = first.set_index("prompt_id")[table.score].astype(float)
    mean = judged.groupby(["prompt_id", "model"])[table.score].mean().unstack().reindex(columns=list(models))
    mean = mean.loc[mean.index.intersection(reference.index)].dropna().astype(float)
    reference = reference.loc[mean.index]
    if len(mean) < levels:
        raise ScoreTableError(f"levels: {levels} need as many prompts scored by every model; there are {len(mean)}")
    cuts = np.quantile(reference, np.arange(1, levels) / levels)
    place = np.searchsorted(cuts, reference, "right")
    rng = np.random.default_rng(seed)
    found = []
    for level in range(levels):
        mine = mean[place == level].to_numpy()
        drawn = prompt_counts(rng, len(mine), draws) @ mine / len(mine)
        low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
        found.append({
            "prompts": len(mine),
            "models": {m: {"mean": float(mine[:, i].mean()), "lo": float(low[i]), "hi": float(high[i])}
                       for i, m in enumerate(models)},
        })  # fmt: skip
    return {"reference": models[0], "cuts": cuts.tolist(), "own_scores": len(seeds) > 1, "levels": found}
