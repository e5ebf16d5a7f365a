"""Prompts × models × steps × seeds → score table; what is done is kept, and never done again."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import io
import json
import logging
import os
import platform
import re
import signal
import subprocess
import sys
import time
import warnings
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, TypeAlias

import lightning as L  # noqa: N812
import numpy as np
import pandas as pd
import torch
from lightning.pytorch.utilities import rank_zero_only
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch.utils.data import DataLoader

from edgesched.errors import CampaignError
from edgesched.generate import DiffusionModel, image_seed
from edgesched.score import SampleScore
from edgesched.table import KEY, ScoreTable
from edgesched.types import PromptSet

log = logging.getLogger(__name__)
LIBRARIES = ("torch", "diffusers", "transformers", "lightning", "edgesched")
SETTINGS = "settings.json"
Rows: TypeAlias = tuple[tuple[int, int], ...]  # (position of the prompt, seed)


@dataclass(frozen=True)
class Job:
    """One batch of images of one model at one step count."""

    model: str
    steps: int
    rows: Rows


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

    Work is keyed by (prompt_id, model, steps, seed). Every batch is one shard, written in one atomic step;
    a campaign that was stopped at any moment goes on where it was. Batches are cut the same way in every
    run, so that an image made after a stop is the image made without one. Jobs are dealt out to processes
    by ``Trainer.predict``; scoring and writing overlap with generating. Seconds come from a pass of their
    own, in one process.

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
        CampaignError: If the folder cannot be written or holds a campaign of other settings, or nothing is left
            to run.
        KeyboardInterrupt: When stopped from the keyboard; batches that were generated are scored and kept.
    """
    out = Path(out)
    counts = sorted({int(k) for k in steps})
    if seeds < 1 or batch_size < 1 or not counts or counts[0] < 1:
        raise CampaignError(
            f"campaign: expected positive seeds, batch_size and steps, got {seeds}, {batch_size}, {counts}"
        )
    if not models or not scorers:
        raise CampaignError("campaign: expected at least one model and one score")
    allowed = [k for k in counts if any(model.allows(k) for model in models.values())]
    if not allowed:
        raise CampaignError(f"campaign: no model may run any of the step counts {counts}")
    _check_settings(out, models, scorers)
    done = _done(out)
    jobs = list(_jobs(prompts, models, counts, seeds, batch_size, done))
    images = sum(len(job.rows) for job in jobs)
    log.info("%d images to generate, %d done before", images, len(done))
    started = time.perf_counter()
    if jobs:
        for model in models.values():
            model.check()
        for scorer in scorers.values():
            scorer.check()
        if devices == "auto":
            devices = torch.cuda.device_count() or 1
        generation = Generation(prompts, models, scorers, jobs, out)
        _predict(generation, accelerator, int(devices), num_nodes, strategy, progress)
    speed = images / (time.perf_counter() - started) if jobs else None
    if rank_zero_only.rank == 0:
        timing = _timing(out, models, counts, sorted({1, batch_size}), timing_repeats, progress)
        return _assemble(out, prompts, models, scorers, counts, seeds, batch_size, timing, speed)
    sys.exit(0)


