"""Prompts × models × steps × seeds → score table; what is done is kept, and never done again."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import logging
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from edgesched.errors import CampaignError
from edgesched.generate import DiffusionModel, image_seed
from edgesched.score import CLIPScore
from edgesched.table import ScoreTable
from edgesched.types import PromptSet

log = logging.getLogger(__name__)
LIBRARIES = ("torch", "diffusers", "transformers", "lightning", "edgesched")
SETTINGS = "settings.json"


@dataclass(frozen=True)
class Job:
    """One batch of images of one model at one step count."""

    model: str
    steps: int
    rows: tuple[tuple[int, int], ...]  # (position of the prompt, seed)


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
    models: Mapping[str, DiffusionModel],
    scorers: Mapping[str, CLIPScore],
    *,
    steps: Sequence[int],
    seeds: int,
    out: Path | str,
    batch_size: int = 64,
    timing_repeats: int = 5,
    progress: bool = True,
) -> ScoreTable:
    """Generate, score and time, and write the score table with its manifest.

    Work is keyed by (prompt_id, model, steps, seed). Every batch is one shard, written in one atomic step;
    a campaign that was stopped at any moment goes on where it was. Seconds come from a pass of their own.

    Args:
        prompts: What is generated.
        models: Models by name.
        scorers: Scores by column name; at least ``clip_score``.
        steps: Step counts; a model skips those it may not run.
        seeds: Images of each prompt, model and step count.
        out: Folder of the table, the manifest and the shards.
        batch_size: Images a batch; halved when memory runs out.
        timing_repeats: Repeats of each measurement of the timing pass.
        progress: Show a progress bar.

    Returns:
        The table, also written to ``out``.

    Raises:
        CampaignError: If the folder cannot be written or holds a campaign of other settings, or nothing is left
            to run.
    """
    out = Path(out)
    counts = sorted({int(k) for k in steps})
    if seeds < 1 or batch_size < 1 or not counts or counts[0] < 1:
        raise CampaignError(
            f"campaign: expected positive seeds, batch_size and steps, got {seeds}, {batch_size}, {counts}"
        )
    if not models or not scorers:
        raise CampaignError("campaign: expected at least one model and one score")
    _check_settings(out, models, scorers)
    done = _done(out)
    jobs = list(_jobs(prompts, models, counts, seeds, batch_size, done))
    total = sum(len(job.rows) for job in jobs)
    if not jobs and not done:
        raise CampaignError(f"campaign: no model may run any of the step counts {counts}")
    log.info("%d images to generate, %d done before", total, len(done))
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, disable=not progress) as bar:
        task = bar.add_task("generating", total=total, rate="")
        finished = 0
        for job in jobs:
            for part in _run_job(job, prompts, models[job.model], scorers):
                _write_shard(out, part)
                finished += len(part["prompt_id"])
                elapsed = bar.tasks[0].elapsed or 1e-9
                rate = f"{finished / elapsed:.1f} images/s, {job.model} at {job.steps}"
                bar.update(task, completed=finished, rate=rate)
    timing = _timing(out, models, counts, sorted({1, batch_size}), timing_repeats, progress)
    return _assemble(out, prompts, models, scorers, counts, seeds, batch_size, timing)


def _settings(models: Mapping[str, DiffusionModel], scorers: Mapping[str, CLIPScore]) -> dict[str, Any]:
    """Whatever changes an image or its score."""
    return {
        "models": {
            name: {
                "path": m.path, "revision": m.revision, "variant": m.variant, "resolution": m.resolution,
                "guidance_scale": m.guidance_scale, "scheduler": m.scheduler,
                "scheduler_options": m.scheduler_options, "dtype": str(m.dtype),
            }
            for name, m in models.items()
        },
        "scores": {name: {"path": s.path, "revision": s.revision} for name, s in scorers.items()},
    }  # fmt: skip


def _check_settings(out: Path, models: Mapping[str, DiffusionModel], scorers: Mapping[str, CLIPScore]) -> None:
    """Refuse to go on with a campaign whose images were made otherwise; remember new models."""
    now = _settings(models, scorers)
    file = out / SETTINGS
    with _guarded(out):
        (out / "shards").mkdir(parents=True, exist_ok=True)
        before = (
            json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"models": {}, "scores": now["scores"]}
        )
        if before["scores"] != now["scores"]:
            raise CampaignError(f"{out}: was begun with other scores ({before['scores']}); choose another campaign.out")
        for name, value in now["models"].items():
            if before["models"].get(name, value) != value:
                changed = [k for k in value if before["models"][name].get(k) != value[k]]
                raise CampaignError(
                    f"{out}: was begun with another {changed[0]} of {name} "
                    f"({before['models'][name].get(changed[0])}, now {value[changed[0]]}); choose another campaign.out"
                )
        before["models"] |= now["models"]
        _atomic(file, json.dumps(before, indent=2).encode())


@contextlib.contextmanager
def _guarded(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        reason = exc.strerror or str(exc)
        raise CampaignError(
            f"{out}: cannot be written ({reason}); what is done is kept, start again once it can"
        ) from exc


def _atomic(file: Path, data: bytes) -> None:
    part = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as handle:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(part, file)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def _write_shard(out: Path, rows: dict[str, list[Any]]) -> None:
    import io

    import pandas as pd

    frame = pd.DataFrame(rows)
    keys = frame[["prompt_id", "model", "steps", "seed"]].to_csv(index=False).encode()
    buffer = io.BytesIO()
    frame.to_parquet(buffer, compression="zstd", index=False)
    with _guarded(out):
        _atomic(out / "shards" / f"{hashlib.sha256(keys).hexdigest()[:20]}.parquet", buffer.getvalue())


def _shards(out: Path) -> Any:
    import pandas as pd

    frames = []
    for file in sorted((out / "shards").glob("*.parquet")):
        try:
            frames.append(pd.read_parquet(file))
        except Exception as exc:
            log.warning("%s cannot be read (%s); its images are made again", file.name, str(exc).splitlines()[0])
            file.unlink()
    if not frames:
        return None
    return pd.concat(frames, ignore_index=True).drop_duplicates(["prompt_id", "model", "steps", "seed"])


def _done(out: Path) -> set[tuple[str, str, int, int]]:
    frame = _shards(out)
    if frame is None:
        return set()
    keys = frame[["prompt_id", "model", "steps", "seed"]].itertuples(index=False, name=None)
    return {(str(p), str(m), int(k), int(s)) for p, m, k, s in keys}


def _jobs(
    prompts: PromptSet,
    models: Mapping[str, DiffusionModel],
    counts: Sequence[int],
    seeds: int,
    batch_size: int,
    done: set[tuple[str, str, int, int]],
) -> Iterator[Job]:
    for name, model in models.items():
        for k in counts:
            if not model.allows(k):
                continue
            rows = [
                (i, seed)
                for seed in range(seeds)
                for i, pid in enumerate(prompts.ids)
                if (pid, name, k, seed) not in done
            ]
            for start in range(0, len(rows), batch_size):
                yield Job(name, k, tuple(rows[start : start + batch_size]))


def _run_job(
    job: Job, prompts: PromptSet, model: DiffusionModel, scorers: Mapping[str, CLIPScore]
) -> Iterator[dict[str, list[Any]]]:
    """Images and scores of one job, halved as often as memory demands."""
    waiting = [job.rows]
    while waiting:
        rows = waiting.pop(0)
        texts = [prompts.texts[i] for i, _ in rows]
        try:
            images = model.generate(texts, job.steps, [image_seed(prompts.ids[i], seed) for i, seed in rows])
        except (torch.OutOfMemoryError, MemoryError) as exc:
            if len(rows) == 1:
                raise CampaignError(f"{job.model}: out of memory on a single image") from exc
            log.warning("out of memory with %d images; going on with half", len(rows))
            if model.device.type == "cuda":
                torch.cuda.empty_cache()
            half = len(rows) // 2
            waiting[:0] = [rows[:half], rows[half:]]
            continue
        part: dict[str, list[Any]] = {
            "prompt_id": [prompts.ids[i] for i, _ in rows],
            "category": [prompts.categories[i] for i, _ in rows],
            "model": [job.model] * len(rows),
            "steps": [job.steps] * len(rows),
            "seed": [seed for _, seed in rows],
        }
        for name, scorer in scorers.items():
            part[name] = scorer.score(images, texts).tolist()
        yield part


def _timing(
    out: Path,
    models: Mapping[str, DiffusionModel],
    counts: Sequence[int],
    batches: Sequence[int],
    repeats: int,
    progress: bool,
) -> list[dict[str, Any]]:
    """The timing pass, kept in ``timing.json`` so that it is not repeated."""  # fmt: skip
    file = out / "timing.json"
    rows: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    have = {(r["model"], r["steps"], r["batch_size"]) for r in rows}
    want = [
        (n, k, b) for n, m in models.items() for k in counts if m.allows(k) for b in batches if (n, k, b) not in have
    ]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not progress) as bar:
        task = bar.add_task("timing", total=len(want))
        for name, k, batch in want:
            seconds = models[name].seconds_per_image(k, batch, repeats if batch == 1 else max(1, repeats))
            rows.append({"model": name, "steps": k, "batch_size": batch, "latency_s": seconds, "repeats": repeats,
                         "device": device_name(models[name].device)})  # fmt: skip
            with _guarded(out):
                _atomic(file, json.dumps(rows, indent=1).encode())
            bar.advance(task)
    return rows


def _git_commit() -> str | None:
    try:
        here = Path(__file__).resolve().parent
        command = ["git", "-C", str(here), "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _assemble(
    out: Path,
    prompts: PromptSet,
    models: Mapping[str, DiffusionModel],
    scorers: Mapping[str, CLIPScore],
    counts: Sequence[int],
    seeds: int,
    batch_size: int,
    timing: list[dict[str, Any]],
) -> ScoreTable:
    """Shards and times as one table with its manifest."""
    import pandas as pd

    frame = _shards(out)
    wanted = frame["model"].isin(list(models)) & frame["steps"].isin(list(counts)) & (frame["seed"] < seeds)
    frame = frame[wanted & frame["prompt_id"].isin(prompts.ids)]
    seconds = {(r["model"], r["steps"]): r["latency_s"] for r in timing if r["batch_size"] == batch_size}
    frame = frame.assign(
        latency_s=[seconds[key] for key in zip(frame["model"], frame["steps"], strict=True)], batch_size=batch_size
    )
    frame["model"] = pd.Categorical(frame["model"], categories=list(models), ordered=True)
    position = {pid: i for i, pid in enumerate(prompts.ids)}
    frame = frame.assign(_place=frame["prompt_id"].map(position))
    frame = frame.sort_values(["model", "steps", "seed", "_place"]).drop(columns="_place")
    frame["model"] = frame["model"].astype(str)
    digest = hashlib.sha256("\n".join(f"{p}\t{c}\t{t}" for p, t, c in prompts).encode()).hexdigest()
    first = next(iter(models.values()))
    manifest = {
        "device": device_name(first.device),
        "dtype": str(first.dtype).removeprefix("torch."),
        "libraries": {name: metadata.version(name) for name in LIBRARIES},
        "git_commit": _git_commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "prompts_sha256": digest,
        "prompts": len(prompts),
        **_settings(models, scorers),
        "truncated_prompts": {name: len(s.truncated) for name, s in scorers.items()},
        "timing": [r for r in timing if r["model"] in models and r["steps"] in counts],
    }
    table = ScoreTable(frame, manifest, next(iter(scorers)), tuple(models), min_prompts=1)
    with _guarded(out):
        table.save(out)
    return table


def sample_grid(model: DiffusionModel, prompts: PromptSet, steps: int, seed: int = 0) -> np.ndarray:
    """One image of each prompt, shape (prompts, height, width, 3), uint8."""
    return model.generate(prompts.texts, steps, [image_seed(pid, seed) for pid in prompts.ids])
