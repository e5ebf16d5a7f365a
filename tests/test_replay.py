"""Replay on held-out prompts: quality by hand, delay by Monte Carlo, intervals that are paired."""

import dataclasses

import numpy as np
import pytest
import torch
from factories import MODELS, synthetic_table

import edgesched as es
from edgesched.errors import ArgumentError, PlanError, ScenarioError, ScoreTableError
from edgesched.evaluation.cascade import plan_cascade, replay_cascade
from edgesched.evaluation.replay import compare, prompt_scores, replay
from edgesched.evaluation.robust import (
    LowerBound,
    bootstrap_quality,
    compare_decisions,
    lower_quality,
    prompt_means,
    resampled_quality,
    safest,
)


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


def test_a_plan_that_is_not_feasible_never_wins_a_replay(setting):
    _, held, scenario, plan = setting
    alone = es.Plan(torch.tensor([[[1.0, 0.0, 0.0]] * 4]), [[4, 8, 2]], [[1.0, 0.0, 0.0]])
    late = float(es.evaluate(scenario, plan).latency_s)
    limits = {
        "memory": {"memory_gib": [[1.0, 2.0, 3.0]], "memory_limit_gib": [5.0]},
        "deadline": {"deadline_s": [0.99 * late]},
        "slices": {"share_units": 4},
    }
    for limit in limits.values():
        tight = dataclasses.replace(scenario, **limit)
        results = replay({"over": plan, "alone": alone}, tight, held, MODELS, draws=50)
        free = replay({"over": plan}, scenario, held, MODELS, draws=50)["over"]
        assert results["over"].utility == -np.inf
        assert (results["over"].utility_draws == -torch.inf).all()
        assert results["over"].quality == free.quality
        feasible = bool(es.evaluate(tight, alone).feasible)
        assert (results["alone"].utility > -np.inf) == feasible
    wide = dataclasses.replace(scenario, memory_gib=[[0.1, 0.2, 0.3]], memory_limit_gib=[0.6])  # 0.1 + 0.2 + 0.3 > 0.6
    assert replay({"over": plan}, wide, held, MODELS, draws=50)["over"].utility == free.utility


def test_replay_pairs_by_name_and_refuses_other_names(setting):
    _, held, scenario, plan = setting
    names = tuple(held.categories)
    named = dataclasses.replace(scenario, category_names=names, model_names=MODELS)
    p = torch.tensor([[[0.1, 0.2, 0.7], [0.5, 0.5, 0.0], [0.0, 0.3, 0.7], [1.0, 0.0, 0.0]]], dtype=torch.float64)
    mixed = es.Plan(p, plan.steps, plan.share)
    usual = replay({"a": mixed}, named, held, MODELS, draws=50)["a"]
    turn = [2, 0, 3, 1]
    turned = dataclasses.replace(
        named,
        demand=named.demand[:, turn],
        quality=named.quality[:, turn],
        category_names=tuple(names[i] for i in turn),
    )
    again = replay({"a": es.Plan(p[:, turn], plan.steps, plan.share)}, turned, held, MODELS, draws=50)["a"]
    assert again.quality == pytest.approx(usual.quality, rel=1e-12)
    assert again.utility == pytest.approx(usual.utility, rel=1e-12)
    with pytest.raises(ScoreTableError, match="the scenario's are tiny, middle, grand"):
        replay({"a": mixed}, named, held, MODELS[::-1], draws=50)
    with pytest.raises(ScoreTableError, match="categories: the scenario's are"):
        other = dataclasses.replace(named, category_names=("x", *names[1:]))
        replay({"a": mixed}, other, held, MODELS, draws=50)


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
    with pytest.raises(ArgumentError, match="'dice' is not one of"):
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


def test_scores_of_one_prompt_stand_together(setting):
    _, held, scenario, _ = setting
    scores = prompt_scores(held, MODELS, scenario.steps)
    row = held.frame[(held.frame.model == "middle") & (held.frame.steps == 4) & (held.frame.category == "Detail")]
    first = row[row.prompt_id == min(row.prompt_id)]
    for seed in (0, 1):
        assert scores["Detail"][0, seed, 1, 2] == pytest.approx(first[first.seed == seed].clip_score.iloc[0])
    other = prompt_scores(held, ["grand", "unknown"], [4, 5])["Detail"]
    assert other[..., 0, 0].isfinite().all()
    assert other[..., 1, :].isnan().all()
    assert other[..., 1].isnan().all()


