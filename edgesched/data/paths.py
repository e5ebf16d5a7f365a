"""Where models lie: hub ids, folders, and folders that ship inside the package."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from edgesched.errors import ModelError

_PACKAGE = "package:"


def resolve(path: str) -> str:
    """A hub id or folder; ``package:micro/weights/x`` is a folder inside the installed package.

    Raises:
        ModelError: If a package folder is not there.
    """
    if not path.startswith(_PACKAGE):
        return path
    folder = Path(str(resources.files("edgesched"))) / path[len(_PACKAGE) :]
    if not folder.is_dir():
        raise ModelError(f"{path}: this installation ships no such folder")
    return str(folder)
