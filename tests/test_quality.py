"""Fitted distributions against known parameters, and times against known lines."""

import numpy as np
import pandas as pd
import pytest
import torch
from factories import CATEGORIES, MODELS, OVERHEAD_S, STEP_TIME_S, STEPS, synthetic_frame, synthetic_table, true_mean
from scipy import optimize, stats

import edgesched as es
from edgesched.data.table import ScoreTable
from edgesched.errors import ScenarioError, ScoreTableError
from edgesched.quality import FAMILIES, QuantilesQuality, shared_strength
from edgesched.quality.diagnostics import cell_misfit, standard_errors
from edgesched.quality.latency import fit_latency, fit_line, latency_remarks
from edgesched.quality.laws import Normal, Quantiles, SkewNormal, StudentT
from edgesched.quality.model import observations

LAWS = [
    (Normal, ()),
    (StudentT, (torch.tensor(3.5, dtype=torch.float64),)),
    (SkewNormal, (torch.tensor(-0.98, dtype=torch.float64),)),
    (Quantiles, (torch.tensor([-2.0, -0.7, -0.1, 0.0, 0.6, 0.9, 2.5], dtype=torch.float64),)),
]


def single_cell(scores):
    """A table of one category, model and step count: what closed forms and scipy can fit."""
    n = len(scores)
    columns = {"prompt_id": [f"p{i}" for i in range(n)], "category": "Basic", "model": "tiny", "steps": 1, "seed": 0}
    return ScoreTable(pd.DataFrame(columns | {"clip_score": scores, "latency_s": 0.1, "batch_size": 1}))


def drawn_table(noise, prompts=64, seed=0):
    """Independent scores with the factory's means and the noise of a law."""
    frame = synthetic_frame(prompts, seeds=1, seed=0)
    place = {c: i for i, c in enumerate(dict.fromkeys(frame.category))}
    means = [
        true_mean(place[c], MODELS.index(m), k)
        for c, m, k in zip(frame.category, frame.model, frame.steps, strict=True)
    ]
    frame["clip_score"] = np.array(means) + noise(np.random.default_rng(seed), len(frame))
    return ScoreTable(frame, order=CATEGORIES)


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


