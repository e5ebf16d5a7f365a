"""Jobs of a campaign, dealt out to processes: every process makes, scores and writes its share."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import warnings
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeAlias

import lightning as L  # noqa: N812
import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch.utils.data import DataLoader

from edgesched.data.digests import text_digest
from edgesched.errors import CampaignError, ModelError, reason
from edgesched.generation.diffusion import image_seed
from edgesched.generation.scores import SampleScore
from edgesched.generation.shards import TEXT, CampaignFolder
from edgesched.protocols import ImageModel
from edgesched.types import PromptSet

log = logging.getLogger(__name__)
Rows: TypeAlias = tuple[tuple[int, int], ...]  # (position of the prompt, seed)
_NO_JOB = -1


@dataclass(frozen=True)
class Job:
    """One batch of images of one model at one step count.

    Args:
        model: Name of the model.
        steps: Denoising steps.
        rows: Position of the prompt, and seed, of every image.
    """

    model: str
    steps: int
    rows: Rows


class Generation(L.LightningModule):
    """Predicts by generating: every process makes, scores and writes its share of the jobs.

    A step count that a model refuses is noted in the folder and left; everything else goes on.

    Args:
        prompts: What is generated.
        models: Models by name.
        scorers: Scores by column name.
        jobs: Every batch of the campaign that is not done.
        folder: Folder of the campaign.
        made_by: Settings of the models and of the scores, by name.
    """

    def __init__(
        self,
        prompts: PromptSet,
        models: Mapping[str, ImageModel],
        scorers: Mapping[str, SampleScore],
        jobs: Sequence[Job],
        folder: CampaignFolder,
        made_by: tuple[Mapping[str, Any], Mapping[str, Any]],
    ) -> None:
        super().__init__()
        self.prompts, self.models, self.jobs, self.folder = prompts, dict(models), list(jobs), folder
        self.scorers = (dict(scorers),)  # in a tuple: Lightning must not take them for parts of a network
        self.made_by = made_by
        self.finished = 0
        self._refused: set[tuple[str, int]] = set()
        self._last: str | None = None
        self._worker: ThreadPoolExecutor | None = None
        self._waiting: deque[Future[None]] = deque()

    def setup(self, stage: str) -> None:
        """Bring models and scores to the device of this process."""
        parts: tuple[ImageModel | SampleScore, ...] = (*self.models.values(), *self.scorers[0].values())
        for part in parts:
            part.place(self.device)
        self._worker = ThreadPoolExecutor(1, "scoring")

    def predict_dataloader(self) -> DataLoader:
        """Numbers of this process's jobs; without one it takes part with nothing, so that no other waits for it."""
        mine = list(range(self.global_rank, len(self.jobs), self.trainer.world_size))
        return DataLoader(mine or [_NO_JOB], batch_size=None)  # type: ignore[arg-type]

    def predict_step(self, batch: int, *_: Any) -> int:
        """Generate one job and say how many images it has; their scores and shard follow in the background.

        Args:
            batch: Position of the job, or −1 for none.
            *_: What else Lightning tells.

        Raises:
            CampaignError: If the folder cannot be written, or a score fails.
        """
        if int(batch) == _NO_JOB:
            return 0
        job = self.jobs[int(batch)]
        if (job.model, job.steps) in self._refused:
            return 0
        if self._last not in (None, job.model):
            self.models[str(self._last)].unload()
        self._last = job.model
        model = self.models[job.model]
        made = 0
        parts = _generated(job, self.prompts, model)
        while True:
            try:
                rows, images = next(parts)
                # Here and not beside the scores: a tokenizer that two threads use pads for one as the other wants.
                cut = [model.truncates(self.prompts.texts[i]) for i, _ in rows]
            except StopIteration:
                return made
            except CampaignError:
                raise
            except Exception as exc:
                self._refuse(job, exc)
                return made
            assert self._worker is not None
            self._waiting.append(self._worker.submit(self._keep, job, rows, images, cut))
            while len(self._waiting) > 2:
                self._waiting.popleft().result()
            made += len(rows)

    def _refuse(self, job: Job, exc: Exception) -> None:
        """Leave a step count of a model, whose pipeline is loaded anew for the next."""
        log.warning("%s at %d steps: %s; going on without it", job.model, job.steps, reason(exc))
        log.debug("%s at %d steps", job.model, job.steps, exc_info=exc)
        self._refused.add((job.model, job.steps))
        self.folder.keep_refusal(job.model, job.steps, reason(exc))
        self.models[job.model].unload()

    def _keep(self, job: Job, rows: Rows, images: np.ndarray, cut: Sequence[bool]) -> None:
        ids, texts = [self.prompts.ids[i] for i, _ in rows], [self.prompts.texts[i] for i, _ in rows]
        scorers = self.scorers[0]
        part: dict[str, Sequence[Any]] = {
            "prompt_id": ids,
            TEXT: [text_digest(text) for text in texts],
            "model": [job.model] * len(rows),
            "steps": [job.steps] * len(rows),
            "seed": [seed for _, seed in rows],
        }
        for name, scorer in scorers.items():
            try:
                part[name] = _finite(scorer.score(images, texts), len(rows))
            except Exception as exc:
                raise CampaignError(f"score {name} of {job.model} at {job.steps} steps: {reason(exc)}") from exc
        part["truncated"] = [
            c or any(s.truncates(t) for s in scorers.values()) for c, t in zip(cut, texts, strict=True)
        ]
        models, scores = self.made_by
        self.folder.write(part, models[job.model], scores)
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
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}", markup=False), TimeElapsedColumn(), TimeRemainingColumn(),
        )  # fmt: skip
        self.bar = Progress(*columns, disable=not self.show or not trainer.is_global_zero)
        self.bar.add_task("generating", total=self.total, rate="")
        self.bar.start()

    def on_predict_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        assert self.bar is not None
        if int(batch) == _NO_JOB:
            return
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


