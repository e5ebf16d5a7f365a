"""An image depends on its prompt, steps and seed alone: what a pipeline draws by itself is seeded too, or refused."""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from edgesched.errors import ModelError, StepsRefused

#: The process's random state is one: who forks it holds it.
_STATE = threading.RLock()
_TEXT, _OTHER = "a red circle", "a large blue star above two small green rings beside a yellow square"


@contextlib.contextmanager
def own_state(seed: int, device: torch.device) -> Iterator[None]:
    """Draw from a state that a seed makes, and leave the process's as it was.

    Args:
        seed: Seed of PyTorch's generators.
        device: Where is drawn besides the processor.
    """
    with _STATE, torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def draw_privately(scheduler: Any, seed: int, device: torch.device) -> None:
    """Let a scheduler's steps draw from a state of their own, as in :func:`own_state`, held during each step only.

    Args:
        scheduler: A diffusers scheduler, changed in place.
        seed: Seed of the state.
        device: Where is drawn besides the processor.
    """
    step = scheduler.step
    state: list[Any] = []

    def stepped(*given: Any, **options: Any) -> Any:
        with _STATE, torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            if state:
                torch.set_rng_state(state[0])
                if device.type == "cuda":
                    torch.cuda.set_rng_state(state[1], device)
            else:
                torch.manual_seed(seed)
            found = step(*given, **options)
            state[:] = [torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None]
        return found

    # Wrapped with the signature that pipelines look at to see what a step takes.
    stepped.__signature__ = inspect.signature(step)  # type: ignore[attr-defined]
    scheduler.step = stepped


def must_be_alone(
    make: Callable[..., np.ndarray], steps: int, tolerance: int, device: torch.device, batched: bool, told: str
) -> bool:
    """Whether images have to be made one by one, found out by making one twice and beside another.

    Args:
        make: Makes images of texts, steps, seeds and a callback.
        steps: Denoising steps of the look.
        tolerance: Levels of 255 by which the same image may differ.
        device: Where images are made.
        batched: Whether a batch is worth a try.
        told: How the model is called in messages.

    Raises:
        ModelError: If an image is not the same twice even by itself, under a state of its own.
    """

    def apart(one: np.ndarray, other: np.ndarray) -> int:
        return int(np.abs(one.astype(int) - other.astype(int)).max())

    def seen(at: int, several: bool) -> np.ndarray:
        with own_state(at, device):  # another state each time: who draws from it shows it
            texts, seeds = ([_TEXT, _OTHER], [3, 5]) if several else ([_TEXT], [3])
            return make(texts, steps, seeds, None)[:1]

    def alone(before: int) -> np.ndarray:
        with own_state(before, device), own_state(3, device):  # as it is made one by one, whatever was drawn before
            return make([_TEXT], steps, [3], None)

    try:
        first = seen(1, False)
        if batched and apart(first, seen(2, False)) <= tolerance and apart(first, seen(4, True)) <= tolerance:
            return False
        one, other = alone(7), alone(8)
    except StepsRefused:
        return not batched  # the count that was asked for says for itself what is wrong
    if apart(one, other) > tolerance:
        raise ModelError(f"{told}: the same prompt, steps and seed give images that differ by {apart(one, other)} of 255 levels; "
                         "choose another scheduler")  # fmt: skip
    return True
