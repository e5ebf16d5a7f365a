"""The headline says what replay gave, at the same grid point, and the command leaves table and figures."""

import json
import sys

import numpy as np
import pytest
from browser import look_over, opens
from composing import run_task

from edgesched.errors import ArgumentError, RequestError
from edgesched.evaluation.grid import Grid, headline
from edgesched.tasks.paper import BASELINES, headline_rows, words

POINTS = [(load, 1.0, weight) for load in (4.0, 16.0) for weight in (1.0, 10.0)]


def grid(quality_factor=1.1, delay_factor=0.8, splits=3, draws=40, seed=0):
    """Annealing a fixed factor from every baseline, the same noise behind both."""
    rng = np.random.default_rng(seed)
    noise = rng.normal(0, 2, (splits, len(POINTS), draws + 1))
    noise[..., 0] = 0
    base = 60 + noise
    delay = np.tile(np.array([1.0, 2.0, 3.0, 4.0]), (splits, 1))
    weight = np.array([p[2] for p in POINTS])[None, :, None]
    quality = dict.fromkeys(BASELINES, base) | {"annealing": quality_factor * base, "published": base}
    latency = dict.fromkeys(BASELINES, delay) | {"annealing": delay_factor * delay, "published": delay}
    utility = {n: quality[n] - weight * latency[n][..., None] for n in quality}
    return Grid(POINTS, utility, quality, latency)


def test_a_fixed_factor_is_recovered_with_paired_intervals():
    rows = headline(grid(), "annealing", BASELINES)
    assert set(rows) == set(BASELINES)
    for row in rows.values():
        for key, value in (("quality_gain_pct", 10.0), ("latency_cut_pct", 20.0)):
            assert row[key] == pytest.approx({"best": value, "median": value, "lo": value, "hi": value})
        assert row["best_point"]["points_both_better"] == len(POINTS)
        assert row["utility_gain"]["lo"] < row["utility_gain"]["median"] < row["utility_gain"]["hi"]


def test_the_best_point_is_one_point_for_both_numbers():
    made = grid()
    made.quality["annealing"][:, 2] *= 1.2
    made.latency_s["annealing"][:, 1] *= 0.5
    row = headline(made, "annealing", BASELINES)["direct"]
    assert row["quality_gain_pct"]["best"] == pytest.approx(32)
    assert row["latency_cut_pct"]["best"] == pytest.approx(20)
    assert (row["best_point"]["load"], row["best_point"]["latency_weight"]) == (16.0, 1.0)


def test_losses_and_trades_are_said():
    agreement = {
        "measured_vs_predicted_pct": 3.25,
        "measured_vs_simulated_pct": 1.5,
        "measured_vs_resimulated_pct": 0.5,
    }
    worse = words(headline(grid(0.9, 1.3), "annealing", BASELINES), agreement)
    assert worse[0].startswith("Over direct, annealing loses utility")
    assert "No grid point is better in both" in worse[0]
    assert worse[-1] == (
        "Served for real on this machine, the mean delay was 3.2 % off theory and 1.5 % off a simulation of the same arrivals "
        "(0.5 % with the step times seen meanwhile)."
    )
    trade = words(headline(grid(1.1, 1.3), "annealing", BASELINES), {})
    assert "takes 30.0 % more delay for 10.0 % more quality" in trade[0]
    spare = words(headline(grid(0.95, 0.5), "annealing", BASELINES), {})
    assert "gives up 5.0 % of quality for 50.0 % less delay" in spare[0]


def test_a_curve_follows_one_axis_and_pairs_its_differences():
    made = grid()
    curve = made.curve("annealing", "quality", 0, (4.0, 1.0, 10.0))
    assert curve[:, 0].tolist() == [4.0, 16.0]
    assert np.allclose(curve[:, 1], 66)
    difference = made.curve("published", "quality", 0, (4.0, 1.0, 10.0), "direct")
    assert np.allclose(difference[:, 1:], 0)
    columns, rows = headline_rows(
        {
            "headline": headline(made, "annealing", BASELINES),
            "headline_published": headline(made, "published", BASELINES),
        }
    )
    assert all(len(row) == len(columns) for row in rows)
    assert rows[-1][0] == "arXiv 2409.09072"