@pytest.mark.parametrize(("law", "shape"), LAWS, ids=lambda v: getattr(v, "__name__", ""))
def test_a_law_agrees_with_itself_and_with_monte_carlo(law, shape):
    level = torch.tensor([0.001, 0.02, 0.2, 0.5, 0.9, 0.999], dtype=torch.float64)
    assert torch.allclose(law.cdf(law.quantile(level, *shape), *shape), level, atol=1e-10)
    fine = torch.linspace(-6, 5, 20001, dtype=torch.float64)
    mass = torch.trapezoid(law.log_density(fine, *shape).exp(), fine)
    assert mass == pytest.approx(float(law.cdf(fine[-1], *shape) - law.cdf(fine[0], *shape)), abs=2e-4)
    u, v = torch.rand((2, 200_000), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    draws = law.draw(u, v, *shape)
    mean, std = law.moments(*shape)
    assert float(draws.mean()) == pytest.approx(float(mean), abs=0.01)
    assert float(draws.std()) == pytest.approx(float(std), rel=0.02)
    observed = torch.tensor([-4.0, -1.2, 0.0, 0.3, 1.0, 3.0], dtype=torch.float64)
    half = 0.5 * (draws - draws.roll(1)).abs().mean()
    oracle = torch.stack([(draws - z).abs().mean() for z in observed]) - half
    assert torch.allclose(law.crps(observed, *shape), oracle, atol=0.012)


def test_laws_equal_scipy_and_have_right_gradients():
    z = torch.linspace(-7, 7, 29, dtype=torch.float64)
    for df in (2.1, 5.0, 150.0):
        shape = torch.tensor(df, dtype=torch.float64)
        assert np.allclose(StudentT.cdf(z, shape), stats.t.cdf(z, df), atol=1e-12)
        assert np.allclose(StudentT.log_density(z, shape), stats.t.logpdf(z, df), atol=1e-11)
    for delta in (-0.998, 0.1, 0.9):
        alpha = delta / np.sqrt(1 - delta**2)
        shape = torch.tensor(delta, dtype=torch.float64)
        assert np.allclose(SkewNormal.cdf(z, shape), stats.skewnorm.cdf(z, alpha), atol=1e-12)
        assert np.allclose(SkewNormal.log_density(z, shape), stats.skewnorm.logpdf(z, alpha), atol=1e-11)
    z = torch.tensor([-1.3, 0.2, 1.7], dtype=torch.float64, requires_grad=True)
    for law, shape in LAWS[1:]:
        free = shape[0].clone().requires_grad_()
        for function in (law.cdf, law.log_density):
            assert torch.autograd.gradcheck(function, (z, free))


def test_gaussian_equals_the_closed_form():
    scores = np.random.default_rng(1).normal(30, 7, 200)
    fit = es.fit_quality(single_cell(scores), strength=0)
    stored = scores.astype("float32")
    assert fit.mean().item() == pytest.approx(float(stored.mean()), abs=0.01)
    assert fit.std().item() == pytest.approx(float(stored.std()), abs=0.01)


@pytest.mark.parametrize(
    ("family", "law", "draw"),
    [
        ("student_t", stats.t, lambda rng: 30 + 4 * rng.standard_t(4, 400)),
        ("skew_normal", stats.skewnorm, lambda rng: stats.skewnorm.rvs(-5, 40, 9, 400, random_state=rng)),
    ],
)
def test_likelihood_equals_that_of_scipy(family, law, draw):
    scores = draw(np.random.default_rng(2)).astype("float32").astype(float)
    fit = es.fit_quality(single_cell(scores), family=family, strength=0)
    zero = torch.zeros(len(scores), dtype=torch.long)
    with torch.no_grad():
        ours = -fit.log_density(torch.tensor(scores), zero, zero, zero).mean().item()
    # scipy's own fit stops early: the same likelihood, searched further from there.
    tight = {"xatol": 1e-7, "fatol": 1e-7, "maxiter": 4000}
    theirs = optimize.minimize(law.nnlf, law.fit(scores), (scores,), "Nelder-Mead", options=tight).x
    assert ours == pytest.approx(-law.logpdf(scores, *theirs).mean(), abs=5e-5)
    assert fit.mean().item() == pytest.approx(law.mean(*theirs), abs=0.05)
    assert fit.std().item() == pytest.approx(law.std(*theirs), rel=0.03)


def test_quantiles_equal_the_empirical_ones():
    class Sharp(QuantilesQuality):
        smoothing = 0.005

    scores = np.random.default_rng(3).gamma(2.0, 8.0, 400)
    fit = es.fit_quality(single_cell(scores), family=Sharp, strength=0)
    levels = Quantiles.levels(torch.zeros(Sharp.levels, dtype=torch.float64))
    below = [(scores <= float(q)).mean() for q in fit.quantile(levels[:, None, None, None]).flatten().detach()]
    assert np.abs(np.array(below) - levels.numpy()).max() < 2 / 400


NOISES = {
    "gaussian": (lambda rng, n: rng.normal(0, 5, n), 5.0),
    "student_t": (lambda rng, n: 4 * rng.standard_t(6, n), 4 * 1.5**0.5),
    "skew_normal": (lambda rng, n: stats.skewnorm.rvs(-4, 0, 8, n, random_state=rng) - stats.skewnorm.mean(-4, 0, 8),
                    stats.skewnorm.std(-4, 0, 8)),
    "quantiles": (lambda rng, n: rng.gamma(4.0, 2.5, n) - 10.0, 5.0),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_lie_in_their_intervals_at_the_nominal_rate(family):
    """64 prompts a category: 95 % intervals of 60 means and 60 deviations hold the truth 95 times in 100."""
    noise, std = NOISES[family]
    truth = torch.tensor([[[true_mean(c, m, k) for k in STEPS] for m in range(3)] for c in range(4)])
    mean_hit, std_hit = [], []
    for seed in range(3):
        table = drawn_table(noise, seed=seed)
        fit = es.fit_quality(table, family=family, strength=0)
        mean_hit.append((fit.mean() - truth).abs() <= 1.96 * standard_errors(fit, table))
        std_hit.append((fit.std() - std).abs() <= 1.96 * standard_errors(fit, table, "std"))
    assert 0.89 <= torch.stack(mean_hit).double().mean() <= 0.99
    assert 0.86 <= torch.stack(std_hit).double().mean() <= 0.99


def test_errors_count_prompts_not_images():
    """A prompt effect shared by seeds and models widens the intervals to those of the prompts' own means."""
    table = synthetic_table(64, seeds=4, seed=5)
    fit = es.fit_quality(table, strength=0)
    errors = standard_errors(fit, table)
    images = fit.std().detach() / np.sqrt(64 * 4)
    by_prompt = table.frame.groupby(["category", "model", "steps", "prompt_id"])["clip_score"].mean()
    prompts = by_prompt.groupby(level=[0, 1, 2]).std().mean() / 8
    assert errors.mean() > 1.5 * images.mean()
    assert float(errors.mean()) == pytest.approx(prompts, rel=0.15)
    with pytest.raises(ScoreTableError, match="'median' is not one of mean, std"):
        standard_errors(fit, table, "median")


@pytest.fixture(scope="module", params=FAMILIES)
def fitted(request, table):
    return es.fit_quality(table, family=request.param)


def test_every_family_keeps_the_one_interface(fitted):
    mean = fitted.mean(torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0])).detach()
    assert (mean.diff(dim=-1) >= 0).all()
    assert torch.allclose(fitted.mean()[..., :3], mean[..., :3])
    low, middle, high = (fitted.quantile(torch.tensor(u)).detach() for u in (0.1, 0.5, 0.9))
    assert (low < middle).all()
    assert (middle < high).all()
    assert torch.allclose(fitted.cdf(middle), torch.tensor(0.5, dtype=torch.float64), atol=1e-8)
    draws = fitted.sample(6000, seed=1)
    assert (draws.mean(0) - fitted.mean()).abs().max() < 0.4
    assert (draws.std(0) / fitted.std() - 1).abs().max() < 0.1
    assert fitted.scenario(1.0, 0.5).shape == (1, 4, 3, 5)
    index = (torch.tensor([60.0, 70.0]), torch.tensor([0, 3]), torch.tensor([1, 2]), torch.tensor([0, 4]))
    assert fitted.cdf(*index)[1].item() == pytest.approx(fitted.cdf(torch.tensor(70.0))[3, 2, 4].item())
    oracle = (draws[:, 0, 1, 0] - 60).abs().mean() - 0.5 * (draws - draws.roll(1, 0)).abs().mean(0)[0, 1, 0]
    assert fitted.crps(*index)[0].item() == pytest.approx(oracle.item(), abs=0.3)


