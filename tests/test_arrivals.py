"""Streams have the rates they were asked for, and a trace is read as it is, with what is wrong in it counted."""

from pathlib import Path

import numpy as np
import pytest
import torch

from edgesched.errors import ArgumentError, EdgeschedError, RequestError
from edgesched.streams.arrivals import RequestStream, bursty, diurnal, poisson, trace

TRACE = Path(__file__).resolve().parents[2] / "shared/data/t2i_requests.csv"
RATE, NAMES = [0.6, 0.3, 0.1], ("a", "b", "c")


@pytest.mark.parametrize("make", [poisson, bursty, diurnal])
def test_rates_and_categories_are_as_asked(make):
    options = {"period_s": 600.0} if make is diurnal else {"burst_s": 20.0} if make is bursty else {}
    came = make(RATE, NAMES, requests=30_000, replicas=4, seed=1, **options)
    assert torch.allclose(came.rate, torch.tensor(RATE, dtype=torch.float64), rtol=0.06)
    assert came.replicas == 4
    assert torch.equal(came.arrival_s, make(RATE, NAMES, requests=30_000, replicas=4, seed=1, **options).arrival_s)
    other = make(RATE, NAMES, requests=30_000, replicas=4, seed=2, **options)
    assert not torch.equal(came.arrival_s, other.arrival_s)


def dispersion(came, window):
    """Variance over mean of the counts of windows: 1 for a Poisson stream."""
    counts = np.concatenate([np.bincount((row / window).astype(int))[:-1] for row in came.arrival_s.numpy()])
    return counts.var() / counts.mean()


def test_bursts_are_bursty_and_poisson_is_not():
    assert dispersion(poisson(RATE, NAMES, requests=30_000), 30.0) == pytest.approx(1, abs=0.15)
    assert dispersion(bursty(RATE, NAMES, requests=30_000, burst=6.0), 30.0) > 3


def test_a_day_has_a_peak_and_a_trough():
    came = diurnal([1.0], ["all"], requests=60_000, swing=0.8, period_s=1_000.0)
    phase = came.arrival_s[0].remainder(1_000.0) / 1_000.0
    count = torch.histc(phase.float(), bins=4, min=0, max=1)
    assert count[0] > 2.5 * count[3]
    flat = diurnal([1.0], ["all"], requests=60_000, swing=0.0, period_s=1_000.0)
    assert dispersion(flat, 30.0) == pytest.approx(1, abs=0.15)


def test_a_trace_is_scaled_filtered_and_its_malformed_rows_are_counted(tmp_path, caplog):
    file = tmp_path / "trace.csv"
    file.write_text(
        "gmt_create,predict_type,prompt_length\n"
        "2024-11-15 10:00:10,TXT_2_IMG,5\n"
        "2024-11-15 10:00:00,TXT_2_IMG,50\n"
        "not a time,TXT_2_IMG,7\n"
        "2024-11-15 10:00:05,INPAINTING,7\n"
        "2024-11-15 10:00:30,TXT_2_IMG,\n"
    )
    came = trace(file, ["short", "long"], rate_scale=10.0)
    assert came.arrival_s.tolist() == [[0.0, 1.0, 3.0]]
    assert came.category[0, :2].tolist() == [1, 0]
    assert "1 of 4 rows are malformed and skipped, the first at line 4" in caplog.text
    assert len(trace(file, ["short", "long"], tasks=None)) == 4
    assert len(trace(file, ["short", "long"], limit=1)) == 1


def test_a_trace_with_seconds_and_named_categories(tmp_path, caplog):
    file = tmp_path / "trace.csv"
    file.write_text("at,kind\n3.5,Basic\n1.5,Complex\n2.0,Unknown\n")
    came = trace(file, ["Basic", "Complex"], tasks=None, time_column="at", category_column="kind")
    assert came.arrival_s.tolist() == [[0.0, 2.0]]
    assert came.category.tolist() == [[1, 0]]
    assert "1 of 3 rows are malformed" in caplog.text


@pytest.mark.skipif(not TRACE.exists(), reason="the trace is not here")
def test_the_production_trace_works_as_it_is():
    came = trace(TRACE, ["Basic", "Detail", "Imagination", "Complex"])
    assert len(came) == 17_177
    assert float(came.rate.sum()) * 3600 == pytest.approx(40.9, abs=0.5)
    parts = torch.bincount(came.category[0]) / len(came)
    assert torch.allclose(parts, torch.full((4,), 0.25), atol=0.03)


