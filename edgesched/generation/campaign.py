"""Prompts × models × steps × seeds → score table; what is done is kept, and never done again."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import logging
import platform
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from lightning.pytorch.utilities import rank_zero_only
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from edgesched.data.digests import json_text, settings_of, text_digest
from edgesched.data.table import ScoreTable
from edgesched.data.writing import json_document, write_bytes
from edgesched.errors import CampaignError, ModelError, reason
from edgesched.generation.jobs import Generation, Job, predict
from edgesched.generation.scores import SampleScore
from edgesched.generation.shards import SETTINGS, TEXT, CampaignFolder, Kept
from edgesched.protocols import ImageModel
from edgesched.types import PromptSet

log = logging.getLogger(__name__)
LIBRARIES = ("torch", "diffusers", "transformers", "lightning", "edgesched")
_NOT_OF_AN_IMAGE = ("steps", "memory_gib", "step_time_s", "overhead_s", "timing_source", "device")


class UnfinishedError(CampaignError):
    """Some step counts of some models could not be made; everything else was.

    Attributes:
        table: The table of everything else, or None if nothing is complete.
    """

    table: ScoreTable | None = None


def device_name(device: torch.device) -> str:
    """The device in words: the GPU's name, or the processor's and its threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    return f"CPU: {name}, {torch.get_num_threads()} threads"


def run_campaign(
    prompts: PromptSet,
    models: Mapping[str, ImageModel],
    scorers: Mapping[str, SampleScore],
    *,
    steps: Sequence[int],
    seeds: int,
    out: Path | str,
    batch_size: int = 64,
    timing_repeats: int = 5,
    accelerator: str = "auto",
    devices: int | str = 1,
    num_nodes: int = 1,
    strategy: str = "auto",
    progress: bool = True,
) -> ScoreTable:
    """Generate, score and time, and write the score table with its manifest.

    Work is keyed by (prompt_id, digest of its text, model, steps, seed); models and scores by their settings. Every
    batch is one shard, written in one atomic step; a campaign that was stopped at any moment goes on where it was.
    Batches are cut the same way in every run, so that an image made after a stop is the image made without one. Jobs
    are dealt out to processes by ``Trainer.predict``; scoring and writing overlap with generating. Seconds come from
    a pass of their own, in one process. A step count that a model refuses is left, and named at the end.

    The table holds everything that was made in the folder for these prompts and is complete: also models, step counts
    and seeds of earlier starts. Categories are always those of ``prompts``.

    Args:
        prompts: What is generated.
        models: Models by name.
        scorers: Scores by column name; the first is what plans are made with.
        steps: Step counts; a model skips those it may not run.
        seeds: Images of each prompt, model and step count.
        out: Folder of the table, the manifest and the shards; shared by all processes and nodes.
        batch_size: Images a batch; halved when memory runs out.
        timing_repeats: Repeats of each measurement of the timing pass.
        accelerator: Lightning accelerator.
        devices: Processes a node, ``"auto"`` for one on every GPU.
        num_nodes: Nodes; with more than one, start the program on each (``torchrun``, Slurm).
        strategy: Lightning strategy; ``"auto"`` starts the processes of one node itself.
        progress: Show a progress bar.

    Returns:
        The table, also written to ``out``. Processes started from outside (``torchrun``, Slurm) other than the
        first end here with exit code 0: the first times, assembles and reports.

    Raises:
        UnfinishedError: At the end, naming the models and step counts that could not be made; it carries the table of
            the others.
        CampaignError: If the folder cannot be written or holds a campaign of other settings, or nothing is left
            to run.
        KeyboardInterrupt: When stopped from the keyboard; batches that were generated are scored and kept.
    """
    counts = _counted(steps, seeds, batch_size, timing_repeats, num_nodes)
    if not models or not scorers:
        raise CampaignError("campaign: expected at least one model and one score")
    if not any(model.allows(k) for k in counts for model in models.values()):
        raise CampaignError(f"campaign: no model may run any of the step counts {counts}")
    processes = _processes(devices)
    if accelerator == "cpu":  # before settings are read: the dtype depends on the device
        parts: tuple[ImageModel | SampleScore, ...] = (*models.values(), *scorers.values())
        for part in parts:
            part.place(torch.device("cpu"))
    made_by = _made_by(models, scorers)
    folder = CampaignFolder(out)
    kept = folder.read()
    folder.check(kept, *made_by)
    folder.begin()
    if rank_zero_only.rank == 0:
        folder.forget_refusals(models, counts)
    done = kept.images()
    jobs = list(_jobs(prompts, models, counts, seeds, batch_size, done))
    images = sum(len(job.rows) for job in jobs)
    log.info("%d images to generate, %d done before", images, len(done))
    started = time.perf_counter()
    if jobs:
        for model in models.values():
            model.check()
        for scorer in scorers.values():
            scorer.check()
        generation = Generation(prompts, models, scorers, jobs, folder, made_by)
        predict(generation, accelerator, processes, num_nodes, strategy, progress)
    speed = images / (time.perf_counter() - started) if jobs else None
    if rank_zero_only.rank != 0:
        sys.exit(0)
    _timing(folder, models, made_by[0], counts, sorted({1, batch_size}), timing_repeats, progress)
    table = _assemble(folder, prompts, models, scorers, made_by, batch_size, speed)
    refused = _missing(table, folder.refusals(), models, counts, seeds)
    if not refused and table is not None:
        return table
    by_reason: dict[tuple[str, str], list[int]] = {}
    for (name, k), why in sorted(refused.items()):
        by_reason.setdefault((name, why), []).append(k)
    told = "; ".join(f"{n} at {', '.join(map(str, k))} steps: {why}" for (n, why), k in by_reason.items())
    rest = "nothing is complete" if table is None else f"the other {len(table)} images are in {folder.out}"
    unfinished = UnfinishedError(f"campaign: not made: {told} ({rest})")
    unfinished.table = table
    raise unfinished


