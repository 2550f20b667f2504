"""Pages of studies: complete, escaped, with figures, without an error in a browser."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET
from dataclasses import replace

import numpy as np
import pytest

from fastclr.config import ConfigError
from fastclr.report import charts
from fastclr.studies import STUDIES, pages
from fastclr.studies.figures import FIGURES, caption, figure
from fastclr.studies.pages import html, markdown, read_studies, write_pages, write_study
from fastclr.studies.scales import TOY
from fastclr.studies.study import Arm, Claim, is_fraction
from fastclr.studies.summaries import summary
from tests.report.test_browser import BROWSER, DRIVER, browser  # noqa: F401
from tests.studies.conftest import plain_study

HOSTILE = "<script>undefined_name()</script> | & $x$"
FACTS = {"name": "tiles", "num_train": 96, "num_test": 64}


def made(num_seeds=3, name="heads", figure="bars", **arms):
    """Return the summary of a study with given h by arm; z is a tenth less."""
    arms = arms or {"a": 0.5, HOSTILE: 0.4}
    study = plain_study(
        {arm: Arm(TOY.base) for arm in arms},
        [Claim(f"{HOSTILE} is worse", (next(iter(arms)),), (list(arms)[-1],))],
        published={HOSTILE: "63.9"},
        figure=figure,
    )
    rows = [
        {
            "key": [arm, seed], "arm": arm, "seed": seed, "seconds": 36.0, "threads": 1,
            "measured": "2026-01-01T00:00:00",
            "hardware": {"device": "cpu", "processor": "Example CPU"},
            "scores": {"h": {"linear": h + seed / 100}, "z": {"linear": h - 0.1}},
        }
        for arm, h in arms.items()
        for seed in range(num_seeds)
    ]  # fmt: skip
    return summary(name, replace(study, title=f"Title {name}"), "toy", TOY, FACTS, rows, num_seeds)


def test_a_summary_has_means_errors_and_verdicts():
    found = made()
    assert found["arms"][0]["values"]["h, linear"] == [
        pytest.approx(0.51), pytest.approx(0.01 / 3**0.5), 3,
    ]  # fmt: skip
    assert found["verdicts"][0]["verdict"] == "holds"
    assert found["verdicts"][0]["difference"] == pytest.approx(0.1)
    assert len(found["seconds"]) == 6 and set(found["seconds"].values()) == {36.0}
    assert found["hardware"] == ["Example CPU, 1 thread"]
    assert (found["done"], found["runs"]) == (6, 6)


def test_markdown_shows_tables_published_numbers_and_verdicts():
    text = markdown([made()])
    assert "| a | 51.0 ± 0.6 | 40.0 ± 0.0 | 3 |  |" in text
    assert "\\| & $x$ | 41.0 ± 0.6 | 30.0 ± 0.0 | 3 | 63.9 |" in text
    assert "| +10.0 ± 0.0 | 3 | holds |" in text
    assert "results/heads/toy/figure.svg" in text
    assert "6 of 6 runs, 0.1 hours on Example CPU, 1 thread, 2026-01-01" in text


def test_a_run_that_studies_share_is_counted_once():
    page = html([made(), made(name="losses"), made(2, name="temperature", c=0.2)])
    assert "3 studies, 8 runs, 0.1 hours." in page


def test_small_numbers_keep_two_digits():
    study = made()
    for value, said in ((0.00061, "0.00061 ± 0.00001"), (-0.071, "-0.071 ± 0.000"), (0.0, "0.00")):
        study["arms"][0]["values"]["h, linear"] = [value, 1e-5 if value else None, 3]
        study["plain"] = ["h, linear"]
        assert f"| {said} |" in markdown([study])


def test_a_study_without_a_run_has_no_figure_and_no_number(tmp_path):
    empty = made(0)
    assert figure(empty) == ""
    text = markdown([empty])
    assert "figure.svg" not in text
    assert "no verdict: 0 of 3 seeds" in text
    write_study(tmp_path, empty)
    assert not (tmp_path / "figure.svg").exists()
    assert "Title heads" in html([empty])


def test_pages_are_of_all_studies_in_their_order(tmp_path):
    for name in ("temperature", "heads"):
        folder = tmp_path / "results" / name / "toy"
        folder.mkdir(parents=True)
        write_study(folder, made(name=name))
    other = tmp_path / "results" / "gone" / "toy"
    other.mkdir(parents=True)
    write_study(other, made(name="gone"))
    write_pages(tmp_path)
    assert [s["name"] for s in read_studies(tmp_path / "results")] == ["heads", "temperature"]
    for page in ("RESULTS.md", "studies.html"):
        text = (tmp_path / page).read_text()
        assert text.index("Title heads") < text.index("Title temperature")
        assert "gone" not in text


@pytest.mark.parametrize("text", ["{", "[]", '{"hours": 1.0}'])
def test_a_damaged_study_is_refused(tmp_path, text):
    folder = tmp_path / "results" / "heads" / "toy"
    folder.mkdir(parents=True)
    (folder / "study.json").write_text(text)
    with pytest.raises(ConfigError, match=r"is damaged.*makes it from the rows"):
        read_studies(tmp_path / "results")


def test_text_is_escaped():
    page = html([made()])
    assert "<script>undefined_name()" not in page
    assert "&lt;script&gt;undefined_name()" in page


def test_every_study_has_a_figure_that_exists():
    assert {study.figure for study in STUDIES.values()} <= set(FIGURES)
    for study in STUDIES.values():
        assert set(study.drawn) <= set(study.columns)


def test_a_grid_is_drawn_on_both_sides_of_its_diagonal():
    drawn = made(3, "augmentations", "grid", **{"b": 0.2, "b + c": 0.3, "c": 0.4})
    chart = figure(drawn)
    assert [chart.count(f">{text}<") for text in ("21.0", "31.0", "41.0")] == [1, 2, 1]


def test_columns_are_groups_of_an_arms_bars_and_bars_groups_of_a_column(monkeypatch):
    monkeypatch.setattr(charts, "bars_chart", lambda _, labels, series, x_label: (labels, series))
    study = made(3, **{"a": 0.5, "b": 0.4})
    study["arms"][1]["values"]["z, linear"] = [None, None, 0]
    labels, series = figure({**study, "figure": "columns"})
    assert labels == ["h, linear", "z, linear"] and list(series) == ["a", "b"]
    assert series["a"][0] == pytest.approx([0.51, 0.4])
    assert series["b"][0] == pytest.approx([0.41, math.nan], nan_ok=True)
    labels, series = figure(study)
    assert labels == ["a", "b"] and list(series) == ["h, linear", "z, linear"]
    assert series["h, linear"][0] == pytest.approx([0.51, 0.41])


SPACES = {
    "maps": {"h": [[0, 0], [1000, 40], [3, 1000]], "z": [[0, 0], [9, 0], [1000, 1000]]},
    "label": [0, 2, 0],
    "spectra": {"h": [1.0, 0.1, 0.0], "z": [1.0], "fc1": [1.0, 0.9]},
}


def pictured(num_seeds=1, name="head_spectrum", figure="spaces", pictures=SPACES):
    """Return the summary of a study with pictures."""
    study = plain_study({"a": Arm(TOY.base)}, [], figure=figure)
    row = {"arm": "a", "seconds": 1.0, "measured": "2026-01-01T00:00:00", "threads": 1,
           "hardware": {"device": "cpu", "processor": "Example CPU"}}  # fmt: skip
    rows = [
        {
            **row,
            "seed": seed,
            "key": seed,
            "scores": {"h": {"linear": 0.5}, "pictures": {**pictures, "seed": seed}},
        }
        for seed in range(num_seeds)
    ]
    return summary(name, study, "toy", TOY, FACTS, rows, num_seeds)


def test_pictures_are_those_of_the_first_seed():
    found = pictured(2)
    assert found["pictures"]["a"]["seed"] == 0
    chart = figure(found)
    assert all(f">{text}<" in chart for text in ("a: h", "a: z", "fc1", "singular values"))
    assert "in the colours of their classes" in caption(found)
    assert caption(made()) == "Mean and standard error over seeds of h, linear, z, linear."


def test_a_column_without_a_score_is_left_out():
    found = pictured()
    assert found["headings"] == ["h, linear"]
    assert [list(arm["values"]) for arm in found["arms"]] == [["h, linear"]]
    assert pictured(0)["headings"] == ["h, linear", "z, linear"]


def test_fractions_are_shown_in_per_cent_and_others_as_they_are():
    found = made()
    found["plain"] = ["z, linear"]
    assert "| a | 51.0 ± 0.6 | 0.40 ± 0.00 | 3 |  |" in markdown([found])
    for path in ("h.linear", "tuned.1", "transfer.linear", "log.accuracy", "h.in_plane"):
        assert is_fraction(path)
    for path in ("h.rank", "weights.fc1", "log.loss", "z.silhouette", "log.entropy"):
        assert not is_fraction(path)


def test_charts_are_whole_svg_files():
    chart = charts.bars_chart(
        "bars", ["a", "<b>"], {"x": ([0.5, float("nan")], [0.1, float("nan")])}, x_label="x",
        reference=0.1,
    )  # fmt: skip
    grid = charts.grid_chart("grid", ["a", "b"], np.array([[0.1, np.nan], [0.2, 0.3]]), title="t")
    for svg in (chart, grid):
        root = ET.fromstring(charts.standalone(svg))
        assert root.tag.endswith("svg")
        assert "var(--first)" in svg
        assert "--first:" in charts.standalone(svg)
    assert pages._table_markdown(["a"], [["b|c"]]).splitlines()[-1] == "| b\\|c |"


@pytest.mark.skipif(not (BROWSER and DRIVER), reason="needs chromium and chromedriver on the PATH")
def test_the_page_opens_without_an_error_and_shows_its_charts(browser, tmp_path):  # noqa: F811
    grid = made(3, "augmentations", "grid", **{"b": 0.2, "b + c": 0.3, "c": 0.4})
    histograms = pictured(
        1, "color_histogram", "histograms", {"histograms": [[[0.5, 0.5], [0.2, 0.8]]]}
    )
    page = tmp_path / "studies.html"
    page.write_text(html([made(), grid, pictured(), histograms, made(0, "losses")]))
    assert browser.console_errors(page) == []
    sizes = browser.run(
        "return Array.from(document.querySelectorAll('svg.chart'), chart => "
        "[chart.id, chart.getBoundingClientRect().width])"
    )
    assert [name for name, _ in sizes] == [
        "heads-toy",
        "augmentations-toy",
        "head-spectrum-toy",
        "color-histogram-toy",
    ]
    assert all(width > 200 for _, width in sizes)
    browser.resize(380)
    browser.console_errors(page)
    assert browser.run("return document.documentElement.scrollWidth") <= 380
