"""Plans before the first image: times from conf/model, assumed curves, and words that call them priors."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from edgesched.equations.utility import service_times
from edgesched.errors import ConfigError, PlanError, ScenarioError
from edgesched.quality.priors import NO_REPLAY, Priors
from edgesched.search import exact

ROOT = Path(__file__).resolve().parents[1]
TIMES = {"steps": [2, 4, 8], "step_time_s": 0.1, "overhead_s": 0.05, "timing_source": "a card, measured by somebody"}
DEAR = TIMES | {"step_time_s": 0.4, "overhead_s": 0.2}
CURVE = {"top": 30.0, "drop": 12.0, "tau": 4.0}


def priors(**curves):
    return Priors(curves, "made up for a test")


def test_the_latency_is_overhead_plus_steps_times_the_published_step_time():
    quality = priors(dear=CURVE, cheap=CURVE).quality({"dear": DEAR, "cheap": TIMES})
    assert quality.models == ("cheap", "dear")
    scenario = quality.scenario(3.0, 0.5)
    chosen = torch.tensor([[4, 8]])
    assert service_times(scenario, chosen)[0].tolist() == pytest.approx([0.05 + 4 * 0.1, 0.2 + 8 * 0.4])
    assert scenario.quality[0, 0, 0].tolist() == pytest.approx([30 - 12 * math.exp(-k / 4) for k in (2, 4, 8)])
    # Both curves are one, so all 3 requests go to the cheap model; k = 2, 4, 8 give 30 − 12 e^(−k/4) − 0.5 · 3 (0.05 + 0.1 k).
    best = max(30 - 12 * math.exp(-k / 4) - 0.5 * 3 * (0.05 + 0.1 * k) for k in (2, 4, 8))
    assert float(exact(scenario).utility) == pytest.approx(best)


def test_curves_by_category_and_by_step_count_are_paired_by_name():
    people, places = {2: 10.0, 8: 20.0}, {"8": 22.0, "2": 11.0}
    quality = Priors(
        {"cheap": {"people": people, "places": places}, "dear": {4: 25.0}}, "made up", ["places", "people"]
    ).quality({"cheap": TIMES, "dear": DEAR})
    assert (quality.categories, quality.models, quality.step_counts) == (
        ("places", "people"),
        ("cheap", "dear"),
        (2, 4, 8),
    )
    none = -math.inf
    assert quality.mean().tolist() == [[[11, none, 22], [none, 25, none]], [[10, none, 20], [none, 25, none]]]
    assert quality.scenario({"people": 2.0}, 1.0).demand.tolist() == [[0.0, 2.0]]
    with pytest.raises(ScenarioError, match="'animals' is not one of places, people"):
        quality.scenario({"animals": 2.0}, 1.0)


def test_everything_shown_names_the_sources_and_calls_them_priors():
    quality = priors(cheap=CURVE).quality({"cheap": TIMES})
    assert quality.device == ("priors, not measurements: times of cheap: a card, measured by somebody; "
                              "scores: made up for a test")  # fmt: skip


@pytest.mark.parametrize("ask", ["std", "cdf"])
def test_methods_that_need_a_distribution_are_told_that_there_is_none(ask):
    quality = priors(cheap=CURVE).quality({"cheap": TIMES})
    with pytest.raises(PlanError, match="mean scores only"):
        getattr(quality, ask)(*([] if ask == "std" else [torch.zeros(1)]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step_time_s": None}, r"^model\.cheap\.step_time_s: is missing"),
        ({"step_time_s": 0.0}, r"^model\.cheap\.step_time_s: expected more than 0 seconds, got 0\.0"),
        ({"step_time_s": math.inf}, r"^model\.cheap\.step_time_s: expected more than 0 seconds, got inf"),
        ({"step_time_s": True}, r"^model\.cheap\.step_time_s: expected more than 0 seconds, got True"),
        ({"overhead_s": None}, r"^model\.cheap\.overhead_s: is missing"),
        ({"overhead_s": -0.1}, r"^model\.cheap\.overhead_s: expected at least 0 seconds, got -0\.1"),
        ({"timing_source": " "}, r"^model\.cheap\.timing_source: is missing"),
        ({"steps": None}, r"^model\.cheap\.steps: is missing"),
    ],
)
def test_a_model_without_published_times_is_refused_by_the_key(change, message):
    with pytest.raises(ConfigError, match=message):
        priors(cheap=CURVE).quality({"cheap": TIMES | change})


@pytest.mark.parametrize(
    ("curves", "message"),
    [
        ({"other": CURVE}, r"^data\.curves\.cheap: is missing"),
        ({"cheap": CURVE | {"tau": 0.0}}, r"^data\.curves\.cheap: expected drop of at least 0 and tau above 0"),
        ({"cheap": CURVE | {"top": math.nan}}, r"^data\.curves\.cheap\.top: expected a finite number, got nan"),
        ({"cheap": {"top": 1.0, "drop": 1.0}}, r"^data\.curves\.cheap: expected top, drop and tau, or step counts"),
        ({"cheap": {5: 1.0}}, r"^data\.curves\.cheap\.5: model\.cheap\.steps has no 5"),
        ({"cheap": {"a": CURVE, 2: 1.0}}, r"^data\.curves\.cheap: mixes categories and numbers"),
        ({"cheap": {"a": {2: 1.0}, "b": {4: 1.0}}}, r"^data\.curves\.cheap: 'b' has other step counts than 'a'"),
    ],
)
def test_a_curve_that_cannot_be_read_is_refused_by_the_key(curves, message):
    with pytest.raises(ConfigError, match=message):
        Priors(curves, "made up").quality({"cheap": TIMES})


def test_categories_that_differ_between_models_or_from_their_order_are_refused():
    with pytest.raises(ConfigError, match=r"^data\.curves\.dear: its categories are b, those of another model a"):
        priors(cheap={"a": CURVE}, dear={"b": CURVE}).quality({"cheap": TIMES, "dear": DEAR})
    with pytest.raises(ConfigError, match=r"^data\.categories: expected each of a once, got a, b"):
        Priors({"cheap": {"a": CURVE}}, "made up", ["a", "b"]).quality({"cheap": TIMES})


def test_every_hub_model_of_the_project_can_be_planned_with():
    data = OmegaConf.to_container(OmegaConf.load(ROOT / "conf/data/priors.yaml"))
    data.pop("_target_")
    nodes = [OmegaConf.to_container(OmegaConf.load(file)) for file in (ROOT / "conf/model").glob("*.yaml")]
    models = {name: node for each in nodes for name, node in each.items() if "step_time_s" in node}
    assert {"sd15", "sd21", "sdxl", "sdxl_turbo", "pixart_sigma"} <= set(models)
    assert set(Priors(**data).quality(models).models) == set(models)


def run(tmp_path, *arguments):
    environment = os.environ | {"HF_HOME": str(tmp_path / "hub"), "WANDB_MODE": "disabled"}
    return subprocess.run([sys.executable, str(ROOT / "scripts/run.py"), *arguments, "hydra.run.dir=out"], cwd=tmp_path,
                          env=environment, capture_output=True, text=True, timeout=280)  # fmt: skip


def test_two_hub_models_are_planned_before_any_image_and_nothing_is_downloaded(tmp_path):
    done = run(tmp_path, "+experiment=plan", "data=priors", "model=[sdxl,sd15]", "search=exact",
               "~data.curves.sd15", "+data.curves.sd15={8:27.0,20:30.0}", "workload.demand=2", "workload.latency_weight=1")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not list((tmp_path / "hub").rglob("models--*"))
    assert "diffusers" not in done.stderr
    metrics, plan = (json.loads((tmp_path / "out" / f).read_text()) for f in ("metrics.json", "plan.json"))
    page = (tmp_path / "out/report.html").read_text()
    published = OmegaConf.load(ROOT / "conf/model/sd15.yaml").sd15
    assert metrics["source"]["device"].startswith("priors, not measurements: ")
    for told in (metrics["source"]["device"], plan["source"], page):
        assert "priors, not measurements" in told
        assert str(published.timing_source) in told
    assert NO_REPLAY in metrics["remarks"]
    assert NO_REPLAY in page
    assert NO_REPLAY in done.stdout
    assert "replay" not in metrics["methods"]["plan"]
    # sd15 at 20 steps and 2 requests: 30 − 2 · (0.088 + 20 · 0.0326) = 28.52; at 8 steps 26.30; sdxl at its best
    # count k: 32 − 12 e^(−k/7) − 2 · (0.156 + 0.1079 k) is 27.04 at k = 14.
    assert plan["assignment"] == {"all": {"sd15": 1.0, "sdxl": 0.0}}
    assert plan["steps"]["sd15"] == 20
    own = metrics["methods"]["plan"]
    assert own["latency_s"] == pytest.approx(2 * (0.088 + 20 * 0.0326))
    assert own["utility"] == pytest.approx(30 - 2 * (0.088 + 20 * 0.0326))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["+experiment=plan"], "model.micro_small.step_time_s: is missing"),
        (["+experiment=policies", "model=[sd15]"], "data: priors are no measurements; this task needs a score table"),
    ],
)
def test_what_priors_cannot_give_ends_in_one_line(tmp_path, arguments, message):
    done = run(tmp_path, "data=priors", *arguments)
    assert done.returncode == 1
    assert next(line for line in done.stderr.splitlines() if line.startswith("error: ")).startswith(f"error: {message}")
    assert "Traceback" not in done.stderr
