"""Charts of measurements: bars, curves on logarithmic axes, a roofline; in the report's style."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from fastclr.report import charts
from fastclr.report.template import Markup

_WIDTH, _BAR, _MARGIN = 4.9, 0.3, 0.85  # inches
_WIDE_RANGE = 30  # from the smallest to the largest bar: beyond, a logarithmic axis
_MOST_TICKS = 7
_NAME_CHARACTERS = 24  # in a line beside a bar
_UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


class Kernel(NamedTuple):
    """A point of a roofline.

    Attributes:
        intensity: Operations for each byte that has to be moved, FLOP/B.
        speed: Operations a second, FLOP/s.
    """

    intensity: float
    speed: float


def bar_chart(
    name: str,
    values: Mapping[str, float],
    *,
    label: str,
    whole: Mapping[str, float] | None = None,
) -> Markup:
    """Draw one bar a value, from the top down, with the value at its end.

    Args:
        name: Chart name, unique on the page.
        values: At least one, by name. A wide range makes the axis logarithmic, if all are above 0.
        label: What the bars show, with the unit; also the text alternative.
        whole: What each value is a part of, drawn pale behind it on an axis from 0; the numbers
            are then both. None for no such thing.

    Returns:
        An `<svg>` element.
    """
    figure, axes = charts.new_axes()
    figure.set_size_inches(_WIDTH, _BAR * len(values) + _MARGIN)
    numbers = list(values.values())
    names = [textwrap.fill(key, _NAME_CHARACTERS) for key in values]
    longest = [whole[key] for key in values] if whole else numbers
    texts = [short(value) for value in numbers]
    if whole:
        texts = [f"{part} of {short(all_)}" for part, all_ in zip(texts, longest, strict=True)]
        axes.barh(names, longest, 0.66, color=charts._MUTED, alpha=0.45)
    bars = axes.barh(names, numbers, 0.66, color=charts._FIRST)
    low, high = min(numbers), max(longest)
    if low > 0 and high > _WIDE_RANGE * low and not whole:
        axes.set(xscale="log", xlim=(low / 3, 6 * high))
        label += ", logarithmic"
    else:
        axes.set_xlim(0, 1.3 * high or 1)
    for bar, end, text in zip(bars, longest, texts, strict=True):
        place = (end, bar.get_y() + bar.get_height() / 2)
        axes.annotate(
            text, place, (4, 0), textcoords="offset points", va="center", color=charts._INK
        )
    axes.invert_yaxis()
    axes.grid(False)
    axes.xaxis.set_major_locator(NullLocator())
    axes.xaxis.set_minor_locator(NullLocator())
    axes.spines["bottom"].set_visible(False)
    axes.set_xlabel(label)
    return charts.svg(figure, name, f"{label}: {', '.join(values)}")


def curve_chart(
    name: str,
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    x_label: str,
    y_label: str,
    from_zero: bool = False,
) -> Markup:
    """Draw series over sizes that grow by factors, a dot for each measurement.

    Args:
        name: Chart name, unique on the page.
        series: Horizontal and vertical values by name, at least one pair, all above 0.
        x_label: Label of the horizontal axis, with the unit.
        y_label: Label of the vertical axis, with the unit; also the text alternative.
        from_zero: Draw the vertical axis from 0 instead of logarithmic.

    Returns:
        An `<svg>` element.
    """
    figure, axes = charts.new_axes()
    for (label, (x_N, y_N)), color in zip(series.items(), _colors(len(series)), strict=True):
        axes.plot(x_N, y_N, color=color, linewidth=2, marker="o", markersize=4, label=label)
    places = sorted({x for x_N, _ in series.values() for x in x_N})
    axes.set(xscale="log", xlabel=x_label, ylabel=y_label)
    axes.xaxis.set_major_locator(FixedLocator(_apart(places)))
    if from_zero:
        axes.set_ylim(bottom=0)
    else:
        axes.set_yscale("log")
        _frame(axes, [y for _, y_N in series.values() for y in y_N])
    _plain_numbers(axes)
    if len(series) > 1:
        charts.add_legend(axes)
    return charts.svg(figure, name, f"{y_label} over {x_label}: {', '.join(series)}")


def _apart(places: Sequence[float]) -> list[float]:
    """Return the first of the places, and those far enough from the one before for a label."""
    least = math.log(places[-1] / places[0]) / _MOST_TICKS
    kept = list(places[:1])
    for place in places[1:]:
        if math.log(place / kept[-1]) >= least:
            kept.append(place)
    return kept


def roofline_chart(
    name: str,
    kernels: Mapping[str, Kernel],
    *,
    bytes_per_second: float | None,
    operations_per_second: float | None,
) -> Markup:
    """Draw kernels under what memory and arithmetic allow.

    Args:
        name: Chart name, unique on the page.
        kernels: At least one, by name.
        bytes_per_second: What memory moves at best; None if it was not measured.
        operations_per_second: What arithmetic does at best, FLOP/s; None likewise.

    Returns:
        An `<svg>` element.
    """
    figure, axes = charts.new_axes()
    figure.set_size_inches(_WIDTH, 3.0 + 0.2 * len(kernels))
    for (label, kernel), color in zip(kernels.items(), _colors(len(kernels)), strict=True):
        axes.plot(
            kernel.intensity, kernel.speed, "o", markersize=8, alpha=0.8, color=color, label=label
        )
    intensities = [kernel.intensity for kernel in kernels.values()]
    decades = math.floor(math.log10(min(intensities))), math.ceil(math.log10(max(intensities)))
    x_N = np.logspace(decades[0], max(decades[1], decades[0] + 1), 60)
    roof_N = np.minimum(x_N * (bytes_per_second or np.inf), operations_per_second or np.inf)
    if roofed := bool(np.isfinite(roof_N).all()):
        axes.plot(x_N, roof_N, color=charts._INK, linewidth=1.4, linestyle="--", label="roof")
    axes.set(xscale="log", yscale="log")
    axes.set(xlabel="FLOP for each byte that must move", ylabel="FLOP/s")
    _frame(axes, [*(roof_N.tolist() if roofed else ()), *(k.speed for k in kernels.values())])
    axes.xaxis.set_major_locator(LogLocator(numticks=_MOST_TICKS))
    _plain_numbers(axes)
    axes.legend(
        frameon=False, labelcolor=charts._INK, loc="lower left", bbox_to_anchor=(0, 1), fontsize=10
    )
    return charts.svg(figure, name, f"roofline: {', '.join(kernels)}")


def short(value: float) -> str:
    """Return a number in three digits with k, M, G or T."""
    for size, unit in _UNITS:
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def _colors(count: int) -> list[str]:
    """Return a colour a series: the page's own, then others that suit both schemes."""
    own = [charts._FIRST, charts._SECOND]
    return (own + charts.class_colors(10)[1:3] + charts.class_colors(10)[4:] * count)[:count]


def _frame(axes: Axes, values: Sequence[float]) -> None:
    """Show a logarithmic axis over the values, with numbers on it also where it is short."""
    low, high = min(values) / 1.6, max(values) * 1.6
    axes.set_ylim(low, high)
    steps = (1.0,) if high > 1000 * low else (1.0, 2.0, 5.0)
    axes.yaxis.set_major_locator(LogLocator(subs=steps, numticks=2 * _MOST_TICKS))


def _plain_numbers(axes: Axes) -> None:
    """Label both axes without powers of ten."""
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
        axis.set_minor_locator(NullLocator())
