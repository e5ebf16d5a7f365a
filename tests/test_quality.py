"""Fitted distributions against known parameters, and times against known lines."""

import numpy as np
import pytest
import torch
from factories import MODELS, OVERHEAD_S, STEP_TIME_S, STEPS, synthetic_frame, synthetic_table, true_mean

import edgesched as es
from edgesched.errors import ScenarioError, ScoreTableError
from edgesched.latency import fit_latency, fit_line
from edgesched.table import ScoreTable


@pytest.fixture(scope="module")
def table():
    return synthetic_table(100, seeds=1, seed=3)


@pytest.fixture(scope="module")
def quality(table):
    return es.fit_quality(table)


def test_recovers_means_and_deviations(quality):
    truth = torch.tensor([[[true_mean(c, m, k) for k in STEPS] for m in range(3)] for c in range(4)])
    error = quality.mean().detach() - truth
    assert quality.models == MODELS
    # One prompt effect of 4 points shared over a category: the mean of 100 prompts has error 0.5.
    assert error.abs().max() < 2.0
    assert error.abs().mean() < 0.6
    assert (quality.std() - 5).abs().mean() < 0.4


def test_likelihood_reaches_the_closed_form_within_the_curve_family(quality, table):
    """Free Gaussians per cell are the best any curve could do: the fit is within 0.01 nats a row."""
    frame = table.frame
    groups = frame.groupby(["category", "model", "steps"])["clip_score"]
    best = float((0.5 * np.log(2 * np.pi * groups.var(ddof=0)) + 0.5).mean())
    from edgesched.quality import observations

    data = observations(table, quality.models)
    with torch.no_grad():
        ours = -quality.log_density(data.score, data.category, data.model, data.step).mean().item()
    assert best <= ours + 1e-6
    assert ours - best < 0.01


def test_mean_grows_with_the_steps_and_levels_off(quality):
    mean = quality.mean(torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0])).detach()
    rise = mean.diff(dim=-1)
    assert (rise >= -1e-4).all()
    assert (rise[..., -1] < 0.2).all()


def test_cdf_and_samples_agree_with_the_distribution(quality):
    assert torch.allclose(quality.cdf(quality.mean()), torch.full_like(quality.mean(), 0.5))
    draws = quality.sample(4000, seed=1)
    assert (draws.mean(0) - quality.mean().detach()).abs().max() < 0.5
    assert torch.equal(draws, quality.sample(4000, seed=1))


def test_scenario_has_the_measured_counts_and_refuses_unknown_categories(quality):
    s = quality.scenario({"Basic": 3, "Complex": 1}, 0.5)
    assert s.shape == (1, 4, 3, 5)
    assert s.demand.tolist() == [[3.0, 0.0, 0.0, 1.0]]
    assert torch.allclose(s.step_time_s[0], torch.tensor(STEP_TIME_S, dtype=torch.float64), rtol=1e-3)
    with pytest.raises(ScenarioError, match="'Other' is not one of"):
        quality.scenario({"Other": 1.0}, 0.5)


def test_utility_is_differentiable_back_to_the_fitted_parameters(quality):
    s = quality.scenario(2.0, 0.5, differentiable=True)
    plan = es.search.coordinate(quality.scenario(2.0, 0.5)).plan
    es.evaluate(s, plan).utility.sum().backward()
    assert quality.top.grad.abs().sum() > 0
    quality.zero_grad()


def test_steps_that_a_model_never_ran_are_masked_and_holes_are_refused():
    frame = synthetic_frame(20)
    masked = ScoreTable(frame[~((frame.model == "tiny") & (frame.steps > 4))])
    quality = es.fit_quality(masked, max_epochs=20)
    assert torch.isneginf(quality.scenario(1.0, 0.1).quality[:, :, 0, 3:]).all()
    hole = ScoreTable(frame[~((frame.model == "tiny") & (frame.steps == 4) & (frame.category == "Detail"))])
    with pytest.raises(ScoreTableError, match="'Detail' has no score of 'tiny' at 4 steps"):
        es.fit_quality(hole, max_epochs=1)


def test_fit_does_not_touch_the_global_random_state(table):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    es.fit_quality(table, max_epochs=2)
    assert torch.equal(torch.rand(3), expected)


def test_latency_line_is_recovered_and_never_negative():
    fit = fit_line([1, 2, 4, 8], [0.12 + 0.03 * k for k in (1, 2, 4, 8)])
    assert fit.step_time_s == pytest.approx(0.03)
    assert fit.overhead_s == pytest.approx(0.12)
    assert fit.relative_error < 1e-9
    steep = fit_line([1, 2, 4], [0.5, 1.2, 2.4])
    assert steep.overhead_s == 0
    assert steep.step_time_s > 0
    flat = fit_line([1, 2, 4], [0.5, 0.4, 0.3])
    assert flat.step_time_s > 0
    single = fit_line([4, 4], [1.0, 1.2])
    assert (single.overhead_s, single.step_time_s) == (0.0, pytest.approx(0.275))
    with pytest.raises(ScoreTableError):
        fit_line([1], [0.0])


def test_times_come_from_the_timing_pass_where_there_is_one(table):
    timing = [{"model": m, "steps": k, "batch_size": 1, "latency_s": 1.0 + k} for m in MODELS for k in (1, 4)]
    timed = ScoreTable(table.frame, {"timing": timing})
    assert fit_latency(timed)["tiny"].overhead_s == pytest.approx(1.0)
    assert fit_latency(table)["tiny"].overhead_s == pytest.approx(OVERHEAD_S[0], rel=1e-3)
