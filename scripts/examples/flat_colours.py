"""A model of one's own that is no diffusers pipeline: a subclass of ``ImageModel``, and ``conf/model/flat_colours.yaml``.

    python scripts/run.py --config-dir scripts/examples/conf +experiment=campaign model=flat_colours \\
        campaign.out=outputs/flat_table
    python scripts/run.py --config-dir scripts/examples/conf +experiment=serve model=flat_colours \\
        data.path=outputs/flat_table

What to do: write ``generate``, whose images depend on text, steps and seed alone, and keep the constructor's arguments
by their names: they are what a campaign knows its images by. The YAML file has one top-level key, the model's name.
Whatever else a model can say (memory, valid step counts, a device, prompts cut short) has defaults in
:class:`edgesched.protocols.ImageModel`. A remote endpoint or another library goes the same way.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import numpy as np

from edgesched.errors import ArgumentError, ModelError
from edgesched.protocols import ImageModel


class FlatColours(ImageModel):
    """A stripe in a colour of its own for every word of the prompt, out of noise that halves with every step.

    Args:
        resolution: Height and width in pixels.
        words: Words of a prompt that are looked at.
        memory_gib: Resident memory in GiB.
        steps: Step counts that may be asked for, or None for any.

    Raises:
        ArgumentError: If an image would have no room for its words.
    """

    def __init__(
        self,
        *,
        resolution: int = 64,
        words: int = 8,
        memory_gib: float | None = 0.01,
        steps: Sequence[int] | None = None,
    ) -> None:
        if not 1 <= words <= resolution:
            raise ArgumentError(f"words: expected 1 to {resolution}, one row of pixels each at least, got {words}")
        self.resolution, self.words, self.memory_gib = resolution, words, memory_gib
        self.steps = None if steps is None else tuple(steps)

    def generate(
        self, texts: Sequence[str], steps: int, seeds: Sequence[int], on_step: Callable[[int], None] | None = None
    ) -> np.ndarray:
        """Images, shape (N, resolution, resolution, 3), uint8.

        Raises:
            ModelError: If the model may not run that step count.
        """
        if not self.allows(steps):
            raise ModelError(f"flat_colours: {steps} is not one of its step counts {list(self.steps or ())}")
        shape = (self.resolution, self.resolution, 3)
        clean = np.stack([self._stripes(text) for text in texts])
        images = np.stack([np.random.default_rng(seed).uniform(0, 255, shape) for seed in seeds])
        for number in range(steps):
            images += (clean - images) / 2
            if on_step is not None:
                on_step(number)
        return images.round().astype(np.uint8)

    def truncates(self, text: str) -> bool:
        """Whether a prompt has more words than are looked at."""
        return len(text.split()) > self.words

    def _stripes(self, text: str) -> np.ndarray:
        words = text.lower().split()[: self.words] or [""]
        colours = np.array([list(hashlib.sha256(word.encode()).digest()[:3]) for word in words], dtype=float)
        rows = np.arange(self.resolution) * len(words) // self.resolution
        return np.broadcast_to(colours[rows, None], (self.resolution, self.resolution, 3))
