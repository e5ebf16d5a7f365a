"""The difficulty task: what a prompt's text says about its score, and what planning by predicted levels gains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from edgesched.data.table import ScoreTable
from edgesched.errors import ArgumentError
from edgesched.evaluation.replay import compare, replay
from edgesched.protocols import Search
from edgesched.quality.difficulty import (
    explained_variance,
    fit_difficulty,
    predict_offsets,
    prompt_offsets,
    split_by_difficulty,
)
from edgesched.report import scores
from edgesched.report.page import Cell, Page, Section
from edgesched.runs.run import Run
from edgesched.tasks.pictures import Album, sentences
from edgesched.tasks.problem import Problem
from edgesched.types import Plan, PromptSet

PREDICTED, SEEN = "predicted", "seen"


class Embedding(Protocol):
    """Texts as vectors."""

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Embeddings, shape (N, D)."""
        ...


def difficulty(
    run: Run,
    *,
    problem: Problem,
    prompts: PromptSet,
    embedding: Embedding,
    search: Search,
    levels: int = 3,
    loads: Sequence[float] = (1, 4, 16, 32, 64, 256),
    routing: str = "random",
    draws: int = 1000,
    seed: int = 0,
) -> None:
    """Predict offsets from texts, split categories by level, and replay plans by levels at every load.

    Args:
        run: Where the results go.
        problem: Table, fits, latency model and weight.
        prompts: Texts of the table's prompts, by their ids.
        embedding: Turns texts into vectors.
        search: Plans at every load.
        levels: Levels of difficulty of every category.
        loads: Requests of every category a slot (a second in queue mode).
        routing: How a replayed request comes to its model.
        draws: Bootstrap draws over prompts.
        seed: Their seed.

    Raises:
        ArgumentError: If a load is not positive, or there is one level only.
    """
    if not loads or min(loads) <= 0:
        raise ArgumentError(f"difficulty.loads: expected positive numbers of requests, got {list(loads)}")
    if levels < 2:
        raise ArgumentError(f"difficulty.levels: expected at least 2, got {levels}")
    table = problem.table
    run.tracker.score_table(table)
    embeddings: dict[str, Tensor] = dict(zip(prompts.ids, embedding.embed_texts(prompts.texts).cpu(), strict=True))
    fit_half, held = problem.halves
    fitted = fit_difficulty(fit_half, embeddings)
    predicted = predict_offsets(fitted.model, held, embeddings)
    explained = explained_variance(held, predicted, draws=draws, seed=seed)

    def gains_of(
        halves: tuple[ScoreTable, ScoreTable], offsets: tuple[Mapping[str, float], Mapping[str, float]]
    ) -> Any:
        return _gains(problem, halves, offsets, search, levels, loads, routing, draws, seed)

    gains = {PREDICTED: gains_of((fit_half, held), (fitted.out_of_fold, predicted))}
    seeds = sorted(int(s) for s in table.frame["seed"].unique())
    if len(seeds) > 1:
        parts = [_by_seed(half, seeds[0]) for half in (fit_half, held)]
        said = [dict(prompt_offsets(first)[["prompt_id", "offset"]].itertuples(index=False)) for first, _ in parts]
        gains[SEEN] = gains_of((parts[0][1], parts[1][1]), (said[0], said[1]))
    metrics: dict[str, Any] = {
        "explained": explained,
        "explained_out_of_fold": fitted.explained,
        "penalty": fitted.model.penalty,  # infinite where the text predicts nothing
        "gains": gains,
        "words": _words(explained, gains, fitted.explained),
        "remarks": list(problem.fitted.remarks(str(problem.workload["latency"]))),
        "source": problem.source,
    }
    run.save(metrics)
    run.publish(_page(problem, metrics, _pictures(run, held, predicted, gains), type(embedding).__name__))


