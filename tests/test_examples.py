"""Extensions of one's own, as scripts/examples/ shows them: each runs through the entry point, and does what it says."""

import doctest
import importlib
import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from composing import ROOT, composed, run_task
from factories import CATEGORIES, synthetic_table
from omegaconf import OmegaConf

import edgesched as es
from edgesched.errors import ArgumentError, ModelError, ScoreTableError
from edgesched.protocols import ImageModel

SCRIPTS = ROOT / "scripts"
CONF = SCRIPTS / "examples/conf"
OURS = f"hydra.searchpath=[file://{CONF}]"
NAMES = sorted(file.stem for file in (SCRIPTS / "examples").glob("*.py") if file.stem != "__init__")


@pytest.fixture(autouse=True)
def _scripts_are_importable(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))


def example(name):
    return importlib.import_module(f"examples.{name}")


@pytest.fixture
def table(tmp_path):
    synthetic_table(prompts=24, seeds=1).save(tmp_path / "table")
    return f"data.path={tmp_path / 'table'}"


def told(folder):
    return json.loads((folder / "metrics.json").read_text())


@pytest.mark.parametrize("name", NAMES)
def test_each_is_one_module_and_one_file_and_its_docstring_runs(name):
    files = list(CONF.glob(f"*/{name}.yaml"))
    assert len(files) == 1
    module = example(name)
    command = f"python scripts/run.py --config-dir {CONF.relative_to(ROOT)} "
    assert command in module.__doc__
    assert name in module.__doc__
    result = doctest.testmod(module)
    assert result.failed == 0
    group = files[0].parent.name
    if group in ("model", "score"):
        assert list(OmegaConf.load(files[0])) == [name]


def test_a_search_of_ones_own_plans_from_the_command_line(tmp_path, table):
    command = [sys.executable, str(SCRIPTS / "run.py"), "--config-dir", str(CONF), "+experiment=plan", "search=hill_climb",
               table, "debug=true", "logger.mode=disabled", f"hydra.run.dir={tmp_path / 'run'}"]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    plan = told(tmp_path / "run")["methods"]["plan"]
    assert plan["feasible"]
    assert plan["utility"] <= plan["bound"]
    assert plan["proposals"] == 50
    assert "--config-dir" in (tmp_path / "run/report.html").read_text()


@pytest.mark.parametrize("latency", ["slot", "queue"])
def test_the_hill_climb_is_feasible_and_stays_below_the_bound_of_solve(latency):
    scenario = es.Scenario.random(6, categories=3, models=3, steps=8, seed=4, latency=latency)
    found, best = example("hill_climb").hill_climb(scenario, iterations=500), es.solve(scenario)
    assert found.feasible.all()
    assert (found.utility <= best.bound + 1e-9).all()
    assert ((best.utility - found.utility) / best.utility).median() < 0.01
    torch.testing.assert_close(found.utility, es.evaluate(scenario, found.plan).utility)
    torch.testing.assert_close(found.gap, (found.bound - found.utility) / found.bound.abs().clamp(min=1))
    assert (found.history.diff(dim=0) >= 0).all()


@pytest.mark.parametrize("latency", ["slot", "queue"])
@pytest.mark.parametrize("limit", ["share_units", "memory_limit_gib", "deadline_s"])
def test_the_hill_climb_meets_limits(latency, limit):
    drawn = es.Scenario.random(6, categories=3, models=3, steps=8, seed=5, latency=latency)
    free = example("hill_climb").hill_climb(drawn, iterations=300)
    seconds = es.evaluate(drawn, free.plan).latency_s
    limits = {
        "share_units": {"share_units": 7},
        "memory_limit_gib": {"memory_gib": torch.ones(6, 3), "memory_limit_gib": torch.full((6,), 1.5)},
        "deadline_s": {"deadline_s": seconds * 0.9},
    }[limit]
    scenario = es.Scenario(drawn.demand, drawn.quality, drawn.steps, drawn.step_time_s, drawn.overhead_s,
                           drawn.latency_weight, latency, **limits)  # fmt: skip
    found = example("hill_climb").hill_climb(scenario, iterations=300)
    assert found.feasible.any()
    assert (found.utility[found.feasible] <= found.bound[found.feasible] + 1e-9).all()
    assert found.utility[~found.feasible].isneginf().all()


