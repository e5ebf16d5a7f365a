"""Diagnostics on held-out prompts: calibrated models pass, wrong ones fail, and the prompt is the unit."""

import json
from functools import partial

import numpy as np
import pandas as pd
import pytest
from composing import run_task
from factories import CATEGORIES, MODELS, STEPS, synthetic_frame, synthetic_table

import edgesched as es
from edgesched.data.table import ScoreTable
from edgesched.errors import ScoreTableError
from edgesched.evaluation.levels import score_levels
from edgesched.quality import diagnostics


@pytest.fixture(scope="module")
def table():
    return synthetic_table(64, seeds=1, seed=11)


@pytest.fixture(scope="module")
def model(table):
    return es.fit_quality(table)


@pytest.fixture(scope="module")
def shipped():
    table = ScoreTable.load()
    families = ("gaussian", "quantiles")
    return {f: diagnostics.out_of_fold(table, partial(es.fit_quality, family=f), folds=2) for f in families}


def redrawn(table, scores):
    frame = table.frame.copy()
    frame["clip_score"] = scores
    return table.replaced(frame)


def test_scores_drawn_from_the_model_are_uniform_and_covered_as_promised(table, model):
    drawn = model.sample(64, seed=3).numpy()
    frame = table.frame
    place = [frame[c].map({v: i for i, v in enumerate(names)}).to_numpy()
             for c, names in (("category", CATEGORIES), ("model", MODELS), ("steps", STEPS))]  # fmt: skip
    prompt = frame["prompt_id"].str.split("-").str[1].astype(int).to_numpy()
    rows = diagnostics.score_rows(model, redrawn(table, drawn[prompt, *place]))
    tests = diagnostics.pit_tests(diagnostics.in_order(rows, table))
    assert [(t["category"], t["model"]) for t in tests] == [(c, m) for c in CATEGORIES for m in MODELS]
    assert {(t["prompts"], t["steps"]) for t in tests} == {(64, 16)}
    assert min(t["p_holm"] for t in tests) > 0.05
    found = diagnostics.summarise(rows, draws=300)
    for level in diagnostics.COVERAGES:
        low, high = found["intervals"][f"coverage_{level}"]
        assert low - 0.01 <= level / 100 <= high + 0.01
    assert diagnostics.non_gaussian_words(tests).startswith("The tests tell no category")


def test_skewed_scores_are_told_from_a_gaussian():
    rng = np.random.default_rng(0)
    frame = synthetic_frame(100, seeds=1)
    skewed = frame["category"] == "Basic"
    noise = np.where(skewed, 10 - rng.exponential(10, len(frame)), rng.normal(0, 10, len(frame)))
    table = ScoreTable(frame.assign(clip_score=60 + noise), order=CATEGORIES)
    rows = diagnostics.out_of_fold(table, partial(es.fit_quality, strength=0), folds=3)
    tests = diagnostics.pit_tests(diagnostics.in_order(rows, table))
    rejected = {t["category"] for t in tests if t["p_holm"] < 0.05}
    assert rejected == {"Basic"}
    words = diagnostics.non_gaussian_words(tests)
    assert words.startswith("Not Gaussian: Basic under")
    assert "does not tell Detail, Imagination and Complex from a Gaussian" in words


def test_no_prompt_is_judged_by_a_fit_that_saw_it(table, model):
    seen = []

    def fit(part):
        seen.append(set(part.frame["prompt_id"]))
        return model

    rows = diagnostics.out_of_fold(table, fit, folds=4)
    everyone = set(table.frame["prompt_id"])
    held = [everyone - s for s in seen]
    assert sum(map(len, held)) == len(everyone)
    assert set().union(*held) == everyone
    assert all(len({p for p in h if p.startswith("Basic")}) == 16 for h in held)
    assert (rows["prompt_id"].to_numpy() == table.frame["prompt_id"].to_numpy()).all()
    assert np.allclose(rows["score"], table.frame["clip_score"])
    for folds in (1, 65):
        with pytest.raises(ScoreTableError, match=f"2 to 64, .*got {folds}"):
            diagnostics.out_of_fold(table, fit, folds=folds)


def test_intervals_count_prompts_not_images():
    values = np.random.default_rng(4).normal(3, 1, 50)
    frame = pd.DataFrame({"prompt_id": [f"p{i}" for i in range(50)], "category": "Basic", "nll": 0.0, "pit": 0.5})
    rows = pd.concat([frame.assign(crps=values)] * 8)
    low, high = diagnostics.summarise(rows, draws=2000)["intervals"]["crps"]
    assert high - low == pytest.approx(2 * 1.96 * values.std() / np.sqrt(50), rel=0.1)
    assert diagnostics.summarise(rows, draws=10)["coverage_50"] == 1.0


