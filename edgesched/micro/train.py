"""Lightning modules that train the micro family: autoencoder, judge and denoisers.

Batches are drawn by (seed, step), so a run that is stopped and resumed sees the same data as one that
is not.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning as L  # noqa: N812
import numpy as np
import torch
from diffusers import AutoencoderTiny, UNet2DConditionModel
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import DataLoader, IterableDataset
from transformers import CLIPModel

from edgesched.errors import CampaignError
from edgesched.micro import world
from edgesched.micro.build import build_scheduler
from edgesched.micro.optimiser import MuonAdamW
from edgesched.micro.pool import ScenePool, to_pixels


class Batches(IterableDataset):
    """Index batches drawn by (seed, step) from ``start`` on, without end.

    Args:
        size: Number of training examples.
        batch_size: Examples a step.
        seed: Seed.
        start: First step.
    """

    def __init__(self, size: int, batch_size: int, seed: int, start: int = 0) -> None:
        super().__init__()
        self.size, self.batch_size, self.seed, self.start = size, batch_size, seed, start

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        step = self.start
        while True:
            rng = np.random.default_rng([self.seed, step])
            yield torch.as_tensor(rng.integers(0, self.size, self.batch_size)), step
            step += 1


class MicroModule(L.LightningModule):
    """Shared optimiser: Muon for inner matrices, AdamW for the rest, warm-up and cosine decay.

    Args:
        learning_rate: Peak learning rate of AdamW.
        max_steps: Optimiser steps.
    """

    muon_factor = 4.0  # Muon's learning rate over AdamW's
    outer: tuple[str, ...] = ()  # parts of names of parameters that Muon leaves to AdamW

    def __init__(self, learning_rate: float, max_steps: int) -> None:
        super().__init__()
        self.learning_rate, self.max_steps = learning_rate, max_steps

    def configure_optimizers(self) -> Any:
        """A linear warm-up over 5 % of the steps and cosine decay."""
        named = [(name, p) for name, p in self.named_parameters() if p.requires_grad]
        inner = [p for name, p in named if p.ndim >= 2 and not any(word in name for word in self.outer)]
        taken = {id(p) for p in inner}
        peaks = [self.learning_rate, self.muon_factor * self.learning_rate][: 1 + bool(inner)]
        optimizer = MuonAdamW(inner, [p for _, p in named if id(p) not in taken], peaks[0], peaks[-1])
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, peaks, self.max_steps + 1, pct_start=0.05, final_div_factor=100, cycle_momentum=False
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class AutoencoderModule(MicroModule):
    """Reconstruction by an autoencoder whose latents are kept small and robust to noise.

    Noise of fixed scale on the latents and a weak penalty on their size make a smooth latent space, as a
    variational autoencoder of fixed variance does (Kingma & Welling 2014).

    Args:
        autoencoder: The autoencoder.
        pool: Training scenes.
        learning_rate: Peak learning rate.
        max_steps: Optimiser steps.
        latent_noise: Standard deviation of the noise on latents.
    """

    muon_factor = 2.0
    outer = ("encoder.layers.0.", "decoder.layers.0.")

    def __init__(
        self,
        autoencoder: AutoencoderTiny,
        pool: ScenePool,
        learning_rate: float,
        max_steps: int,
        latent_noise: float = 0.1,
    ) -> None:
        super().__init__(learning_rate, max_steps)
        self.autoencoder = autoencoder
        self.pool = pool
        self.latent_noise = latent_noise

    def training_step(self, batch: tuple[Tensor, int], _: int) -> Tensor:
        """Mean absolute and squared error of the reconstruction plus the latent penalty.

        Args:
            batch: Indices of scenes, shape (batch,), and the step.
            _: Number of the batch.
        """
        pixels = to_pixels(self.pool.images[batch[0].cpu().numpy()]).to(self.device)
        latents = self.autoencoder.encode(pixels).latents
        noisy = latents + self.latent_noise * torch.randn_like(latents)
        difference = self.autoencoder.decode(noisy).sample.float() - pixels
        reconstruction = difference.abs().mean()
        loss = reconstruction + difference.square().mean() + 2e-3 * latents.float().square().mean()
        self.log("reconstruction_l1", reconstruction, prog_bar=True)
        return loss


class DecoderModule(MicroModule):
    """The autoencoder's decoder, trained on with its latents kept: it learns to decode what denoisers leave.

    Latents get noise of up to ``latent_noise`` of their spread, so that small errors of a denoiser do not
    become crooked edges. The loss is that of the pixels and a perceptual one (Esser et al. 2021), the cosine
    distance of the judge's patch tokens; its score is not looked at.

    Args:
        autoencoder: A trained autoencoder; its encoder does not change.
        judge: A trained judge; it does not change.
        pool: Training scenes.
        learning_rate: Peak learning rate.
        max_steps: Optimiser steps.
        latent_noise: Largest noise, in standard deviations of the latents.
        perceptual_weight: Weight of the perceptual loss.
    """

    muon_factor = 2.0
    outer = ("decoder.layers.0.",)

    def __init__(
        self,
        autoencoder: AutoencoderTiny,
        judge: CLIPModel,
        pool: ScenePool,
        learning_rate: float,
        max_steps: int,
        latent_noise: float = 0.4,
        perceptual_weight: float = 0.5,
    ) -> None:
        super().__init__(learning_rate, max_steps)
        self.autoencoder = autoencoder
        self.autoencoder.encoder.requires_grad_(False)
        self.eyes = judge.vision_model.requires_grad_(False)
        self.pool = pool
        self.latent_noise, self.perceptual_weight = latent_noise, perceptual_weight

    def training_step(self, batch: tuple[Tensor, int], _: int) -> Tensor:
        """Pixel errors and the distance of patch tokens.

        Args:
            batch: Indices of scenes, shape (batch,), and the step.
            _: Number of the batch.
        """
        pixels = to_pixels(self.pool.images[batch[0].cpu().numpy()]).to(self.device)
        with torch.no_grad():
            latents = self.autoencoder.encode(pixels).latents
            target = self.eyes(pixel_values=pixels).last_hidden_state.float()
            amount = torch.rand(len(pixels), 1, 1, 1, device=self.device) * self.latent_noise * latents.std()
            noisy = latents + amount * torch.randn_like(latents)
        decoded = self.autoencoder.decode(noisy).sample.float()
        difference = decoded - pixels
        pixel = difference.abs().mean() + difference.square().mean()
        seen = self.eyes(pixel_values=decoded).last_hidden_state.float()
        perceptual = 1 - F.cosine_similarity(seen, target, dim=-1).mean()
        self.log("pixel_loss", pixel, prog_bar=True)
        self.log("perceptual_loss", perceptual, prog_bar=True)
        return pixel + self.perceptual_weight * perceptual


class JudgeModule(MicroModule):
    """Contrastive training of the judge with hard negatives (CLIP, Radford et al. 2021; NegCLIP, 2023).

    Every image sees, beside the batch's captions, captions with one attribute wrong. Equal captions of
    different images do not count as negatives. Two kinds of linear heads, dropped after training, make up
    for the few bits that a pair gives: one, shared by image and caption, reads every stated attribute from
    the embedding; one reads from every patch which shape and texture cover it.

    Args:
        judge: The CLIP model.
        pool: Training scenes.
        learning_rate: Peak learning rate.
        max_steps: Optimiser steps.
        wrong: Wrong captions a scene and step.
        attribute_weight: Weight of the cross-entropy of the attributes.
        patch_weight: Weight of the cross-entropy of the patches.
    """

    outer = ("embed", "heads", "logit_scale", "projection")

    def __init__(
        self,
        judge: CLIPModel,
        pool: ScenePool,
        learning_rate: float,
        max_steps: int,
        wrong: int = 2,
        attribute_weight: float = 4.0,
        patch_weight: float = 4.0,
    ) -> None:
        super().__init__(learning_rate, max_steps)
        self.judge = judge
        self.pool = pool
        self.wrong, self.attribute_weight, self.patch_weight = wrong, attribute_weight, patch_weight
        self.class_counts = [len(options) for options in world.LABELS.values()]
        self.heads = nn.Linear(judge.config.projection_dim, sum(self.class_counts))
        width = judge.config.vision_config.hidden_size
        self.patch_heads = nn.ModuleDict(
            {kind: nn.Linear(width, 1 + len(world.LABELS[f"{kind}_first"])) for kind in ("shape", "texture")}
        )

    def _attribute_loss(self, embedding: Tensor, labels: Tensor) -> Tensor:
        parts = self.heads(embedding * embedding.shape[-1] ** 0.5).split(self.class_counts, -1)
        losses = [
            F.cross_entropy(part, column, ignore_index=-1)
            for part, column in zip(parts, labels.T, strict=True)
            if bool((column >= 0).any())
        ]
        return torch.stack(losses).mean()

    def _patch_loss(self, patches: Tensor, labels: Tensor, owners: Tensor) -> Tensor:
        """Cross-entropy of what covers a patch; class 0 is the background, unsaid textures do not count."""
        names = list(world.LABELS)
        losses = []
        for kind, head in self.patch_heads.items():
            said = labels[:, [names.index(f"{kind}_first"), names.index(f"{kind}_second")]]
            shown = 1 + said.gather(1, owners.clamp(min=0))
            target = torch.where(owners < 0, 0, torch.where(shown == 0, -1, shown))
            losses.append(F.cross_entropy(head(patches).flatten(0, 1), target.flatten(), ignore_index=-1))
        return torch.stack(losses).mean()

    def training_step(self, batch: tuple[Tensor, int], _: int) -> Tensor:
        """Symmetric cross-entropy over images and captions, wrong captions on the image side, and the heads.

        Args:
            batch: Indices of scenes, shape (batch,), and the step.
            _: Number of the batch.
        """
        index, step = batch
        rows = index.cpu()
        n = len(rows)
        pixels = to_pixels(self.pool.images[rows.numpy()]).to(self.device)
        tokens = self.pool.tokens[rows]
        kept = self.pool.wrong_tokens.shape[1]
        pick = torch.as_tensor((step * self.wrong + np.arange(self.wrong)) % kept)
        false = self.pool.wrong_tokens[rows][:, pick].flatten(0, 1)
        both = torch.cat([tokens, false]).to(self.device)
        seen = self.judge.get_image_features(pixel_values=pixels)
        image = F.normalize(seen.pooler_output.float(), dim=-1)
        text = F.normalize(self.judge.get_text_features(input_ids=both).pooler_output.float(), dim=-1)
        logits = self.judge.logit_scale.float().exp().clamp(max=100) * image @ text.T
        same = (both[None, :] == tokens.to(self.device)[:, None]).all(-1)
        target = torch.arange(n, device=self.device)
        same[target, target] = False
        logits = logits.masked_fill(same, -1e4)
        square = logits[:, :n]
        contrastive = (F.cross_entropy(logits, target) + F.cross_entropy(square.T, target)) / 2
        labels = self.pool.labels[rows].to(self.device)
        attribute = (self._attribute_loss(image, labels) + self._attribute_loss(text[:n], labels)) / 2
        patch = self._patch_loss(seen.last_hidden_state[:, 1:].float(), labels, self.pool.owners[rows].to(self.device))
        own = logits[:, n:].reshape(n, n, self.wrong)[target, target]
        self.log("loss", contrastive, prog_bar=True)
        self.log("attribute_loss", attribute)
        self.log("patch_loss", patch)
        self.log("hard_accuracy", (logits[target, target, None] > own).float().mean(), prog_bar=True)
        return contrastive + self.attribute_weight * attribute + self.patch_weight * patch


class DenoiserModule(MicroModule):
    """Latent diffusion with v-prediction (Salimans & Ho 2022), caption dropout and an averaged copy.

    Args:
        denoiser: The UNet.
        latents: Scaled latents of the training scenes, shape (scenes, channels, 8, 8).
        text_states: Text-encoder states of every distinct caption, shape (captions, tokens, width).
        caption_of: Row of ``text_states`` of each scene, shape (scenes,).
        empty_state: Text-encoder states of the empty caption, shape (tokens, width).
        learning_rate: Peak learning rate.
        max_steps: Optimiser steps.
        caption_dropout: Share of captions replaced by the empty one, for classifier-free guidance.
        ema_decay: Decay of the averaged weights.
    """

    outer = ("conv_in", "conv_out", "time_emb")

    def __init__(
        self,
        denoiser: UNet2DConditionModel,
        latents: Tensor,
        text_states: Tensor,
        caption_of: Tensor,
        empty_state: Tensor,
        learning_rate: float,
        max_steps: int,
        caption_dropout: float = 0.1,
        ema_decay: float = 0.998,
    ) -> None:
        super().__init__(learning_rate, max_steps)
        self.denoiser = denoiser
        self.averaged = copy.deepcopy(denoiser).requires_grad_(False)
        self.data = (latents, text_states, caption_of, empty_state)
        self.caption_dropout, self.ema_decay = caption_dropout, ema_decay
        self.noise_schedule = build_scheduler()

    def training_step(self, batch: tuple[Tensor, int], _: int) -> Tensor:
        """Mean squared error of the predicted velocity.

        Args:
            batch: Indices of scenes, shape (batch,), and the step.
            _: Number of the batch.
        """
        latents, text_states, caption_of, empty_state = self.data
        index, step = batch
        rows = index.cpu()
        clean = latents[rows].to(self.device)
        text = text_states[caption_of[rows]].to(self.device).float()
        generator = torch.Generator().manual_seed(step * 7919 + 13)
        drop = torch.rand(len(rows), generator=generator) < self.caption_dropout
        text[drop.to(self.device)] = empty_state.to(self.device).float()
        # Stratified timesteps: one from each of batch-size equal slices lowers the variance of the loss.
        slices = (torch.arange(len(rows)) + torch.rand(len(rows), generator=generator)) / len(rows)
        times = (slices * self.noise_schedule.config.num_train_timesteps).long().to(self.device)
        noise = torch.randn(clean.shape, generator=generator).to(self.device)
        noisy = self.noise_schedule.add_noise(clean, noise, times)
        target = self.noise_schedule.get_velocity(clean, noise, times)
        loss = F.mse_loss(self.denoiser(noisy, times, text).sample.float(), target)
        self.log("loss", loss, prog_bar=True)
        return loss

    def on_train_batch_end(self, *_: Any) -> None:
        """Move the averaged weights towards the trained ones."""
        decay = min(self.ema_decay, (1 + self.global_step) / (10 + self.global_step))
        with torch.no_grad():
            for mean, value in zip(self.averaged.parameters(), self.denoiser.parameters(), strict=True):
                mean.lerp_(value, 1 - decay)


def fit_module(
    module: MicroModule,
    size: int,
    batch_size: int,
    folder: Path,
    *,
    seed: int = 0,
    precision: str = "bf16-mixed",
    logger: Any = False,
    progress: bool = True,
    callbacks: Sequence[L.Callback] = (),
) -> MicroModule:
    """Train a module to its ``max_steps``, from its last checkpoint in ``folder`` if there is one.

    Args:
        module: What to train.
        size: Number of training examples.
        batch_size: Examples a step.
        folder: Where checkpoints are kept.
        seed: Seed of the batches and of the module's own noise.
        precision: Lightning precision.
        logger: Lightning logger or False.
        progress: Show a progress bar.
        callbacks: Further callbacks.

    Raises:
        CampaignError: If the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise CampaignError(f"{folder}: cannot keep checkpoints here ({exc.strerror})") from exc
    last = folder / "last.ckpt"
    start = int(torch.load(last, map_location="cpu", weights_only=False)["global_step"]) if last.exists() else 0
    L.seed_everything(seed + start, verbose=False)
    every = max(10, min(100, module.max_steps // 2))
    checkpoint = ModelCheckpoint(folder, save_last=True, save_top_k=0, every_n_train_steps=every)
    bars = [TQDMProgressBar(refresh_rate=10)] if progress else []
    trainer = L.Trainer(
        max_steps=module.max_steps,
        accelerator="auto",
        devices=1,
        precision=precision,
        logger=logger,
        callbacks=[checkpoint, *bars, *callbacks],
        enable_progress_bar=progress,
        enable_model_summary=False,
        gradient_clip_val=1.0,
        log_every_n_steps=20,
    )
    if start < module.max_steps:
        loader = DataLoader(Batches(size, batch_size, seed, start), batch_size=None)
        try:
            trainer.fit(module, loader, ckpt_path=str(last) if last.exists() else None, weights_only=False)
        except SystemExit as exc:  # Lightning's answer to Ctrl-C
            raise KeyboardInterrupt from exc
        trainer.save_checkpoint(last)
    else:
        module.load_state_dict(torch.load(last, map_location="cpu", weights_only=False)["state_dict"])
    return module.eval().cpu()
