"""Checkpoints of an annealing: written atomically, refused where the problem is another."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgesched.errors import SearchError
from edgesched.types import Scenario


def fingerprint(scenario: Scenario, parts: list[Tensor | None], settings: str) -> str:
    """SHA-256 over every number of a problem and the settings of the search."""
    digest = hashlib.sha256(settings.encode())
    fields = [getattr(scenario, name) for name in sorted(scenario.__dataclass_fields__)]
    for value in (*fields, *parts):
        if isinstance(value, Tensor):
            digest.update(f"{value.dtype} {tuple(value.shape)} ".encode())
            digest.update(value.detach().cpu().contiguous().numpy().tobytes())
        else:
            digest.update(repr(value).encode())
    return digest.hexdigest()


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint so that a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def load(path: Path, problem: str, device: torch.device) -> dict[str, Any] | None:
    """Read a checkpoint of this problem, or None if there is none.

    Raises:
        SearchError: If the file is no checkpoint, or one of another problem or other settings.
    """
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        found = state["problem"]
    except Exception as error:
        raise SearchError(f"checkpoint: {path} cannot be read as a checkpoint of an annealing ({error})") from error
    if found != problem:
        raise SearchError(
            f"checkpoint: {path} belongs to another scenario or to other settings; give another path or delete it"
        )
    return dict(state)
