"""Real scores from outside, read by path into a score table."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from edgesched.data.table import MIN_PROMPTS, ScoreTable
from edgesched.errors import ScoreTableError


def pp_scores(
    path: Path | str, *, score: str = "clip_score", challenges: bool = False, min_prompts: int = MIN_PROMPTS
) -> ScoreTable:
    """PartiPrompts × SD-Turbo, SDXL-Turbo, aMUSEd and TAESD: the published method's own prompts and categories.

    One step option, times measured for every prompt. Prompts outside the four published categories are left out
    unless their challenge is taken for the category.

    Args:
        path: CSV with the columns ``prompt_id challenge category model clip_score nima_score latency_s``.
        score: ``"clip_score"`` (ViT-g-14, × 100) or ``"nima_score"``.
        challenges: Take the prompt set's challenge as the category.
        min_prompts: Categories with fewer prompts are left out.

    Returns:
        The table; its device is the publishers'.

    Raises:
        ScoreTableError: If the file cannot be read or breaks the contract.

    Source:
        Repository sco-edge/CEMS.
    """
    columns = {"category": "published_category", "challenge": "category"} if challenges else None
    device = "NVIDIA GeForce RTX 2080 Ti, 512 x 512, mean of three images (sco-edge/CEMS)"
    return ScoreTable.from_csv(path, score=score, columns=columns, device=device, min_prompts=min_prompts)


def t2i_scores(
    path: Path | str, *, seconds: Mapping[str, float], score: str = "clip_score", min_prompts: int = MIN_PROMPTS
) -> ScoreTable:
    """One image a prompt of five models with CLIPScore and human ratings; the prompt's source is its category.

    Args:
        path: CSV with the columns ``prompt_id source model clip_score human_score``; other columns are not kept.
        seconds: Model → seconds an image, because the file has none.
        score: ``"clip_score"`` (ViT-B/32, × 100) or ``"human_score"`` (1 to 5).
        min_prompts: Sources with fewer prompts are left out.

    Raises:
        ScoreTableError: If the file cannot be read, breaks the contract, or has a model without seconds.

    Source:
        Repository Yushi-Hu/tifa, human annotations of TIFA v1.0.
    """
    wrong = [f"{model} ({value})" for model, value in seconds.items() if not value > 0]
    if wrong:
        raise ScoreTableError(f"data.seconds: expected more than 0 seconds, got {', '.join(wrong)}")
    device = "scores as published (Yushi-Hu/tifa); seconds from the configuration"
    return ScoreTable.from_csv(path, score=score, columns={"source": "category"}, seconds=seconds, device=device,
                               min_prompts=min_prompts)  # fmt: skip
