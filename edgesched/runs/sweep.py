"""Jobs of a sweep: which are finished, which failed, and what need not be run again."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from edgesched.data.digests import content_digest, json_text
from edgesched.data.writing import write_json

FINISHED, FAILED, SKIPPED = "finished.json", "failed.json", "skipped.json"
_OF_THE_PLACE = ("run_folder", "logger", "rerun")
_WRITTEN = ("campaign.out", "train.out", "train.weights")  # what a job makes is not what it depends on
_FOLDER = re.compile(r"(^|_)(path|paths|file|files|folder|folders)$")
_INSTALLED = ("site-packages", "dist-packages")
_CODE = ("edgesched", "conf", "scripts")


def job_digest(cfg: DictConfig) -> str:
    """What a job's result depends on, by content and not by name.

    That is its whole configuration, the files that it names, the code of components from outside the package, the
    package's version, and the state of its clone. Where the run folder lies, and how it is logged, do not count.
    """
    plain = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(plain, dict)
    for name in _OF_THE_PLACE:
        plain.pop(name, None)
    told = json_text([plain, dict(_contents(plain)), metadata.version("edgesched"), _clone()])
    return hashlib.sha256(told.encode()).hexdigest()


def _contents(node: Any, place: str = "") -> Iterator[tuple[str, str]]:
    """Digest of every file that a configuration names, of folders under a key for a path, and of foreign code."""
    key = place.rpartition(".")[2]
    if place in _WRITTEN:
        return
    if isinstance(node, dict):
        for name, value in node.items():
            yield from _contents(value, f"{place}.{name}" if place else str(name))
    elif isinstance(node, list):
        for value in node:
            yield from _contents(value, place)
    elif isinstance(node, str) and node:
        try:
            if key in ("_target_", "task"):
                for code in _foreign_code(node):
                    yield str(code), content_digest(code)
            elif Path(node).is_file() or (_FOLDER.search(key) and Path(node).is_dir()):
                yield node, content_digest(node)
        except (OSError, ValueError):
            return  # no name of a file, or one that the job itself has to complain of


def _foreign_code(target: str) -> list[Path]:
    """Files of code that a dotted name lies in: the module's, or all of a package that is not installed."""
    parts = target.split(".")
    if parts[0] == __name__.split(".")[0]:
        return []
    top = _spec(parts[0])
    folders = [Path(place) for place in (top.submodule_search_locations or ())] if top is not None else []
    if folders and not any(folder.parent.name in _INSTALLED for folder in folders):
        return sorted(file for folder in folders for file in folder.rglob("*.py"))
    for end in range(len(parts), 0, -1):
        found = _spec(".".join(parts[:end]))
        if found is not None:
            return [Path(found.origin)] if found.has_location and found.origin else []
    return []


def _spec(name: str) -> ModuleSpec | None:
    try:
        return importlib.util.find_spec(name)
    except (ImportError, AttributeError, ValueError):
        return None


def _clone() -> str:
    """Commit and uncommitted changes of the clone that this file lies in; nothing for an installed package."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return ""
    new = ("ls-files", "--others", "--exclude-standard", "-z")
    try:
        done = [
            subprocess.run(["git", *command], cwd=root, capture_output=True, timeout=10, check=True).stdout
            for command in (["rev-parse", "HEAD"], ["diff", "--binary", "HEAD", "--", *_CODE], [*new, "--", *_CODE])
        ]
        done += [content_digest(root / os.fsdecode(name)).encode() for name in done[-1].split(b"\0") if name]
    except (OSError, subprocess.SubprocessError):
        return ""
    return hashlib.sha256(b"".join(done)).hexdigest()


def mark(folder: Path, name: str, values: dict[str, Any]) -> None:
    """Write a small JSON file into a run folder in one atomic step.

    Args:
        folder: Run folder.
        name: Name of the file.
        values: What it holds.

    Raises:
        OutputError: If it cannot be written.
    """
    write_json(folder / name, values)


def earlier(folder: Path, digest: str) -> tuple[Path, float | None] | None:
    """A finished run of the same job in this or an earlier sweep of the same name, and the value it returned.

    Args:
        folder: Run folder of the job, ``<outputs>/<name>/<time>/<number>``.
        digest: From :func:`job_digest`.
    """
    for file in sorted(folder.parents[1].glob(f"*/*/{FINISHED}")):
        try:
            told = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if told.get("digest") == digest:
            return file.parent, told.get("value")
    return None


class SweepEnd(Callback):
    """After a sweep, name the jobs that failed and end with exit code 1 if there are any."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Read what the jobs of a sweep left in its folder.

        Args:
            config: Configuration of the sweep, with Hydra's own node.
            **kwargs: What else Hydra tells.

        Raises:
            SystemExit: If a job failed.
        """
        folder = Path(config.hydra.sweep.dir)
        failed = sorted(folder.glob(f"*/{FAILED}"), key=lambda file: int(file.parent.name))
        if not failed:
            return
        jobs = len([f for f in folder.iterdir() if f.is_dir() and f.name.isdigit()])
        lines = [f"  job {f.parent.name}: {json.loads(f.read_text(encoding='utf-8'))['error']}" for f in failed]
        sys.stdout.flush()
        sys.exit(f"error: {len(failed)} of {jobs} jobs failed\n" + "\n".join(lines))