def test_a_category_with_few_prompts_is_drawn_towards_its_model():
    frame = synthetic_frame(60, seeds=1, seed=7, std=8.0)
    few = {f"Basic-{i}" for i in range(24)}
    table = ScoreTable(frame[(frame.category != "Basic") | frame.prompt_id.isin(few)])
    for family in ("gaussian", "quantiles"):
        none, some, all_of_it = (
            es.fit_quality(table, family=family, strength=a, max_epochs=4).mean().mean(-1).detach()
            for a in (0.0, 20.0, 1e6)
        )
        assert all_of_it.std(0).max() < 0.2
        pooled = all_of_it.mean(0)
        kept = (some - pooled).abs().mean(-1) / (none - pooled).abs().mean(-1)
        assert (kept < 1).all()
        # 24 prompts of its own, not 60: the same strength moves the small category further.
        assert kept[0] < kept[3]


def test_strength_is_large_for_equal_categories_and_small_for_unequal_ones():
    rng = np.random.default_rng(0)
    frame = synthetic_frame(40, seeds=1)
    equal, unequal = frame.copy(), frame.copy()
    equal["clip_score"] = rng.normal(50, 10, len(frame))
    place = frame.category.map({c: i for i, c in enumerate(dict.fromkeys(frame.category))})
    unequal["clip_score"] = 30.0 * place + rng.normal(50, 3, len(frame))
    assert shared_strength(observations(ScoreTable(equal), MODELS)) >= 64
    assert shared_strength(observations(ScoreTable(unequal), MODELS)) <= 0.5
    assert shared_strength(observations(single_cell(rng.normal(50, 3, 30)), ("tiny",))) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"family": "cauchy"}, "'cauchy' is not one of gaussian, student_t, skew_normal, quantiles"),
        ({"strength": -1.0}, "at least 0 prompts, got -1.0"),
        ({"strength": float("nan")}, "at least 0 prompts, got nan"),
    ],
)
def test_wrong_options_are_named(table, options, message):
    with pytest.raises(ScenarioError, match=message):
        es.fit_quality(table, **options)


def test_rows_that_the_model_does_not_know_are_refused(table, quality):
    with pytest.raises(ScoreTableError, match="category 'Basic' is not one of Other"):
        observations(table, MODELS, ("Other",))
    with pytest.raises(ScoreTableError, match="steps 1 is not one of 2, 4"):
        observations(table, MODELS, None, (2, 4))


def test_a_checkpoint_gives_the_same_model_and_the_logger_has_every_epoch(table, tmp_path):
    from lightning.pytorch.loggers import CSVLogger

    fit = es.fit_quality(table, family="quantiles", logger=CSVLogger(tmp_path, "log", ""), checkpoint=tmp_path)
    again = QuantilesQuality.load_from_checkpoint(tmp_path / "quantiles.ckpt", weights_only=False)
    assert torch.equal(again.mean(), fit.mean())
    assert again.latency_fits == fit.latency_fits
    losses = pd.read_csv(tmp_path / "log/metrics.csv")["loss"]
    assert len(losses) >= 2
    assert losses.iloc[-1] <= losses.iloc[0]


