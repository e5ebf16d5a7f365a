"""Results are files written in one step that no stop can tear; JSON holds only what JSON has."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from edgesched.errors import ArgumentError, ConfigError, OutputError, reason

log = logging.getLogger(__name__)


@contextlib.contextmanager
def replacing(path: Path | str) -> Iterator[BinaryIO]:
    """A file to write to, which takes the place of ``path`` once it is whole: a reader finds the old one or the new one.

    Args:
        path: The file.

    Raises:
        OSError: If it cannot be written; the old file stays, whatever goes wrong.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.part")
    try:
        with open(part, "wb") as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def write_bytes(path: Path | str, data: bytes) -> None:
    """Write a file in one step, as :func:`replacing` does.

    Args:
        path: The file.
        data: What it holds.

    Raises:
        OSError: If it cannot be written; the old file stays.
    """
    with replacing(path) as handle:
        handle.write(data)


def plain(value: Any) -> Any:
    """A value as strict JSON has it: NaN and infinity are null, numbers of NumPy and PyTorch are numbers."""
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(inner) for inner in value]
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if callable(getattr(value, "tolist", None)):
        return plain(value.tolist())
    return str(value)


def json_document(value: Any) -> str:
    """Strict JSON, indented, with a newline at its end."""
    return json.dumps(plain(value), indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def write_json(path: Path | str, value: Any) -> None:
    """Write strict JSON in one step, and the folders above it.

    Args:
        path: File; its folder is made.
        value: What :func:`plain` can turn into JSON.

    Raises:
        OutputError: If it cannot be written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, json_document(value).encode())
    except OSError as exc:
        raise OutputError(f"{path}: cannot be written ({exc.strerror or exc})") from exc


@contextlib.contextmanager
def left_out(what: str) -> Iterator[None]:
    """Do what the results do not depend on: if it fails it is left out, in one line, and nothing else is lost.

    Raises:
        ArgumentError: As it comes: what the user asked for wrongly is no failure of a check.
        ConfigError: Likewise.
    """
    try:
        yield
    except (ArgumentError, ConfigError):
        raise
    except Exception as exc:
        log.warning("%s: left out (%s)", what, reason(exc))
        log.debug("%s", what, exc_info=exc)
