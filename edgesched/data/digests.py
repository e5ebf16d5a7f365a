"""Digests of content: what a file, a text or a component is, whatever its name."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edgesched.data.paths import resolve
from edgesched.errors import ModelError

_LENGTH = 16


def text_digest(text: str) -> str:
    """Digest of a text, 16 hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()[:_LENGTH]


def json_text(value: Any) -> str:
    """The one JSON text of a value: sorted keys, whatever is not JSON by its ``str``."""
    return json.dumps(value, sort_keys=True, default=str, ensure_ascii=False)


@functools.lru_cache(maxsize=4096)
def _file_digest(file: str, size: int, changed_ns: int) -> str:
    with open(file, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def content_digest(path: Path | str) -> str:
    """Digest of a file's bytes, or of the names and bytes of the files below a folder, 16 hexadecimal digits.

    Hidden files and Python's caches below a folder do not count: desktops and downloads leave them anywhere.

    A file is read once in a process, as long as its size and its time of change stay.

    Raises:
        OSError: If it cannot be read.
    """
    path = Path(path)
    files = [path] if path.is_file() else sorted(_files(path))
    told = []
    for file in files:
        facts = file.stat()
        name = "" if file == path else file.relative_to(path).as_posix()
        told.append((name, _file_digest(str(file.resolve()), facts.st_size, facts.st_mtime_ns)))
    return text_digest(json_text(told))


def _files(folder: Path) -> Iterator[Path]:
    """Files below a folder, each folder once whatever links lead to it."""
    seen = set()

    def fail(exc: OSError) -> None:
        raise exc

    for at, folders, names in os.walk(folder, followlinks=True, onerror=fail):
        real = os.path.realpath(at)
        mine = [] if real in seen else [n for n in folders if not n.startswith(".") and n != "__pycache__"]
        folders[:] = sorted(mine)
        if real not in seen:
            yield from (Path(at) / name for name in names if not name.startswith("."))
        seen.add(real)


def settings_of(component: Any) -> dict[str, Any]:
    """Class, settings and the content of the local folder of a model or a score, as plain JSON.

    Args:
        component: Its ``settings()`` is asked where it has one; else the constructor's arguments that it keeps by name
            count.

    Returns:
        Settings by name, with ``class`` and, for a local folder, the digest of its ``content``.
    """
    kind = type(component)
    if callable(getattr(component, "settings", None)):
        found = dict(component.settings())
    else:
        names = {n for k in kind.__mro__ if "__init__" in vars(k) for n in inspect.signature(k).parameters}
        found = {n: vars(component)[n] for n in sorted(names) if n in vars(component)}
        found |= {n: getattr(component, n) for n in ("path", "revision") if hasattr(component, n)}
    found = {"class": f"{kind.__module__}.{kind.__qualname__}"} | found
    folder = _local_folder(getattr(component, "path", None))
    if folder is not None:
        found["content"] = content_digest(folder)
    plain = json.loads(json_text(found))
    assert isinstance(plain, dict)
    return plain


def _local_folder(path: Any) -> Path | None:
    """The local file or folder that a model's path names, if it is one; hub ids are pinned by their revision."""
    if not isinstance(path, str) or not path:
        return None
    try:
        found = Path(resolve(path))
        return found if found.exists() else None
    except (ModelError, OSError, ValueError):
        return None
