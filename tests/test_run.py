"""A run leaves strict metrics at once, and a page that fails costs none of them."""

import json

from edgesched.report.page import Page, Section
from edgesched.runs.run import Run
from edgesched.runs.tracking import Tracker


def test_metrics_are_written_before_the_page_and_a_page_that_fails_costs_none(tmp_path, caplog, capsys):
    rows = [["a", 1.5], ["b", None]]
    broken = Section("Broken", figures=[(tmp_path / "missing.png", "gone")])
    with Tracker(tmp_path, {}, "t", mode="disabled") as tracker:
        run = Run(tmp_path, "t", tracker)
        run.save({"value": float("inf"), "nested": {"x": 1}})
        run.publish(
            Page(
                {"Device": "this one"},
                [Section("Shown", ("Some words.",), ("name", "value"), rows, key="shown"), broken],
            )
        )
    found = json.loads((tmp_path / "metrics.json").read_text())
    assert found["value"] is None
    assert found["nested"] == {"x": 1}
    assert found["seconds_total"] >= 0
    assert [m for m in caplog.messages if m.startswith("the report: left out (FileNotFoundError")]
    out = capsys.readouterr().out
    assert all(word in out for word in ("Device: this one", "Shown", "Some words."))
    assert "Broken" not in out


def test_a_page_says_how_to_repeat_the_run(tmp_path):
    (tmp_path / ".hydra").mkdir()
    (tmp_path / ".hydra/overrides.yaml").write_text(
        f"- +experiment=plan\n- data.path={'very/long/' * 20}\n- 'a=[1, 2]'\n"
    )
    with Tracker(tmp_path, {}, "t", mode="disabled") as tracker:
        Run(tmp_path, "t", tracker).publish(Page({"Device": "x"}, [Section("One")]))
    page = (tmp_path / "report.html").read_text()
    assert "python scripts/run.py +experiment=plan data.path=very/long/" in page
    assert "&#x27;a=[1, 2]&#x27;" in page
