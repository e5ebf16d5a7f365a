"""Offsets are recovered where the text tells them, nothing is claimed where it does not, and levels are sound."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from composing import run_task

from edgesched.data.table import ScoreTable
from edgesched.errors import ScoreTableError
from edgesched.quality.difficulty import (
    WordCounts,
    explained_variance,
    fit_difficulty,
    predict_offsets,
    prompt_offsets,
    split_by_difficulty,
)


def made(prompts=120, signal=4.0, noise=1.0, seed=0, width=6):
    """Two categories whose prompts' offsets are linear in an embedding: table, embeddings, true offsets."""
    rng = np.random.default_rng(seed)
    rows, embeddings, truth = [], {}, {}
    direction = rng.normal(size=width) / width**0.5
    for c, category in enumerate(("Basic", "Complex")):
        for i in range(prompts):
            pid = f"{category}-{seed}-{i}"
            x = rng.normal(size=width) + 5 * c
            embeddings[pid] = torch.tensor(x)
            truth[pid] = signal * float((x - 5 * c) @ direction)
            for m, model in enumerate(("small", "large")):
                for k in (1, 8):
                    score = 50 + 10 * c + 5 * m + k + truth[pid] + noise * rng.normal()
                    rows.append((pid, category, model, k, 0, score, 0.1 * k * (1 + m), 1))
    columns = ["prompt_id", "category", "model", "steps", "seed", "clip_score", "latency_s", "batch_size"]
    return ScoreTable(pd.DataFrame(rows, columns=columns), min_prompts=1), embeddings, truth


def test_offsets_are_means_over_category_model_and_steps():
    table, _, truth = made(noise=0.0)
    rows = prompt_offsets(table)
    for _, mine in rows.groupby("category"):
        assert mine["offset"].mean() == pytest.approx(0, abs=1e-4)
        true = mine["prompt_id"].map(truth)
        assert np.allclose(mine["offset"], true - true.mean(), atol=1e-4)


def test_what_the_text_tells_is_recovered_on_held_out_prompts():
    table, embeddings, _ = made(noise=2.0)
    fit, held = table.split()
    fitted = fit_difficulty(fit, embeddings)
    shares = explained_variance(held, predict_offsets(fitted.model, held, embeddings), draws=300)
    offsets = prompt_offsets(held)["offset"].var()
    ceiling = 1 - (2.0**2 / 4) / offsets
    assert shares["all"]["lo"] < ceiling
    assert shares["all"]["value"] > ceiling - 0.05
    assert fitted.explained == pytest.approx(shares["all"]["value"], abs=0.1)
    assert set(shares) == {"all", "Basic", "Complex"}


def test_where_the_text_tells_nothing_nothing_is_predicted():
    found = []
    for seed in range(5):
        table, embeddings, _ = made(signal=0.0, seed=seed)
        fit, held = table.split()
        fitted = fit_difficulty(fit, embeddings)
        found.append(
            explained_variance(held, predict_offsets(fitted.model, held, embeddings), draws=10)["all"]["value"]
        )
        assert fitted.explained >= 0
    assert max(found) < 0.1
    assert min(found) > -0.1


def test_out_of_fold_predictions_do_not_know_their_own_prompt():
    """Another score for one prompt leaves its own prediction as it is, and changes those that learn from it."""
    table, embeddings, _ = made(prompts=30, width=8)
    frame = table.frame.copy()
    odd = "Basic-0-7"
    # Every other prompt of the category moves up, so that its mean, and with it the offsets of the others, stays.
    n = frame.loc[frame.category == "Basic", "prompt_id"].nunique()
    frame["clip_score"] = frame["clip_score"].astype(float) + np.where(
        frame.prompt_id == odd, 3.0, np.where(frame.category == "Basic", -3.0 / (n - 1), 0.0)
    )
    before = fit_difficulty(table, embeddings)
    after = fit_difficulty(table.replaced(frame), embeddings)
    assert before.model.penalty == after.model.penalty
    change = {p: abs(after.out_of_fold[p] - said) for p, said in before.out_of_fold.items()}
    assert change[odd] < 1e-4
    assert sum(c > 1e-2 for c in change.values()) > len(change) / 2


