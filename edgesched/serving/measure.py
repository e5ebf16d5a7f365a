"""A stream of requests really served by diffusion pipelines on this machine, and held against what was predicted.

Shares are realised by interleaving denoising steps: the model that has had least of the machine for its share is next
(stride scheduling, Waldspurger and Weihl 1995), and the turn of an idle model stays idle, as the equations assume.
"""

from __future__ import annotations

import collections
import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from rich.progress import Progress
from torch import Tensor

from edgesched._checks import expect_positive, expect_whole
from edgesched.errors import ArgumentError, ConfigError, PlanError, RequestError
from edgesched.generation.diffusion import image_seed
from edgesched.protocols import ImageModel
from edgesched.search._threads import one_thread
from edgesched.streams.arrivals import RequestStream, poisson
from edgesched.streams.clock import WALL, Clock
from edgesched.streams.queues import lindley, pollaczek_khinchine, route
from edgesched.types import Plan, PromptSet

if TYPE_CHECKING:
    from edgesched.quality import QualityModel


@dataclass(frozen=True)
class Measured:
    """Latencies of a stream that was really served, beside those of the equations.

    Attributes:
        model: Model of every request, shape (n,).
        measured_s: Measured seconds from arrival to the finished image, shape (n,).
        simulated_s: Seconds by the simulator, same arrivals, shape (n,).
        predicted_s: Pollaczek and Khinchine's mean for every model, shape (M,), infinite where it is overloaded.
        alone_s: Seconds an image with the whole machine, measured beforehand, shape (M,).
        inside_s: The same as it was during the service: seconds of the turns that made images, by image, shape (M,);
            what was measured beforehand where a model served nothing.
        resimulated_s: As ``simulated_s``, with ``inside_s`` for ``alone_s``: what is left is the error of the queues
            and shares, without that of a machine that is slower or faster than it was beforehand.
        share: Planned shares, shape (M,).
        worked_s: Seconds that each model's turns took, idle ones included, shape (M,).
        load: What was asked of each model over what its share can make, shape (M,): at 1 and above it is overloaded,
            and its queue has no mean.
    """

    model: Tensor
    measured_s: Tensor
    simulated_s: Tensor
    predicted_s: Tensor
    alone_s: Tensor
    inside_s: Tensor
    resimulated_s: Tensor
    share: Tensor
    worked_s: Tensor
    load: Tensor

    def errors(self) -> dict[str, float | None]:
        """Means in seconds, and relative errors in per cent of the mean over all requests.

        ``measured_vs_predicted_pct`` is against the theory, which knows only the rate of this stream;
        ``measured_vs_simulated_pct`` against a simulation of the very arrivals, and ``measured_vs_resimulated_pct``
        against one with the seconds an image that were seen during the service. ``predicted_s`` and what is held
        against it are None where a model that served is overloaded: the theory knows no mean then.
        """
        count = torch.bincount(self.model, minlength=len(self.predicted_s)).double()
        used = count > 0
        predicted = float((count[used] * self.predicted_s[used]).sum() / count.sum())
        measured, simulated = float(self.measured_s.mean()), float(self.simulated_s.mean())
        again = float(self.resimulated_s.mean())
        known = math.isfinite(predicted)
        return {
            "measured_s": measured,
            "simulated_s": simulated,
            "predicted_s": predicted if known else None,
            "measured_vs_predicted_pct": 100 * abs(measured - predicted) / predicted if known else None,
            "measured_vs_simulated_pct": 100 * abs(measured - simulated) / simulated,
            "measured_vs_resimulated_pct": 100 * abs(measured - again) / again,
        }


