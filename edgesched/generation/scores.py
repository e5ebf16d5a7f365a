"""Scores of images for their prompts; every score is a torchmetrics Metric that keeps every sample."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torchmetrics import Metric

from edgesched.errors import ModelError
from edgesched.generation import loading
from edgesched.generation.diffusion import fetchable, unreachable

log = logging.getLogger(__name__)


class SampleScore(Metric):
    """A score of every single image; ``compute`` returns them all, because a mean would hide the distribution.

    A new score is a subclass with :meth:`score`, and one YAML file in ``conf/score/`` whose key is its column.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True
    path: str = ""
    revision: str | None = None
    values: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("values", default=[], dist_reduce_fx="cat")

    def score(self, images: Any, texts: Sequence[str]) -> Tensor:
        """Score of each image, shape (N,), on the CPU.

        Args:
            images: Shape (N, H, W, 3), uint8.
            texts: Prompts, N of them.

        Raises:
            NotImplementedError: Here; a subclass has to write it.
        """
        raise NotImplementedError

    def truncates(self, text: str) -> bool:
        """Whether the score sees the beginning of a prompt only."""
        return False

    def place(self, device: torch.device) -> None:
        """Run on another device from now on."""

    def check(self) -> None:
        """Fail before a campaign begins, not in the middle of it."""

    def update(self, images: Any, texts: Sequence[str]) -> None:
        """Keep the scores of a batch.

        Args:
            images: Shape (N, H, W, 3), uint8.
            texts: Prompts, N of them.
        """
        self.values.append(self.score(images, texts))

    def compute(self) -> Tensor:
        """Every kept score, shape (N,)."""
        return torch.cat([v.reshape(-1) for v in self.values]) if self.values else torch.empty(0)


class CLIPScore(SampleScore):
    """100 × the cosine between the CLIP embeddings of image and prompt, not clipped at 0 (Hessel et al. 2021).

    Any CLIP checkpoint serves. Of prompts beyond the token limit the beginning is scored, with one warning each.

    Args:
        path: Hub id, local folder, or ``package:`` folder of a ``transformers.CLIPModel``.
        revision: Revision of a hub id; pin it.
        device: Device, or None for CUDA where there is one.
    """

    def __init__(self, path: str, *, revision: str | None = None, device: str | None = None) -> None:
        super().__init__()
        self.path, self.revision = path, revision
        self.where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._warned: set[str] = set()
        self._loaded: tuple[Any, Any, Any] | None = None
        self._texts: dict[str, Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        """A copy for another process leaves the loaded model behind."""
        return super().__getstate__() | {"_loaded": None, "_texts": {}}

    def check(self) -> None:
        """Fail before a campaign begins, not in the middle of it.

        Raises:
            ModelError: In one line, if the checkpoint is neither here nor to be had.
        """
        fetchable("score model", self.path, self.revision, "config.json")

    def place(self, device: torch.device) -> None:
        """Run on another device from now on."""
        if device != self.where:
            self.where, self._loaded, self._texts = device, None, {}

    def _parts(self) -> tuple[Any, Any, Any]:
        if self._loaded is None:
            from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel
            from transformers.utils import logging as transformers_logging

            transformers_logging.disable_progress_bar()
            folder = fetchable("score model", self.path, self.revision, "config.json")
            options = {} if Path(folder).is_dir() else {"revision": self.revision}
            try:
                model, info = CLIPModel.from_pretrained(
                    folder, dtype=torch.float32, output_loading_info=True, **options
                )
                tokenizer = AutoTokenizer.from_pretrained(folder, **options)
                processor = CLIPImageProcessorPil.from_pretrained(folder, **options)
            except Exception as exc:
                raise unreachable("score model", self.path, exc) from exc
            loading.complete(model, info, f"score model {self.path!r}")
            self._loaded = (model.eval().to(self.where), tokenizer, processor)
        return self._loaded

    def truncates(self, text: str) -> bool:
        """Whether a prompt is longer than the text tower's token limit."""
        model, tokenizer, _ = self._parts()
        tokens, limit = len(tokenizer(text).input_ids), model.config.text_config.max_position_embeddings
        if tokens > limit and text not in self._warned:
            self._warned.add(text)
            log.warning("%s: a prompt of %d tokens is cut to %d: %.60s…", self.path, tokens, limit, text)
        return tokens > limit

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Unit embeddings of prompts, shape (N, width); each is computed once.

        Raises:
            ModelError: If the checkpoint cannot be loaded.
        """
        model, tokenizer, _ = self._parts()
        new = [text for text in dict.fromkeys(texts) if text not in self._texts]
        if new:
            limit = model.config.text_config.max_position_embeddings
            tokens = tokenizer(new, padding="max_length", truncation=True, max_length=limit, return_tensors="pt")
            mask = {"attention_mask": tokens.attention_mask.to(self.where)} if "attention_mask" in tokens else {}
            found = model.get_text_features(input_ids=tokens.input_ids.to(self.where), **mask).pooler_output
            self._texts |= dict(zip(new, F.normalize(found, dim=-1), strict=True))
        return torch.stack([self._texts[text] for text in texts])

    @torch.inference_mode()
    def score(self, images: Any, texts: Sequence[str]) -> Tensor:
        """Score of each image, shape (N,), on the CPU.

        Args:
            images: Shape (N, H, W, 3), uint8.
            texts: Prompts, N of them.

        Raises:
            ModelError: If there are more images than texts, or fewer, or the checkpoint cannot be loaded.
        """
        if len(images) != len(texts):
            raise ModelError(f"score: {len(images)} images for {len(texts)} prompts")
        model, _, processor = self._parts()
        for text in texts:
            self.truncates(text)
        pixels = processor(images=list(images), return_tensors="pt").pixel_values.to(self.where)
        image = F.normalize(model.get_image_features(pixel_values=pixels).pooler_output, dim=-1)
        return (100 * (image * self.embed_texts(texts)).sum(-1)).cpu()


class Colourfulness(SampleScore):
    """How colourful an image is: M̂³ of Hasler & Süsstrunk (2003), 0 for grey; needs neither prompt nor weights."""

    path = "Hasler & Süsstrunk 2003"

    def score(self, images: Any, texts: Sequence[str]) -> Tensor:
        """Score of each image, shape (N,), on the CPU.

        Args:
            images: Shape (N, H, W, 3), uint8.
            texts: Not looked at.
        """
        red, green, blue = torch.as_tensor(images).float().flatten(1, 2).unbind(-1)
        opponents = torch.stack([red - green, (red + green) / 2 - blue])
        spread, mean = opponents.std(-1, correction=0), opponents.mean(-1)
        return spread.norm(dim=0) + 0.3 * mean.norm(dim=0)