def test_levels_keep_every_prompt_once_and_are_ordered():
    table, embeddings, truth = made()
    fit, held = table.split()
    fitted = fit_difficulty(fit, embeddings)
    predicted = predict_offsets(fitted.model, held, embeddings)
    fit_levels, held_levels, names = split_by_difficulty(fit, held, fitted.out_of_fold, predicted)
    assert names["Basic"] == ["Basic, hard", "Basic, middle", "Basic, easy"]
    assert fit_levels.categories == held_levels.categories == tuple(n for mine in names.values() for n in mine)
    for before, after in ((fit, fit_levels), (held, held_levels)):
        keys = ["prompt_id", "model", "steps", "seed"]
        pd.testing.assert_frame_equal(
            before.frame[[*keys, "clip_score"]].sort_values(keys).reset_index(drop=True),
            after.frame[[*keys, "clip_score"]].sort_values(keys).reset_index(drop=True),
        )
        of = after.frame.drop_duplicates("prompt_id").assign(truth=lambda f: f["prompt_id"].map(truth))
        mean = of.groupby("category")["truth"].mean()
        assert mean["Basic, hard"] < mean["Basic, middle"] < mean["Basic, easy"]


def test_a_category_too_small_for_its_levels_gets_fewer():
    table, _, truth = made(prompts=4)
    ids = sorted(table.frame["prompt_id"].unique())
    half = table.frame["prompt_id"].isin(ids[::2])
    fit, held = table.replaced(table.frame[half]), table.replaced(table.frame[~half])
    _, _, names = split_by_difficulty(fit, held, truth, truth, 3)
    assert all(len(mine) == 1 for mine in names.values())
    assert names["Basic"] == ["Basic"]


def test_bad_input_is_named():
    table, embeddings, truth = made(prompts=20)
    lost = dict(list(embeddings.items())[1:])
    with pytest.raises(ScoreTableError, match=r"prompt 'Basic-0-0' of the table is not among the prompts given"):
        fit_difficulty(table, lost)
    with pytest.raises(ScoreTableError, match="folds"):
        fit_difficulty(table, embeddings, folds=1)
    with pytest.raises(ScoreTableError, match="levels: expected one of 1, 2, 3, got 7"):
        split_by_difficulty(table, table, truth, truth, 7)
    model = fit_difficulty(table, embeddings).model
    other = table.replaced(table.frame.assign(category="Other"))
    with pytest.raises(ScoreTableError, match="category 'Other'"):
        predict_offsets(model, other, embeddings)


def test_word_counts_know_words_not_their_order_unless_asked():
    plain = WordCounts(width=64).embed_texts(["a red boat", "boat red a", "a blue boat"])
    assert plain.shape == (3, 65)
    assert torch.equal(plain[0], plain[1])
    assert not torch.equal(plain[0], plain[2])
    pairs = WordCounts(width=64, pairs=True).embed_texts(["a red boat", "boat red a"])
    assert not torch.equal(pairs[0], pairs[1])


@pytest.mark.weights
def test_the_difficulty_experiment_leaves_what_it_promises(tmp_path, capsys):
    run_task(tmp_path, "+experiment=difficulty", "difficulty.loads=[4,32]", "replay.draws=100", "quality.max_epochs=20")
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["explained"]["all"]["value"] > 0.25
    for by_load in metrics["gains"].values():
        assert list(by_load) == ["4", "32"]
        for row in by_load.values():
            assert row["split"] - row["plain"] == pytest.approx(row["value"], abs=1e-9)
    assert metrics["words"][0] in capsys.readouterr().out
    assert (tmp_path / "report.html").stat().st_size > 10_000
