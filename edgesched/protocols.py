"""What searches, policies, fitted scores and image models have to offer; a class of one's own needs no other base."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from edgesched.types import Scenario, SearchResult


class Search(Protocol):
    """Finds a plan: a function of a scenario, its own settings bound by keyword."""

    def __call__(self, scenario: Scenario, *, assignment: Tensor | None = None) -> SearchResult:
        """The best plan found.

        Args:
            scenario: A batch of B problems.
            assignment: Shares of every category by model, shape (B, C, M), kept as they are; None leaves them free.

        Raises:
            SearchError: If the method cannot solve this problem.
            ArgumentError: If a setting is wrong, whatever the problem.
            PlanError: If the assignment's rows are no probabilities.
        """
        ...


class Scores(Protocol):
    """Fitted score distributions, as a policy may ask for them, each of shape (C, M, K)."""

    def mean(self) -> Tensor:
        """Mean scores, in points."""
        ...

    def std(self) -> Tensor:
        """Standard deviations, in points."""
        ...

    def cdf(self, score: Tensor) -> Tensor:
        """P(S ≤ score), shape (..., C, M, K) for scores of shape (..., 1, 1, 1)."""
        ...


class Policy(Protocol):
    """Assigns categories to models, or leaves that to the search."""

    def __call__(self, scenario: Scenario, scores: Scores | None) -> Tensor | None:
        """Shares of every category by model, shape (B, C, M), rows summing to 1; None leaves them to the search.

        Args:
            scenario: A batch of B problems.
            scores: Fitted score distributions of its categories, models and step counts, where the policy needs them.

        Raises:
            PlanError: If the policy does not fit this problem.
            ArgumentError: If a setting is wrong, whatever the problem.
        """
        ...


@runtime_checkable
class ImageModel(Protocol):
    """A text-to-image model: a diffusers pipeline, another library, a remote endpoint.

    A class of one's own derives from this one and writes :meth:`generate`; the rest has defaults that fit a model that
    holds nothing here.

    Attributes:
        memory_gib: Resident memory in GiB, or None if nobody said.
        steps: Step counts that the model may run, or None for any.
        device: Where it runs.
    """

    memory_gib: float | None = None
    steps: Sequence[int] | None = None
    device: torch.device = torch.device("cpu")

    def generate(
        self, texts: Sequence[str], steps: int, seeds: Sequence[int], on_step: Callable[[int], None] | None = None
    ) -> np.ndarray:
        """Images, shape (N, height, width, 3), uint8; each depends on its text, steps and seed alone.

        Args:
            texts: Prompts, N of them.
            steps: Denoising steps.
            seeds: One for each image.
            on_step: Called after every denoising step with its number, from 0, where the model can say so.

        Raises:
            ModelError: If the model cannot make them.
        """
        ...

    def allows(self, steps: int) -> bool:
        """Whether the model may run this step count."""
        return self.steps is None or steps in self.steps

    def truncates(self, text: str) -> bool:
        """Whether the model sees the beginning of a prompt only."""
        return False

    def settings(self) -> dict[str, Any]:
        """What its images depend on, as plain values: a campaign's folder keeps to them.

        By default the constructor's arguments that are kept by their names.
        """
        names = [n for k in type(self).__mro__ if "__init__" in vars(k) for n in inspect.signature(k).parameters]
        return {n: vars(self)[n] for n in sorted(set(names)) if n in vars(self)}

    def place(self, device: torch.device) -> None:
        """Run on another device from now on."""

    def check(self) -> None:
        """Fail before a campaign begins, not in the middle of it.

        Raises:
            ModelError: In one line.
        """

    def unload(self) -> None:
        """Free the memory that it holds."""

    def forget_prompts(self) -> None:
        """Drop what is kept of prompts: the next one is encoded anew, as one never seen is."""

    def seconds_per_image(self, steps: int, batch_size: int, repeats: int = 5) -> float:
        """Median measured seconds per image, text encoding counted, over synchronised repeats after a warm-up.

        Args:
            steps: Denoising steps.
            batch_size: Images at once.
            repeats: Batches that are timed, after the first.
        """
        texts, seconds = ["a red circle"] * batch_size, []
        for _ in range(repeats + 1):
            self.forget_prompts()
            self._synchronise()
            start = time.perf_counter()
            self.generate(texts, steps, list(range(batch_size)))
            self._synchronise()
            seconds.append((time.perf_counter() - start) / batch_size)
        return float(np.median(seconds[1:]))

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
