"""The train_micro task: the micro family and its judge from nothing, then what they can do."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from edgesched.data.table import ScoreTable
from edgesched.generation.campaign import device_name, run_campaign
from edgesched.generation.diffusion import DiffusionModel
from edgesched.generation.samples import sample_grid
from edgesched.generation.scores import CLIPScore
from edgesched.micro.family import Recipe, compare_settings, examine_judge, reconstruction_scores, train_family
from edgesched.micro.world import prompt_set
from edgesched.report import scores, style
from edgesched.report.page import Cell, Page, Section
from edgesched.runs.run import Run
from edgesched.runs.tracking import Tracker
from edgesched.tasks.pictures import family_rows

if TYPE_CHECKING:
    from edgesched.micro.family import Setting
    from edgesched.types import PromptSet


def train_micro(
    run: Run,
    *,
    recipe: Recipe,
    out: str,
    weights: str,
    examine_prompts: int,
    examine_steps: Sequence[int],
    guidance_scales: Sequence[float],
    schedulers: Sequence[str | None],
    compared_steps: Sequence[int],
    judged_scenes: int = 400,
    rebuilt_scenes: int = 200,
    batch_size: int = 64,
    timing_repeats: int = 3,
    seed: int = 0,
) -> None:
    """Train autoencoder, judge and denoisers, save them, and measure what they can do.

    Args:
        run: Where the results go.
        recipe: Sizes of all stages.
        out: Folder of scenes, checkpoints and logs; stopped and started again, training goes on there.
        weights: Folder of the judge and of one pipeline a model.
        examine_prompts: Prompts of each category that the models are examined with.
        examine_steps: Step counts of the examination.
        guidance_scales: Compared for every model; the best is used.
        schedulers: Likewise; None is the saved one.
        compared_steps: Step counts at which these are compared.
        judged_scenes: Unseen scenes that the judge is examined with.
        rebuilt_scenes: Scenes that the autoencoder rebuilds.
        batch_size: Images a batch of the examination.
        timing_repeats: Repeats of each measurement of its timing.
        seed: Seed of the prompts.

    Raises:
        CampaignError: If a folder cannot be written, or images cannot be made.
        ModelError: If a trained model cannot be loaded.
    """
    from transformers import CLIPModel

    folder = Path(weights)
    seconds = train_family(recipe, Path(out), folder)
    judge = CLIPModel.from_pretrained(folder / "judge", dtype=torch.float32).eval()
    judged = examine_judge(judge, judged_scenes)
    models = {name: DiffusionModel(str(folder / name), resolution=64) for name in recipe.denoisers}
    rebuilt = reconstruction_scores(judge, next(iter(models.values())).pipeline.vae.float(), rebuilt_scenes)
    prompts = prompt_set(examine_prompts, seed=seed + 99)
    scorer = CLIPScore(str(folder / "judge"))
    settings = compare_settings(
        models, prompts, scorer, list(guidance_scales), list(schedulers), [int(k) for k in compared_steps]
    )
    chosen = {name: max((s for s in settings if s.model == name), key=lambda s: s.score) for name in models}
    for name, model in models.items():
        model.guidance_scale, model.scheduler = chosen[name].guidance_scale, chosen[name].scheduler
    examined = run.folder / "examination"
    table = run_campaign(prompts, models, {"clip_score": scorer}, steps=[int(k) for k in examine_steps], seeds=1, out=examined,
                         batch_size=batch_size, timing_repeats=timing_repeats)  # fmt: skip
    metrics = {
        "judge": {"accuracy": judged["accuracy"], "accuracy_by_attribute": judged["accuracy_by_attribute"]},
        "family": {"render": judged["render"], "reconstruction": rebuilt, **_family(table, list(models))},
        "chosen": {name: dataclasses.asdict(setting) for name, setting in chosen.items()},
        "seconds": seconds,
        "device": device_name(next(iter(models.values())).device),
    }
    run.save(metrics)
    run.publish(
        Page(
            {"Device": str(metrics["device"]), "Weights": weights},
            [
                *_judge_sections(judged, rebuilt, list(table.categories)),
                *_family_sections(run, table, models, metrics, prompts, judged["render"]),
                _settings_section(settings, list(chosen.values()), len(prompts), compared_steps),
            ],
        )
    )
    _log_curves(Path(out), recipe.denoisers, run.tracker)
    shutil.rmtree(examined / "shards", ignore_errors=True)
    print(f"Weights: {weights}", flush=True)


def _family(table: ScoreTable, models: Sequence[str]) -> dict[str, Any]:
    """Best mean score of every model by category, and its seconds a step at the largest batch."""
    mean = table.frame.groupby(["model", "category", "steps"])[table.score].mean()
    timing = {(r["model"], r["batch_size"], r["steps"]): r["latency_s"] for r in table.manifest["timing"]}
    batch = max(b for _, b, _ in timing)
    family: dict[str, Any] = {}
    for name in models:
        family[name] = {c: {"best_score": float(mean[name][c].max())} for c in table.categories}
        counts = sorted(k for m, b, k in timing if m == name and b == batch)
        if len(counts) > 1:
            first, last = counts[0], counts[-1]
            family[name]["seconds_per_step"] = (timing[name, batch, last] - timing[name, batch, first]) / (last - first)
    return family


def _judge_sections(
    judged: Mapping[str, Any], rebuilt: Mapping[str, float], categories: Sequence[str]
) -> list[Section]:
    by_category: list[list[Cell]] = [[c, judged["accuracy"][c], judged["render"][c], rebuilt[c]] for c in categories]
    by_attribute: list[list[Cell]] = [[a, v] for a, v in judged["accuracy_by_attribute"].items()]
    return [
        Section("The judge", ("How often it prefers the true caption of an unseen render to one with a single "
                "attribute wrong, and what it gives true renders and the autoencoder's reconstructions.",),
                ("category", "prefers the true caption", "renders", "reconstructions"), by_category, key="judge"),
        Section("By the attribute that is wrong", (), ("attribute", "prefers the true caption"), by_attribute, key="attributes"),
    ]  # fmt: skip


def _family_sections(
    run: Run,
    table: ScoreTable,
    models: Mapping[str, DiffusionModel],
    metrics: Mapping[str, Any],
    prompts: PromptSet,
    renders: Mapping[str, float],
) -> list[Section]:
    counts = list(table.steps)
    shown = sorted({counts[round(i * (len(counts) - 1) / 4)] for i in range(5)})
    sheet = prompts.per_category(2)
    images = {
        f"{name.removeprefix('micro_')}, {k}": list(sample_grid(model, sheet, k))
        for name, model in models.items()
        for k in shown
    }
    figure = scores.sample_images(images, sheet.texts, "model, denoising steps", cell=1.1)
    picture = style.save(figure, run.figures / "samples.png")
    columns, rows = family_rows(table)
    rows.append(["true renders", *(renders[c] for c in table.categories)])
    speed = {name: metrics["family"][name].get("seconds_per_step", float("nan")) for name in models}
    speed_rows: list[list[Cell]] = [
        [name, f"{1000 * s:.2f}", s / next(iter(speed.values()))] for name, s in speed.items()
    ]
    return [
        Section("The family at each model's best step count", (), columns, rows,
                [(picture, "Two prompts of each category; model and denoising steps at the left.")], key="family"),
        Section("Cost of a denoising step at the largest batch", (),
                ("model", "milliseconds an image", "over the first"), speed_rows, key="speed"),
    ]  # fmt: skip


def _settings_section(
    settings: Sequence[Setting], chosen: Sequence[Setting], prompts: int, compared_steps: Sequence[int]
) -> Section:
    rows: list[list[Cell]] = [
        [s.model, s.scheduler or "as saved (DDIM)", s.guidance_scale, s.score, "chosen" if s in chosen else ""]
        for s in settings
    ]
    return Section("Guidance and scheduler, by measurement",
                   (f"Mean score over the {prompts} prompts at {', '.join(map(str, compared_steps))} steps.",),
                   ("model", "scheduler", "guidance scale", "mean score", ""), rows)  # fmt: skip


def _log_curves(out: Path, denoisers: Mapping[str, Any], tracker: Tracker) -> None:
    """Training curves, which the stages wrote as CSV, to W&B."""
    import pandas as pd

    for name in ("autoencoder", "judge", "decoder", *denoisers):
        for file in sorted(out.glob(f"{name}/log/metrics.csv")):
            frame = pd.read_csv(file)
            columns = [c for c in frame.columns if c not in ("epoch", "step")]
            for row in frame[["step", *columns]].dropna().to_dict("records"):
                tracker.metrics({name: {"step": row["step"], **{c: row[c] for c in columns}}})