class Generation(L.LightningModule):
    """Predicts by generating: every process makes, scores and writes its share of the jobs.

    Args:
        prompts: What is generated.
        models: Models by name.
        scorers: Scores by column name.
        jobs: Every batch of the campaign that is not done.
        out: Folder of the campaign.
    """

    def __init__(
        self,
        prompts: PromptSet,
        models: Mapping[str, DiffusionModel],
        scorers: Mapping[str, SampleScore],
        jobs: Sequence[Job],
        out: Path,
    ) -> None:
        super().__init__()
        self.prompts, self.models, self.jobs, self.out = prompts, dict(models), list(jobs), out
        self.scorers = (dict(scorers),)  # in a tuple: Lightning must not take them for parts of a network
        self.finished = 0
        self._last: str | None = None
        self._worker: ThreadPoolExecutor | None = None
        self._waiting: deque[Future[None]] = deque()

    def setup(self, stage: str) -> None:
        """Bring models and scores to the device of this process."""
        parts: tuple[DiffusionModel | SampleScore, ...] = (*self.models.values(), *self.scorers[0].values())
        for part in parts:
            part.place(self.device)
        self._worker = ThreadPoolExecutor(1, "scoring")

    def predict_dataloader(self) -> DataLoader:
        """Numbers of this process's jobs."""
        mine = range(self.global_rank, len(self.jobs), self.trainer.world_size)
        return DataLoader(list(mine), batch_size=None)  # type: ignore[arg-type]

    def predict_step(self, batch: int, *_: Any) -> int:
        """Generate one job and say how many images it has; their scores and shard follow in the background."""
        job = self.jobs[int(batch)]
        if self._last not in (None, job.model):
            self.models[str(self._last)].unload()
        self._last = job.model
        model = self.models[job.model]
        for rows, images in _generated(job, self.prompts, model):
            assert self._worker is not None
            # Here and not beside the scores: a tokenizer that two threads use pads for the one as the other wants.
            cut = [model.truncates(self.prompts.texts[i]) for i, _ in rows]
            self._waiting.append(self._worker.submit(self._keep, job, rows, images, cut))
            while len(self._waiting) > 2:
                self._waiting.popleft().result()
        return len(job.rows)

    def _keep(self, job: Job, rows: Rows, images: np.ndarray, cut: Sequence[bool]) -> None:
        ids, texts = [self.prompts.ids[i] for i, _ in rows], [self.prompts.texts[i] for i, _ in rows]
        scorers = self.scorers[0]
        part: dict[str, Sequence[Any]] = {
            "prompt_id": ids,
            "category": [self.prompts.categories[i] for i, _ in rows],
            "model": [job.model] * len(rows),
            "steps": [job.steps] * len(rows),
            "seed": [seed for _, seed in rows],
        }
        for name, scorer in scorers.items():
            part[name] = scorer.score(images, texts).tolist()
        part["truncated"] = [
            c or any(s.truncates(t) for s in scorers.values()) for c, t in zip(cut, texts, strict=True)
        ]
        _write_shard(self.out, part)
        self.finished += len(rows)

    def drain(self) -> None:
        """Wait until everything that was generated is written."""
        while self._waiting:
            self._waiting.popleft().result()

    def on_predict_end(self) -> None:
        """Leave together, when the last shard of every process is on disk."""
        self.drain()
        self.trainer.strategy.barrier("shards")


class _Progress(L.Callback):
    """Images done, images a second and the time left, on the first process; keeps what is under way on errors."""

    def __init__(self, total: int, show: bool) -> None:
        self.total, self.show = total, show
        self.bar: Progress | None = None

    def on_predict_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        columns = (
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(), TimeRemainingColumn(),
        )  # fmt: skip
        self.bar = Progress(*columns, disable=not self.show or not trainer.is_global_zero)
        self.bar.add_task("generating", total=self.total, rate="")
        self.bar.start()

    def on_predict_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        assert self.bar is not None
        made = min(self.total, module.finished * trainer.world_size)
        job = module.jobs[int(batch)]
        speed = made / (self.bar.tasks[0].elapsed or 1e-9)
        self.bar.update(
            self.bar.tasks[0].id, completed=made, rate=f"{speed:.1f} images/s, {job.model} at {job.steps} steps"
        )

    def on_predict_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self.bar is not None:
            self.bar.update(self.bar.tasks[0].id, completed=self.total)
            self.bar.stop()

    def on_exception(self, trainer: L.Trainer, module: Any, exception: BaseException) -> None:
        if self.bar is not None:
            self.bar.stop()
        with contextlib.suppress(Exception):  # the first error is the one that is told
            module.drain()


def _predict(
    generation: Generation, accelerator: str, devices: int, num_nodes: int, strategy: str, progress: bool
) -> None:
    """Run ``Trainer.predict`` and say in one line what went wrong in any process."""
    if strategy == "auto" and devices * num_nodes > 1:
        started_from_outside = num_nodes > 1 or "LOCAL_RANK" in os.environ
        strategy = "ddp" if started_from_outside else "ddp_spawn"
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    total = sum(len(job.rows) for job in generation.jobs)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        trainer = L.Trainer(
            accelerator=accelerator if torch.cuda.is_available() else "cpu",
            devices=devices,
            num_nodes=num_nodes,
            strategy=strategy,
            use_distributed_sampler=False,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[_Progress(total, progress)],
        )
        before = signal.getsignal(signal.SIGINT)
        try:
            trainer.predict(generation, return_predictions=False)
        except SystemExit as exc:  # Lightning's answer to Ctrl-C
            signal.signal(signal.SIGINT, before)
            raise KeyboardInterrupt from exc
        except torch.multiprocessing.ProcessRaisedException as exc:
            told = re.findall(r"^edgesched\.errors\.\w+: (.*)$", str(exc), re.MULTILINE)
            if not told:
                raise
            raise CampaignError(told[-1]) from exc
        except torch.multiprocessing.ProcessExitedException as exc:
            raise CampaignError(f"a process ended ({exc}); what is done is kept, start again to go on") from exc


