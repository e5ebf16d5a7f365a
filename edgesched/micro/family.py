"""Train, save and examine the micro family: one call from nothing to folders that load like hub models."""

from __future__ import annotations

import logging
import multiprocessing
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from transformers import CLIPModel

from edgesched.errors import CampaignError
from edgesched.generation.diffusion import DiffusionModel, image_seed
from edgesched.generation.scores import SampleScore
from edgesched.micro import world
from edgesched.micro.build import (
    build_autoencoder,
    build_denoiser,
    build_judge,
    prepare_judge,
    save_judge,
    save_pipeline,
    text_encoder,
    tokenize,
)
from edgesched.micro.pool import ScenePool, draw_pool, to_pixels
from edgesched.micro.train import AutoencoderModule, DecoderModule, DenoiserModule, JudgeModule, fit_module
from edgesched.types import PromptSet

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StageSize:
    """How long and on what one stage trains.

    Args:
        max_steps: Optimiser steps.
        batch_size: Scenes a step.
        learning_rate: Peak learning rate of AdamW.
    """

    max_steps: int
    batch_size: int
    learning_rate: float


@dataclass(frozen=True)
class DenoiserSize(StageSize):
    """How long one denoiser trains, and how large it is.

    Args:
        max_steps: Optimiser steps.
        batch_size: Scenes a step.
        learning_rate: Peak learning rate of AdamW.
        channels: Channels at every resolution.
        layers: Layers of every block.
    """

    channels: Sequence[int] = (32, 64)
    layers: int = 1


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what a training run makes.

    Args:
        autoencoder: Size of the autoencoder's training.
        decoder: Size of the training of its decoder alone, once the judge is there.
        judge: Size of the judge's training.
        denoisers: Size of each model, by name, from small to large.
        scenes: Rendered training scenes.
        seed: Seed of scenes, weights and batches.
        processes: Stages trained side by side; more than one shares the cores among them (CPU only).
        precision: Lightning precision.
        progress: Show progress bars.
        wrong_captions: Captions with one attribute wrong, for each scene.
    """

    autoencoder: StageSize
    decoder: StageSize
    judge: StageSize
    denoisers: Mapping[str, DenoiserSize]
    scenes: int = 24_000
    seed: int = 0
    processes: int = 2
    precision: str = "bf16-mixed"
    progress: bool = True
    wrong_captions: int = field(default=6)


def _pool(recipe: Recipe, out: Path) -> ScenePool:
    """The training scenes, drawn once and kept in ``out``."""
    kept = out / f"scenes-{recipe.seed}-{recipe.scenes}.npz"
    if kept.exists():
        data = np.load(kept)
        captions = tuple(str(c) for c in data["captions"])
        tensors = {k: torch.as_tensor(data[k]) for k in ("tokens", "wrong_tokens", "labels", "owners")}
        return ScenePool(images=data["images"], captions=captions, **tensors)
    log.info("drawing %d scenes", recipe.scenes)
    pool = draw_pool(recipe.scenes, recipe.seed, recipe.wrong_captions)
    part = kept.with_suffix(".part.npz")
    np.savez(
        part,
        images=pool.images,
        tokens=pool.tokens.numpy(),
        wrong_tokens=pool.wrong_tokens.numpy(),
        labels=pool.labels.numpy(),
        owners=pool.owners.numpy(),
        captions=np.array(pool.captions),
    )
    os.replace(part, kept)
    return pool


def _fit(module: Any, pool: ScenePool, size: StageSize, recipe: Recipe, out: Path, name: str) -> Any:
    return fit_module(
        module,
        len(pool),
        size.batch_size,
        out / name,
        seed=recipe.seed,
        precision=recipe.precision,
        logger=CSVLogger(out, name=name, version="log"),
        progress=recipe.progress,
    )


def _autoencoder_module(recipe: Recipe, pool: ScenePool) -> AutoencoderModule:
    torch.manual_seed(recipe.seed)
    size = recipe.autoencoder
    return AutoencoderModule(
        build_autoencoder().to(memory_format=torch.channels_last), pool, size.learning_rate, size.max_steps
    )


def _judge_module(recipe: Recipe, pool: ScenePool) -> JudgeModule:
    torch.manual_seed(recipe.seed + 1)
    judge = build_judge()
    prepare_judge(judge, to_pixels(pool.images[:2000]))
    return JudgeModule(judge, pool, recipe.judge.learning_rate, recipe.judge.max_steps)


def _restored(module: Any, out: Path, name: str) -> Any:
    module.load_state_dict(torch.load(out / name / "last.ckpt", map_location="cpu", weights_only=False)["state_dict"])
    return module.eval()


def train_autoencoder(recipe: Recipe, out: Path) -> None:
    """Train the autoencoder to its last step, from its last checkpoint if there is one.

    Args:
        recipe: What to train and for how long.
        out: Folder of checkpoints, scenes and logs.

    Raises:
        CampaignError: If the folder cannot be written.
    """
    pool = _pool(recipe, out)
    _fit(_autoencoder_module(recipe, pool), pool, recipe.autoencoder, recipe, out, "autoencoder")


def _decoder_module(recipe: Recipe, pool: ScenePool, out: Path) -> DecoderModule:
    autoencoder = _restored(_autoencoder_module(recipe, pool), out, "autoencoder").autoencoder
    judge = _restored(_judge_module(recipe, pool), out, "judge").judge
    size = recipe.decoder
    return DecoderModule(autoencoder, judge, pool, size.learning_rate, size.max_steps)


def train_decoder(recipe: Recipe, out: Path) -> None:
    """Train the decoder on, from its last checkpoint if there is one.

    Args:
        recipe: What to train and for how long.
        out: Folder of checkpoints, scenes and logs; autoencoder and judge must be there.

    Raises:
        CampaignError: If the folder cannot be written.
    """
    pool = _pool(recipe, out)
    _fit(_decoder_module(recipe, pool, out), pool, recipe.decoder, recipe, out, "decoder")


def train_judge(recipe: Recipe, out: Path) -> None:
    """Train the judge to its last step, from its last checkpoint if there is one.

    Args:
        recipe: What to train and for how long.
        out: Folder of checkpoints, scenes and logs.

    Raises:
        CampaignError: If the folder cannot be written.
    """
    pool = _pool(recipe, out)
    _fit(_judge_module(recipe, pool), pool, recipe.judge, recipe, out, "judge")


def encode_pool(recipe: Recipe, out: Path) -> dict[str, Tensor]:
    """Latents of all training scenes and text states of their captions, computed once and kept in ``out``.

    Args:
        recipe: What to train and for how long.
        out: Folder of checkpoints, scenes and logs; autoencoder and judge must be there.

    Returns:
        ``latents`` of unit variance (scenes, channels, 8, 8), ``scale`` that makes it one, ``text_states`` of distinct
        captions (captions, tokens, width), ``empty_state`` (tokens, width) and ``caption_of`` (scenes,).
    """
    kept = out / f"encoded-{recipe.seed}-{recipe.scenes}.pt"
    if kept.exists():
        return torch.load(kept)
    pool = _pool(recipe, out)
    autoencoder = _restored(_autoencoder_module(recipe, pool), out, "autoencoder").autoencoder
    encoder = text_encoder(_restored(_judge_module(recipe, pool), out, "judge").judge)
    distinct = tuple(dict.fromkeys(pool.captions))
    row = {text: i for i, text in enumerate(distinct)}
    with torch.inference_mode():
        latents = torch.cat([autoencoder.encode(to_pixels(part)).latents for part in np.array_split(pool.images, 200)])
        tokens = tokenize((*distinct, ""))
        states = torch.cat([encoder(input_ids=part).last_hidden_state for part in tokens.split(512)])
    encoded = {
        "latents": latents / latents.std(),
        "scale": 1 / latents.std(),
        "text_states": states[:-1].half(),
        "empty_state": states[-1].half(),
        "caption_of": torch.tensor([row[text] for text in pool.captions]),
    }
    part = kept.with_suffix(".part")
    torch.save(encoded, part)
    os.replace(part, kept)
    return encoded


def _denoiser_module(recipe: Recipe, name: str, encoded: dict[str, Tensor]) -> DenoiserModule:
    size = recipe.denoisers[name]
    torch.manual_seed(recipe.seed + 2 + list(recipe.denoisers).index(name))
    return DenoiserModule(
        build_denoiser(size.channels, size.layers),
        encoded["latents"],
        encoded["text_states"],
        encoded["caption_of"],
        encoded["empty_state"],
        size.learning_rate,
        size.max_steps,
    )


def train_denoiser(name: str, recipe: Recipe, out: Path) -> None:
    """Train one denoiser to its last step, from its last checkpoint if there is one.

    Args:
        name: Model.
        recipe: What to train and for how long.
        out: Folder of checkpoints, scenes and logs; autoencoder and judge must be there.

    Raises:
        CampaignError: If the folder cannot be written.
    """
    encoded = encode_pool(recipe, out)
    pool = _pool(recipe, out)
    _fit(_denoiser_module(recipe, name, encoded), pool, recipe.denoisers[name], recipe, out, name)


def _share_cores(processes: int) -> None:
    """Begin a worker process, which is all our own: nobody else's threads are in it."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))


