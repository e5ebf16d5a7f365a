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
from edgesched.generate import resolve, unreachable

log = logging.getLogger(__name__)


class CLIPScore(Metric):
    """100 × the cosine between the CLIP embeddings of image and prompt, not clipped at 0 (Hessel et al. 2021).

    Any CLIP checkpoint serves. Prompts that the text tower cuts are counted in ``truncated`` and warned of.

    Args:
        path: Hub id, local folder, or ``package:`` folder of a ``transformers.CLIPModel``.
        revision: Revision of a hub id; pin it.
        name: Column of the score table.
        device: Device, or None for CUDA where there is one.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True
    values: list[Tensor]

    def __init__(
        self, path: str, *, revision: str | None = None, name: str = "clip_score", device: str | None = None
    ) -> None:
        super().__init__()
        self.path, self.revision, self.name = path, revision, name
        self.where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.add_state("values", default=[], dist_reduce_fx="cat")
        self.truncated: set[str] = set()
        self._loaded: tuple[Any, Any, Any] | None = None

    def _parts(self) -> tuple[Any, Any, Any]:
        if self._loaded is None:
            from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel
            from transformers.utils import logging as transformers_logging

            transformers_logging.disable_progress_bar()
            folder = resolve(self.path)
            options = {} if Path(folder).is_dir() else {"revision": self.revision}
            try:
                model = CLIPModel.from_pretrained(folder, dtype=torch.float32, **options)
                tokenizer = AutoTokenizer.from_pretrained(folder, **options)
                processor = CLIPImageProcessorPil.from_pretrained(folder, **options)
            except Exception as exc:
                raise unreachable("score model", self.path, exc) from exc
            self._loaded = (model.eval().to(self.where), tokenizer, processor)
        return self._loaded

    @torch.inference_mode()
    def score(self, images: Any, texts: Sequence[str]) -> Tensor:
        """Score of each image, shape (N,), for uint8 images of shape (N, H, W, 3).

        Raises:
            ModelError: If there are more images than texts, or fewer.
        """
        if len(images) != len(texts):
            raise ModelError(f"score: {len(images)} images for {len(texts)} prompts")
        model, tokenizer, processor = self._parts()
        limit = model.config.text_config.max_position_embeddings
        tokens = tokenizer(list(texts), padding="max_length", truncation=True, max_length=limit, return_tensors="pt")
        for text, row in zip(texts, tokenizer(list(texts)).input_ids, strict=True):
            if len(row) > limit and text not in self.truncated:
                self.truncated.add(text)
                log.warning("%s: a prompt of %d tokens is cut to %d: %.60s…", self.name, len(row), limit, text)
        pixels = processor(images=list(images), return_tensors="pt").pixel_values.to(self.where)
        mask = {"attention_mask": tokens.attention_mask.to(self.where)} if "attention_mask" in tokens else {}
        image = model.get_image_features(pixel_values=pixels).pooler_output
        text = model.get_text_features(input_ids=tokens.input_ids.to(self.where), **mask).pooler_output
        return (100 * (F.normalize(image, dim=-1) * F.normalize(text, dim=-1)).sum(-1)).cpu()

    def update(self, images: Any, texts: Sequence[str]) -> None:
        """Keep the scores of a batch."""
        self.values.append(self.score(images, texts))

    def compute(self) -> Tensor:
        """Every kept score, shape (N,)."""
        return torch.cat([v.reshape(-1) for v in self.values]) if self.values else torch.empty(0)
