"""Charts of measurements: what they say, and that they are SVG which follows the page's colours."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import pytest

from fastclr.report.curves import (
    Kernel,
    bar_chart,
    curve_chart,
    roofline_chart,
    short,
    standalone,
)


def texts(svg: str) -> list[str]:
    """Return what is written in a chart."""
    root = ET.fromstring(standalone(svg))
    return [text for element in root.iter() if (text := (element.text or "").strip())]


@pytest.mark.parametrize(
    ("value", "written"),
    [(0.01234, "0.0123"), (12.0, "12"), (1234.0, "1.23k"), (5e6, "5M"), (7.5e9, "7.5G"),
     (2e12, "2T"), (0.0, "0")],
)  # fmt: skip
def test_numbers_are_short(value, written):
    assert short(value) == written


def test_bars_show_their_values():
    svg = bar_chart("bars", {"one & <two>": 3.0, "other": 5.0}, label="images/s")
    assert {"one & <two>", "other", "3", "5", "images/s"} <= set(texts(svg))
    assert 'id="bars"' in svg and "var(--first)" in svg and "#030303" not in svg


def test_a_wide_range_of_bars_is_logarithmic():
    assert "images/s, logarithmic" in texts(bar_chart("b", {"a": 1.0, "b": 31.0}, label="images/s"))
    assert "images/s" in texts(bar_chart("b", {"a": 1.0, "b": 29.0}, label="images/s"))
    assert "images/s" in texts(bar_chart("b", {"a": 0.0, "b": 29.0}, label="images/s"))


def test_bars_show_what_they_are_part_of():
    said = texts(bar_chart("b", {"a": 0.0, "b": 2.0}, label="ms", whole={"a": 4.0, "b": 90.0}))
    assert {"0 of 4", "2 of 90", "ms"} <= set(said)


def test_all_bars_may_be_0():
    assert texts(bar_chart("b", {"a": 0.0}, label="ms", whole={"a": 0.0})).count("0 of 0") == 1


def test_curves_are_named_and_have_numbers_on_both_axes():
    series = {"ours": ([1, 2, 4], [100.0, 190.0, 350.0]), "model": ([2, 4], [200.0, 400.0])}
    said = texts(curve_chart("c", series, x_label="ranks", y_label="images/s"))
    assert {"ours", "model", "ranks", "images/s", "1", "2", "4", "100", "200"} <= set(said)
    lonely = curve_chart("c", {"ours": ([3], [7.0])}, x_label="ranks", y_label="s", from_zero=True)
    assert "ours" not in texts(lonely) and "3" in texts(lonely)


@pytest.mark.parametrize("bandwidth", [None, 1e10])
@pytest.mark.parametrize("peak", [None, 1e11])
def test_a_roof_is_drawn_of_what_is_known(bandwidth, peak):
    kernels = {"LARS": Kernel(0.5, 4e9), "NT-Xent": Kernel(1000.0, 9e10)}
    svg = roofline_chart("r", kernels, bytes_per_second=bandwidth, operations_per_second=peak)
    said = texts(svg)
    assert {"LARS", "NT-Xent", "FLOP/s"} <= set(said)
    assert ("roof" in said) == bool(bandwidth or peak)


def test_two_charts_of_a_page_share_no_id():
    first, second = (curve_chart(name, {"a": ([1, 2], [1.0, 2.0])}, x_label="x", y_label="y")
                     for name in ("first", "second"))  # fmt: skip
    ids = [set(re.findall(r'\sid="([^"]+)"', svg)) for svg in (first, second)]
    assert ids[0] and not ids[0] & ids[1]