def _side_by_side(jobs: Sequence[tuple[Callable[..., None], tuple[Any, ...]]], processes: int) -> None:
    """Run jobs in worker processes that share the cores, or one after the other."""
    if processes <= 1 or torch.cuda.is_available():
        for function, arguments in jobs:
            function(*arguments)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context, initializer=_share_cores, initargs=(processes,)) as workers:
        for future in [workers.submit(function, *arguments) for function, arguments in jobs]:
            future.result()


def train_family(recipe: Recipe, out: Path | str, weights: Path | str) -> dict[str, float]:
    """Train autoencoder, judge and denoisers, and save them as folders.

    A run that was stopped goes on where it was: each stage resumes from its last checkpoint in ``out``.

    Args:
        recipe: What to train and for how long.
        out: Folder of checkpoints, scenes and logs.
        weights: Folder that receives ``judge/`` and one pipeline folder a model.

    Returns:
        Wall-clock seconds of each stage of this call.

    Raises:
        CampaignError: If a folder cannot be written.
    """
    out, weights = Path(out), Path(weights)
    try:
        out.mkdir(parents=True, exist_ok=True)
        weights.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise CampaignError(f"{exc.filename}: cannot be written ({exc.strerror})") from exc
    seconds: dict[str, float] = {}
    start = time.perf_counter()
    pool = _pool(recipe, out)
    _side_by_side([(train_judge, (recipe, out)), (train_autoencoder, (recipe, out))], recipe.processes)
    seconds["autoencoder_and_judge"] = time.perf_counter() - start
    start = time.perf_counter()
    encoded = encode_pool(recipe, out)
    jobs: list[tuple[Callable[..., None], tuple[Any, ...]]] = [
        (train_denoiser, (name, recipe, out))
        for name in list(recipe.denoisers)[::-1]  # the largest first
    ]
    _side_by_side([*jobs, (train_decoder, (recipe, out))], recipe.processes)
    seconds["denoisers_and_decoder"] = time.perf_counter() - start
    autoencoder = _restored(_decoder_module(recipe, pool, out), out, "decoder").autoencoder
    autoencoder.register_to_config(scaling_factor=float(encoded["scale"]))
    judge = _restored(_judge_module(recipe, pool), out, "judge").judge
    save_judge(judge, weights / "judge")
    for name in recipe.denoisers:
        denoiser = _restored(_denoiser_module(recipe, name, encoded), out, name).averaged
        save_pipeline(autoencoder, judge, denoiser, weights / name)
    return seconds