def cascade_by_hand(plan, scenario, table, models):
    """Oracle: every request of every prompt walked through one by one."""
    demand, total = scenario.demand[0], float(scenario.demand.sum())
    seconds = [float(scenario.overhead_s[0, m] + k * scenario.step_time_s[0, m])
               for m, k in zip((plan.small, plan.large), plan.steps, strict=True)]  # fmt: skip
    frame, quality, large, spread = table.frame, 0.0, 0.0, 0.0
    for c, category in enumerate(table.categories):
        given, again = [], []
        for _, rows in frame[frame.category == category].groupby("prompt_id"):
            for _, images in rows.groupby("seed"):
                score = {(r.model, r.steps): r.clip_score for r in images.itertuples()}
                one = score[models[plan.small], plan.steps[0]]
                two = score[models[plan.large], plan.steps[1]]
                repeat = one < plan.threshold
                again.append(repeat)
                given.append(one if not repeat else two if plan.deliver == "last" else max(one, two))
        rate = np.mean(again)
        quality += float(demand[c]) / total * np.mean(given)
        large += float(demand[c]) * rate
        spread += float(demand[c]) * rate * (1 - rate)
    latency = total * (seconds[0] + plan.judge_s) / plan.share[0]
    if large:
        latency += (large**2 + spread) * seconds[1] / plan.share[1] / total
    return quality, latency


@pytest.mark.parametrize("deliver", ["last", "better"])
def test_a_cascade_pays_for_both_passes(setting, deliver):
    fit, held, scenario, _ = setting
    plan = plan_cascade(scenario, fit, MODELS, deliver=deliver, judge_s=0.002, thresholds=9)
    result = replay_cascade(plan, scenario, held, MODELS, planned_on=fit, draws=50)
    quality, latency = cascade_by_hand(plan, scenario, held, MODELS)
    assert result.quality == pytest.approx(quality, rel=1e-6)
    assert result.latency_s == pytest.approx(latency, rel=1e-6)
    assert result.utility == pytest.approx(quality - 0.4 * latency)
    assert result.utility_draws.std() > 0
    quality, latency = cascade_by_hand(plan, scenario, fit, MODELS)
    noise = 0.4 * 0.25 * 20 * float(scenario.step_time_s.max() * 16 + 1) / max(plan.share[1], 1e-3) / 20
    assert quality - 0.4 * latency - 1e-6 <= plan.utility <= quality - 0.4 * latency + noise


def test_a_cascade_finds_the_threshold_that_parts_easy_from_hard():
    """The small model fails on half of the prompts, the large one never: repeat exactly what failed."""
    frame = synthetic_table(20, 1, std=0.0).frame.copy()
    failed = frame.prompt_id.str.rsplit("-").str[-1].astype(int) % 2 == 0
    frame["clip_score"] = np.where(frame.model == "grand", 90.0, np.where(failed, 20.0, 90.0))
    table = es.ScoreTable(frame)
    scenario = es.fit_quality(table, max_epochs=2).scenario(5.0, 1.0)
    plan = plan_cascade(scenario, table, MODELS)
    assert (MODELS[plan.small], MODELS[plan.large], plan.steps) == ("tiny", "grand", (1, 1))
    assert 20.0 < plan.threshold <= 90.0
    result = replay_cascade(plan, scenario, table, MODELS, draws=10)
    assert result.quality == pytest.approx(90.0)
    shut = plan_cascade(scenario.__class__(**{**vars(scenario), "latency_weight": [1e5]}), table, MODELS)
    assert shut.threshold == float("-inf")
    assert replay_cascade(shut, scenario, table, MODELS, draws=10).quality == pytest.approx(55.0)


def test_a_cascade_keeps_to_limits_and_queues(setting):
    fit, held, scenario, _ = setting
    fields = vars(scenario)
    tight = es.Scenario(**{**fields, "memory_gib": [[1.0, 2.0, 4.0]], "memory_limit_gib": [3.5]})
    plan = plan_cascade(tight, fit, MODELS, thresholds=5)
    assert {plan.small, plan.large} == {0, 1} or plan.threshold == float("-inf")
    queue = es.Scenario(**{**fields, "latency": "queue", "demand": [[0.5] * 4]})
    plan = plan_cascade(queue, fit, MODELS, thresholds=5)
    result = replay_cascade(plan, queue, held, MODELS, draws=20)
    assert np.isfinite(result.utility)
    assert sum(plan.share) == pytest.approx(1)
    for message, bad in (("'first' is not one of", {"deliver": "first"}), ("judge_s", {"judge_s": -1.0})):
        with pytest.raises(ArgumentError, match=message):
            plan_cascade(scenario, fit, MODELS, **bad)
    with pytest.raises(PlanError, match="two models"):
        plan_cascade(scenario, fit, MODELS[:1])
    with pytest.raises(ScoreTableError, match="was used for planning"):
        replay_cascade(plan, queue, fit, MODELS, planned_on=fit)


