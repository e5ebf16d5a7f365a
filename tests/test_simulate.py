"""Replay on held-out prompts: quality by hand, delay by Monte Carlo, intervals that are paired."""

import numpy as np
import pytest
import torch
from factories import MODELS, synthetic_table

import edgesched as es
from edgesched.errors import PlanError, ScoreTableError
from edgesched.simulate import compare, replay


@pytest.fixture(scope="module")
def setting():
    table = synthetic_table(40)
    fit, held = table.split()
    scenario = es.fit_quality(fit, max_epochs=40).scenario(5.0, 0.4)
    p = torch.tensor([[[0.2, 0.3, 0.5]] * 4], dtype=torch.float64)
    plan = es.Plan(p, [[4, 8, 2]], [[0.2, 0.3, 0.5]])
    return fit, held, scenario, plan


def test_quality_is_the_weighted_mean_of_measured_scores(setting):
    fit, held, scenario, plan = setting
    result = replay({"a": plan}, scenario, held, MODELS, planned_on=fit)["a"]
    frame = held.frame
    expected = 0.0
    for category in held.categories:
        for model, steps, part in (("tiny", 4, 0.2), ("middle", 8, 0.3), ("grand", 2, 0.5)):
            rows = frame[(frame.category == category) & (frame.model == model) & (frame.steps == steps)]
            expected += 0.25 * part * rows.groupby("prompt_id").clip_score.mean().mean()
    assert result.quality == pytest.approx(expected, rel=1e-6)
    low, high = result.interval("quality")
    assert low < result.quality < high
    assert result.utility == pytest.approx(result.quality - 0.4 * result.latency_s)


def test_random_routing_delay_equals_monte_carlo_and_exceeds_quota(setting):
    _, held, scenario, plan = setting
    random = replay({"a": plan}, scenario, held, MODELS, routing="random")["a"].latency_s
    quota = replay({"a": plan}, scenario, held, MODELS, routing="quota")["a"].latency_s
    assert quota == pytest.approx(es.evaluate(scenario, plan).latency_s.item())
    rng = np.random.default_rng(0)
    load = rng.multinomial(20, [0.2, 0.3, 0.5], size=200_000)
    seconds = (scenario.overhead_s + plan.steps * scenario.step_time_s)[0].numpy() / plan.share[0].numpy()
    assert random == pytest.approx((load**2 * seconds).sum(1).mean() / 20, rel=5e-3)
    assert random > quota


def test_a_plan_compared_with_itself_gains_nothing_at_all(setting):
    _, held, scenario, plan = setting
    one = replay({"a": plan, "b": plan}, scenario, held, MODELS, draws=200)
    gain = compare(one["a"], one["b"])
    assert gain["quality_gain_pct"] == {"value": 0.0, "lo": 0.0, "hi": 0.0}
    assert gain["latency_cut_pct"]["value"] == 0.0


def test_intervals_cover_the_truth_at_their_rate():
    covered = 0
    plan = es.Plan(torch.tensor([[[0.0, 0.0, 1.0]] * 4]), [[1, 1, 16]], [[0.0, 0.0, 1.0]])
    truth = np.mean([80 + 6 - 6 * c + (3 if c >= 2 else 0) - 30 * np.exp(-15 / 3.1) for c in range(4)])
    scenario = es.fit_quality(synthetic_table(20), max_epochs=2).scenario(5.0, 0.4)
    for seed in range(40):
        low, high = replay({"a": plan}, scenario, synthetic_table(30, 1, seed), MODELS, draws=200)["a"].interval(
            "quality"
        )
        covered += low <= truth <= high
    assert 32 <= covered <= 40


def test_replay_refuses(setting):
    fit, held, scenario, plan = setting
    with pytest.raises(ScoreTableError, match="was used for planning"):
        replay({"a": plan}, scenario, fit, MODELS, planned_on=fit)
    with pytest.raises(PlanError, match="'dice' is not one of"):
        replay({"a": plan}, scenario, held, MODELS, routing="dice")
    never = es.Plan(plan.assignment, [[3, 8, 2]], plan.share)
    with pytest.raises((ScoreTableError, PlanError), match="3"):
        replay({"a": never}, scenario, held, MODELS)
    short = held.replaced(
        held.frame[~((held.frame.model == "tiny") & (held.frame.prompt_id == held.frame.prompt_id[0]))]
    )
    with pytest.raises(ScoreTableError, match="held-out prompts"):
        replay({"a": plan}, scenario, short, MODELS)


def test_an_infeasible_plan_is_replayed_as_such(setting):
    _, held, scenario, plan = setting
    broken = es.Plan(plan.assignment, plan.steps, [[0.5, 0.5, 0.0]])
    result = replay({"a": broken}, scenario, held, MODELS)["a"]
    assert result.utility == float("-inf")
    assert result.latency_s == float("inf")
