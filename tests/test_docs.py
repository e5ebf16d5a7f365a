"""API pages are made from the docstrings by one command, and have what the public API promises."""

import subprocess
import sys

import pytest
from composing import ROOT

import edgesched as es

SEARCHES = ("anneal", "relax", "exact")


@pytest.mark.slow
def test_every_public_name_has_a_page(tmp_path):
    pytest.importorskip("pdoc")
    command = [sys.executable, str(ROOT / "scripts/api_docs.py"), str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "Error importing" not in done.stderr
    first = (tmp_path / "edgesched.html").read_text()
    for name in es.__all__:
        if name != "search":
            assert f'id="{name}"' in first, name
    for member in ("Scenario.random", "Scenario.to", "ScoreTable.load", "SearchResult.gap", "QualityModel.scenario"):
        assert f'id="{member}"' in first, member
    searches = (tmp_path / "edgesched/search.html").read_text()
    for name in SEARCHES:
        assert f'id="{name}"' in searches, name
    for page in ("protocols", "tasks/schedule", "generation/campaign", "equations/bounds"):
        assert "<h1" in (tmp_path / f"edgesched/{page}.html").read_text(), page
    assert not list(tmp_path.rglob("_*.html"))
    assert (tmp_path / "index.html").exists()
