"""Rendered scenes that the micro family learns from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from edgesched.micro import world
from edgesched.micro.build import PATCH_SIZE, tokenize

CATEGORY_WEIGHTS = {"Basic": 0.2, "Detail": 0.25, "Imagination": 0.25, "Complex": 0.3}
ATTRIBUTE_WEIGHTS = {"relation": 2.0, "shape": 2.0, "count": 1.5, "texture": 1.5}


@dataclass(frozen=True)
class ScenePool:
    """Rendered scenes with captions and captions that get one attribute wrong.

    Args:
        images: Shape (scenes, 64, 64, 3), uint8.
        tokens: Caption token ids, shape (scenes, tokens), int64.
        wrong_tokens: Token ids of wrong captions, shape (scenes, wrong, tokens), int64.
        labels: What each caption says, shape (scenes, len(world.LABELS)), int64, −1 where it is silent.
        owners: The thing that covers most of each patch of the judge, shape (scenes, patches), int64, −1 where
            the background does.
        captions: Caption of each scene.
    """

    images: np.ndarray
    tokens: Tensor
    wrong_tokens: Tensor
    labels: Tensor
    owners: Tensor
    captions: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.captions)


def draw_pool(scenes: int, seed: int, wrong: int = 6) -> ScenePool:
    """Draw scenes in the proportions of :data:`CATEGORY_WEIGHTS`, each with ``wrong`` false captions.

    The wrong attribute is drawn in the proportions of :data:`ATTRIBUTE_WEIGHTS`, the harder the oftener.

    Args:
        scenes: Number of scenes.
        seed: Seed of the draw.
        wrong: False captions of each scene.
    """
    rng = np.random.default_rng([seed, 7])
    names, weights = list(CATEGORY_WEIGHTS), list(CATEGORY_WEIGHTS.values())
    images = np.empty((scenes, world.IMAGE_SIZE, world.IMAGE_SIZE, 3), np.uint8)
    captions, false, labels, owners = [], [], [], []
    for i in range(scenes):
        scene = world.sample_scene(names[int(rng.choice(len(names), p=weights))], rng)
        images[i], owner = world.draw(scene, rng)
        owners.append(_patch_owners(owner))
        captions.append(world.caption(scene))
        labels.append(world.labels(scene))
        stated = world.attributes(scene)
        odds = np.array([ATTRIBUTE_WEIGHTS.get(attribute, 1.0) for attribute in stated])
        changed = rng.choice(stated, wrong, p=odds / odds.sum())
        false += [world.caption(world.mutate(scene, str(attribute), rng)) for attribute in changed]
    wrong_tokens = tokenize(false).reshape(scenes, wrong, -1)
    patches = torch.as_tensor(np.stack(owners)).long()
    return ScenePool(images, tokenize(captions), wrong_tokens, torch.tensor(labels), patches, tuple(captions))


def _patch_owners(owner: np.ndarray) -> np.ndarray:
    """The thing that covers at least a third of a patch, else the background; pixels (side, side) to (patches,)."""
    n = owner.shape[0] // PATCH_SIZE
    patches = owner.reshape(n, PATCH_SIZE, n, PATCH_SIZE).transpose(0, 2, 1, 3).reshape(n * n, -1)
    share = np.stack([(patches == place).mean(1) for place in (0, 1)])
    return np.where(share.max(0) >= 1 / 3, share.argmax(0), -1).astype(np.int8)


def to_pixels(images: np.ndarray | Tensor) -> Tensor:
    """uint8 images (N, H, W, 3) as floats in [−1, 1], shape (N, 3, H, W)."""
    return torch.as_tensor(images).permute(0, 3, 1, 2).float() / 127.5 - 1
