"""Prompts with categories: the micro world, PartiPrompts, or a CSV of one's own."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from edgesched.errors import PromptError
from edgesched.types import PromptSet

CATEGORIES = ("Basic", "Detail", "Imagination", "Complex")
PARTI_CATEGORIES = {
    "Basic": "Basic",
    "Fine-grained Detail": "Detail",
    "Simple Detail": "Detail",
    "Imagination": "Imagination",
    "Complex": "Complex",
}


def micro(per_category: int = 128, seed: int = 0) -> PromptSet:
    """Distinct captions of the micro world, ``per_category`` of each category."""
    from edgesched.micro.world import prompt_set

    return prompt_set(per_category, seed)


def parti(
    path: Path | str | None = None,
    *,
    repository: str = "nateraw/parti-prompts",
    revision: str | None = None,
    other_challenges: bool = False,
    numbered: bool = False,
    per_category: int | None = None,
) -> PromptSet:
    """PartiPrompts (Yu et al. 2022) from its TSV file, challenges mapped to the four categories.

    Args:
        path: Tab-separated file with the columns ``Prompt`` and ``Challenge``; None takes it from the hub.
        repository: Data set on the hub that holds ``PartiPrompts.tsv``, where no path is given.
        revision: Revision of the data set.
        other_challenges: Keep the other challenges as categories of their own.
        numbered: Name prompts by their line, ``PP1``, ``PP2``, … as score tables from elsewhere do, not by a hash.
        per_category: Most prompts of each category.

    Raises:
        PromptError: If the file cannot be read, has other columns, or the hub cannot be reached.
    """
    if path is None:
        path = _from_hub(repository, revision)
    frame = _read(path, "\t", ("Prompt", "Challenge"))
    frame["category"] = frame["Challenge"].map(
        lambda c: PARTI_CATEGORIES.get(str(c).strip(), str(c).strip() if other_challenges else None)
    )
    frame = frame[frame["category"].notna()]
    frame = frame.drop_duplicates("Prompt")
    ids = [f"PP{line + 1}" for line in frame.index] if numbered else None
    return _prompt_set(path, frame["Prompt"].tolist(), frame["category"].tolist(), ids, per_category)


def _from_hub(repository: str, revision: str | None) -> Path:
    from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache

    try:
        cached = try_to_load_from_cache(repository, "PartiPrompts.tsv", revision=revision, repo_type="dataset")
        if isinstance(cached, str):
            return Path(cached)
        HfApi().dataset_info(repository, revision=revision, timeout=10)  # at once, without the download's retries
        return Path(hf_hub_download(repository, "PartiPrompts.tsv", repo_type="dataset", revision=revision))
    except Exception as exc:
        raise PromptError(
            f"prompts: {repository!r} cannot be fetched from the hub ({str(exc).strip().splitlines()[0][:120]}); "
            "download PartiPrompts.tsv where there is a network and give prompts.path=<file>"
        ) from exc


def csv(path: Path | str, *, columns: Mapping[str, str] | None = None, per_category: int | None = None) -> PromptSet:
    """Prompts from a CSV file with the columns ``text`` and ``category``, and ``prompt_id`` if there is one.

    Args:
        path: The file.
        columns: Column of the file → ``text``, ``category`` or ``prompt_id``, where names differ.
        per_category: Most prompts of each category.

    Raises:
        PromptError: If the file cannot be read, a column is missing, or a row is empty.
    """
    frame = _read(path, ",", ("text", "category"), dict(columns or {}))
    ids = frame["prompt_id"].astype(str).tolist() if "prompt_id" in frame else None
    return _prompt_set(path, frame["text"].tolist(), frame["category"].tolist(), ids, per_category)


def _read(path: Path | str, separator: str, needed: tuple[str, ...], rename: dict[str, str] | None = None):  # type: ignore[no-untyped-def]
    import pandas as pd

    if path is None or not Path(path).is_file():
        raise PromptError(f"prompts.path: {path} is no file; give the path of the prompts")
    try:
        frame = pd.read_csv(path, sep=separator, dtype=str, keep_default_na=False)
    except (OSError, ValueError) as exc:
        raise PromptError(f"{path}: cannot be read ({exc})") from exc
    frame = frame.rename(columns=rename or {})
    missing = [c for c in needed if c not in frame.columns]
    if missing:
        raise PromptError(f"{path}: column {missing[0]!r} is missing; present: {', '.join(map(str, frame.columns))}")
    return frame


def _prompt_set(
    path: Path | str, texts: list[str], categories: list[str], ids: list[str] | None, per_category: int | None
) -> PromptSet:
    if ids is None:
        ids = [hashlib.sha256(text.encode()).hexdigest()[:12] for text in texts]
    try:
        prompts = PromptSet(tuple(ids), tuple(texts), tuple(categories))
    except PromptError as exc:
        raise PromptError(f"{path}: {exc}") from exc
    return prompts if per_category is None else prompts.per_category(per_category)