def _settings(models: Mapping[str, DiffusionModel], scorers: Mapping[str, SampleScore]) -> dict[str, Any]:
    """Whatever changes an image or its score."""
    return {
        "models": {
            name: {
                "path": m.path, "revision": m.revision, "variant": m.variant, "resolution": m.resolution,
                "guidance_scale": m.guidance_scale, "scheduler": m.scheduler,
                "scheduler_options": m.scheduler_options, "dtype": str(m.dtype),
                "channels_last": m.channels_last, "compile": m.compile,
            }
            for name, m in models.items()
        },
        "scores": {name: {"path": s.path, "revision": s.revision} for name, s in scorers.items()},
    }  # fmt: skip


def _check_settings(out: Path, models: Mapping[str, DiffusionModel], scorers: Mapping[str, SampleScore]) -> None:
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


def _write_shard(out: Path, rows: Mapping[str, Sequence[Any]]) -> None:
    frame = pd.DataFrame(rows)
    keys = frame[list(KEY)].to_csv(index=False).encode()
    buffer = io.BytesIO()
    frame.to_parquet(buffer, compression="zstd", index=False)
    with _guarded(out):
        _atomic(out / "shards" / f"{hashlib.sha256(keys).hexdigest()[:20]}.parquet", buffer.getvalue())


def _shards(out: Path) -> pd.DataFrame | None:
    frames = []
    for file in sorted((out / "shards").glob("*.parquet")):
        try:
            frames.append(pd.read_parquet(file))
        except Exception as exc:
            log.warning("%s cannot be read (%s); its images are made again", file.name, str(exc).splitlines()[0])
            file.unlink(missing_ok=True)
    return pd.concat(frames, ignore_index=True).drop_duplicates(list(KEY)) if frames else None


def _done(out: Path) -> set[tuple[str, str, int, int]]:
    frame = _shards(out)
    if frame is None:
        return set()
    return {(str(p), str(m), int(k), int(s)) for p, m, k, s in frame[list(KEY)].itertuples(index=False, name=None)}


def _jobs(
    prompts: PromptSet,
    models: Mapping[str, DiffusionModel],
    counts: Sequence[int],
    seeds: int,
    batch_size: int,
    done: set[tuple[str, str, int, int]],
) -> Iterator[Job]:
    """Batches cut before what is done is left out, so that a stop does not change who shares a batch with whom."""
    rows = [(i, seed) for seed in range(seeds) for i in range(len(prompts))]
    batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    for name, model in models.items():
        for k in filter(model.allows, counts):
            for batch in batches:
                left = tuple((i, seed) for i, seed in batch if (prompts.ids[i], name, k, seed) not in done)
                if left:
                    yield Job(name, k, left)


def _generated(job: Job, prompts: PromptSet, model: DiffusionModel) -> Iterator[tuple[Rows, np.ndarray]]:
    """Images of one job, halved as often as memory demands."""
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
        yield rows, images


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
        last = None
        for name, k, batch in want:
            if last not in (None, name):
                models[str(last)].unload()
            last = name
            seconds, fits = _timed(models[name], k, batch, repeats)
            rows.append({"model": name, "steps": k, "batch_size": batch, "measured_batch_size": fits,
                         "latency_s": seconds, "repeats": repeats,
                         "device": device_name(models[name].device)})  # fmt: skip
            with _guarded(out):
                _atomic(file, json.dumps(rows, indent=1).encode())
            bar.advance(task)
    return rows


def _timed(model: DiffusionModel, steps: int, batch: int, repeats: int) -> tuple[float, int]:
    """Seconds per image, and the batch that they were measured at: the largest half that memory holds."""
    while True:
        try:
            return model.seconds_per_image(steps, batch, repeats), batch
        except (torch.OutOfMemoryError, MemoryError):
            if batch == 1:
                raise CampaignError(f"{model.path}: out of memory on a single image") from None
            batch //= 2


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
    scorers: Mapping[str, SampleScore],
    counts: Sequence[int],
    seeds: int,
    batch_size: int,
    timing: list[dict[str, Any]],
    images_per_second: float | None,
) -> ScoreTable:
    """Shards and times as one table with its manifest."""
    frame = _shards(out)
    assert frame is not None
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
        "images_per_second": images_per_second,  # generating and scoring, in the call that made the last images
        **_settings(models, scorers),
        "truncated_prompts": int(frame.loc[frame["truncated"], "prompt_id"].nunique()),
        "timing": [r for r in timing if r["model"] in models and r["steps"] in counts],
    }
    table = ScoreTable(frame, manifest, next(iter(scorers)), tuple(models), min_prompts=1)
    with _guarded(out):
        table.save(out)
    return table


def sample_grid(model: DiffusionModel, prompts: PromptSet, steps: int, seed: int = 0) -> np.ndarray:
    """One image of each prompt, shape (prompts, height, width, 3), uint8."""
    return model.generate(prompts.texts, steps, [image_seed(pid, seed) for pid in prompts.ids])
