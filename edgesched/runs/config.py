"""The schema of the configuration, and checks that turn a mistake in it into one line.

The top level is a dataclass, so that an unknown key fails when the configuration is composed. Below it,
components are named by ``_target_``: :func:`build` checks every argument of every component against
its signature before anything runs.
"""

from __future__ import annotations

import contextlib
import difflib
import inspect
import logging
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.utils import get_method, instantiate
from omegaconf import DictConfig, ListConfig, Node, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from edgesched.errors import ArgumentError, ConfigError, EdgeschedError
from edgesched.runs.kinds import is_of_kind, kind_in_words

_RESERVED = {"_target_", "_partial_", "_args_", "_recursive_", "_convert_"}


@dataclass
class Schema:
    """Top-level keys of a run; every key from ``task`` on holds what its group under ``conf/`` builds.

    Args:
        name: Name of the run's folder.
        seed: Seed of whatever has none of its own.
        rerun: In a sweep, run finished jobs again.
        debug: Small sizes, and full tracebacks.
        run_folder: Where the results go.
        task: What is run.
        problem: The score table, its fits and the workload.
        data: The score table, or curves.
        prompts: Prompt source.
        model: Image models, by name.
        score: Scores of images, by column.
        campaign: Generation of a score table.
        samples: Images generated while one watches.
        quality: Family of score distributions.
        fit: Comparison of the families.
        method: Methods that are compared: an assignment and a search each.
        assign: Assignment policy of the method ``plan``.
        search: Search of the method ``plan``.
        workload: Demand, latency model, constraints and arrivals.
        estimate: What is planned on: the fitted means, or a careful estimate.
        policies: Sizes of the comparison of policies.
        difficulty: Prediction of prompts' difficulty.
        paper: Sizes and grid of the paper's comparison.
        stream: Slots and simulated streams of requests.
        replay: Routing, draws and seed of the replay on held-out prompts.
        train: Training of the micro family.
        logger: Weights & Biases.
    """

    name: str = "default"
    seed: int = 0
    rerun: bool = False
    debug: bool = False
    run_folder: str = "???"
    task: Any = field(default_factory=dict)
    problem: Any = field(default_factory=dict)
    data: Any = field(default_factory=dict)
    prompts: Any = field(default_factory=dict)
    model: Any = field(default_factory=dict)
    score: Any = field(default_factory=dict)
    campaign: Any = field(default_factory=dict)
    samples: Any = field(default_factory=dict)
    quality: Any = field(default_factory=dict)
    fit: Any = field(default_factory=dict)
    method: Any = field(default_factory=dict)
    assign: Any = field(default_factory=dict)
    search: Any = field(default_factory=dict)
    workload: Any = field(default_factory=dict)
    estimate: Any = field(default_factory=dict)
    policies: Any = field(default_factory=dict)
    difficulty: Any = field(default_factory=dict)
    paper: Any = field(default_factory=dict)
    stream: Any = field(default_factory=dict)
    replay: Any = field(default_factory=dict)
    train: Any = field(default_factory=dict)
    logger: Any = field(default_factory=dict)


def register_schema() -> None:
    """Make the schema known to Hydra as ``schema``."""
    ConfigStore.instance().store(name="schema", node=Schema)


