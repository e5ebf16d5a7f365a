"""Small synthetic score tables with known parameters."""

import numpy as np
import pandas as pd
import torch

import edgesched as es
from edgesched.data.table import ScoreTable

CATEGORIES = ("Basic", "Detail", "Imagination", "Complex")
MODELS = ("tiny", "middle", "grand")
STEPS = (1, 2, 4, 8, 16)
STEP_TIME_S, OVERHEAD_S = (0.01, 0.02, 0.05), (0.004, 0.006, 0.01)


def true_mean(c: int, m: int, k: int) -> float:
    """Mean score of category c under model m at k steps."""
    top = 80 + 3 * m - 6 * c + (1.5 * m if c >= 2 else 0)
    return top - 30 * np.exp(-(k - 1) / (1.5 + 0.8 * m))


def synthetic_frame(prompts: int = 40, seeds: int = 2, seed: int = 0, std: float = 5.0) -> pd.DataFrame:
    """Gaussian scores with a prompt effect shared by all models."""
    rng = np.random.default_rng(seed)
    rows = []
    for c, category in enumerate(CATEGORIES):
        for p in range(prompts):
            shared = rng.normal(0, std * 0.8)
            for m, model in enumerate(MODELS):
                for k in STEPS:
                    for s in range(seeds):
                        score = true_mean(c, m, k) + shared + rng.normal(0, std * 0.6)
                        seconds = OVERHEAD_S[m] + k * STEP_TIME_S[m]
                        rows.append((f"{category}-{p}", category, model, k, s, score, seconds, 1))
    columns = ["prompt_id", "category", "model", "steps", "seed", "clip_score", "latency_s", "batch_size"]
    return pd.DataFrame(rows, columns=columns)


def synthetic_table(prompts: int = 40, seeds: int = 2, seed: int = 0, std: float = 5.0) -> ScoreTable:
    """The frame above as a table."""
    manifest = {"device": "synthetic", "category_order": list(CATEGORIES), "model_order": list(MODELS)}
    return ScoreTable(synthetic_frame(prompts, seeds, seed, std), manifest)


def draw_plan(scenario: es.Scenario, seed: int, sharp: bool = False) -> es.Plan:
    """A random plan; ``sharp`` sends every category to one model."""
    rng = np.random.default_rng(seed)
    b, c, m, k = scenario.shape
    p = torch.tensor(rng.dirichlet(np.full(m, 0.5), (b, c)))
    if sharp:
        p = torch.nn.functional.one_hot(p.argmax(-1), m).double()
    steps = scenario.steps[torch.tensor(rng.integers(0, k, (b, m)))]
    share = torch.tensor(rng.dirichlet(np.full(m, 2.0), b))
    return es.Plan(p, steps, share)
