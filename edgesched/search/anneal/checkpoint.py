"""Checkpoints of an annealing: written atomically, refused where the problem is another."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgesched.data.writing import replacing
from edgesched.errors import SearchError
from edgesched.types import Scenario

_SAVE_SECONDS = 10.0


class Ledger:
    """Jobs that are over and jobs under way, kept in a file where there is one.

    Args:
        path: File to keep them in, read first if it exists.
        problem: Fingerprint of the problem and the settings.
        device: Where tensors go.

    Raises:
        SearchError: As :func:`load`.
    """

    def __init__(self, path: Path | None, problem: str, device: torch.device) -> None:
        self.path, self.problem = path, problem
        saved = None if path is None else load(path, problem, device)
        self.finished: dict[int, dict[str, Any]] = saved["finished"] if saved else {}
        self.partial: dict[int, dict[str, Tensor]] = saved["partial"] if saved else {}
        self._saved_at = time.perf_counter()

    def due(self) -> bool:
        """Whether the file is there to be written and older than it should be."""
        return self.path is not None and time.perf_counter() - self._saved_at > _SAVE_SECONDS

    def write(self) -> None:
        """Write the file, if there is to be one."""
        if self.path is not None:
            save(self.path, {"problem": self.problem, "finished": self.finished, "partial": self.partial})
        self._saved_at = time.perf_counter()


def fingerprint(scenario: Scenario, parts: list[Tensor | None], settings: str) -> str:
    """SHA-256 over every number of a problem and the settings of the search.

    Args:
        scenario: The problem.
        parts: What is given of its plan.
        settings: Settings that the result depends on, as one text.
    """
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
    """Write a checkpoint so that a reader never sees half of it.

    Args:
        path: File; its folder is made.
        state: Tensors and plain values.

    Raises:
        OSError: If it cannot be written; the file stays as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        torch.save(state, file)


def load(path: Path, problem: str, device: torch.device) -> dict[str, Any] | None:
    """Read a checkpoint of this problem, or None if there is none.

    Args:
        path: File.
        problem: Fingerprint that it must have.
        device: Where tensors go.

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