def nearest(word: str, allowed: list[str]) -> str:
    """A hint that names the nearest allowed word, or all of them.

    Args:
        word: What was given.
        allowed: What would have been allowed.
    """
    close = difflib.get_close_matches(word, allowed, n=1)
    return f"did you mean {close[0]!r}?" if close else f"allowed: {', '.join(sorted(allowed))}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep Hydra's own report of a failure out of the log; ours says the same in one line."""
    logger = logging.getLogger("hydra.utils")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def check(node: Any, path: str = "") -> None:
    """Check every ``_target_`` below a node: that it can be located, and that it takes the arguments given.

    Args:
        node: Part of a configuration.
        path: Its full name, as messages call it.

    Raises:
        ConfigError: Naming the key by its full path and the nearest valid one.
        ArgumentError: If a value is of another kind than its argument.
    """
    if isinstance(node, ListConfig):
        for i, item in enumerate(node):
            check(item, f"{path}[{i}]")
        return
    if not isinstance(node, DictConfig) or node._is_none() or node._is_missing():
        return
    target = node.get("_target_")
    if target is not None:
        try:
            with _quiet():
                component = get_method(target)
        except Exception as exc:
            cause = exc.__cause__ or exc
            reason = str(cause).strip().splitlines() or [type(cause).__name__]
            raise ConfigError(f"{path}._target_: {target!r} cannot be located ({reason[0]})") from exc
        parameters = inspect.signature(component).parameters
        open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        for key in map(str, node):
            if key in parameters:
                _check_kind(node, key, path, component)
            elif key not in _RESERVED and not open_ended:
                raise ConfigError(f"{path}.{key}: unknown argument of {target}; {nearest(key, list(parameters))}")
    for name in node:  # as it stands: step counts are keys that are numbers
        inner = node._get_node(name)  # values that refer to a missing one are not checked, but said when they are built
        if isinstance(inner, (DictConfig, ListConfig)) and not inner._is_interpolation():
            check(inner, f"{path}.{name!s}" if path else str(name))


def _nodes(node: Any) -> Iterator[Any]:
    """A node and every node below it that is there."""
    yield node
    if isinstance(node, DictConfig | ListConfig) and not (
        node._is_none() or node._is_missing() or node._is_interpolation()
    ):
        for key in node if isinstance(node, DictConfig) else range(len(node)):
            yield from _nodes(node._get_node(key))  # type: ignore[arg-type]


def _check_kind(node: DictConfig, key: str, path: str, component: Any) -> None:
    """Refuse a value that is of no kind that the component's signature names.

    Raises:
        ArgumentError: Naming the key by its full path.
    """
    inner = node._get_node(key)
    if inner is None or (isinstance(inner, Node) and inner._is_missing()):
        return
    try:
        value = node[key]
        if isinstance(value, DictConfig | ListConfig):
            if any(isinstance(n, DictConfig) and "_target_" in n for n in _nodes(value)):
                return  # made of components, which are checked by themselves
            value = OmegaConf.to_container(value, resolve=True)
    except OmegaConfBaseException:
        return  # refers to what is missing, which is said when it is built
    wanted = inspect.signature(component).parameters[key].annotation
    if isinstance(wanted, str):
        function = component.__init__ if inspect.isclass(component) else component
        try:
            wanted = eval(wanted, vars(sys.modules[component.__module__]) | getattr(function, "__globals__", {}))
        except Exception:
            return  # names a type that is known to type checkers only
    if not is_of_kind(value, wanted):
        refers = (
            re.fullmatch(r"\$\{(?:oc\.select:)?([\w.]+)(?:,.*)?\}", str(inner._value()))
            if inner._is_interpolation()
            else None
        )
        where = refers[1] if refers else f"{path}.{key}"
        raise ArgumentError(f"{where}: expected {kind_in_words(wanted)}, got {value!r}")


def build(node: Any, path: str, **arguments: Any) -> Any:
    """Instantiate a component, or say in one line what is wrong with its configuration.

    Args:
        node: A node with ``_target_``.
        path: Where the node stands, for the message.
        **arguments: Passed on to the component.

    Raises:
        ConfigError: If it cannot be instantiated.
    """
    check(node, path)
    try:
        return instantiate(node, _convert_="all", **arguments)
    except EdgeschedError:
        raise
    except Exception as exc:
        cause: BaseException = exc
        while cause.__cause__ is not None and not isinstance(cause, EdgeschedError):
            cause = cause.__cause__
        if isinstance(cause, EdgeschedError):
            raise cause from exc
        raise ConfigError(f"{path}: {str(cause).splitlines()[0] if str(cause) else type(cause).__name__}") from exc
