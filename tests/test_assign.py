"""Assignment policies: rows are probabilities, thresholds cut Gaussian mass, gradients are right."""

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgesched import search
from edgesched.assign.policies import (
    AlwaysBest,
    AlwaysCheapest,
    Direct,
    GainPerSecond,
    Probabilistic,
    Random,
    Trained,
    mixture_quantiles,
    threshold_assignment,
)
from edgesched.equations.bounds import upper_bound
from edgesched.equations.shares import best_share
from edgesched.equations.utility import evaluate
from edgesched.errors import ArgumentError, PlanError
from edgesched.types import Plan, Scenario


class Known:
    """Scores with known means and deviations, shape (C, M, K)."""

    def __init__(self, c, m, k):
        self._mean = torch.arange(c, dtype=torch.float64)[:, None, None].expand(c, m, k) * 5
        self._std = torch.full((c, m, k), 3.0, dtype=torch.float64)

    def mean(self):
        return self._mean

    def std(self):
        return self._std

    def cdf(self, score):
        return torch.special.ndtr((score - self._mean) / self._std)


@given(st.lists(st.floats(-50, 50), min_size=1, max_size=4), st.integers(0, 1000))
def test_rows_are_probabilities_for_any_thresholds(cuts, seed):
    generator = torch.Generator().manual_seed(seed)
    mean = 20 * torch.randn(5, generator=generator, dtype=torch.float64)
    std = torch.rand(5, generator=generator, dtype=torch.float64) * 10
    p = threshold_assignment(mean, std, torch.tensor(sorted(cuts), dtype=torch.float64))
    assert p.shape == (5, len(cuts) + 1)
    assert (p >= 0).all()
    assert torch.allclose(p.sum(-1), torch.ones(5, dtype=torch.float64))


def test_bands_hold_the_share_of_draws_between_the_thresholds():
    mean, std = torch.tensor([10.0, 14.0]), torch.tensor([2.0, 5.0])
    cuts = torch.tensor([9.0, 13.0])
    draws = mean + std * torch.randn(200_000, 2, generator=torch.Generator().manual_seed(0))
    counted = torch.stack([(draws < 9).float().mean(0), ((draws >= 9) & (draws < 13)).float().mean(0),
                           (draws >= 13).float().mean(0)], -1)  # fmt: skip
    assert (threshold_assignment(mean, std, cuts) - counted).abs().max() < 5e-3


def test_vanishing_spread_and_single_model():
    sharp = threshold_assignment(torch.tensor([5.0]), torch.tensor([0.0]), torch.tensor([4.0, 6.0]))
    assert torch.allclose(sharp, torch.tensor([[0.0, 1.0, 0.0]]))
    assert threshold_assignment(torch.tensor([5.0]), torch.tensor([1.0]), torch.empty(0)).tolist() == [[1.0]]
    with pytest.raises(ArgumentError, match="increasing"):
        threshold_assignment(torch.tensor([5.0]), torch.tensor([1.0]), torch.tensor([6.0, 4.0]))