def test_bad_input_is_named(tmp_path):
    file = tmp_path / "trace.csv"
    file.write_text("gmt_create,predict_type\n2024-11-15 10:00:10,INPAINTING\n")
    with pytest.raises(RequestError, match=r"no request is left; tasks kept: TXT_2_IMG"):
        trace(file, ["a"])
    with pytest.raises(RequestError, match="column 'when' is missing; present: gmt_create, predict_type"):
        trace(file, ["a"], time_column="when")
    with pytest.raises(RequestError, match="cannot be read"):
        trace(tmp_path / "nothing.csv", ["a"])
    with pytest.raises(RequestError, match="rate_scale"):
        trace(file, ["a"], rate_scale=0.0)
    with pytest.raises(RequestError, match="rate: expected 1 finite rates"):
        poisson([float("nan")], ["a"])
    with pytest.raises(RequestError, match="swing"):
        diurnal([1.0], ["a"], swing=2.0)
    with pytest.raises(RequestError, match="burst"):
        bursty([1.0], ["a"], burst_share=1.0)
    with pytest.raises(RequestError, match="do not decrease"):
        RequestStream([[1.0, 0.5]], [[0, 0]], ("a",))
    with pytest.raises(RequestError, match="positions 0 to 0"):
        RequestStream([[0.0, 0.5]], [[0, 1]], ("a",))


def arrivals(file, text, **options):
    file.write_text(text, encoding="utf-8")
    options = {"tasks": None, "time_column": "t", "length_column": None} | options
    return trace(file, ("A", "B"), **options).arrival_s[0].tolist()


def refusal(file, text, **options):
    with pytest.raises(RequestError) as caught:
        arrivals(file, text, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_trailing_comma_shifts_no_column_and_more_fields_are_refused(tmp_path):
    file = tmp_path / "t.csv"
    assert arrivals(file, "t,prompt_length\n10,300,\n12,900,\n19,400,\n", length_column="prompt_length") == [0, 2, 9]
    assert "line 3: 4 fields, the header has 2" in refusal(file, "t,n\n1,2\n3,4,extra,cells\n")
    assert "line 3: 1 fields, the header has 2" in refusal(file, "t,n\n1,2\n3\n")


def test_line_breaks_in_quotes_are_no_malformed_rows(tmp_path, caplog):
    assert arrivals(tmp_path / "t.csv", 't,prompt\n1,"a red\nboat"\n2,"a cow\nin a field"\n') == [0, 1]
    assert not caplog.records


def test_rows_out_of_order_are_sorted_with_one_warning(tmp_path, caplog):
    assert arrivals(tmp_path / "t.csv", "t\n5\n3\n9\n4\n") == [0, 1, 2, 6]
    assert [r.message for r in caplog.records] == [
        "t.csv: 2 of 4 rows are earlier than the row before, the first at line 3; sorted by time"
    ]


def test_a_clock_that_is_set_back_is_refused_unless_offsets_say_the_order(tmp_path):
    file = tmp_path / "t.csv"
    local = "t\n2024-10-27 02:30:00\n2024-10-27 02:59:50\n2024-10-27 02:00:05\n2024-10-27 02:40:00\n"
    assert "line 4: t goes back by 3585 s" in refusal(file, local)
    named = "t\n2024-10-27T02:59:50+02:00\n2024-10-27T02:00:05+01:00\n"
    assert arrivals(file, named) == [0, 15]  # 00:59:50 and 01:00:05 in UTC


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_speed_up_that_is_no_speed_is_a_wrong_argument(tmp_path, value):
    (tmp_path / "t.csv").write_text("t\n1\n2\n")
    with pytest.raises(ArgumentError, match="rate_scale: expected a finite number above 0"):
        trace(tmp_path / "t.csv", ["a"], tasks=None, time_column="t", rate_scale=value)


@pytest.mark.parametrize(
    ("make", "options", "name"),
    [(bursty, {"burst": float("nan")}, "burst"), (bursty, {"burst_s": float("inf")}, "burst_s"),
     (diurnal, {"period_s": float("nan")}, "period_s"), (poisson, {"rate": [0.0]}, "rate")],
)  # fmt: skip
def test_arguments_of_streams_out_of_range_are_wrong_arguments(make, options, name):
    with pytest.raises(ArgumentError, match=name):
        make(**({"rate": [1.0], "categories": ["a"]} | options))


def test_limits_lengths_and_tasks_are_held_to_their_kind(tmp_path, caplog):
    file = tmp_path / "t.csv"
    text = "t,task,n\n1,draw,3\n2,other,4\n4,draw,\n"
    for limit in (0, -1, 1.5):
        with pytest.raises(ArgumentError, match="limit"):
            arrivals(file, text, limit=limit)
    assert arrivals(file, text, limit=2) == [0, 1]
    assert arrivals(file, text, tasks="draw", task_column="task", length_column="n") == [0, 3]
    assert "line 2: n is 'long'" in refusal(file, "t,n\n1,long\n", length_column="n")
    assert not caplog.records
    arrivals(file, text, length_column="length")
    assert "no column 'length'" in caplog.text
    assert "all requests arrive at once" in refusal(file, "t\n1\n1\n", rate=[1.0, 1.0])
    with pytest.raises(EdgeschedError, match="whole positions"):
        RequestStream([[0.0, 1.0]], [[0.0, 0.5]], ("a", "b"))