def predict(
    generation: Generation, accelerator: str, devices: int, num_nodes: int, strategy: str, progress: bool
) -> None:
    """Run ``Trainer.predict`` and say in one line what went wrong in any process.

    Args:
        generation: What to run.
        accelerator: Lightning's; without a GPU the processor is taken.
        devices: Processes of this machine, no more than there are jobs.
        num_nodes: Machines.
        strategy: Lightning's; ``"auto"`` starts processes where there are several.
        progress: Show a progress bar.

    Raises:
        CampaignError: If no trainer can be made of the arguments, or a process fails.
        KeyboardInterrupt: When stopped from the keyboard.
    """
    started_from_outside = num_nodes > 1 or "LOCAL_RANK" in os.environ
    if not started_from_outside:
        devices = min(devices, len(generation.jobs))
    if strategy == "auto" and devices * num_nodes > 1:
        strategy = "ddp" if started_from_outside else "ddp_spawn"
    if accelerator in ("auto", "gpu", "cuda") and not torch.cuda.is_available():
        if accelerator != "auto":
            log.warning("campaign.accelerator=%s: there is no GPU here; going on with the processor", accelerator)
        accelerator = "cpu"
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    total = sum(len(job.rows) for job in generation.jobs)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        try:
            trainer = L.Trainer(
                accelerator=accelerator,
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
        except (MisconfigurationException, ValueError) as exc:
            given = f"accelerator={accelerator} devices={devices} num_nodes={num_nodes} strategy={strategy}"
            raise CampaignError(f"campaign: {given} cannot be had ({' '.join(str(exc).split())[:200]})") from exc
        before = signal.getsignal(signal.SIGINT)
        try:
            trainer.predict(generation, return_predictions=False)
        except SystemExit as exc:  # Lightning's answer to Ctrl-C
            signal.signal(signal.SIGINT, before)
            raise KeyboardInterrupt from exc
        except torch.multiprocessing.ProcessRaisedException as exc:
            told = re.findall(r"^edgesched\.errors\.\w+: (.*)$", str(exc), re.MULTILINE)
            last = str(exc).strip().splitlines()[-1]
            raise CampaignError(told[-1] if told else f"a process failed: {last}") from exc
        except torch.multiprocessing.ProcessExitedException as exc:
            raise CampaignError(f"a process ended ({exc}); what is done is kept, start again to go on") from exc


def _finite(scores: torch.Tensor, images: int) -> list[float]:
    """One finite number for every image: a shard keeps whatever it is given, and is never made again."""
    values = torch.as_tensor(scores).reshape(-1)
    if len(values) != images:
        raise ModelError(f"expected one score for each of {images} images, got {len(values)}")
    if not bool(torch.isfinite(values).all()):
        raise ModelError(f"expected finite scores, got {values[~torch.isfinite(values)][0].item()}")
    return [float(value) for value in values.tolist()]


def _generated(job: Job, prompts: PromptSet, model: ImageModel) -> Iterator[tuple[Rows, np.ndarray]]:
    """Images of one job, halved as often as memory demands."""
    waiting = [job.rows]
    while waiting:
        rows = waiting.pop(0)
        texts = [prompts.texts[i] for i, _ in rows]
        try:
            images = model.generate(texts, job.steps, [image_seed(prompts.ids[i], seed) for i, seed in rows])
        except (torch.OutOfMemoryError, MemoryError) as exc:
            if len(rows) == 1:
                raise ModelError("out of memory on a single image") from exc
            log.warning("out of memory with %d images; going on with half", len(rows))
            if model.device.type == "cuda":
                torch.cuda.empty_cache()
            half = len(rows) // 2
            waiting[:0] = [rows[:half], rows[half:]]
            continue
        yield rows, images
