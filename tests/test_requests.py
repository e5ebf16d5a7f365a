"""Streams have the rates they were asked for, and a trace is read as it is, with what is wrong in it counted."""

from pathlib import Path

import numpy as np
import pytest
import torch

from edgesched.errors import ArgumentError, RequestError
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
        ",TXT_2_IMG,7\n"
        "2024-11-15 10:00:05,INPAINTING,7\n"
        "2024-11-15 10:00:30,TXT_2_IMG,\n"
    )
    came = trace(file, ["short", "long"], rate_scale=10.0)
    assert came.arrival_s.tolist() == [[0.0, 1.0, 3.0]]
    assert came.category[0, :2].tolist() == [1, 0]
    assert "1 of 4 rows are malformed and skipped" in caplog.text
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
    for scale in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ArgumentError, match="rate_scale: expected a number above 0"):
            trace(file, ["a"], rate_scale=scale)
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
