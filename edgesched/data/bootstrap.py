"""The bootstrap over prompts: every interval over prompts resamples them in the same way."""

from __future__ import annotations

import numpy as np


def prompt_counts(rng: np.random.Generator, prompts: int, draws: int) -> np.ndarray:
    """How often each prompt is drawn when as many are drawn with replacement as there are.

    Args:
        rng: Where the draws come from.
        prompts: Number of prompts.
        draws: Number of draws.

    Returns:
        Counts, shape (draws, prompts), each row summing to ``prompts``.

    Source:
        Efron, Annals of Statistics 7 (1979).
    """
    return rng.multinomial(prompts, np.full(prompts, 1 / prompts), size=draws)
