"""What is committed: rows that are what their names say, and the pages that were made of them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

import fastclr.studies
from fastclr.studies.pages import markdown, read_studies
from fastclr.studies.running import find_rows
from tests.report.test_browser import BROWSER, DRIVER, browser  # noqa: F401

FOLDER = Path(fastclr.studies.__file__).parent
ROWS = find_rows(FOLDER / "results")
STUDIES = read_studies(FOLDER / "results")


def test_a_row_is_named_by_its_key():
    assert ROWS
    for digest, file in ROWS.items():
        key = json.loads(file.read_text())["key"]
        text = json.dumps(key, sort_keys=True)
        assert hashlib.sha256(text.encode()).hexdigest()[:16] == digest, file


def test_the_table_is_of_the_rows_there_are():
    assert (FOLDER / "RESULTS.md").read_text() == markdown(STUDIES)
    for study in STUDIES:
        folder = FOLDER / "results" / study["name"] / study["scale"]
        assert (folder / "figure.svg").exists() == bool(study["done"])


@pytest.mark.skipif(not (BROWSER and DRIVER), reason="needs chromium and chromedriver on the PATH")
def test_the_page_opens_without_an_error(browser):  # noqa: F811
    assert browser.console_errors(FOLDER / "studies.html") == []
    charts = browser.run("return document.querySelectorAll('svg.chart').length")
    assert charts == sum(bool(study["done"]) for study in STUDIES)
