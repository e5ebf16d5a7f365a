"""Nothing that a run says depends on the order of rows, of categories or of models."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from factories import CATEGORIES, MODELS, STEPS, synthetic_frame

from edgesched import search
from edgesched.assign import AlwaysBest, Direct, Probabilistic
from edgesched.data.table import ScoreTable
from edgesched.equations.bounds import upper_bound
from edgesched.equations.utility import evaluate
from edgesched.errors import ScoreTableError
from edgesched.evaluation.replay import replay
from edgesched.evaluation.robust import bootstrap_quality, compare_decisions
from edgesched.quality import fit_quality

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = ROOT / "edgesched/data"
DEMAND = {"Basic": 40.0, "Detail": 24.0, "Imagination": 12.0, "Complex": 20.0}
WEIGHT = 10.0


def shuffled(table, seed, orders=True):
    """The table with its rows in another order and, if asked for, its stored orders in another one too."""
    rng = np.random.default_rng(seed)
    manifest = dict(table.manifest)
    for key in ("category_order", "model_order"):
        manifest[key] = [str(n) for n in rng.permutation(manifest[key])] if orders else manifest[key]
    return ScoreTable(table.frame.iloc[rng.permutation(len(table))], manifest)


def by_name(quality, values):
    """A tensor (C, M, ...) with categories and models in the order of their names."""
    rows = [quality.categories.index(c) for c in sorted(quality.categories)]
    return values[rows][:, [quality.models.index(m) for m in sorted(quality.models)]]


def chain(table, salt=None, draws=200):
    """Everything a plan run says, categories and models by name."""
    fit, held = table.split(salt)
    quality = fit_quality(fit)
    said = {"mean": by_name(quality, quality.mean().detach()), "std": by_name(quality, quality.std().detach())}
    for mode, load in (("slot", 1.0), ("queue", 0.05)):
        demand = {c: load * n for c, n in DEMAND.items()}
        scenario = quality.scenario(demand, WEIGHT, latency=mode)
        scores = scenario.quality[0].nan_to_num(neginf=-1e6)
        said[f"{mode} scenario"] = torch.cat(
            [by_name(quality, scores).flatten(), scenario.step_time_s[0].sort().values]
        )
        said[f"{mode} bound"] = upper_bound(scenario)
        results = {"annealing": search.anneal(scenario, chains=16, iterations=300)}
        if mode == "slot":
            results["solve"] = search.solve(scenario)
            for name, policy in (("direct", Direct()), ("best", AlwaysBest()), ("published", Probabilistic())):
                results[name] = search.coordinate(scenario, assignment=policy(scenario, quality))
        plans = {name: result.plan for name, result in results.items()}
        for name, outcome in replay(plans, scenario, held, quality.models, planned_on=fit, draws=draws).items():
            view = evaluate(scenario, plans[name])
            plan = plans[name]
            said[f"{mode} {name} view"] = torch.stack([view.utility[0], view.quality[0], view.latency_s[0]])
            said[f"{mode} {name} replay"] = torch.tensor([outcome.utility, *outcome.interval("utility")])
            if name != "annealing":  # its moves follow the positions of categories, so that its last digits do
                said[f"{mode} {name} plan"] = by_name(quality, plan.assignment[0])
                said[f"{mode} {name} steps"] = plan.steps[0] * (plan.share[0] > 0)
    return said


def assert_same(one, other, within):
    """Points and seconds agree; where the fits stopped at other points of one flat optimum, options of equal worth may differ."""
    assert one.keys() == other.keys()
    for name, value in one.items():
        if within and name.endswith((" plan", " steps")):
            continue
        assert torch.allclose(value.double(), other[name].double(), rtol=0, atol=within), (name, value, other[name])


@pytest.fixture(scope="module")
def shipped():
    return ScoreTable.load()


@pytest.fixture(scope="module")
def reference(shipped):
    return chain(shipped)


def test_the_shipped_table_tells_its_order(shipped):
    told = json.loads((SHIPPED / "manifest.json").read_text())
    assert tuple(told["category_order"]) == shipped.categories == ("Basic", "Detail", "Imagination", "Complex")
    assert tuple(told["model_order"]) == shipped.models == ("micro_small", "micro_base", "micro_large")


@pytest.mark.parametrize("seed", range(4))
def test_a_run_on_shuffled_rows_is_the_same_run(shipped, seed):
    other = shuffled(shipped, seed, orders=False)
    pd.testing.assert_frame_equal(other.frame, shipped.frame)
    assert (other.categories, other.models, other.digest()) == (shipped.categories, shipped.models, shipped.digest())


@pytest.mark.parametrize("seed", range(4))
def test_every_number_is_the_same_under_shuffled_rows_categories_and_models(shipped, reference, seed):
    assert_same(chain(shuffled(shipped, seed)), reference, 1e-9)


def test_every_number_of_a_run_is_exactly_the_same_under_shuffled_rows(shipped, reference):
    assert_same(chain(shuffled(shipped, 4, orders=False)), reference, 0.0)


@pytest.mark.parametrize("salt", [1, 7])
def test_other_halves_pair_by_name_too(shipped, salt):
    assert_same(chain(shuffled(shipped, salt, orders=False), salt), chain(shipped, salt), 0.0)


@pytest.mark.parametrize("salt", [None, *range(12)])
def test_both_halves_keep_the_order_at_every_salt(salt):
    frame = synthetic_frame(prompts=24, seeds=1)
    # The first prompt of every half is of another category from salt to salt.
    table = ScoreTable(
        frame.sample(frac=1, random_state=3), {"category_order": list(CATEGORIES), "model_order": MODELS}
    )
    for half in table.split(salt):
        assert (half.categories, half.models) == (CATEGORIES, MODELS)


def test_without_a_stored_order_names_are_sorted_whatever_the_rows():
    frame = synthetic_frame(prompts=24, seeds=1)
    for seed in range(3):
        table = ScoreTable(frame.sample(frac=1, random_state=seed))
        assert table.categories == ("Basic", "Complex", "Detail", "Imagination")
        assert table.models == ("grand", "middle", "tiny")


def test_the_order_is_saved_and_read_back_and_names_that_are_new_come_last(tmp_path):
    frame = synthetic_frame(prompts=24, seeds=1)
    ScoreTable(frame, order=("Complex", "Basic"), models=MODELS).save(tmp_path)
    told = json.loads((tmp_path / "manifest.json").read_text())
    assert told["category_order"] == ["Complex", "Basic", "Detail", "Imagination"]
    assert told["model_order"] == list(MODELS)
    again = ScoreTable.load(tmp_path)
    assert list(again.categories) == told["category_order"]
    assert again.models == MODELS


@pytest.mark.parametrize("told", ["Basic", ["Basic", "Basic"], [1, 2], {"Basic": 0}])
def test_an_order_that_is_no_list_of_names_is_refused(told):
    with pytest.raises(ScoreTableError, match="manifest: category_order is .* expected a list of different names"):
        ScoreTable(synthetic_frame(prompts=24, seeds=1), {"category_order": told})


def test_random_draws_belong_to_names():
    frame = synthetic_frame(prompts=24, seeds=1)
    one = ScoreTable(frame, {"category_order": list(CATEGORIES)})
    other = ScoreTable(frame, {"category_order": list(CATEGORIES[::-1])})
    drawn = [bootstrap_quality(t, MODELS, STEPS, draws=5) for t in (one, other)]
    assert torch.equal(drawn[0], drawn[1].flip(1))
    rows = []
    for table in (one, other):
        fit, held = table.split()
        scenario = fit_quality(fit, max_epochs=20).scenario(20.0, 10.0)
        rows.append(compare_decisions(scenario, fit, held, MODELS, counts=(8,), repeats=3, draws=10, candidates=1))
    for mine, theirs in zip(*rows, strict=True):
        assert mine["rule"] == theirs["rule"]
        assert mine["utility"] == pytest.approx(theirs["utility"], abs=1e-6)


@pytest.mark.slow
def test_the_entry_point_prints_the_same_for_a_copy_with_shuffled_rows(tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    frame = pd.read_parquet(SHIPPED / "scores.parquet").sample(frac=1, random_state=5)
    frame.to_parquet(copy / "scores.parquet", index=False)
    (copy / "manifest.json").write_bytes((SHIPPED / "manifest.json").read_bytes())
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts/run.py"), "-m", "+experiment=plan", f"data.path=null,{copy}",
         "hydra.sweep.dir=out", "debug=true"], cwd=tmp_path, env=os.environ | {"WANDB_MODE": "disabled"},
        capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    metrics = [json.loads((tmp_path / "out" / job / "metrics.json").read_text()) for job in ("0", "1")]
    for told in metrics:
        told.pop("seconds_total")
        for row in told["methods"].values():
            row.pop("seconds")
    assert metrics[0] == metrics[1]
    plans = [json.loads((tmp_path / "out" / job / "plan.json").read_text()) for job in ("0", "1")]
    assert plans[0] == plans[1]