def test_gradients_through_the_normal_distribution():
    mean = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    std = torch.tensor([1.5, 0.7], dtype=torch.float64, requires_grad=True)
    cuts = torch.tensor([0.8, 2.2], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(threshold_assignment, (mean, std, cuts))


def test_quantile_thresholds_give_every_model_an_equal_part_of_the_requests():
    s = Scenario.random(3, seed=2)
    p = Probabilistic()(s, Known(4, 3, 50))
    load = (s.demand[..., None] * p).sum(1) / s.demand.sum(-1, keepdim=True)
    assert torch.allclose(load, torch.full((3, 3), 1 / 3, dtype=torch.float64), atol=1e-6)
    cuts = mixture_quantiles(lambda x: torch.special.ndtr(x)[:, None], torch.ones(1, 1), torch.tensor([0.5]), -9, 9)
    assert cuts.item() == pytest.approx(0, abs=1e-6)


def test_the_hardest_prompts_go_to_the_most_capable_model():
    s = Scenario.random(1, seed=0)
    order = s.quality.amax(-1)
    capable = int((s.demand[..., None] * order).sum(1).argmax())
    p = Probabilistic(thresholds=[4.0, 9.0])(s, Known(4, 3, 50))
    assert p[0, 0, capable] == p[0, 0].max()
    assert p[0, 0, capable] > p[0, 3, capable]


def test_simple_policies():
    s = Scenario.random(4, seed=1)
    for policy in (Direct(), Random(), AlwaysBest(), AlwaysCheapest()):
        p = policy(s)
        assert torch.allclose(p.sum(-1), torch.ones(4, 4, dtype=torch.float64))
    assert (AlwaysCheapest()(s)[..., 0] == 1).all()
    best = s.quality.amax(-1)
    assert torch.allclose((Direct()(s) * best).sum(-1), best.amax(-1))
    masked = s.quality.clone()
    masked[:, :, 0] = -torch.inf
    assert (AlwaysCheapest()(dataclasses.replace(s, quality=masked))[..., 1] == 1).all()


def test_probabilistic_refuses_what_does_not_fit():
    s = Scenario.random(1)
    scores = Known(4, 3, 50)
    with pytest.raises(PlanError, match="expected 2 for 3 models"):
        Probabilistic(thresholds=[1.0])(s, scores)
    with pytest.raises(PlanError, match="99 is not one of"):
        Probabilistic(reference_steps=99)(s, scores)
    with pytest.raises(PlanError, match="position"):
        Probabilistic(reference=5)(s, scores)
    with pytest.raises(PlanError, match="needs fitted"):
        Probabilistic()(s, None)
    with pytest.raises(ArgumentError, match="increasing"):
        Probabilistic(thresholds=[4.0, 1.0])(s, scores)
    with pytest.raises(ArgumentError, match="starts: expected at least 1"):
        Trained(starts=0)
    with pytest.raises(ArgumentError, match="price: expected at least 0"):
        GainPerSecond(price=-1.0)
    with pytest.raises(ArgumentError, match="prices: expected at least 2"):
        GainPerSecond(prices=1)


def utility_of(scenario, p):
    return search.exact(scenario, assignment=p).utility


@pytest.mark.parametrize(("models", "latency"), [(2, "slot"), (3, "slot"), (2, "queue")])
def test_trained_thresholds_reach_the_best_of_a_fine_grid(models, latency):
    """Oracle: every pair of thresholds on a grid that reaches beyond all scores, at the best of all steps."""
    s = Scenario.random(3, categories=3, models=models, steps=4, seed=5, latency=latency)
    scores = Known(3, models, 4)
    grid = torch.linspace(-8, 18, 53, dtype=torch.float64).tolist()
    cuts = torch.tensor(list(itertools.combinations_with_replacement(grid, models - 1)))
    capable_first = (s.demand[..., None] * s.quality.amax(-1)).sum(1).argsort(descending=True)
    bands = threshold_assignment(scores.mean()[:, 0, 0], scores.std()[:, 0, 0], cuts)
    p = torch.stack([bands[..., order.argsort()] for order in capable_first], 1)
    oracle = utility_of(s.repeat(len(cuts)), p.flatten(0, 1)).reshape(len(cuts), 3).amax(0)
    trained = utility_of(s, Trained()(s, scores))
    assert (trained >= oracle - 2e-3 * oracle.abs()).all(), (trained, oracle)
    assert (trained >= utility_of(s, Probabilistic()(s, scores)) - 1e-9).all()
    assert (trained <= upper_bound(s) + 1e-9).all()


@given(st.integers(0, 10_000), st.sampled_from([2, 3]))
@settings(max_examples=8)
def test_trained_thresholds_are_never_worse_than_the_quantiles(seed, models):
    s = Scenario.random(2, categories=3, models=models, steps=5, seed=seed)
    scores = Known(3, models, 5)
    trained = utility_of(s, Trained(starts=2, iterations=15)(s, scores))
    assert (trained >= utility_of(s, Probabilistic()(s, scores)) - 1e-9).all()


def test_trained_thresholds_do_not_depend_on_the_batch():
    s = Scenario.random(3, categories=3, models=3, steps=4, seed=1)
    scores = Known(3, 3, 4)
    together = Trained(starts=3, iterations=30).cuts(s, scores)
    for i in range(3):
        assert torch.allclose(Trained(starts=3, iterations=30).cuts(s[i], scores), together[i : i + 1], atol=1e-8)


def test_trained_thresholds_keep_to_the_memory_limit():
    s = Scenario.random(1, categories=2, models=2, steps=3, seed=0)
    s = dataclasses.replace(s, memory_gib=[[3.0, 3.0]], memory_limit_gib=[4.0])
    p = Trained(starts=2, iterations=5)(s, Known(2, 2, 3))
    assert sorted(p.sum((0, 1)).tolist()) == [0.0, 2.0]


def test_gradients_reach_the_fitted_distributions_through_trained_thresholds():
    s = Scenario.random(1, categories=3, models=2, steps=3, seed=0)
    scores = Known(3, 2, 3)
    scores._mean = scores._mean.clone().requires_grad_()
    p = Probabilistic(thresholds=[4.0])(s, scores)
    p[0, :, 0].sum().backward()
    assert scores._mean.grad[:, 0, -1].abs().min() > 1e-4


@pytest.mark.parametrize("latency", ["slot", "queue"])
def test_gradients_of_utility_through_thresholds_and_closed_form_shares(latency):
    s = Scenario.random(1, categories=3, models=3, steps=3, seed=3, latency=latency)
    steps = s.steps[torch.tensor([[2, 1, 0]])]
    mean = torch.tensor([[0.0, 5.0, 10.0]], dtype=torch.float64, requires_grad=True)
    std = torch.full((1, 3), 3.0, dtype=torch.float64, requires_grad=True)
    cuts = torch.tensor([[-1.0, 2.0]], dtype=torch.float64, requires_grad=True)

    def utility(mean, std, cuts, demand, quality, weight):
        scenario = dataclasses.replace(s, demand=demand, quality=quality, latency_weight=weight)
        p = threshold_assignment(mean, std, cuts).flip(-1)
        return evaluate(scenario, Plan(p, steps, best_share(scenario, p, steps))).utility

    demand = s.demand * (1.0 if latency == "slot" else 0.15)
    leaves = [t.clone().requires_grad_() for t in (demand, s.quality, s.latency_weight)]
    assert utility(mean, std, cuts, *leaves).isfinite().all()
    assert torch.autograd.gradcheck(utility, (mean, std, cuts, *leaves), atol=1e-4)


def test_the_router_meets_its_ends_and_beats_them():
    s = Scenario.random(8, seed=3)
    free = GainPerSecond(price=0.0)(s)
    assert torch.equal(free, Direct()(s))
    assert torch.equal(GainPerSecond(price=1e9)(s), AlwaysCheapest()(s))
    routed = utility_of(s[:2], GainPerSecond()(s[:2]))
    for policy in (Direct(), AlwaysCheapest()):
        assert (routed >= utility_of(s[:2], policy(s[:2])) - 0.05).all()


def test_the_router_moves_up_where_a_second_gains_more_than_its_price():
    quality = torch.tensor([[[[20.0], [21.0]], [[20.0], [26.0]]]], dtype=torch.float64)
    s = Scenario([[1.0, 1.0]], quality, [1], [[1.0, 3.0]], [[0.0, 0.0]], [0.1])
    assert GainPerSecond(price=1.0)(s)[0, :, 1].tolist() == [0.0, 1.0]
    assert GainPerSecond(price=0.4)(s)[0, :, 1].tolist() == [1.0, 1.0]
    assert GainPerSecond(price=4.0)(s)[0, :, 1].tolist() == [0.0, 0.0]


def test_no_policy_is_led_astray_by_a_category_without_demand_that_a_model_cannot_serve():
    quality = torch.tensor([[[[20.0], [30.0]], [[25.0], [-torch.inf]]]], dtype=torch.float64)
    s = Scenario([[4.0, 0.0]], quality, [4], [[0.1, 0.2]], [[0.0, 0.0]], [0.1])
    assert AlwaysBest()(s)[0, 0].tolist() == [0.0, 1.0]
    assert GainPerSecond(price=0.0)(s)[0, 0].tolist() == [0.0, 1.0]
    for policy in (AlwaysBest(), AlwaysCheapest(), Direct(), Random(), GainPerSecond()):
        p = policy(s)
        assert p.isfinite().all()
        assert evaluate(s, Plan(p, [[4, 4]], best_share(s, p, torch.tensor([[4, 4]])))).utility.isfinite().all()


@pytest.mark.parametrize("cuts", [[float("nan"), 1.0], [0.0, float("nan")], [float("nan"), float("nan")]])
def test_thresholds_that_are_no_numbers_are_refused(cuts):
    with pytest.raises(ArgumentError, match="thresholds"):
        threshold_assignment(torch.tensor([0.0]), torch.tensor([1.0]), torch.tensor(cuts))
    s = Scenario.random(1, seed=0)

    class Scores:
        def mean(self):
            return s.quality[0]

        def std(self):
            return torch.ones_like(s.quality[0])

        def cdf(self, score):
            return torch.special.ndtr(score - s.quality[0])

    with pytest.raises(ArgumentError, match="thresholds"):
        Probabilistic(thresholds=cuts)(s, Scores())
