"""Assignment policies: rows are probabilities, thresholds cut Gaussian mass, gradients are right."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edgesched.assign import (
    AlwaysBest,
    AlwaysCheapest,
    Direct,
    Probabilistic,
    Random,
    mixture_quantiles,
    threshold_assignment,
)
from edgesched.errors import PlanError
from edgesched.types import Scenario


class Known:
    """Scores with known means and deviations, shape (C, M, K)."""

    def __init__(self, c, m, k):
        self._mean = torch.arange(c, dtype=torch.float64)[:, None, None].expand(c, m, k) * 5
        self._std = torch.full((c, m, k), 3.0, dtype=torch.float64)

    def mean(self):
        return self._mean

    def std(self):
        return self._std


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
    with pytest.raises(PlanError, match="increasing"):
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
    cuts = mixture_quantiles(torch.tensor([0.0]), torch.tensor([1.0]), torch.ones(1, 1), 2)
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