def alone(
    models: Sequence[ImageModel], steps: Sequence[int], text: str, *, repeats: int = 15, clock: Clock = WALL
) -> Tensor:
    """Median seconds of one image by each model with the whole machine, shape (M,), after one image to warm up.

    Measured as images are served: on a CPU with one thread, a denoising step of one model after a step of the next and
    every second turn idle, so that caches and clocks are as in service, and the prompt encoded anew for every image.

    Args:
        models: Models.
        steps: Denoising steps of each.
        text: Prompt of the images.
        repeats: Images of each model that are timed, after the first.
        clock: What time it is.

    Raises:
        ArgumentError: If nothing would be timed.
    """
    if repeats < 1:
        raise ArgumentError(f"repeats: expected at least 1 image of each model to time, got {repeats}")
    workers = [_Worker(model, int(k), clock) for model, k in zip(models, steps, strict=True)]
    seconds: list[list[float]] = [[] for _ in workers]
    try:
        for repeat in range(repeats + 1):
            spent = [0.0] * len(workers)
            for worker in workers:
                worker.inbox.append((0, text, repeat))
            while any(worker.has_work for worker in workers):
                for m, worker in enumerate(workers):
                    if worker.has_work:
                        start = clock.now()
                        worker.grant()
                        took = clock.now() - start
                        spent[m] += took
                        clock.sleep(took)
            for mine, once in zip(seconds, spent, strict=True):
                mine.append(once)
    finally:
        for worker in workers:
            worker.stop()
    return torch.tensor([sorted(mine[1:])[repeats // 2] for mine in seconds], dtype=torch.float64)


def serve(
    stream: RequestStream,
    prompts: PromptSet,
    models: Mapping[str, ImageModel],
    plan: Plan,
    *,
    routing: str = "random",
    seed: int = 0,
    progress: bool = False,
    alone_s: Tensor | None = None,
    clock: Clock = WALL,
) -> Measured:
    """Serve a stream in real time and compare.

    Args:
        stream: One replica; its last arrival says how long this takes.
        prompts: Prompts of the stream's categories; requests of a category take them in turn.
        models: Models in the plan's order.
        plan: One plan.
        routing: As in :func:`edgesched.streams.queues.route`.
        seed: Seed of the routing.
        progress: Show a progress bar.
        alone_s: Seconds an image with the whole machine, shape (M,), as by :func:`alone`; None measures them first.
        clock: What time it is.

    Raises:
        RequestError: If there are several replicas or a category has no prompt.
        PlanError: If plan and models do not fit, or a model with requests has no share.
        ArgumentError: If seconds alone are given and are not positive, or not one for every model.
    """
    if stream.replicas != 1:
        raise RequestError(f"requests: expected one replica, got {stream.replicas}")
    if len(plan) != 1 or plan.share.shape[1] != len(models):
        raise PlanError(
            f"plan: expected one plan for {len(models)} models, got shares of shape {tuple(plan.share.shape)}"
        )
    texts = _texts(stream, prompts)
    model = route(stream, plan.assignment, routing=routing, seed=seed)[0, 0]
    share = plan.share[0].double()
    if bool((share[model] <= 0).any()):
        raise PlanError("share: a model that serves requests has none")
    steps = [int(k) for k in plan.steps[0]]
    arrival = stream.arrival_s[0] - stream.arrival_s[0, 0]
    if alone_s is None:
        whole = alone(list(models.values()), steps, texts[0][1], clock=clock)
    else:
        whole = alone_s.double()
        if whole.shape != share.shape or not bool((whole.isfinite() & (whole > 0)).all()):
            raise ArgumentError(f"alone_s: expected {len(models)} numbers above 0, got {whole.tolist()}")
    workers = [_Worker(each, k, clock) for each, k in zip(models.values(), steps, strict=True)]
    try:
        finish, worked, busy = _run(workers, texts, arrival.tolist(), model.tolist(), share.tolist(), (whole / torch.tensor(steps)).tolist(), progress, clock)  # fmt: skip
    finally:
        for worker in workers:
            worker.stop()
    count = torch.bincount(model, minlength=len(workers)).double()
    inside = torch.where(count > 0, busy / count.clamp(min=1), whole)
    gaps = max(len(arrival) - 1, 1) / len(arrival)  # n arrivals end n − 1 gaps
    # One request has no rate: nothing can wait for it.
    rate = gaps * count / arrival[-1].clamp(min=1e-9) if len(arrival) > 1 else torch.zeros_like(count)
    return Measured(
        model, torch.tensor(finish) - arrival, _simulated(arrival, model, whole / share),
        pollaczek_khinchine(rate, whole / share), whole, inside, _simulated(arrival, model, inside / share), share, worked, torch.where(count > 0, rate * whole / share, 0.0),
    )  # fmt: skip


def _simulated(arrival: Tensor, model: Tensor, service: Tensor) -> Tensor:
    """Latencies of a stream dealt to models, first come, first served."""
    latency = torch.empty_like(arrival)
    for m in range(len(service)):
        mine = model == m
        if bool(mine.any()):
            latency[mine] = (lindley(arrival, torch.where(mine, service[m], 0.0), mine) - arrival)[mine]
    return latency


def _texts(stream: RequestStream, prompts: PromptSet) -> list[tuple[str, str]]:
    """Prompt of every request: (id, text)."""
    by_category: dict[str, list[tuple[str, str]]] = {c: [] for c in stream.categories}
    for pid, text, category in prompts:
        if category in by_category:
            by_category[category].append((pid, text))
    empty = [c for c, mine in by_category.items() if not mine]
    if empty:
        raise RequestError(f"prompts: category {empty[0]!r} of the requests has none")
    turn = collections.Counter[str]()
    texts = []
    for position in stream.category[0].tolist():
        name = stream.categories[position]
        texts.append(by_category[name][turn[name] % len(by_category[name])])
        turn[name] += 1
    return texts


class _Worker(threading.Thread):
    """One model; a grant lets it run to its next denoising step, and to the image after the last one."""

    def __init__(self, model: ImageModel, steps: int, clock: Clock) -> None:
        super().__init__(daemon=True)
        self.model, self.steps, self.clock = model, steps, clock
        self.inbox: collections.deque[tuple[int, str, int]] = collections.deque()
        self.finished: tuple[int, float] | None = None
        self.error: BaseException | None = None
        self._go, self._done, self._stopping, self._inside = (
            threading.Semaphore(0),
            threading.Semaphore(0),
            False,
            False,
        )
        self.start()

    @property
    def has_work(self) -> bool:
        return self._inside or bool(self.inbox)

    def grant(self) -> tuple[int, float] | None:
        """Let it run one turn; (request, time) if that finished one."""
        self.finished = None
        self._go.release()
        self._done.acquire()
        if self.error is not None:
            raise self.error
        return self.finished

    def stop(self) -> None:
        self._stopping = True
        self._go.release()
        self.join(timeout=10)

    def run(self) -> None:
        with one_thread():  # two models' threads must not wait for each other within a turn
            self._serve()

    def _serve(self) -> None:
        while True:
            self._go.acquire()
            if self._stopping:
                return
            number, text, seed = self.inbox.popleft()
            self._inside = True
            try:
                self.model.forget_prompts()
                self.model.generate([text], self.steps, [seed], self._turn_over)
                self.finished = (number, self.clock.now())
            except _Stopped:
                return
            except BaseException as exc:
                self.error = exc
            self._inside = False
            self._done.release()

    def _turn_over(self, number: int) -> None:
        if number + 1 < self.steps:
            self._done.release()
            self._go.acquire()
            if self._stopping:
                raise _Stopped


class _Stopped(Exception):  # noqa: N818
    """The service ended in the middle of an image."""


def _run(
    workers: Sequence[_Worker],
    texts: Sequence[tuple[str, str]],
    arrival: Sequence[float],
    model: Sequence[int],
    share: Sequence[float],
    turn_s: Sequence[float],
    progress: bool,
    clock: Clock,
) -> tuple[list[float], Tensor, Tensor]:
    """Serve in real time; when every request was done, the seconds of every model's turns, and of those not idle."""
    finish = [0.0] * len(arrival)
    passed = [0.0 if f > 0 else float("inf") for f in share]
    rest = max(0.0, 1.0 - sum(share))
    if rest > 1e-9:  # what no model was given stays idle too
        passed.append(0.0)
    worked, busy = torch.zeros(2, len(workers), dtype=torch.float64)
    admitted = done = 0
    with Progress(*Progress.get_default_columns(), disable=not progress) as bar:
        task = bar.add_task("Serving requests", total=len(arrival))
        begun = clock.now()
        while done < len(arrival):
            now = clock.now() - begun
            while admitted < len(arrival) and arrival[admitted] <= now:
                pid, text = texts[admitted]
                workers[model[admitted]].inbox.append((admitted, text, image_seed(pid, admitted)))
                admitted += 1
            m = min(range(len(passed)), key=passed.__getitem__)
            start = clock.now()
            working = m < len(workers) and workers[m].has_work
            if working:
                found = workers[m].grant()
                if found is not None:
                    finish[found[0]] = found[1] - begun
                    done += 1
                    bar.advance(task)
            else:
                clock.sleep(turn_s[m] if m < len(workers) else min(turn_s))
            spent = clock.now() - start
            passed[m] += spent / (share[m] if m < len(workers) else rest)
            if m < len(workers):
                worked[m] += spent
                busy[m] += spent * working
    return finish, worked, busy


@dataclass(frozen=True, eq=False)
class ServedForReal:
    """A short stream, to be served at a given part of what the machine can take.

    Every model serves an equal part of every category, at the same steps and the best shares for it: what is tested is
    the model of the machine, not the plan.

    Args:
        models: Models by name.
        prompts: Prompts of the requests.
        requests: Requests that are served.
        utilisation: Of the busiest model.
        steps: Denoising steps; the nearest measured count is taken.
        timing_repeats: Images of each model that are timed beforehand.
        routing: How a request comes to its model.
        seed: Seed of arrivals and routing.
        clock: The time in which it is served.

    Raises:
        ArgumentError: If a value is out of range.
    """

    models: Mapping[str, ImageModel]
    prompts: PromptSet
    requests: int = 150
    utilisation: float = 0.5
    steps: int = 8
    timing_repeats: int = 15
    routing: str = "random"
    seed: int = 0
    clock: Clock = WALL

    def __post_init__(self) -> None:
        for name in ("requests", "steps", "timing_repeats"):
            expect_whole(f"stream.{name}", getattr(self, name))
        expect_positive("stream.utilisation", self.utilisation)

    def measure(self, quality: QualityModel) -> tuple[Measured, tuple[str, ...], list[int]]:
        """Serve, and say what was measured, the models that served, and the step count of each.

        Args:
            quality: Fitted scores: their models are served, at a step count that they know.

        Raises:
            ConfigError: If none of the models is known to the scores.
        """
        names = tuple(n for n in quality.models if n in self.models)
        if not names:
            raise ConfigError(f"model: none of {', '.join(self.models)} is in the score table")
        models = {name: self.models[name] for name in names}
        prompts = self.prompts.per_category(8)
        categories = tuple(dict.fromkeys(prompts.categories))
        counts = [min(quality.step_counts, key=lambda k: (abs(k - self.steps), k))] * len(names)
        seconds = alone(list(models.values()), counts, prompts.texts[0], repeats=self.timing_repeats, clock=self.clock)
        share = seconds.sqrt() / seconds.sqrt().sum()
        rate = self.utilisation * float((share / seconds).min()) * len(names)
        stream = poisson([rate / len(categories)] * len(categories), categories, requests=self.requests, seed=self.seed)
        even = torch.full((1, len(categories), len(names)), 1 / len(names), dtype=torch.float64)
        found = serve(stream, prompts, models, Plan(even, torch.tensor([counts]), share[None]), routing=self.routing,
                      seed=self.seed, progress=True, alone_s=seconds, clock=self.clock)  # fmt: skip
        return found, names, counts
