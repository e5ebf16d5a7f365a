"""Utility of a stream that was served: held-out prompts are dealt to its requests."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from torch import Tensor

from edgesched.errors import ScoreTableError
from edgesched.streams.arrivals import RequestStream


def served_utility(
    stream: RequestStream,
    model: Tensor,
    step: Tensor,
    latency: Tensor,
    scores: Mapping[str, Tensor],
    weight: float,
    seed: int,
) -> tuple[float, float]:
    """Mean measured score of held-out prompts dealt to the requests, and utility.

    Args:
        stream: One replica of n requests.
        model: Model of every request, shape (n,).
        step: Index of its step count, shape (n,).
        latency: Its seconds, shape (n,).
        scores: Category → measured scores of held-out prompts, shape (prompts, seeds, M, K), NaN where not measured.
        weight: Score points a second.
        seed: Seed of the dealing.

    Returns:
        Quality and utility in points.

    Raises:
        ScoreTableError: If a prompt was not scored with what serves it.
    """
    rng = np.random.default_rng(seed)
    total = 0.0
    for c, name in enumerate(stream.categories):
        mine = (stream.category[0] == c).numpy()
        values = scores[name].nanmean(1).numpy()
        prompt = rng.integers(len(values), size=int(mine.sum()))
        dealt = values[prompt, model.numpy()[mine], step.numpy()[mine]]
        if np.isnan(dealt).any():
            raise ScoreTableError(
                f"held-out prompts of category {name!r}: some have no score of the model and step count that serve them; "
                "score all prompts alike"
            )
        total += float(dealt.sum())
    quality = total / len(stream)
    return quality, quality - weight * float(latency.mean())
