"""Scores from outside: files as described become tables, the variance table matches made-up effects."""

import html
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from composing import composed, run_task

from edgesched.data.sources import pp_scores, t2i_scores
from edgesched.data.table import ScoreTable
from edgesched.errors import ScoreTableError
from edgesched.evaluation.variance import SOURCES, variance_table
from edgesched.runs.config import build
from edgesched.tasks.policies import words

CONF = Path(__file__).resolve().parents[1] / "conf"
PP_SECONDS = {"sd_turbo": 0.141, "amused": 0.399, "sdxl_turbo": 0.477, "taesd": 1.508}
T2I_MODELS = ("mini_dalle", "vq_diffusion", "stable_diffusion_v1_1", "stable_diffusion_v1_5", "stable_diffusion_v2_1")


def pp_file(path, prompts=24, interaction=0.0, seed=0):
    """Scores with known effects of category, prompt, model and their interaction."""
    rng = np.random.default_rng(seed)
    rows = []
    for c, (challenge, category) in enumerate([("Basic", "Basic"), ("Complex", "Complex"), ("Quantity", None)]):
        for p in range(prompts):
            shared = 2 * rng.normal()
            for m, (model, seconds) in enumerate(PP_SECONDS.items()):
                score = 28 + 4 * c + shared + 0.5 * m + interaction * (-1) ** (c + m) + 0.7 * rng.normal()
                rows.append((f"PP{c}-{p}", "Animals", challenge, category, 3, model, score, 5.0, seconds))
    columns = ["prompt_id", "topic", "challenge", "category", "words", "model", "clip_score", "nima_score", "latency_s"]
    pd.DataFrame(rows, columns=columns).to_csv(path, index=False)
    return path


def t2i_file(path, prompts=24):
    rng = np.random.default_rng(0)
    rows = []
    for source, count in (("coco", prompts), ("partiprompt", prompts), ("drawbench", 2)):
        for p in range(count):
            rows += [(f"{source}_{p}", source, "a secret prompt", model, 30 + rng.normal(), rng.uniform(1, 5))
                     for model in T2I_MODELS]  # fmt: skip
    pd.DataFrame(rows, columns=["prompt_id", "source", "prompt", "model", "clip_score", "human_score"]).to_csv(
        path, index=False
    )
    return path


def test_pp_scores_has_the_published_categories_or_the_challenges(tmp_path):
    file = pp_file(tmp_path / "pp.csv")
    table = build(composed("data=pp_scores", f"data.path={file}").data, "data")
    assert table.categories == ("Basic", "Complex")
    assert table.steps == (1,)
    assert set(table.models) == set(PP_SECONDS)
    assert len(table) == 2 * 24 * 4
    assert (table.frame.batch_size == 1).all()
    assert "2080 Ti" in table.device
    assert pp_scores(file, challenges=True).categories == ("Basic", "Complex", "Quantity")
    assert pp_scores(file, score="nima_score").frame.nima_score.eq(5).all()


def test_t2i_scores_takes_seconds_from_the_configuration_and_keeps_no_text(tmp_path):
    file = t2i_file(tmp_path / "t2i.csv")
    table = build(composed("data=t2i_scores", f"data.path={file}", "data.seconds.vq_diffusion=4").data, "data")
    assert table.categories == ("coco", "partiprompt")
    assert set(table.frame.loc[table.frame.model == "vq_diffusion", "latency_s"]) == {4.0}
    assert not table.frame.astype(str).apply(lambda column: column.str.contains("secret")).any().any()
    assert table.scores == ("clip_score", "human_score")
    with pytest.raises(ScoreTableError, match=r"data.seconds names none for model 'mini_dalle'"):
        t2i_scores(file, seconds={"vq_diffusion": 1.0})
    with pytest.raises(ScoreTableError, match="more than 0 seconds, got mini_dalle"):
        t2i_scores(file, seconds={"mini_dalle": 0.0})
    with pytest.raises(ScoreTableError, match="cannot be read"):
        t2i_scores(tmp_path / "none.csv", seconds={})


def test_a_file_from_outside_is_held_to_its_header(tmp_path):
    file = t2i_file(tmp_path / "t2i.csv")
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[:3], lines[3].replace("a secret prompt", "a secret, prompt"), *lines[4:]]))
    with pytest.raises(ScoreTableError, match="line 4: 7 fields, the header has 6; quote the text"):
        t2i_scores(file, seconds=dict.fromkeys(T2I_MODELS, 1.0))
    with pytest.raises(ScoreTableError, match="column 'source' is missing"):
        t2i_scores(pp_file(tmp_path / "pp.csv"), seconds=dict.fromkeys(T2I_MODELS, 1.0))


