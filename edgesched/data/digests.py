"""Digests of content: what a file, a text or a component is, whatever its name."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import os
from pathlib import Path
from typing import Any

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
    """Digest of a file's bytes, or of the names and bytes of all files below a folder, 16 hexadecimal digits.

    A file is read once in a process, as long as its size and its time of change stay.

    Raises:
        OSError: If it cannot be read.
    """
    path = Path(path)
    walked = os.walk(path, followlinks=True)
    files = [path] if path.is_file() else sorted(Path(at) / name for at, _, names in walked for name in names)
    told = []
    for file in files:
        facts = file.stat()
        name = "" if file == path else file.relative_to(path).as_posix()
        told.append((name, _file_digest(str(file.resolve()), facts.st_size, facts.st_mtime_ns)))
    return text_digest(json_text(told))


def settings_of(component: Any, base: type = object) -> dict[str, Any]:
    """Class, settings and the content of the local folder of a model or a score, as plain JSON.

    Args:
        component: Its ``settings()`` is asked where it has one; else the constructor's arguments that it keeps by name
            count.
        base: Count the arguments of this class and its own bases, not those that a class derived from it adds.
    """
    kind = type(component)
    if callable(getattr(component, "settings", None)):
        found = dict(component.settings())
    else:
        kinds = kind.__mro__ if base is object else base.__mro__
        names = {n for k in kinds if "__init__" in vars(k) for n in inspect.signature(k).parameters}
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
    from edgesched.errors import ModelError
    from edgesched.generation.diffusion import resolve

    if not isinstance(path, str) or not path:
        return None
    try:
        found = Path(resolve(path))
        return found if found.exists() else None
    except (ModelError, OSError, ValueError):
        return None
