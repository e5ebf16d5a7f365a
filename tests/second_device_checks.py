"""What generates, plans and simulates runs on another device than the CPU, with the same results, and never mixes two.

Run by ``test_devices.py`` in a process of its own: the device has to be registered before the first gradient is taken,
and other tests should not see it.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import numpy as np
import pytest
import torch
from second_device import NAME, Elsewhere, SecondDevice
from torch import Tensor

import edgesched as es
from edgesched.assign import policies as assign
from edgesched.equations import utility as objective
from edgesched.equations.bounds import regret
from edgesched.errors import SearchError
from edgesched.generation.diffusion import DiffusionModel
from edgesched.generation.scores import CLIPScore
from edgesched.search import _result
from edgesched.streams import arrivals as requests
from edgesched.streams import queues as queueing
from edgesched.streams import replan as slots

PROBLEMS = ("slot", "queue", "slices", "memory", "deadline", "queue and slices")


def problem(kind: str) -> es.Scenario:
    scenario = es.Scenario.random(
        3, categories=3, models=2, steps=6, seed=1, latency="queue" if "queue" in kind else "slot"
    )
    limits: dict[str, Any] = {
        "slices": {"share_units": 8},
        "memory": {"memory_gib": torch.tensor([[2.0, 3.0]]).expand(3, 2), "memory_limit_gib": torch.full((3,), 4.0)},
        "deadline": {"deadline_s": torch.full((3,), 5.0)},
    }
    return dataclasses.replace(scenario, **limits.get(kind.removeprefix("queue and "), {}))


def even(scenario: es.Scenario) -> es.Plan:
    b, c, m, _ = scenario.shape
    like = {"dtype": scenario.demand.dtype, "device": scenario.device}
    steps = torch.full((b, m), 3, device=scenario.device)
    return es.Plan(torch.full((b, c, m), 1 / m, **like), steps, torch.full((b, m), 1 / m, **like))


def assert_same(here: Any, away: Any, path: str = "") -> None:
    if isinstance(here, Tensor):
        assert isinstance(away, Elsewhere), f"{path} came back on the CPU"
        torch.testing.assert_close(away.inner.double(), here.double(), rtol=1e-6, atol=1e-9, equal_nan=True, msg=path)
    elif dataclasses.is_dataclass(here):
        for field in dataclasses.fields(here):
            if field.name != "elapsed_s":
                assert_same(getattr(here, field.name), getattr(away, field.name), f"{path}.{field.name}")
    elif isinstance(here, dict):
        for key in here:
            assert_same(here[key], away[key], f"{path}[{key}]")
    else:
        assert here == away, path


def check(work: Any, scenario: es.Scenario) -> None:
    try:
        here = work(scenario)
    except SearchError:  # what is refused is refused on every device
        with SecondDevice(), pytest.raises(SearchError):
            work(scenario.to(NAME))
        return
    with SecondDevice():
        away = work(scenario.to(NAME))
    assert_same(here, away)


def test_the_second_device_tells_devices_apart():
    with SecondDevice():
        x = torch.ones(3).to(NAME)
        assert (x + torch.tensor(1.0)).device.type == NAME
        assert float((x * 2).sum()) == 6
        assert torch.arange(3, device=x.device)[torch.tensor([0, 2])].tolist() == [0, 2]
        with pytest.raises(RuntimeError, match="same device"):
            x + torch.ones(3)
        with pytest.raises(RuntimeError, match="same device"):
            torch.ones(3)[torch.zeros(1, dtype=torch.int64, device=x.device)]
        assert type((x + 1).cpu()) is Tensor


@pytest.mark.parametrize("kind", PROBLEMS)
def test_objective_and_policies(kind):
    scenario = problem(kind)
    check(lambda s: es.evaluate(s, even(s)), scenario)
    check(lambda s: es.best_share(s, even(s).assignment, even(s).steps), scenario)
    check(lambda s: es.upper_bound(s, even(s).assignment), scenario)
    check(es.upper_bound, scenario)
    check(lambda s: regret(s, es.upper_bound(s), es.evaluate(s, even(s)).utility), scenario)
    check(objective.single_best_plan, scenario)
    for policy in (
        assign.Direct(),
        assign.Random(),
        assign.AlwaysBest(),
        assign.AlwaysCheapest(),
        assign.GainPerSecond(),
    ):
        check(lambda s, policy=policy: policy(s), scenario)


@pytest.mark.parametrize("given", [False, True], ids=("joint", "given"))
@pytest.mark.parametrize("kind", PROBLEMS)
def test_searches(kind, given, monkeypatch):
    monkeypatch.setattr(sys.modules["edgesched.search.anneal.annealing"], "_worth_compiling", lambda *_: False)
    monkeypatch.setattr(_result, "upper_bound", lambda s, a=None: es.upper_bound(s, a, nodes=1))  # it has its own test
    scenario = problem(kind)
    sized = {"chains": 4, "iterations": 12}
    small = sized | {"compile": False}
    options: list[tuple[Any, dict[str, Any]]] = [
        (es.search.anneal, small),
        (es.search.anneal, small | {"shares": "annealed", "cooling": es.search.Cooling(schedule="adaptive")}),
        (
            es.search.anneal,
            small
            | {
                "cooling": es.search.Cooling(tempering=True),
                "stopping": es.search.Stopping(patience=6, target_gap=1e-3),
            },
        ),
        (es.search.relax, {"starts": 2, "iterations": 3, "sweeps": 1}),
        (es.search.tree, {"iterations": 2, "rollouts": 4}),
        (es.search.random_search, {"samples": 8}),
        *((getattr(es.search, name), {}) for name in ("exact", "branch", "coordinate")),
        *((getattr(es.search, name), sized) for name in (("equal_allocation", "optimal_step") if given else ())),
    ]
    for search, given_options in options:
        check(
            lambda s, f=search, o=given_options: f(s, assignment=even(s).assignment if given else None, **o), scenario
        )
    check(lambda s: es.search.anneal(s, start=even(s), restarts=2, **small), scenario)


@pytest.mark.parametrize("kind", ["slot", "queue"])
def test_gradients(kind):
    def slope(scenario: es.Scenario) -> Tensor:
        b, c, m, k = scenario.shape
        like = {"dtype": scenario.demand.dtype, "device": scenario.device}
        logits = torch.linspace(-1, 1, b * c * m, **like).reshape(b, c, m).requires_grad_()
        weights = torch.full((b, m, k), 1 / k, **like)
        utility = es.soft_utility(scenario, logits.softmax(-1), weights, even(scenario).share)
        return torch.autograd.grad(utility.sum(), logits)[0]

    check(slope, problem(kind))


class Scores:
    """Gaussian scores of fixed parameters, kept on the CPU as a fitted model is."""

    def mean(self) -> Tensor:
        return torch.linspace(20, 30, 3 * 2 * 6, dtype=torch.float64).reshape(3, 2, 6)

    def std(self) -> Tensor:
        return torch.full((3, 2, 6), 4.0, dtype=torch.float64)

    def cdf(self, score: Tensor) -> Tensor:
        return torch.special.ndtr((score - self.mean()) / self.std())


@pytest.mark.parametrize(
    "policy", [assign.Probabilistic(), assign.Probabilistic([25.0]), assign.Trained(iterations=5, starts=2)]
)
def test_thresholds_on_scores_kept_on_the_cpu(policy):
    check(lambda s: policy(s, Scores()), problem("slot"))


@pytest.mark.parametrize("routing", queueing.ROUTINGS)
@pytest.mark.parametrize("discipline", queueing.DISCIPLINES)
def test_simulation(discipline, routing):
    scenario = problem("queue")
    stream = requests.poisson([0.5, 0.3, 0.2], ["a", "b", "c"], requests=200, replicas=2, seed=0)

    def work(stream: requests.RequestStream, scenario: es.Scenario) -> Any:
        served = queueing.simulate(stream, scenario, even(scenario), discipline=discipline, routing=routing)
        times = torch.linspace(0, 100, 5, dtype=torch.float64)
        return served, queueing.summary(stream, served, deadline_s=3.0), queueing.backlog(stream, served, times)

    here = work(stream, scenario)
    with SecondDevice():
        away = work(stream.to(NAME), scenario.to(NAME))
    for one, other in zip(here, away, strict=True):
        assert_same(one, other)


def test_slots_are_planned_on_the_scenarios_device():
    stream = requests.poisson([0.2, 0.2, 0.2], ["a", "b", "c"], requests=40, seed=0)
    scenario = problem("slot")[:1]
    seen = []

    def search(scenario: es.Scenario, start: es.Plan | None = None) -> es.SearchResult:
        seen.append(scenario.device.type)
        return es.search.anneal(scenario, start=start, chains=2, iterations=20, compile=False)

    here = slots.run_slots(stream, scenario, search, slot_s=30.0)
    with SecondDevice():
        away = slots.run_slots(stream.to(NAME), scenario.to(NAME), search, slot_s=30.0)
    torch.testing.assert_close(away.latency_s, here.latency_s)
    assert set(seen) == {"cpu", NAME}


def test_images_and_scores_are_made_on_the_device_asked_for(monkeypatch):
    monkeypatch.setattr(torch.__future__, "get_overwrite_module_params_on_conversion", lambda: True)
    texts, seeds = ["a red circle", "two blue squares on a green background"], [1, 2]
    model = {"path": "package:micro/weights/micro_small", "resolution": 64, "guidance_scale": 2.0}
    here = DiffusionModel(**model).generate(texts, 2, seeds)
    scores = CLIPScore("package:micro/weights/judge").score(here, texts)
    with SecondDevice():
        away = DiffusionModel(**model, device=NAME).generate(texts, 2, seeds)
        judge = CLIPScore("package:micro/weights/judge", device=NAME)
        again = judge.score(away, texts)
        assert judge.embed_texts(texts).device.type == NAME
    np.testing.assert_array_equal(away, here)
    assert type(again) is Tensor
    torch.testing.assert_close(again, scores)
