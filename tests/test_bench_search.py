"""The benchmark of searches runs small from end to end and writes the keys relied on from outside."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "scripts/bench_search.py"


def test_quick_benchmark_writes_its_keys_and_figures(tmp_path):
    pytest.importorskip("simanneal")
    pytest.importorskip("numba")
    pytest.importorskip("highspy")
    command = [sys.executable, str(SCRIPT), "--quick", "--json", "out.json", "--figures", "figures", "--threads", "1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert {"compiled_vs_eager", "compiled_vs_numba", "dual_annealing_vs_anneal"} <= set(found["ratios"])
    assert {"gap_median", "gap_worst", "regret_median", "seconds"} <= set(found["joint"])
    assert {"method", "gap", "milliseconds"} <= set(found["single"])
    assert found["device"]["name"]
    assert 0 <= found["single"]["gap"] < 0.01
    rows = {(r["problem"], r["method"]): r for r in found["peers"]["rows"]}
    for problem in ("given", "joint"):
        for method in ("solve", "exact", "branch", "coordinate", "relax", "anneal", "tree", "random_search",
                       "dual_annealing", "simanneal", "numba_loop", "integer_program"):  # fmt: skip
            assert rows[problem, method]["gap_median"] >= 0
    assert rows["joint", "exact"]["gap_worst"] < 1e-6
    for problem in ("given", "joint"):
        assert found["many"][problem]["annealing"][0]["within_0.1_percent"] > 0.2
    assert found["many"]["device"] == "CPU"
    assert {p.name for p in (tmp_path / "figures").iterdir()} == {
        f"{name}.{kind}" for name in ("gap_against_time", "scaling") for kind in ("png", "svg")
    }


def test_unknown_section_is_refused(tmp_path):
    pytest.importorskip("simanneal")
    command = [sys.executable, str(SCRIPT), "--only", "everything"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "'everything' is not one of" in done.stderr


def test_a_device_that_is_not_here_is_refused(tmp_path):
    pytest.importorskip("simanneal")
    command = [sys.executable, str(SCRIPT), "--device", "nowhere"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "--device: 'nowhere' cannot be used here" in done.stderr