def test_scenario_has_the_measured_counts_and_refuses_unknown_categories(quality):
    s = quality.scenario({"Basic": 3, "Complex": 1}, 0.5)
    assert s.shape == (1, 4, 3, 5)
    assert s.demand.tolist() == [[3.0, 0.0, 0.0, 1.0]]
    assert torch.allclose(s.step_time_s[0], torch.tensor(STEP_TIME_S, dtype=torch.float64), rtol=1e-3)
    with pytest.raises(ScenarioError, match="'Other' is not one of"):
        quality.scenario({"Other": 1.0}, 0.5)


def test_a_scenario_carries_names_and_does_not_depend_on_the_order_of_rows():
    frame = synthetic_frame(20, seeds=2)
    rng = np.random.default_rng(0)
    shuffled = frame.iloc[rng.permutation(len(frame))].reset_index(drop=True)
    demand = {"Complex": 1.0, "Detail": 4.0}
    plain, other = (es.fit_quality(ScoreTable(f), max_epochs=3).scenario(demand, 0.5) for f in (frame, shuffled))
    assert plain.model_names == other.model_names == MODELS
    assert set(plain.category_names) == set(other.category_names) == set(CATEGORIES)
    place = [other.category_names.index(c) for c in plain.category_names]
    assert torch.equal(plain.demand, other.demand[:, place])
    assert dict(zip(plain.category_names, plain.demand[0].tolist(), strict=True)) == {
        "Basic": 0.0, "Detail": 4.0, "Imagination": 0.0, "Complex": 1.0}  # fmt: skip
    # Measured means are of rounded float32 scores; only the order of sums may differ.
    assert torch.allclose(plain.quality, other.quality[:, place], atol=1e-4)
    assert torch.equal(plain.step_time_s, other.step_time_s)


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
    with pytest.raises(ScoreTableError, match=r"latency_s 0 is not allowed; expected more than 0 seconds"):
        fit_line([1], [0.0])


@pytest.mark.parametrize("bad", [float("inf"), float("nan"), -1.0])
def test_latency_refuses_what_is_not_a_time_by_name(bad):
    with pytest.raises(ScoreTableError, match=f"latency of 'tiny': latency_s {bad:g} is not allowed"):
        fit_line([1, 2], [1.0, bad], name="'tiny'")
    with pytest.raises(ScoreTableError, match=f"latency of 'tiny': steps {bad:g} is not allowed"):
        fit_line([1, bad], [1.0, 2.0], name="'tiny'")
    with pytest.raises(ScoreTableError, match="got 1 for 2"):
        fit_line([1, 2], [1.0])


def test_a_clamped_or_bad_latency_fit_is_refitted_and_warned_of(caplog):
    k, t = np.array([1.0, 2.0, 4.0, 8.0]), np.array([0.1, 0.5, 1.4, 3.2])
    fit = fit_line(k, t, name="'tiny'")
    # The constrained optimum by a search of its own: no overhead, and the slope of least relative squares.
    best = optimize.minimize_scalar(lambda a: ((a * k / t - 1) ** 2).sum(), bounds=(0, 1), method="bounded")
    assert (fit.overhead_s, fit.clamped) == (0.0, "overhead")
    assert fit.step_time_s == pytest.approx(best.x, rel=1e-4)
    assert fit.relative_error == pytest.approx(np.abs(best.x * k / t - 1).max(), rel=1e-3)
    assert not fit.trusted
    assert "times of 'tiny'" in caplog.text
    assert "negative overhead" in caplog.text
    caplog.clear()
    flat = fit_line([1, 2, 4], [0.5, 0.4, 0.3])
    constant = optimize.minimize_scalar(lambda o: sum((o / x - 1) ** 2 for x in (0.5, 0.4, 0.3)))
    assert flat.overhead_s == pytest.approx(constant.x, rel=1e-4)
    assert flat.clamped == "step time"
    assert "negative step time" in caplog.text
    caplog.clear()
    good = fit_line([1, 2, 4], [0.3, 0.5, 0.9])
    assert not caplog.text
    assert latency_remarks({"a": fit, "b": good}) == (fit.remark("a"),)


