"""The figure of a study, from what ``study.json`` says."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from fastclr.report import charts
from fastclr.report.template import Markup

JSON = dict[str, Any]


def _bars(study: JSON) -> Markup:
    """Draw a group of bars for each arm: means and standard errors."""
    arms = _done(study)
    series = {name: _numbers([arm["values"][name] for arm in arms]) for name in study["drawn"]}
    return _chart(study, [arm["name"] for arm in arms], series)


def _columns(study: JSON) -> Markup:
    """Draw a group of bars for each column, one for each of at most three arms."""
    drawn = study["drawn"]
    series = {a["name"]: _numbers([a["values"][name] for name in drawn]) for a in _done(study)}
    return _chart(study, drawn, series)


def _done(study: JSON) -> list[JSON]:
    """Return the arms that have runs."""
    return [arm for arm in study["arms"] if any(cell[2] for cell in arm["values"].values())]


def _numbers(cells: list[list[Any]]) -> tuple[list[float], ...]:
    """Return the means and the standard errors of cells, NaN where there are none."""
    return tuple([math.nan if cell[k] is None else cell[k] for cell in cells] for k in (0, 1))


def _chart(study: JSON, labels: list[str], series: dict[str, Any]) -> Markup:
    return charts.bars_chart(_id(study), labels, series, x_label="accuracy on the test images")


def _grid(study: JSON) -> Markup:
    """Draw arms called ``ROW + COLUMN`` as a square; an arm without a plus is on the diagonal."""
    heading = study["drawn"][0]
    cells = {arm["name"]: arm["values"][heading][0] for arm in study["arms"]}
    parts = {name: name.split(" + ") for name in cells if cells[name] is not None}
    labels = list(dict.fromkeys(part for name in parts for part in parts[name]))
    value_GG = np.full((len(labels), len(labels)), np.nan)
    for name, of in parts.items():
        row, column = labels.index(of[0]), labels.index(of[-1])
        value_GG[row, column] = value_GG[column, row] = cells[name]
    return charts.grid_chart(_id(study), labels, value_GG, title=f"{heading}, per cent")


def _id(study: JSON) -> str:
    return f"{study['name']}-{study['scale']}".replace("_", "-")


def _spaces(study: JSON) -> Markup:
    """Draw the maps of h and z and the spectra of the first seed, a row an arm."""
    rows = {
        arm: (
            {name: np.array(at) for name, at in found["maps"].items()},
            np.array(found["label"]),
            {name: np.array(values) for name, values in found["spectra"].items()},
        )
        for arm, found in study["pictures"].items()
    }
    return charts.spaces_chart(_id(study), rows)


def _histograms(study: JSON) -> Markup:
    """Draw the histograms of crops of the first seed, a row an arm."""
    rows = {arm: np.array(found["histograms"]) for arm, found in study["pictures"].items()}
    return charts.histograms_chart(_id(study), rows)


_MEANS = "Mean and standard error over seeds of {}."
# By kind: what draws it, and the caption, with the headings that are drawn.
FIGURES: dict[str, tuple[Callable[[JSON], Markup], str]] = {
    "bars": (_bars, _MEANS),
    "columns": (_columns, _MEANS),
    "grid": (_grid, _MEANS),
    "histograms": (
        _histograms,
        "Intensities of all channels of four crops of two test images, a column an image.",
    ),
    "spaces": (
        _spaces,
        "t-SNE of test images in the colours of their classes, and singular values divided by the "
        "largest, of the covariances of h and z and of the head's layers; of the first seed.",
    ),
}


def figure(study: JSON) -> Markup:
    """Draw a study's figure; nothing where no run is done."""
    return FIGURES[study["figure"]][0](study) if study["done"] else Markup()


def caption(study: JSON) -> str:
    """Say what a study's figure shows."""
    return FIGURES[study["figure"]][1].format(", ".join(study["drawn"]))
