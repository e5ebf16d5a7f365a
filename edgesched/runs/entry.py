"""The way in: a composed configuration is checked, its task is built with all it needs, and run."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError

from edgesched.errors import ConfigError
from edgesched.runs.config import build, check
from edgesched.runs.run import Run
from edgesched.runs.tracking import Tracker

_QUIET = ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero")
_OF_THE_RUN = ("task", "name", "run_folder", "logger", "debug", "rerun", "hydra", "experiment")
_REFERENCE = re.compile(r"\$\{(?:oc\.select:)?\s*([A-Za-z_][\w.]*)")


def run(cfg: DictConfig) -> float | None:
    """Check the configuration, run the task it names under a W&B run, and print where the results are.

    Args:
        cfg: The composed configuration.

    Returns:
        What a sweep maximises: for plans the replayed utility of the best, or None for other tasks.

    Raises:
        EdgeschedError: For every mistake that the user can mend, in one line.
    """
    for name in _QUIET:
        logging.getLogger(name).setLevel(logging.ERROR)
    given = list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []
    if cfg.debug:
        cfg = tiny(cfg, given)
    refuse_unused(cfg, given)
    check(cfg)
    folder = Path(cfg.run_folder)
    settings = plain(cfg)
    logger = dict(settings["logger"])
    if logger["group"] is None and HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
        logger["group"] = f"{cfg.name}/{folder.parent.name}"
    with Tracker(folder, settings, str(cfg.name), **logger) as tracker:
        this = Run(folder, str(cfg.name), tracker)
        value: float | None = build(cfg.task, "task")(this)
    print(f"Run folder: {this}", flush=True)
    return value


def plain(node: DictConfig) -> dict[str, Any]:
    """A node as a plain dictionary.

    Raises:
        ConfigError: If a value refers to one that has to be given.
    """
    try:
        found = OmegaConf.to_container(node, resolve=True, throw_on_missing=False)
    except InterpolationToMissingValueError as exc:
        key = str(exc).splitlines()[0].rsplit(" ", 1)[-1]
        raise ConfigError(f"{key}: has no value; give one, as {key}=...") from exc
    assert isinstance(found, dict)
    return {str(key): value for key, value in found.items()}


def tiny(cfg: DictConfig, given: Sequence[str], file: Path | None = None) -> DictConfig:
    """The configuration at the sizes of ``conf/debug.yaml``; what was given on the command line stays.

    Args:
        cfg: The composed configuration.
        given: Overrides as they were given.
        file: The sizes; None for ``debug.yaml`` beside the configuration that Hydra composed.

    Raises:
        ConfigError: If there is no such file.
    """
    if file is None:
        sources = HydraConfig.get().runtime.config_sources if HydraConfig.initialized() else []
        folders = [Path(str(source.path)) for source in sources if source.schema == "file"]
        found = [folder / "debug.yaml" for folder in folders if (folder / "debug.yaml").is_file()]
        if not found:
            raise ConfigError("debug: no debug.yaml beside the configuration")
        file = found[0]
    cfg = cfg.copy()
    OmegaConf.set_readonly(cfg, False)
    _shrink(cfg, OmegaConf.load(file), {_key(text) for text in given})
    return cfg


def _shrink(node: DictConfig, sizes: Any, given: set[str], path: str = "") -> None:
    for key, value in sizes.items():
        where = f"{path}{key}"
        if key == "_every_":  # for whatever this node holds
            for name in list(node):
                if isinstance(node._get_node(name), DictConfig):
                    _shrink(node[name], value, given, f"{path}{name}.")
        elif key in node and isinstance(value, DictConfig):  # also of a group that was chosen on the command line
            inner = node._get_node(key)
            if isinstance(inner, DictConfig) and not inner._is_interpolation():
                _shrink(node[key], value, given, f"{where}.")
        elif key in node and where not in given:
            node[key] = value


def refuse_unused(cfg: DictConfig, given: Sequence[str]) -> None:
    """Refuse a key that was given and that the task does not use.

    Args:
        cfg: The composed configuration; what its ``task`` refers to, at any depth, is used.
        given: Overrides as they were given.

    Raises:
        ConfigError: Naming the first key.
    """
    used = set(_OF_THE_RUN)
    _follow(cfg, cfg._get_node("task"), used)
    for text in given:
        key = _key(text)
        if not any(_within(key, u) or _within(u, key) for u in used):
            raise ConfigError(f"{key}: {cfg.name} does not use it; leave it out")


def _key(override: str) -> str:
    """Dotted key of an override without its sign and value; of a group put elsewhere, the place."""
    group, _, place = override.lstrip("+~").partition("=")[0].partition("@")
    return (place if place and not place.startswith("_") else group).replace("/", ".")


def _within(key: str, of: str) -> bool:
    return key == of or key.startswith(f"{of}.")


def _follow(cfg: DictConfig, node: Any, used: set[str]) -> None:
    """Note every key that is there and that a node refers to, and what that refers to in turn."""
    for reference in _references(node):
        if reference in used:
            continue
        target: Any = cfg
        for part in reference.split("."):
            inside = (
                isinstance(target, DictConfig) and not (target._is_missing() or target._is_none()) and part in target
            )
            target = target._get_node(part) if inside else None
            if target is None:
                break
        else:
            used.add(reference)
            _follow(cfg, target, used)


def _references(node: Any) -> Iterator[str]:
    if node is None:
        return
    if isinstance(node, DictConfig | ListConfig) and not (
        node._is_interpolation() or node._is_missing() or node._is_none()
    ):
        keys = list(node) if isinstance(node, DictConfig) else range(len(node))
        for key in keys:
            yield from _references(node._get_node(key))
        return
    value = node._value() if hasattr(node, "_value") else node
    if isinstance(value, str):
        yield from _REFERENCE.findall(value)