def test_seconds_of_different_batch_sizes_are_not_mixed():
    frame = synthetic_frame(20)
    large = frame.assign(seed=frame.seed + 100, batch_size=8, latency_s=frame.latency_s * 3)
    both = ScoreTable(pd.concat([frame, large], ignore_index=True))
    single, batched = fit_latency(both, False)["tiny"], fit_latency(both)["tiny"]
    assert (single.batch_size, batched.batch_size) == (1, 8)
    assert single.step_time_s == pytest.approx(STEP_TIME_S[0], rel=1e-3)
    assert batched.step_time_s == pytest.approx(3 * STEP_TIME_S[0], rel=1e-3)


def test_times_come_from_the_timing_pass_where_there_is_one(table):
    timing = [{"model": m, "steps": k, "batch_size": 1, "latency_s": 1.0 + k} for m in MODELS for k in (1, 4)]
    timed = ScoreTable(table.frame, {"timing": timing})
    assert fit_latency(timed)["tiny"].overhead_s == pytest.approx(1.0)
    assert fit_latency(table)["tiny"].overhead_s == pytest.approx(OVERHEAD_S[0], rel=1e-3)


def shaped_table(mean, prompts=40, std=3.0, seed=0, constant=()):
    """One category and model whose means over the step counts are given; cells in ``constant`` do not vary."""
    rng = np.random.default_rng(seed)
    rows = [
        (f"p{i}", "Basic", "tiny", k, 0, mean(k) + (0 if k in constant else std * rng.normal()), 0.1 * k, 1)
        for i in range(prompts) for k in STEPS
    ]  # fmt: skip
    columns = ["prompt_id", "category", "model", "steps", "seed", "clip_score", "latency_s", "batch_size"]
    return ScoreTable(pd.DataFrame(rows, columns=columns))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "mean", [lambda k: 40.0 - k, lambda k: 30.0 - 4 * abs(np.log2(k / 4))], ids=["falling", "peak"]
)
def test_means_that_fall_or_peak_are_recovered_to_within_the_noise(mean, family):
    table = shaped_table(mean)
    fit = es.fit_quality(table, family=family)
    found = fit.mean().detach().flatten().numpy()
    truth = np.array([mean(k) for k in STEPS])
    assert np.abs(found - truth).max() < 3 * 3.0 / np.sqrt(40)
    measured = table.frame.groupby("steps")["clip_score"].mean().to_numpy()
    assert np.abs(found - measured).max() < 3.0 / np.sqrt(40)
    assert int(found.argmax()) == int(truth.argmax())
    assert fit.converged
    assert fit.std().detach().numpy() == pytest.approx(3.0, rel=0.45)
    worst = cell_misfit(fit, table)[0]
    assert worst["misfit"] == pytest.approx(np.abs(found - measured).max(), rel=1e-3) or worst["misfit"] < 0
    assert max(abs(cell["offset"]) for cell in cell_misfit(fit, table)) > 1


def test_offsets_vanish_where_the_curve_is_right():
    sizes = [es.fit_quality(drawn_table(lambda rng, n: rng.normal(0, 5, n), seed=s)) for s in range(2)]
    noise = 5 / np.sqrt(64)
    for fit in sizes:
        assert (fit.unit * fit.offset).square().mean().sqrt() < 0.6 * noise


@pytest.mark.parametrize("family", FAMILIES)
def test_a_constant_cell_keeps_every_deviation_bounded(family):
    for constant in ((4,), (1, 16), STEPS):
        fit = es.fit_quality(shaped_table(lambda k: 30.0 - 5 / k, constant=constant), family=family)
        std = fit.std().detach().flatten()
        assert torch.isfinite(fit.mean()).all()
        assert (std < 6).all()
        assert (std > 0).all()
        assert fit.converged


def test_a_skewed_table_with_outliers_and_constants_does_not_diverge():
    rng = np.random.default_rng(1)
    frame = synthetic_frame(30, seeds=1)
    frame["clip_score"] = np.where(frame.model == "tiny", 25.0, 20 + 30 * rng.pareto(1.5, len(frame)).clip(0, 50))
    fit = es.fit_quality(ScoreTable(frame), family="skew_normal")
    assert torch.isfinite(fit.mean()).all()
    assert torch.isfinite(fit.std()).all()


def test_a_fit_that_does_not_converge_says_so_by_name(table, caplog, monkeypatch):
    fit = es.fit_quality(table, family="student_t", max_epochs=1)
    assert not fit.converged
    assert "family student_t: the fit did not converge in 1 epochs" in caplog.text
    monkeypatch.setattr(SkewNormal, "log_density", staticmethod(lambda z, delta: z * float("nan")))
    with pytest.raises(
        ScoreTableError, match="family skew_normal: the fit diverged, .*'Basic'.* choose another family"
    ):
        es.fit_quality(table, family="skew_normal", max_epochs=3)
