"""The page is self-contained and escapes what it shows; W&B runs finish also when the code fails."""

import numpy as np
import pytest
from browser import look_over, opens
from matplotlib.figure import Figure

from edgesched.report import page, plans, scores, style


def test_html_is_self_contained_and_escaped(tmp_path):
    figure = scores.sample_images({"m": [np.zeros((8, 8, 3), np.uint8)]}, ["<b>bold</b> prompt"])
    picture = style.save(figure, tmp_path / "f" / "a.png")
    section = page.Section("A <section>", ("1 < 2",), ("name", "value"), [("<i>", 1.5)], [(picture, "a & b")], "{}")
    written = page.write_html(tmp_path / "r.html", "T", {"Device": "<x>"}, [section]).read_text()
    assert "<b>" not in written
    assert "&lt;section&gt;" in written
    assert "1 &lt; 2" in written
    assert "data:image/png;base64," in written
    assert "<script" not in written


@pytest.mark.parametrize(
    ("value", "text"), [(None, "–"), (float("nan"), "–"), (float("-inf"), "−∞"), (0.0, "0"), (12.3456, "12.35"),
                        (1e-5, "1.00e-05"), ("a", "a")]
)  # fmt: skip
def test_cells(value, text):
    assert page.show(value) == text


def test_figures_draw_with_missing_and_constant_values(tmp_path):
    flat = {"a": np.array([1.0, 1.0]), "b": np.array([-np.inf, 0.5])}
    style.save(plans.convergence(flat, 1.0, 1.0), tmp_path / "c.png")
    rows = {"direct": dict.fromkeys(("utility", "quality", "latency_s"), (1.0, 1.0, 1.0))}
    style.save(plans.methods_compared(rows, 2.0), tmp_path / "m.png", vector=True)
    assert (tmp_path / "m.svg").exists()


def test_dollar_signs_and_brackets_of_users_stand_as_they_are(tmp_path, capsys):
    texts = ["a bag with $_{ and $ on it", "$5 or $10"]
    figure = scores.sample_images({"m $_{ $": [np.zeros((8, 8, 3), np.uint8)] * 2}, texts)
    style.save(figure, tmp_path / "samples.png")
    flat = {"$_{ cheap $": np.array([1.0, 2.0]), "[/x]": np.array([-np.inf, 0.5])}
    curves = plans.convergence(flat, 1.0, 1.0)
    curves.axes[0].set_yticks([1.0], ["$_{ cheap $"])
    style.save(curves, tmp_path / "curves.png", vector=True)
    shown = curves.axes[0].get_yticklabels()
    assert [(text.get_text(), text.get_parse_math()) for text in shown] == [("$_{ cheap $", False)]
    plain = Figure().subplots()
    plain.set_xscale("log")
    plain.plot([1, 1000], [0, 1])
    style.save(plain.figure, tmp_path / "log.svg")
    assert any(label.get_parse_math() for label in plain.get_xticklabels())
    page.print_table("[title]", ["[column]"], [["[/x] [red]apple[/red]"]])
    told = capsys.readouterr().out
    assert all(text in told for text in ("[title]", "[column]", "[/x] [red]apple[/red]"))


@pytest.fixture
def browser():
    if not opens():
        pytest.skip("no Chromium here that starts")


def test_a_browser_finds_nothing_wrong_with_a_page_of_long_words_and_wide_tables(tmp_path, browser):
    picture = style.save(plans.methods_compared({"a": dict.fromkeys(("utility", "quality", "latency_s"), (1.0, 0.5, 2.0))}),
                           tmp_path / "f.png")  # fmt: skip
    rows = [["word" * 30, *(1.23456e-5 * i for i in range(14))]] * 3
    sections = [page.Section("L" * 200, ("x" * 500,), ["name", *(f"column {i}" for i in range(14))], rows, [(picture, "c" * 300)]),
                page.Section("Code", code="k" * 400)]  # fmt: skip
    written = page.write_html(tmp_path / "report.html", "T" * 150, {"Device": "d" * 200}, sections)
    found, console = look_over(written, tmp_path)
    assert not console
    for width, seen in found.items():
        assert seen["width"] <= width
        assert seen["images"] == 1
        assert not seen["missing"]
        assert not seen["over"]
        assert not seen["cut"]


def test_the_browser_would_find_what_is_wrong(tmp_path, browser):
    page = tmp_path / "bad.html"
    page.write_text(
        "<!doctype html><body><img src='none.png' alt='gone'><p style='width:2000px'>wide</p>"
        "<p style='width:50px;white-space:nowrap;overflow:hidden'>much too long for its place</p><script>nothing()</script>"
    )
    found, console = look_over(page, tmp_path)
    assert any("nothing is not defined" in line for line in console)
    for seen in found.values():
        assert seen["missing"] == ["gone"]
        assert any(text.startswith("P: wide") for text in seen["over"])
        assert any("too long" in text for text in seen["cut"])