@torch.inference_mode()
def examine_judge(judge: CLIPModel, scenes_per_category: int = 400, seed: int = 1_000) -> dict[str, Any]:
    """How often the judge prefers the true caption of an unseen render to one with a single attribute wrong.

    Args:
        judge: The CLIP model.
        scenes_per_category: Unseen scenes of each category; every stated attribute is tried on each.
        seed: Seed of the scenes, apart from the training seeds.

    Returns:
        ``accuracy`` by category, ``accuracy_by_attribute``, and ``render``: the mean score of true
        renders by category (100 × cosine), the ceiling of every generator.
    """
    accuracy: dict[str, float] = {}
    render: dict[str, float] = {}
    by_attribute: dict[str, list[Tensor]] = {a: [] for a in world.ATTRIBUTES}
    for c, category in enumerate(world.CATEGORIES):
        rng = np.random.default_rng([seed, c])
        scenes = [world.sample_scene(category, rng) for _ in range(scenes_per_category)]
        pixels = to_pixels(np.stack([world.render(s, rng) for s in scenes]))
        image = F.normalize(judge.get_image_features(pixel_values=pixels).pooler_output, dim=-1)
        true = (image * _text_features(judge, [world.caption(s) for s in scenes])).sum(-1)
        render[category] = float(100 * true.mean())
        wins = []
        for attribute in world.ATTRIBUTES:
            rows = [i for i, s in enumerate(scenes) if attribute in world.attributes(s)]
            if not rows:
                continue
            wrong = [world.caption(world.mutate(scenes[i], attribute, rng)) for i in rows]
            won = (true[rows] > (image[rows] * _text_features(judge, wrong)).sum(-1)).float()
            wins.append(won)
            by_attribute[attribute].append(won)
        accuracy[category] = float(torch.cat(wins).mean())
    return {
        "accuracy": accuracy,
        "accuracy_by_attribute": {a: float(torch.cat(w).mean()) for a, w in by_attribute.items() if w},
        "render": render,
    }