def test_chosen_family_covers_four_scores_in_five_on_the_shipped_table(shipped):
    rows = shipped["quantiles"]
    assert 0.75 <= diagnostics.summarise(rows, draws=10)["coverage_80"] <= 0.85
    for group in diagnostics.coverage_by(rows, "model").values():
        assert 0.75 <= group["coverage_80"] <= 0.85
    _, low, high = diagnostics.compare_crps(rows, shipped["gaussian"])
    assert low < high < 0


def test_families_are_compared_on_the_same_prompts_only(shipped):
    some = shipped["gaussian"][shipped["gaussian"]["category"] != "Basic"]
    with pytest.raises(ScoreTableError, match="different prompts"):
        diagnostics.compare_crps(some, shipped["quantiles"])


def test_rows_beyond_the_fit_are_refused(table, model):
    frame = table.frame
    part = ScoreTable(frame[~((frame.model == "tiny") & (frame.steps == 16))])
    with pytest.raises(ScoreTableError, match="'tiny' at 16 steps: the model was not fitted there"):
        diagnostics.score_rows(es.fit_quality(part, max_epochs=1), table)
    with pytest.raises(ScoreTableError, match="category 'Basic' is not one of Other"):
        model_of_others = ScoreTable(frame.assign(category="Other"))
        diagnostics.score_rows(es.fit_quality(model_of_others, max_epochs=1), table)


def test_holm_is_never_below_the_plain_p_and_at_most_one():
    p = [0.2, 0.001, 0.9, 0.04]
    assert diagnostics.holm(p) == pytest.approx([0.4, 0.004, 0.9, 0.12])
    assert diagnostics.holm([0.6, 0.7]) == [1.0, 1.0]


def test_the_fit_experiment_leaves_what_it_promises(tmp_path, capsys):
    synthetic_table(24, seeds=1).save(tmp_path / "table")
    run_task(tmp_path, "+experiment=fit", "debug=true", f"data.path={tmp_path / 'table'}",
             "~fit.families.student_t", "~fit.families.skew_normal")  # fmt: skip
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert set(metrics["families"]) == {"gaussian", "quantiles"}
    for family in metrics["families"].values():
        assert {"nll", "crps", "coverage_50", "coverage_80", "coverage_95"} <= set(family)
    assert metrics["chosen"] in metrics["families"]
    assert all({"category", "model", "p"} <= set(pair) for pair in metrics["non_gaussian"])
    page = (tmp_path / "report.html").read_text()
    assert page.count("<img") == len(list((tmp_path / "figures").glob("*.png"))) == 3
    assert metrics["source"]["device"] in page
    assert "Gaussian" in capsys.readouterr().out


def test_score_levels_compare_other_images_than_made_the_levels():
    """Models that differ by a constant differ by it on every level, and luck of the reference does not show."""
    rng = np.random.default_rng(3)
    rows = []
    for p in range(900):
        hard = 5 * rng.normal()
        rows += [
            (f"p{p}", "Basic", model, 4, seed, 60 + 8 * m + hard + 4 * rng.normal(), 0.1, 1)
            for m, model in enumerate(("tiny", "grand"))
            for seed in range(2)
        ]
    columns = ["prompt_id", "category", "model", "steps", "seed", "clip_score", "latency_s", "batch_size"]
    frame = pd.DataFrame(rows, columns=columns)
    found = score_levels(ScoreTable(frame), ("tiny", "grand"))
    assert found["own_scores"]
    assert [level["prompts"] for level in found["levels"]] == [300, 300, 300]
    for level in found["levels"]:
        tiny, grand = level["models"]["tiny"], level["models"]["grand"]
        assert grand["mean"] - tiny["mean"] == pytest.approx(8, abs=1.6)
        assert tiny["lo"] < tiny["mean"] < tiny["hi"]
    means = [level["models"]["grand"]["mean"] for level in found["levels"]]
    assert means == sorted(means)
    biased = score_levels(ScoreTable(frame[frame.seed == 0]), ("tiny", "grand"))
    assert not biased["own_scores"]
    spread = [
        f["levels"][2]["models"]["tiny"]["mean"] - f["levels"][0]["models"]["tiny"]["mean"] for f in (found, biased)
    ]
    assert spread[1] > spread[0] + 2
    with pytest.raises(ScoreTableError, match="levels"):
        score_levels(ScoreTable(frame[frame.prompt_id.isin(["p0", "p1"])], min_prompts=1), ("tiny", "grand"))