def _counted(steps: Sequence[int], seeds: int, batch_size: int, timing_repeats: int, num_nodes: int) -> list[int]:
    """Step counts in order, and every number a whole positive one."""
    given: dict[str, list[Any]] = {
        "seeds": [seeds],
        "batch_size": [batch_size],
        "timing_repeats": [timing_repeats],
        "num_nodes": [num_nodes],
        "steps": list(steps) if isinstance(steps, Iterable) and not isinstance(steps, str) else [steps],
    }
    for name, values in given.items():
        for value in values or [None]:
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
                raise CampaignError(f"campaign.{name}: expected positive whole numbers, got {value!r}")
    return sorted({int(k) for k in steps})


def _processes(devices: int | str) -> int:
    """Processes of a node."""
    if devices == "auto":
        return torch.cuda.device_count() or 1
    count = int(devices) if isinstance(devices, str) and devices.isdecimal() else devices
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise CampaignError(f"campaign.devices: expected a positive whole number or auto, got {devices!r}")
    return count


def _made_by(
    models: Mapping[str, ImageModel], scorers: Mapping[str, SampleScore]
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """Whatever changes an image, by model, and its score, by score: classes, arguments, and content of folders."""
    made: dict[str, dict[str, Any]] = {}
    scored: dict[str, dict[str, Any]] = {}
    name = ""
    try:
        for name, model in models.items():
            told = settings_of(model)
            made[name] = {key: value for key, value in told.items() if key not in _NOT_OF_AN_IMAGE}
        for name, scorer in scorers.items():
            scored[name] = {key: value for key, value in settings_of(scorer).items() if key != "device"}
    except OSError as exc:
        raise CampaignError(f"{name}: {exc.filename} cannot be read ({exc.strerror or exc})") from exc
    return made, scored


def _jobs(
    prompts: PromptSet,
    models: Mapping[str, ImageModel],
    counts: Sequence[int],
    seeds: int,
    batch_size: int,
    done: set[tuple[str, str, str, int, int]],
) -> Iterator[Job]:
    """Batches cut before what is done is left out, so that a stop does not change who shares a batch with whom."""
    texts = [text_digest(text) for text in prompts.texts]
    rows = [(i, seed) for seed in range(seeds) for i in range(len(prompts))]
    batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    for name, model in models.items():
        for k in filter(model.allows, counts):
            for batch in batches:
                left = tuple((i, s) for i, s in batch if (prompts.ids[i], texts[i], name, k, s) not in done)
                if left:
                    yield Job(name, k, left)


def _timing(
    folder: CampaignFolder,
    models: Mapping[str, ImageModel],
    made_by: Mapping[str, Mapping[str, Any]],
    counts: Sequence[int],
    batches: Sequence[int],
    repeats: int,
    progress: bool,
) -> None:
    """The timing pass, kept in ``timing.json`` so that it is not repeated."""
    settings = {name: text_digest(json_text(told)) for name, told in made_by.items()}
    have = {(r["model"], r["steps"], r["batch_size"], r["settings"]) for r in folder.times()}
    refused = set(folder.refusals())
    want = [
        (n, k, b) for n, m in models.items() for k in counts if m.allows(k) and (n, k) not in refused
        for b in batches if (n, k, b, settings[n]) not in have
    ]  # fmt: skip
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not progress) as bar:
        task = bar.add_task("timing", total=len(want))
        last = None
        for name, k, batch in want:
            bar.advance(task)
            if (name, k) in refused:
                continue
            if last not in (None, name):
                models[str(last)].unload()
            last = name
            try:
                seconds, fits = _timed(models[name], k, batch, repeats)
            except CampaignError:
                raise
            except Exception as exc:
                refused.add((name, k))
                folder.keep_refusal(name, k, f"timing: {reason(exc)}")
                continue
            folder.keep_time({"model": name, "steps": k, "batch_size": batch, "measured_batch_size": fits,
                              "latency_s": seconds, "repeats": repeats, "device": device_name(models[name].device),
                              "settings": settings[name]})  # fmt: skip