SMALL = (
    "+experiment=paper", "samples=none", "paper.loads=[8,32]", "paper.budgets=[1]", "paper.latency_weights=[10]",
    "paper.splits=2", "paper.draws=20", "replay.draws=50", "search.iterations=60", "quality.max_epochs=20",
    "policies.compare.trained.starts=1", "policies.compare.trained.iterations=3", "stream.requests=12", "stream.agreement_requests=2000",
)  # fmt: skip


@pytest.mark.slow
def test_the_paper_experiment_leaves_what_it_promises(tmp_path, capsys):
    run_task(tmp_path, *SMALL)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    for baseline in BASELINES:
        for key in ("quality_gain_pct", "latency_cut_pct"):
            assert {"best", "median", "lo", "hi"} <= set(metrics["headline"][baseline][key])
    found = metrics["agreement"]
    assert found["simpy_max_abs_s"] < 1e-6
    assert found["pk_relative"] < 3 * found["pk_halfwidth"] + 0.01
    assert found["measured_vs_simulated_pct"] >= 0
    assert metrics["headline"]["optimal_step"]["utility_gain"]["median"] > 0
    pictures = {file.stem for file in (tmp_path / "figures").glob("*.svg")}
    assert len(pictures) == 9
    page = (tmp_path / "report.html").read_text()
    assert "Over optimal_step, annealing gains utility" in page
    assert "Over optimal_step, annealing gains utility" in capsys.readouterr().out
    if opens():
        found, console = look_over(tmp_path / "report.html", tmp_path)
        assert not console
        for width, seen in found.items():
            assert seen["width"] <= width
            assert seen["images"] == 9
            assert [*seen["missing"], *seen["over"], *seen["cut"]] == []


def test_an_optional_check_that_fails_loses_nothing_of_the_grid(tmp_path, monkeypatch, caplog):
    def made(problem, methods, points, sizes, routing):
        shape = (sizes.splits, len(points), 1 + sizes.draws)
        values = {name: np.full(shape, 50.0 + i) for i, name in enumerate(methods)}
        return Grid(points, values, values, {name: np.ones(shape[:2]) for name in methods})

    def failing(*_, **__):
        raise RequestError("stream.requests: overloaded")

    module = sys.modules["edgesched.tasks.paper"]
    monkeypatch.setattr(module, "run_grid", made)
    monkeypatch.setattr(module, "agreement", failing)
    monkeypatch.setattr(module, "score_levels", failing)
    run_task(tmp_path, *SMALL)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert set(metrics["headline"]) == set(BASELINES)
    assert metrics["agreement"] == {}
    assert len(metrics["words"]) == len(BASELINES)
    left = [message for message in caplog.messages if "left out" in message]
    assert left[0] == "the agreement of simulator, theory and service: left out (stream.requests: overloaded)"
    assert "the figure of score levels: left out (stream.requests: overloaded)" in left
    assert "What came out" in (tmp_path / "report.html").read_text()


def test_a_bad_grid_is_refused(tmp_path):
    with pytest.raises(ArgumentError, match=r"paper.loads: expected different numbers above 0, got \[4.0, 0.0\]"):
        run_task(tmp_path, "+experiment=paper", "paper.loads=[4,0]")
    with pytest.raises(ArgumentError, match="method: the published evaluation needs direct"):
        run_task(tmp_path, "+experiment=paper", "method=[annealing,published]")
    with pytest.raises(ArgumentError, match=r"paper.splits: expected at least 1"):
        run_task(tmp_path, "+experiment=paper", "paper.splits=0")