def test_the_hill_climb_keeps_an_assignment_that_is_given():
    scenario = es.Scenario.random(4, seed=1)
    given = torch.full((4, 4, 3), 1 / 3, dtype=torch.float64)
    found = example("hill_climb").hill_climb(scenario, assignment=given, iterations=100)
    torch.testing.assert_close(found.plan.assignment, given)
    torch.testing.assert_close(found.bound, es.upper_bound(scenario, given))
    again = example("hill_climb").hill_climb(scenario, assignment=given, iterations=100)
    assert torch.equal(found.utility, again.utility)
    with pytest.raises(ArgumentError, match="iterations"):
        example("hill_climb").hill_climb(scenario, iterations=0)


def test_a_policy_of_ones_own_sends_every_category_to_a_model_that_is_good_enough():
    policy = example("cheapest_good").CheapestGood
    scenario = es.Scenario.random(20, categories=5, models=4, steps=10, seed=2)
    best = scenario.quality.amax((-2, -1))
    chosen = policy(within=2.0)(scenario)
    assert (chosen.sum(-1) == 1).all()
    reached = (chosen * scenario.quality.amax(-1)).sum(-1)
    assert (reached >= best - 2.0).all()
    assert torch.equal(policy(within=0.0)(scenario).argmax(-1), scenario.quality.amax(-1).argmax(-1))
    with pytest.raises(ArgumentError, match="within"):
        policy(within=-1)


def test_a_policy_of_ones_own_is_planned_with_and_compared(tmp_path, table):
    run_task(tmp_path / "plan", OURS, "+experiment=plan", "assign=cheapest_good", "search=solve", table, "debug=true")
    plan = json.loads((tmp_path / "plan/plan.json").read_text())
    assert all(sorted(row.values()) == [0, 0, 1] for row in plan["assignment"].values())
    run_task(tmp_path / "compared", OURS, "+experiment=policies", "+assign@policies.compare.cheapest_good=cheapest_good",
             "~assign@policies.compare.trained", table, "debug=true", "policies.decisions.repeats=0")  # fmt: skip
    assert "cheapest_good" in (tmp_path / "compared/metrics.json").read_text()


def test_a_model_and_a_score_of_ones_own_fill_a_table_and_serve_from_it(tmp_path):
    out = tmp_path / "table"
    run_task(tmp_path / "made", OURS, "+experiment=campaign", "model=flat_colours", "score=[micro,brightness]",
             f"campaign.out={out}", "campaign.prompts_per_category=20", "campaign.steps=[1,2,4]", "campaign.seeds=1",
             "campaign.timing_repeats=1", "campaign.progress=false", "campaign.accelerator=cpu")  # fmt: skip
    made = es.ScoreTable.load(out)
    assert made.models == ("flat_colours",)
    assert set(made.scores) == {"clip_score", "brightness"}
    assert made.frame["brightness"].between(0, 100).all()
    assert (made.frame["latency_s"] > 0).all()
    assert made.manifest["models"]["flat_colours"]["words"] == 8
    run_task(tmp_path / "served", OURS, "+experiment=serve", "model=flat_colours", f"data.path={out}", "debug=true")
    served = told(tmp_path / "served")["models"]["flat_colours"]
    assert served["requests"] == 6
    assert served["measured_s"] > 0


