"""Prompts with categories: PartiPrompts, or a CSV of one's own."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path

from edgesched.data.reading import Records, read_records
from edgesched.errors import ArgumentError, PromptError
from edgesched.types import PromptSet

log = logging.getLogger(__name__)
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
        path: Tab-separated file with the columns ``Prompt`` and ``Challenge``, as published: quotes are text; None takes it from the hub.
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
    records = read_records(path, ("Prompt", "Challenge"), error=PromptError, separator="\t", quoted=False)
    challenges = records.names("Challenge", empty=True)
    if "" in challenges:
        log.warning("%s: %d prompts without a challenge are left out", Path(path).name, challenges.count(""))
    categories = [PARTI_CATEGORIES.get(c, c if other_challenges else "") for c in challenges]
    first: dict[str, int] = {}
    for row, (text, category) in enumerate(zip(records.columns["Prompt"], categories, strict=True)):
        if category:
            first.setdefault(text, row)
    again = sum(bool(category) for category in categories) - len(first)
    if again:
        log.warning("%s: %d prompts stand there again and are left out", Path(path).name, again)
    kept = set(first.values())
    keep = [row in kept for row in range(len(records))]
    ids = [f"PP{row + 1}" for row in sorted(kept)] if numbered else None
    chosen = [category for category, is_kept in zip(categories, keep, strict=True) if is_kept]
    return _prompt_set(records.where(keep), "Prompt", chosen, ids, per_category)


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
        path: The file, or a folder of its parts.
        columns: Column of the file → ``text``, ``category`` or ``prompt_id``, where names differ.
        per_category: Most prompts of each category.

    Raises:
        PromptError: If the file cannot be read, a column is missing, a field is empty, or a prompt appears twice.
        ArgumentError: If ``per_category`` is no whole number from 1.
    """
    records = read_records(path, ("text", "category"), error=PromptError, rename=columns)
    ids = records.names("prompt_id", empty=True) if "prompt_id" in records else None
    return _prompt_set(records, "text", records.names("category", empty=True), ids, per_category)


def _prompt_set(
    records: Records, column: str, categories: list[str], ids: list[str] | None, per_category: int | None
) -> PromptSet:
    """Prompts of the records; ids are a hash of the text where none are given."""
    if per_category is not None and (isinstance(per_category, bool) or per_category != int(per_category)
                                     or per_category < 1):  # fmt: skip
        raise ArgumentError(f"per_category: expected a whole number from 1, got {per_category!r}")
    texts = records.columns[column]
    named = ids is not None
    ids = ids or [hashlib.sha256(text.encode()).hexdigest()[:12] for text in texts]
    seen: dict[str, int] = {}
    for row, (pid, text, category) in enumerate(zip(ids, texts, categories, strict=True)):
        for name, value in (("prompt_id", pid), (column, text), ("category", category)):
            if not value.strip():
                raise records.wrong(row, f"row {row}: {name} is {value!r}; expected a non-empty string")
        if pid in seen:
            what = f"prompt id {pid!r}" if named else "the prompt"
            raise records.wrong(row, f"{what} stands at {records.places[seen[pid]]} too; a prompt appears twice, "
                                "and ids must be unique")  # fmt: skip
        seen[pid] = row
    try:
        prompts = PromptSet(tuple(ids), tuple(texts), tuple(categories))
    except PromptError as exc:
        raise PromptError(f"{records.path}: {exc}") from exc
    return prompts if per_category is None else prompts.per_category(int(per_category))
