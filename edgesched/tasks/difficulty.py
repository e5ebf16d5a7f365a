"""The difficulty task: what a prompt's text says about its score, and what planning by predicted levels gains."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from edgesched.data.table import ScoreTable
from edgesched.data.writing import write_json
from edgesched.evaluation.replay import compare, replay
from edgesched.quality.difficulty import (
    explained_variance,
    fit_difficulty,
    predict_offsets,
    prompt_offsets,
    split_by_difficulty,
)
from edgesched.report import figures, page
from edgesched.runs.config import build
from edgesched.runs.tracking import Tracker
from edgesched.types import Plan

PREDICTED, SEEN = "predicted", "seen"


def difficulty(cfg: DictConfig, folder: Path, tracker: Tracker) -> float | None:
    """Score table and texts → predicted offsets → categories split by level → plans, replayed at every load.

    Args:
        cfg: The composed configuration; ``difficulty`` names the embedding, levels and loads.
        folder: Run folder.
        tracker: W&B run.

    Returns:
        None: nothing here is for a sweep to maximise.
    """
    started = time.perf_counter()
    table: ScoreTable = build(cfg.data, "data")
    tracker.score_table(table)
    prompts = build(cfg.prompts, "prompts")
    embedding = build(cfg.difficulty.embedding, "difficulty.embedding")
    embeddings: dict[str, Tensor] = dict(zip(prompts.ids, embedding.embed_texts(prompts.texts).cpu(), strict=True))
    fit_half, held = table.split()
    fitted = fit_difficulty(fit_half, embeddings)
    predicted = predict_offsets(fitted.model, held, embeddings)
    draws, seed = int(cfg.replay.draws), int(cfg.replay.seed)
    explained = explained_variance(held, predicted, draws=draws, seed=seed)
    gains = {PREDICTED: _gains(cfg, fit_half, held, fitted.out_of_fold, predicted)}
    seeds = sorted(int(s) for s in table.frame["seed"].unique())
    if len(seeds) > 1:
        parts = [_by_seed(half, seeds[0]) for half in (fit_half, held)]
        said = [dict(prompt_offsets(first)[["prompt_id", "offset"]].itertuples(index=False)) for first, _ in parts]
        gains[SEEN] = _gains(cfg, parts[0][1], parts[1][1], said[0], said[1])
    words = _words(explained, gains, fitted.explained)
    metrics: dict[str, Any] = {
        "explained": explained,
        "explained_out_of_fold": fitted.explained,
        "penalty": fitted.model.penalty,
        "gains": gains,
        "words": words,
        "source": {"device": table.device, "digest": table.digest(), "rows": len(table)},
        "seconds_total": time.perf_counter() - started,
    }
    write_json(folder / "metrics.json", metrics)
    rows: list[list[page.Cell]] = [
        [name, load, row["plain"], row["split"], f"{row['value']:+.3f} ({row['lo']:+.3f} to {row['hi']:+.3f})"]
        for name, by_load in gains.items()
        for load, row in by_load.items()
    ]
    columns = ("levels", "requests a category", "utility, categories", "utility, levels", "gain")
    page.print_table("Planning by levels of difficulty, replayed on held-out prompts", columns, rows)
    for sentence in words:
        print(sentence, flush=True)
    measured = prompt_offsets(held)
    picture = figures.save(
        figures.difficulty(
            {
                str(c): (mine["prompt_id"].map(predicted).to_numpy(float), mine["offset"].to_numpy())
                for c, mine in measured.groupby("category", sort=False)
            },
            gains,
        ),
        folder / "figures" / "difficulty.png",
    )
    shares: list[list[page.Cell]] = [
        [name, f"{100 * v['value']:.1f} %", f"{100 * v['lo']:.1f} to {100 * v['hi']:.1f} %"]
        for name, v in explained.items()
    ]
    page.write_html(
        folder / "report.html",
        f"edgesched: {cfg.name}",
        {
            "Scores come from": table.device,
            "Prompts": f"{held.frame['prompt_id'].nunique()} held out, {fit_half.frame['prompt_id'].nunique()} to fit",
            "Embedding": str(cfg.difficulty.embedding.get("path", cfg.difficulty.embedding["_target_"])),
        },
        [
            page.Section("What the text says", words, ("category", "variance explained", "95 % interval"), shares,
                           [(picture, "Left: predicted against measured offsets of held-out prompts. Right: utility that "
                             "planning by levels gains over planning by categories, with paired 95 % intervals.")]),
            page.Section("Planning by levels", (
                "predicted: levels from the text. seen: levels from the scores of one seed, replayed on the others; what "
                "would be gained if one image of every prompt had been made and judged before.",), columns, rows),
        ],
    )  # fmt: skip
    tracker.summary(metrics)
    tracker.images({"difficulty": picture})
    return None


def _by_seed(table: ScoreTable, seed: int) -> tuple[ScoreTable, ScoreTable]:
    """Rows of one seed, and of the others."""
    mine = table.frame["seed"] == seed
    return table.replaced(table.frame[mine]), table.replaced(table.frame[~mine])


def _gains(
    cfg: DictConfig,
    fit_half: ScoreTable,
    held: ScoreTable,
    fit_offsets: Mapping[str, float],
    held_offsets: Mapping[str, float],
) -> dict[str, dict[str, Any]]:
    """Replayed utility of planning by levels over planning by categories, at every load.

    ``clear``: the gain is told from zero at 95 % for all loads together (Bonferroni).
    """
    fit_levels, held_levels, names = split_by_difficulty(
        fit_half, held, fit_offsets, held_offsets, int(cfg.difficulty.levels)
    )
    plain, split = (build(cfg.quality, "quality")(half) for half in (fit_half, fit_levels))
    assert plain.models == split.models
    search = build(cfg.difficulty.search, "difficulty.search")
    owner = {level: c for c, mine in names.items() for level in mine}
    rows = torch.tensor([plain.categories.index(owner[level]) for level in split.categories])
    prompts = fit_levels.frame.groupby("category", sort=False)["prompt_id"].nunique()
    part = {level: prompts[level] / sum(prompts[n] for n in mine) for mine in names.values() for level in mine}
    by_load = {}
    for load in cfg.difficulty.loads:
        options = {"latency_weight": float(cfg.workload.latency_weight), "latency": str(cfg.workload.latency)}
        coarse = plain.scenario(float(load), **options)
        fine = split.scenario({level: float(load) * float(part[level]) for level in part}, **options)
        wide, own = search(coarse).plan, search(fine).plan
        plans = {"plain": Plan(wide.assignment[:, rows], wide.steps, wide.share), "split": own}
        outcomes = replay(
            plans, fine, held_levels, split.models, planned_on=fit_levels, routing=cfg.replay.routing,
            draws=int(cfg.replay.draws), seed=int(cfg.replay.seed),
        )  # fmt: skip
        gain = compare(outcomes["split"], outcomes["plain"])["utility_gain"]
        difference = (outcomes["split"].utility_draws - outcomes["plain"].utility_draws).double()
        edge = 0.025 / len(cfg.difficulty.loads)
        low, high = difference.quantile(torch.tensor([edge, 1 - edge], dtype=torch.float64)).tolist()
        by_load[str(load)] = {**gain, "clear": low > 0 or high < 0}
        by_load[str(load)] |= {name: outcome.utility for name, outcome in outcomes.items()}
    return by_load


def _words(
    explained: Mapping[str, Mapping[str, float]], gains: Mapping[str, Mapping[str, Mapping[str, Any]]], inside: float
) -> Sequence[str]:
    """What the text explains and what the split gains, also where that is nothing."""
    whole = explained["all"]
    words = [
        f"On held-out prompts the text explains {100 * whole['value']:.1f} % of the variance of scores within a category "
        f"({100 * whole['lo']:.1f} to {100 * whole['hi']:.1f}); by cross-validation on the prompts to fit, {100 * inside:.1f} %."
    ]
    for name, by_load in gains.items():
        clear = {load: row for load, row in by_load.items() if row["clear"]}
        source = "Levels predicted from the text" if name == PREDICTED else "Levels seen on another image of the prompt"
        if not clear:
            best = max(by_load, key=lambda load: by_load[load]["value"])
            row = by_load[best]
            words.append(f"{source} gain nothing that can be told from zero over all loads compared; most at {best} requests of every "
                         f"category, {row['value']:+.3f} points ({row['lo']:+.3f} to {row['hi']:+.3f}).")  # fmt: skip
            continue
        for load, row in clear.items():
            verb = "gain" if row["value"] > 0 else "cost"
            words.append(f"{source} {verb} {abs(row['value']):.3f} points at {load} requests of every category "
                         f"({row['lo']:+.3f} to {row['hi']:+.3f}).")  # fmt: skip
    return words
