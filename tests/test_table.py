"""The score table's contract: what breaks it is refused with row, column and reason."""

import json

import numpy as np
import pytest
from factories import synthetic_frame, synthetic_table

from edgesched.data.table import ScoreTable
from edgesched.errors import ScoreTableError


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.assign(clip_score=f.clip_score.where(f.index != 7)), "row 7: clip_score is missing or NaN"),
        (lambda f: f.assign(clip_score=f.clip_score.where(f.index != 3, np.inf)), "row 3: clip_score is inf"),
        (lambda f: f.assign(latency_s=f.latency_s.where(f.index != 2, -1.0)), "row 2: latency_s is -1"),
        (lambda f: f.assign(steps=f.steps.where(f.index != 4, 0)), "row 4: steps is 0"),
        (lambda f: f.drop(columns="seed"), "columns missing: seed"),
        (lambda f: f.iloc[:0], "the table is empty"),
        (lambda f: f.assign(category=["x", *f.category[1:]]),
         "more than one category"),
        (lambda f: f.assign(steps="many"), "steps: expected int32"),
    ],
)  # fmt: skip
def test_refuses(change, message):
    with pytest.raises(ScoreTableError, match=message):
        ScoreTable(change(synthetic_frame(20)))


def test_refuses_a_key_that_appears_twice_and_an_unknown_model():
    frame = synthetic_frame(20)
    twice = frame.copy()
    twice.loc[1, ["prompt_id", "category", "model", "steps", "seed"]] = frame.loc[
        0, ["prompt_id", "category", "model", "steps", "seed"]
    ]
    with pytest.raises(ScoreTableError, match="row 1: the key .* appears twice"):
        ScoreTable(twice)
    with pytest.raises(ScoreTableError, match="model 'grand' is not one of tiny, middle"):
        ScoreTable(frame, models=("tiny", "middle"))


def test_small_categories_are_left_out_with_a_message(caplog):
    frame = synthetic_frame(25)
    single = frame[frame.prompt_id == "Basic-0"].assign(category="Rare", prompt_id="rare-0")
    import pandas as pd

    table = ScoreTable(pd.concat([frame, single]))
    assert "Rare" not in table.categories
    assert "'Rare' is left out: 1 prompts" in caplog.text
    with pytest.raises(ScoreTableError, match="every category has fewer than 20"):
        ScoreTable(single)


def test_round_trip_digest_and_manifest(tmp_path):
    table = synthetic_table(20)
    table.save(tmp_path / "t")
    again = ScoreTable.load(tmp_path / "t")
    assert again.digest() == table.digest()
    assert again.device == "synthetic"
    assert ScoreTable.load(tmp_path / "t" / "scores.parquet").models == table.models
    assert not list((tmp_path / "t").glob("*.part"))


def test_unreadable_files_are_said_in_one_line(tmp_path):
    with pytest.raises(ScoreTableError, match="no such score table"):
        ScoreTable.load(tmp_path / "none")
    path = synthetic_table(20).save(tmp_path)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ScoreTableError, match="not a readable Parquet file") as caught:
        ScoreTable.load(path)
    assert "\n" not in str(caught.value)
    synthetic_table(20).save(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ScoreTableError, match="not valid JSON"):
        ScoreTable.load(tmp_path)


def test_split_is_stable_and_shares_no_prompt():
    table = synthetic_table(40)
    fit, held = table.split()
    assert not set(fit.frame.prompt_id) & set(held.frame.prompt_id)
    assert len(fit) + len(held) == len(table)
    shuffled = ScoreTable(table.frame.sample(frac=1, random_state=0))
    assert set(shuffled.split()[0].frame.prompt_id) == set(fit.frame.prompt_id)
    assert 0.35 < len(fit) / len(table) < 0.65


def test_csv_fills_in_what_is_missing(tmp_path):
    frame = synthetic_frame(20, seeds=1)
    frame = frame[frame.steps == 8].drop(columns=["steps", "seed", "batch_size", "latency_s"])
    frame.to_csv(tmp_path / "s.csv", index=False)
    table = ScoreTable.from_csv(tmp_path / "s.csv", seconds={"tiny": 0.1, "middle": 0.2, "grand": 0.4})
    assert table.steps == (1,)
    assert set(table.frame.batch_size) == {1}
    with pytest.raises(ScoreTableError, match="names none for model 'middle'"):
        ScoreTable.from_csv(tmp_path / "s.csv", seconds={"tiny": 0.1})


def test_the_shipped_table_keeps_its_promises():
    table = ScoreTable.load()
    assert table.categories == ("Basic", "Detail", "Imagination", "Complex")
    assert set(table.models) == {"micro_small", "micro_base", "micro_large"}
    assert len(table.steps) >= 8
    assert table.steps[0] == 1
    assert table.steps[-1] >= 30
    assert table.manifest["truncated_prompts"] == int(table.frame["truncated"].sum()) == 0
    assert table.frame.groupby("category")["prompt_id"].nunique().min() >= 64
    assert table.frame["seed"].nunique() >= 2
    for key in ("device", "dtype", "libraries", "git_commit", "models", "prompts_sha256", "scores", "date", "timing"):
        assert table.manifest[key], key
    assert min(row["repeats"] for row in table.manifest["timing"]) >= 5
    json.dumps(dict(table.manifest))