def test_flat_colours_depend_on_text_steps_and_seed_alone():
    model = example("flat_colours").FlatColours(resolution=16, words=2)
    assert isinstance(model, ImageModel)
    seen = []
    both = model.generate(["red boat", "green hill"], 4, [1, 2], seen.append)
    assert both.shape == (2, 16, 16, 3)
    assert both.dtype == np.uint8
    assert seen == [0, 1, 2, 3]
    assert np.array_equal(both[1:], model.generate(["green hill"], 4, [2]))
    assert not np.array_equal(both[:1], model.generate(["red boat"], 4, [2]))
    assert np.array_equal(model.generate(["red boat"], 16, [1]), model.generate(["red boat"], 16, [2]))
    assert model.truncates("a red boat")
    assert not model.truncates("red boat")
    assert model.settings() == {"memory_gib": 0.01, "resolution": 16, "steps": None, "words": 2}
    with pytest.raises(ModelError, match="3 is not one of its step counts"):
        example("flat_colours").FlatColours(steps=[1, 2]).generate(["x"], 3, [0])
    with pytest.raises(ArgumentError, match="words"):
        example("flat_colours").FlatColours(resolution=4, words=5)


def test_brightness_is_linear_in_the_pixels():
    score = example("brightness").Brightness(weights=[1, 1, 2])
    images = np.zeros((3, 4, 4, 3), np.uint8)
    images[1, ..., 2], images[2] = 255, 51
    score.update(images, ["black", "blue", "grey"])
    torch.testing.assert_close(score.compute(), torch.tensor([0.0, 50.0, 20.0]))


def test_a_task_of_ones_own_reports_a_table(tmp_path, table):
    run_task(tmp_path / "run", OURS, "task=table_summary", "name=table_summary", table)
    models = told(tmp_path / "run")["models"]
    expected = es.ScoreTable.load(tmp_path / "table").frame.groupby("model").size()
    assert {name: row["images"] for name, row in models.items()} == expected.to_dict()
    assert (tmp_path / "run/report.html").exists()


def test_a_data_source_of_ones_own_is_planned_with(tmp_path):
    rng = np.random.default_rng(0)
    rows = [{"prompt_id": f"{c}-{i}", "category": c} for c in CATEGORIES for i in range(24)]
    sheet = pd.DataFrame(rows)
    for m, model in enumerate(("small", "large")):
        for k in (1, 4, 8):
            sheet[f"{model}@{k}"] = 60 + 10 * m + k + rng.normal(size=len(sheet))
    sheet.to_csv(tmp_path / "sheet.csv", index=False)
    run_task(tmp_path / "run", OURS, "+experiment=plan", "data=my_table", f"data.path={tmp_path / 'sheet.csv'}",
             "data.seconds={small: 0.01, large: 0.05}", "search=solve", "debug=true")  # fmt: skip
    assert told(tmp_path / "run")["source"] == {**told(tmp_path / "run")["source"], "rows": 6 * len(sheet)}


def test_a_data_source_says_what_is_wrong_with_its_file(tmp_path):
    my_table = example("my_table").my_table
    file = tmp_path / "sheet.csv"
    for text, match in (
        ("prompt_id,small@1\n", "column category is missing"),
        ("prompt_id,category,small\n", "'small' is not <model>@<steps>"),
        ("prompt_id,category,large@1\n", "large has none"),
        ("prompt_id,category\n", "no column"),
    ):
        file.write_text(text)
        with pytest.raises(ScoreTableError, match=match):
            my_table(file, seconds={"small": 0.1})
    with pytest.raises(ScoreTableError, match="cannot be read"):
        my_table(tmp_path / "none.csv", seconds={})


def test_a_sweeps_job_depends_on_the_code_of_an_example(tmp_path, monkeypatch):
    from edgesched.runs import sweep

    monkeypatch.setattr(sweep, "_clone", lambda: "")
    (tmp_path / "own_search.py").write_text("def search(scenario, *, assignment=None): ...\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    cfg = composed(OURS, "+experiment=plan", "search=hill_climb")
    cfg.search = {"_target_": "own_search.search", "_partial_": True}
    before = sweep.job_digest(cfg)
    assert before == sweep.job_digest(cfg)
    (tmp_path / "own_search.py").write_text(
        "def search(scenario, *, assignment=None):\n    raise NotImplementedError\n"
    )
    assert sweep.job_digest(cfg) != before
    assert any("hill_climb" in name for name, _ in sweep._contents({"_target_": "examples.hill_climb.hill_climb"}))