def _timed(model: ImageModel, steps: int, batch: int, repeats: int) -> tuple[float, int]:
    """Seconds per image, and the batch that they were measured at: the largest half that memory holds."""
    while True:
        try:
            return model.seconds_per_image(steps, batch, repeats), batch
        except (torch.OutOfMemoryError, MemoryError):
            if batch == 1:
                raise ModelError("out of memory on a single image") from None
            batch //= 2


def _git_commit() -> str | None:
    try:
        here = Path(__file__).resolve().parent
        command = ["git", "-C", str(here), "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _assemble(
    folder: CampaignFolder,
    prompts: PromptSet,
    models: Mapping[str, ImageModel],
    scorers: Mapping[str, SampleScore],
    made_by: tuple[Mapping[str, Any], Mapping[str, Any]],
    batch_size: int,
    images_per_second: float | None,
) -> ScoreTable | None:
    """Shards and times as one table with its manifest, or None if no model has every prompt at any step count."""
    with folder.locked():
        kept = folder.read()
        folder.check(kept, *made_by)  # a start of other settings may have begun beside this one
        settings = {name: ways[0] for name, ways in kept.models.items()} | dict(made_by[0])
        digests = {name: text_digest(json_text(told)) for name, told in settings.items()}
        times = [r for r in folder.times() if r["settings"] == digests.get(r["model"])]
        frame = _complete(kept, prompts, times, batch_size, set(folder.refusals()))
        if frame is None:
            return None
        names = folder.order(tuple(models), tuple(frame["model"].unique()))
        places = {pid: i for i, pid in enumerate(prompts.ids)}
        ranks = {name: i for i, name in enumerate(names)}
        frame = frame.assign(_model=frame["model"].map(ranks), _place=frame["prompt_id"].map(places))
        frame = frame.sort_values(["_model", "steps", "seed", "_place"]).drop(columns=["_model", "_place"])
        cells = set(zip(frame["model"], frame["steps"], strict=True))
        timing = [r for r in times if (r["model"], r["steps"]) in cells]
        devices = list(dict.fromkeys(r["device"] for r in timing))
        if len(devices) > 1:
            log.warning("%s: seconds come from several devices: %s", folder.out, "; ".join(devices))
        of_all = {"models": {name: settings[name] for name in names}, "scores": dict(made_by[1])}
        manifest = {
            "device": "; ".join(devices),
            "dtype": str(settings[names[0]].get("dtype", "unknown")).removeprefix("torch."),
            "libraries": {name: metadata.version(name) for name in LIBRARIES},
            "git_commit": _git_commit(),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "prompts_sha256": hashlib.sha256(json_text(list(prompts)).encode()).hexdigest(),
            "prompts": len(prompts),
            "images_per_second": images_per_second,  # generating and scoring, in the call that made the last images
            **of_all,
            "truncated_prompts": int(frame.loc[frame["truncated"], "prompt_id"].nunique()),
            "timing": timing,
        }
        order = tuple(dict.fromkeys(prompts.categories))
        table = ScoreTable(frame, manifest, next(iter(scorers)), names, min_prompts=1, order=order)
        with folder.guarded():
            write_bytes(folder.out / SETTINGS, json_document(of_all).encode())
            table.save(folder.out)
    return table