def test_variance_shares_add_up_and_recover_made_up_components(tmp_path):
    table = pp_scores(pp_file(tmp_path / "pp.csv", 200, interaction=0.6))
    rows = {r["source"]: r for r in variance_table(table, draws=200)}
    assert tuple(rows) == SOURCES
    assert sum(r["share"] for r in rows.values()) == pytest.approx(1)
    assert rows["prompt"]["variance"] == pytest.approx(4.0, rel=0.2)
    assert rows["prompt x model"]["variance"] == pytest.approx(0.49, rel=0.1)
    assert rows["category x model"]["variance"] == pytest.approx(0.6**2 * 8 / 3, rel=0.15)
    for row in rows.values():
        assert row["lo"] <= row["share"] <= row["hi"] or row["share"] < 0.01


def test_variance_matches_sums_of_squares_by_hand(tmp_path):
    table = pp_scores(pp_file(tmp_path / "pp.csv", 21))
    frame = table.frame.astype({"clip_score": float})
    score, grand = frame.clip_score, frame.clip_score.mean()
    of = {keys: frame.groupby(list(keys)).clip_score.transform("mean")
          for keys in (("category",), ("model",), ("prompt_id",), ("category", "model"))}  # fmt: skip
    cell = of["category", "model"] - of["category",] - of["model",] + grand
    by_hand = [of["category",] - grand, of["prompt_id",] - of["category",], of["model",] - grand, cell,
               score - of["prompt_id",] - of["category", "model"] + of["category",]]  # fmt: skip
    total = ((score - grand) ** 2).sum()
    for row, part in zip(variance_table(table, draws=10), by_hand, strict=True):
        assert row["share"] == pytest.approx((part**2).sum() / total, abs=1e-6)


def test_noise_alone_gives_an_interaction_its_share_by_chance(tmp_path):
    shares = []
    for seed in range(12):
        rows = {r["source"]: r for r in variance_table(pp_scores(pp_file(tmp_path / "pp.csv", 24, seed=seed)), draws=2)}
        shares.append((rows["category x model"]["share"], rows["category x model"]["by_chance"]))
    found, chance = np.mean(shares, 0)
    assert found == pytest.approx(chance, rel=0.6)


def test_variance_table_refuses(tmp_path):
    table = pp_scores(pp_file(tmp_path / "pp.csv"))
    with pytest.raises(ScoreTableError, match="every prompt needs"):
        variance_table(table.replaced(table.frame.iloc[1:]))
    with pytest.raises(ScoreTableError, match="two models"):
        variance_table(ScoreTable(table.frame[table.frame.model == "amused"]))


def test_policies_are_compared_under_load_and_in_words(tmp_path, capsys):
    file = pp_file(tmp_path / "pp.csv", 40, interaction=0.8)
    options = (
        "+experiment=policies", "data=pp_scores", f"data.path={file}", "workload.latency_weight=0.05",
        "policies.loads=[1,64]", "policies.compare.by_hand.thresholds=[27,29,31]", "policies.compare.trained.starts=2",
        "policies.compare.trained.iterations=10", "policies.decisions.counts=[8,null]", "policies.decisions.repeats=3",
        "policies.decisions.draws=10", "replay.draws=200",
    )  # fmt: skip
    run_task(tmp_path, *options)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    names = {*composed(*options).policies.compare, "single_best", "joint_lower_bound", "cascade_last", "cascade_better"}
    for rows in metrics["loads"].values():
        assert set(rows) == names
        assert rows["single_best"]["over_single"] == {"value": 0.0, "lo": 0.0, "hi": 0.0}
        assert not rows["single_best"]["clear"]
        for row in rows.values():
            gain = row["over_single"]
            assert gain["lo"] - 1e-9 <= gain["value"] <= gain["hi"] + 1e-9
            assert row["utility"] == pytest.approx(row["quality"] - 0.05 * row["latency_s"])
    assert len(metrics["words"]) == 2
    assert {r["rule"] for r in metrics["decisions"]} == {"mean", "lower_bound", "safest"}
    assert [r["source"] for r in metrics["variance"]] == list(SOURCES)
    page = (tmp_path / "report.html").read_text()
    assert html.escape(metrics["words"][0]) in page
    assert "Where the variance of scores lies" in page
    assert {f.stem for f in (tmp_path / "figures").glob("*.png")} == {"policies", "assignment_methods", "score_levels"}
    assert metrics["words"][0] in capsys.readouterr().out


def test_words_say_when_one_model_for_everyone_is_best():
    def row(value, clear=False):
        return {
            "utility": 30 + value,
            "clear": clear,
            "over_single": {"value": value, "lo": value - 1, "hi": value + 1},
        }

    rows = {"single_best": row(0.0), "direct": row(-0.2), "cascade_better": row(0.9)}
    (one,) = words({"4": rows})
    assert one.startswith("At 4 requests of every category the best single model for everyone wins (30.000 points)")
    assert "judge's own score: +0.900" in one
    (unsure,) = words({"4": {**rows, "direct": row(0.3)}})
    assert "no policy clearly beats" in unsure
    (sure,) = words({"4": {**rows, "direct": row(0.3, True)}})
    assert "direct wins, +0.300 points" in sure
