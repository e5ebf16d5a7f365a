"""Prompts with categories: PartiPrompts, or a CSV of one's own."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from edgesched.data.reading import read_records
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
    records = read_records(path, ("Prompt", "Challenge"), error=PromptError, separator="\t")
    seen: set[str] = set()
    texts, categories, ids = [], [], []
    for line, (text, challenge) in enumerate(
        zip(records.columns["Prompt"], records.names("Challenge", empty=True), strict=True), 1
    ):
        category = PARTI_CATEGORIES.get(challenge, challenge if other_challenges else None)
        if category and text not in seen:
            seen.add(text)
            texts.append(text)
            categories.append(category)
            ids.append(f"PP{line}")
    return _prompt_set(path, texts, categories, ids if numbered else None, per_category)


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
    records = read_records(path, ("text", "category"), error=PromptError, rename=columns)
    ids = records.names("prompt_id") if "prompt_id" in records else None
    return _prompt_set(path, records.columns["text"], records.names("category"), ids, per_category)


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