def _pictures(run: Run, held: ScoreTable, predicted: Mapping[str, float], gains: Mapping[str, Any]) -> Album:
    """Draw what was found."""
    album = Album(run.figures)
    by_category = prompt_offsets(held).groupby("category", sort=False)
    points = {
        str(c): (mine["prompt_id"].map(predicted).to_numpy(float), mine["offset"].to_numpy()) for c, mine in by_category
    }
    album.keep("difficulty", scores.difficulty(points, gains), "Left: predicted against measured offsets of held-out prompts. "
               "Right: utility that planning by levels gains over planning by categories, with paired 95 % intervals.")  # fmt: skip
    return album


def _page(problem: Problem, metrics: Mapping[str, Any], album: Album, embedding: str) -> Page:
    rows: list[list[Cell]] = [
        [name, load, row["plain"], row["split"], f"{row['value']:+.3f} ({row['lo']:+.3f} to {row['hi']:+.3f})"]
        for name, by_load in metrics["gains"].items()
        for load, row in by_load.items()
    ]
    shares: list[list[Cell]] = [
        [name, f"{100 * v['value']:.1f} %", f"{100 * v['lo']:.1f} to {100 * v['hi']:.1f} %"]
        for name, v in metrics["explained"].items()
    ]
    held, fit_half = problem.held, problem.fit_half
    facts = {
        "Scores come from": problem.table.device,
        "Prompts": f"{held.frame['prompt_id'].nunique()} held out, {fit_half.frame['prompt_id'].nunique()} to fit",
        "Embedding": embedding,
    }
    return Page(facts, [
        Section("What the text says", (*metrics["words"], *sentences(metrics["remarks"])), ("category", "variance explained", "95 % interval"),
                shares, album.of("difficulty"), key="explained"),
        Section("Planning by levels of difficulty, replayed on held-out prompts", (
            "predicted: levels from the text. seen: levels from the scores of one seed, replayed on the others; what "
            "would be gained if one image of every prompt had been made and judged before.",),
            ("levels", "requests a category", "utility, categories", "utility, levels", "gain"), rows, key="levels"),
    ])  # fmt: skip


def _by_seed(table: ScoreTable, seed: int) -> tuple[ScoreTable, ScoreTable]:
    """Rows of one seed, and of the others."""
    mine = table.frame["seed"] == seed
    return table.replaced(table.frame[mine]), table.replaced(table.frame[~mine])


def _gains(
    problem: Problem,
    halves: tuple[ScoreTable, ScoreTable],
    offsets: tuple[Mapping[str, float], Mapping[str, float]],
    search: Search,
    levels: int,
    loads: Sequence[float],
    routing: str,
    draws: int,
    seed: int,
) -> dict[str, dict[str, Any]]:
    """Replayed utility of planning by levels over planning by categories, at every load.

    ``clear``: the gain is told from zero at 95 % for all loads together (Bonferroni).
    """
    fit_half, held = halves
    fit_levels, held_levels, names = split_by_difficulty(fit_half, held, *offsets, levels)
    plain, split = (problem.quality(half) for half in (fit_half, fit_levels))
    assert plain.models == split.models
    owner = {level: c for c, mine in names.items() for level in mine}
    rows = torch.tensor([plain.categories.index(owner[level]) for level in split.categories])
    prompts = fit_levels.frame.groupby("category", sort=False)["prompt_id"].nunique()
    part = {level: prompts[level] / sum(prompts[n] for n in mine) for mine in names.values() for level in mine}
    by_load = {}
    for load in loads:
        coarse = problem.at(plain, demand=float(load))
        fine = problem.at(split, demand={level: float(load) * float(part[level]) for level in part})
        wide, own = search(coarse).plan, search(fine).plan
        plans = {"plain": Plan(wide.assignment[:, rows], wide.steps, wide.share), "split": own}
        outcomes = replay(
            plans, fine, held_levels, split.models, planned_on=fit_levels, routing=routing, draws=draws, seed=seed,
        )  # fmt: skip
        gain = compare(outcomes["split"], outcomes["plain"])["utility_gain"]
        difference = (outcomes["split"].utility_draws - outcomes["plain"].utility_draws).double()
        edge = 0.025 / len(loads)
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