def test_bootstrap_draws_resample_prompts_jointly(setting):
    fit, _, scenario, _ = setting
    draws = bootstrap_quality(fit, MODELS, scenario.steps, draws=400, seed=1)
    assert draws.shape == (400, 4, 3, 5)
    means = prompt_means(fit, MODELS, scenario.steps)
    exact = resampled_quality(means, [torch.ones(1, len(p), dtype=torch.float64) for p in means])[0]
    assert torch.allclose(exact[2], means[2].mean(0))
    spread = torch.stack([p.std(0, correction=0) / len(p) ** 0.5 for p in means])
    assert torch.allclose(draws.std(0), spread, rtol=0.2)
    difference = draws[:, 0, 2, 4] - draws[:, 0, 1, 4]
    independent = (draws[:, 0, 2, 4].var() + draws[:, 0, 1, 4].var()).sqrt()
    assert difference.std() < 0.75 * independent
    assert torch.equal(draws, bootstrap_quality(fit, MODELS, scenario.steps, draws=400, seed=1))


def test_the_lower_bound_lies_below_by_what_prompts_are_unsure(setting):
    fit, _, scenario, _ = setting
    draws = bootstrap_quality(fit, MODELS, scenario.steps, draws=400)
    lower = lower_quality(scenario.quality[0], draws, 0.1)
    assert torch.allclose(scenario.quality[0] - lower, 1.28 * draws.std(0), rtol=0.35)
    view = LowerBound(level=0.1, draws=400)(scenario, fit, MODELS)
    assert torch.allclose(view.quality[0], lower)
    masked = scenario.quality.clone()
    masked[0, :, 1, 4] = -torch.inf
    draws[:, :, 1, 4] = -torch.inf
    assert torch.isneginf(lower_quality(masked[0], draws, 0.1)[:, 1, 4]).all()
    for bad, message in (({"level": 1.0}, "level"), ({"draws": 1}, "draws")):
        with pytest.raises(ScenarioError, match=message):
            LowerBound(**bad)


def test_the_safest_plan_shuns_the_model_that_nobody_knows():
    s = es.Scenario([[1.0]], [[[[10.0], [10.2]]]], [1], [[1.0, 1.0]], [[0.0, 0.0]], [0.0])
    noise = torch.linspace(-3, 3, 101, dtype=torch.float64)
    draws = torch.stack([torch.full_like(noise, 10.0), 10.2 + noise], -1)[:, None, None, :, None]
    plans = [es.Plan([[[1.0, 0.0]]], [[1, 1]], [[1.0, 0.0]]), es.Plan([[[0.0, 1.0]]], [[1, 1]], [[0.0, 1.0]])]
    assert safest(s, draws, plans, 0.1).assignment[0, 0].tolist() == [1.0, 0.0]
    assert safest(s, draws, plans, 0.9).assignment[0, 0].tolist() == [0.0, 1.0]


def test_decisions_from_more_prompts_are_better_and_less_spread(setting):
    fit, held, scenario, _ = setting
    rows = compare_decisions(scenario, fit, held, MODELS, counts=(2, None), repeats=12, draws=20, candidates=1)
    by = {(r["prompts"], r["rule"]): r for r in rows}
    assert len(by) == 6
    many = None
    for rule in ("mean", "lower_bound", "safest"):
        assert by[many, rule]["regret"] < by[2, rule]["regret"]
        assert by[many, rule]["regret"] > -1e-6
        assert by[2, rule]["p10"] <= by[2, rule]["utility"]
    assert by[2, "mean"]["optimism"] > by[many, "mean"]["optimism"]
    assert by[2, "mean"]["gain"] == 0
    with pytest.raises(ScoreTableError, match="share prompts"):
        compare_decisions(scenario, fit, fit, MODELS)