def _missing(
    table: ScoreTable | None,
    refusals: Mapping[tuple[str, int], str],
    models: Mapping[str, ImageModel],
    counts: Sequence[int],
    seeds: int,
) -> dict[tuple[str, int], str]:
    """Models and step counts that were asked for and are not in the table with every seed, and why."""
    there = set() if table is None else set(table.frame[["model", "steps", "seed"]].itertuples(index=False, name=None))
    asked = [(name, k) for name, model in models.items() for k in counts if model.allows(k)]
    lost = "not every image is in the folder; start again to go on"
    return {
        (name, k): refusals.get((name, k), lost)
        for name, k in asked
        if (name, k) in refusals or any((name, k, seed) not in there for seed in range(seeds))
    }


def _complete(
    kept: Kept, prompts: PromptSet, times: Sequence[Mapping[str, Any]], batch_size: int, refused: set[tuple[str, int]]
) -> pd.DataFrame | None:
    """Rows of these prompts, of every model, step count and seed that has all of them and was timed."""
    if kept.frame is None:
        return None
    texts = {pid: text_digest(text) for pid, text, _ in prompts}
    categories = {pid: category for pid, _, category in prompts}
    mine = kept.frame["prompt_id"].map(texts).eq(kept.frame[TEXT])
    if not mine.all():
        log.warning("%d images of other prompts, or of other texts of these, are not in the table", int((~mine).sum()))
    seconds: dict[tuple[str, int], tuple[int, float]] = {}
    for row in sorted(times, key=lambda r: (r["batch_size"] == batch_size, r["batch_size"])):
        seconds[row["model"], row["steps"]] = row["batch_size"], row["latency_s"]
    parts = []
    for (name, k, seed), rows in kept.frame[mine].groupby(["model", "steps", "seed"], sort=False):
        if len(rows) == len(prompts) and (name, k) in seconds and (name, k) not in refused:
            batch, latency = seconds[name, k]
            parts.append(rows.assign(latency_s=latency, batch_size=batch))
            continue
        log.warning(
            "%s at %d steps, seed %d, is not in the table: %d of %d prompts made, %s",
            name, k, seed, len(rows), len(prompts), "timed" if (name, k) in seconds else "not timed",
        )  # fmt: skip
    if not parts:
        return None
    frame = pd.concat(parts, ignore_index=True).drop(columns=TEXT)
    frame.insert(1, "category", frame["prompt_id"].map(categories))
    return frame
