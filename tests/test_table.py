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


HEAD = "prompt_id,category,model,{},latency_s"


def csv_table(file, *, score="clip_score", categories=("Basic", "None"), models=("small", "large"), more=(), edit=None):
    """A file of 24 prompts a category, each under two models."""
    rows = [f"{c}{p},{c},{m},{50 + p},0.1" for c in categories for p in range(24) for m in models]
    rows = [edit(i, row) for i, row in enumerate(rows)] if edit else rows
    file.write_text("\n".join([HEAD.format(score), *rows, *more]) + "\n", encoding="utf-8")
    return file


def before_score(row, fields):
    *names, score, seconds = row.split(",")
    return ",".join([*names, fields, score, seconds])


def test_csv_names_are_text_and_the_score_asked_for_is_kept(tmp_path):
    file = csv_table(tmp_path / "s.csv", score="imagereward", models=("1.5", "2.10"))
    table = ScoreTable.from_csv(file, score="imagereward")
    assert len(table) == 96
    assert set(table.categories) == {"Basic", "None"}
    assert set(table.models) == {"1.5", "2.10"}
    ids = csv_table(tmp_path / "i.csv", edit=lambda i, row: f"{i // 2:04d}" + row[row.index(",") :])
    assert ScoreTable.from_csv(ids).frame.prompt_id.min() == "0000"


@pytest.mark.parametrize(
    ("fifth", "message"),
    [("B,Basic,small,,0.1", "line 6: clip_score is empty"), ("B,Basic,small,nan,0.1", "line 6: clip_score is 'nan'"),
     ('B,Basic,small,"30,5",0.1', "line 6: clip_score is '30,5'; write it with a decimal point"),
     ("B,Basic,small,30,-1", "line 6: latency_s is -1; expected at least 0"), (",Basic,small,30,1", "line 6: prompt_id"),
     ("B,Basic,,30,1", "line 6: model is empty"), ("B,Basic,small,30,1,2", "line 6: 6 fields, the header has 5")],
)  # fmt: skip
def test_csv_fields_that_are_no_value_of_their_column_are_refused_by_line(tmp_path, fifth, message):
    with pytest.raises(ScoreTableError, match=message):
        ScoreTable.from_csv(csv_table(tmp_path / "s.csv", edit=lambda i, row: fifth if i == 4 else row))


def test_csv_steps_are_whole_numbers_and_truncated_is_true_or_false(tmp_path):
    def with_steps(steps, truncated):
        return csv_table(
            tmp_path / "s.csv",
            score="steps,truncated,clip_score",
            edit=lambda i, row: before_score(row, f"{steps if i else 4},{truncated}"),
        )

    table = ScoreTable.from_csv(with_steps("4.0", "False"))
    assert table.steps == (4,)
    assert not table.frame.truncated.any()
    with pytest.raises(ScoreTableError, match="line 3: steps is 4.9; expected a whole number"):
        ScoreTable.from_csv(with_steps("4.9", "False"))
    with pytest.raises(ScoreTableError, match="line 2: truncated is 'no'; expected true, false, 1 or 0"):
        ScoreTable.from_csv(with_steps("4", "no"))


def test_csv_columns_that_are_missing_are_named_with_those_present(tmp_path):
    file = tmp_path / "s.csv"
    file.write_text("prompt_id;category;model;clip_score\n1;Basic;small;30,5\n")
    with pytest.raises(ScoreTableError) as caught:
        ScoreTable.from_csv(file)
    assert "column 'prompt_id' is missing, and 'category', 'model', 'clip_score'; present: prompt_id;" in str(
        caught.value
    )
    assert "parted by ';'" in str(caught.value)
    with pytest.raises(ScoreTableError, match="'steps' is no score"):
        ScoreTable.from_csv(file, score="steps")


def test_csv_rows_without_a_category_are_counted_and_other_scores_kept_if_numbers(tmp_path, caplog):
    file = csv_table(tmp_path / "s.csv", score="a_score,b_score,words,clip_score", more=["x,,small,1,good,n,30,0.1"],
                     edit=lambda i, row: before_score(row, f"7,{'good' if i == 9 else 1},many"))  # fmt: skip
    table = ScoreTable.from_csv(file, seconds={"small": 1.0, "large": 2.0})
    assert table.scores == ("a_score", "clip_score")
    assert "1 of 97 rows have no category and are left out" in caplog.text
    assert "'b_score' is left out" in caplog.text
    assert "data.seconds is not used" in caplog.text
    with pytest.raises(ScoreTableError, match=r"more than 0 seconds, got small \(inf\)"):
        ScoreTable.from_csv(file, seconds={"small": float("inf")})
