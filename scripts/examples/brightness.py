"""A score of one's own: a subclass of ``SampleScore`` with ``score``, and ``conf/score/brightness.yaml``.

    python scripts/run.py --config-dir scripts/examples/conf +experiment=campaign 'score=[micro,brightness]'

What to do: return one finite number for every image. The YAML file has one top-level key, the score's column in the
table. The first score is what plans are made with: after ``score=brightness`` that is this one, else ask a table for it
(``data.score=brightness data.path=outputs/campaign_table``). A score with weights also says ``path``, ``place``,
``check`` and ``truncates``, as :class:`edgesched.generation.scores.CLIPScore` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from edgesched.generation.scores import SampleScore


class Brightness(SampleScore):
    """Mean luma of an image, 0 for black to 100 for white.

    Args:
        weights: Of red, green and blue; the usual ones are those of ITU-R BT.601.
    """

    def __init__(self, weights: Sequence[float] = (0.299, 0.587, 0.114)) -> None:
        super().__init__()
        self.weights = tuple(weights)

    def score(self, images: Any, texts: Sequence[str]) -> Tensor:
        """Score of each image, shape (N,), for uint8 images of shape (N, H, W, 3).

        Example:
            >>> Brightness().score(torch.full((1, 8, 8, 3), 255, dtype=torch.uint8), ["snow"])
            tensor([100.])
        """
        pixels = torch.as_tensor(images).double().flatten(1, 2)
        weights = torch.tensor(self.weights, dtype=pixels.dtype, device=pixels.device)
        return (100 / 255 * (pixels @ weights).mean(1) / weights.sum()).float().cpu()