@dataclass(frozen=True)
class Setting:
    """Mean score of a model under one guidance scale and scheduler, over prompts and step counts.

    Args:
        model: Name of the model.
        guidance_scale: Classifier-free guidance scale.
        scheduler: Name of a diffusers scheduler, or None for the saved one.
        score: Mean score in points.
    """

    model: str
    guidance_scale: float
    scheduler: str | None
    score: float


def compare_settings(
    models: Mapping[str, DiffusionModel],
    prompts: PromptSet,
    scorer: SampleScore,
    guidance_scales: Sequence[float],
    schedulers: Sequence[str | None],
    steps: Sequence[int],
) -> list[Setting]:
    """Mean score of every model under every guidance scale and scheduler, the same noise for all.

    Args:
        models: Models by name; their own guidance and scheduler are left as they were.
        prompts: What is generated.
        scorer: The score.
        guidance_scales: Classifier-free guidance scales.
        schedulers: Names of diffusers schedulers, None for the saved one.
        steps: Step counts that the mean is over.
    """
    found = []
    seeds = [image_seed(pid, 0) for pid in prompts.ids]
    for name, model in models.items():
        before = model.guidance_scale, model.scheduler
        for scheduler in schedulers:
            for scale in guidance_scales:
                model.guidance_scale, model.scheduler = float(scale), scheduler
                scores = [scorer.score(model.generate(prompts.texts, k, seeds), prompts.texts) for k in steps]
                found.append(Setting(name, float(scale), scheduler, float(torch.stack(scores).mean())))
        model.guidance_scale, model.scheduler = before
    return found


def _text_features(judge: CLIPModel, captions: Sequence[str]) -> Tensor:
    return F.normalize(judge.get_text_features(input_ids=tokenize(captions)).pooler_output, dim=-1)


@torch.inference_mode()
def reconstruction_scores(
    judge: CLIPModel, autoencoder: Any, scenes_per_category: int = 200, seed: int = 2_000
) -> dict[str, float]:
    """Mean score of the autoencoder's reconstructions of true renders by category (100 × cosine).

    Args:
        judge: The CLIP model.
        autoencoder: The autoencoder.
        scenes_per_category: Unseen scenes of each category.
        seed: Seed of the scenes, apart from the training seeds.
    """
    scores = {}
    for c, category in enumerate(world.CATEGORIES):
        rng = np.random.default_rng([seed, c])
        scenes = [world.sample_scene(category, rng) for _ in range(scenes_per_category)]
        pixels = to_pixels(np.stack([world.render(s, rng) for s in scenes]))
        decoded = autoencoder.decode(autoencoder.encode(pixels).latents).sample.clamp(-1, 1)
        image = F.normalize(judge.get_image_features(pixel_values=decoded).pooler_output, dim=-1)
        scores[category] = float(
            100 * (image * _text_features(judge, [world.caption(s) for s in scenes])).sum(-1).mean()
        )
    return scores
