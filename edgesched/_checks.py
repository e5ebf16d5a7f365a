"""Checks of arguments and of what goes into a type: shapes, ranges and names, each refused with the field and the first bad entry."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import Tensor

from edgesched.errors import ArgumentError, ScenarioError


def floats(name: str, value: Any, error: type[Exception]) -> Tensor:
    """Turn numbers, lists, arrays or tensors into a floating tensor (float64 unless it already floats).

    Args:
        name: Field, as messages call it.
        value: Numbers, nested as they come.
        error: What is raised.

    Raises:
        Exception: ``error``, if the value is not made of numbers.
    """
    try:
        tensor = value if isinstance(value, Tensor) else torch.as_tensor(value, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as exc:
        raise error(f"{name}: expected numbers, got {type(value).__name__} ({exc})") from exc
    return tensor if tensor.is_floating_point() else tensor.to(torch.float64)


def shaped(name: str, tensor: Tensor, shape: tuple[int, ...], error: type[Exception]) -> Tensor:
    """Expand missing leading dimensions, or say which shape was expected.

    Args:
        name: Field, as messages call it.
        tensor: What is given.
        shape: What is needed; leading dimensions may be missing or of size 1.
        error: What is raised.

    Raises:
        Exception: ``error``, if the shape does not fit.
    """
    if tensor.shape == shape:
        return tensor
    if tensor.ndim < len(shape) and (tensor.ndim == 0 or tensor.shape == shape[-tensor.ndim :]):
        return tensor.expand(shape)
    if len(shape) == 2 and tensor.shape == (shape[0], 1):
        return tensor.expand(shape)
    if tensor.ndim == len(shape) and tensor.shape == (1, *shape[1:]):
        return tensor.expand(shape)
    raise error(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")


def refuse(name: str, tensor: Tensor, bad: Tensor, allowed: str, error: type[Exception]) -> None:
    """Raise ``error`` naming the first offending entry of ``tensor`` if any entry of ``bad`` is set.

    Args:
        name: Field, as messages call it.
        tensor: Values.
        bad: Boolean, of the same shape.
        allowed: What is allowed, as the message ends.
        error: What is raised.

    Raises:
        Exception: ``error``, if any entry is bad.
    """
    if bool(bad.any()):
        index = tuple(int(i) for i in bad.nonzero()[0])
        value = tensor.detach()[index].item()
        raise error(f"{name}{list(index)} = {value:g}: {allowed}")


def rows(index: Any, length: int) -> slice | Any:
    """An index as one that keeps the batch dimension: any whole number (also NumPy's) becomes a slice.

    Args:
        index: Whole number, slice, list or tensor.
        length: Size of the batch.
    """
    try:
        at = range(length)[operator.index(index)]
    except TypeError:
        return index
    return slice(at, at + 1)


def names(field: str, value: Any, count: int) -> tuple[str, ...] | None:
    """Names in the order of a dimension, or None; as many as it has, none twice.

    Args:
        field: Field, as messages call it.
        value: Names, or one as a text, or None.
        count: Size of the dimension.

    Raises:
        ScenarioError: If there are more or fewer, one comes twice, or one is no text.
    """
    if value is None:
        return None
    given = (value,) if isinstance(value, str) else tuple(value)
    if len(given) != count or len(set(given)) != count or not all(isinstance(name, str) for name in given):
        raise ScenarioError(f"{field}: expected {count} different names, got {list(given)}")
    return given


def step_counts(value: Any, device: torch.device) -> Tensor:
    """Denoising steps on offer, as strictly increasing whole numbers of at least 1, shape (K,), int64.

    Args:
        value: Step counts on offer.
        device: Where they go.

    Raises:
        ScenarioError: If they are not one strictly increasing list of whole numbers of at least 1.
    """
    steps = torch.as_tensor(value)
    if steps.ndim != 1 or steps.numel() == 0:
        raise ScenarioError(f"steps: expected a list of step counts, got shape {tuple(steps.shape)}")
    if steps.is_floating_point():
        refuse("steps", steps, steps != steps.round(), "expected whole numbers", ScenarioError)
    steps = steps.to(device=device, dtype=torch.int64)
    refuse("steps", steps, steps < 1, "expected at least one denoising step", ScenarioError)
    if bool((steps[1:] <= steps[:-1]).any()):
        raise ScenarioError(f"steps: expected strictly increasing integers, got {steps.tolist()}")
    return steps


def expect_whole(name: str, value: int) -> None:
    """Refuse what is no whole number of at least 1.

    Args:
        name: Key, as the message calls it.
        value: What is given.

    Raises:
        ArgumentError: Naming the key.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ArgumentError(f"{name}: expected a whole number of at least 1, got {value!r}")


def expect_positive(name: str, value: float, most: float = math.inf) -> None:
    """Refuse what is no finite number above 0, or is above the most.

    Args:
        name: Key, as the message calls it.
        value: What is given.
        most: Largest value that is allowed.

    Raises:
        ArgumentError: Naming the key.
    """
    if not (math.isfinite(value) and 0 < value <= most):
        until = f" and up to {most:g}" if most < math.inf else ""
        raise ArgumentError(f"{name}: expected a number above 0{until}, got {value!r}")
