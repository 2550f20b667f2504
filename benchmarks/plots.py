"""Plots of the benchmarks: logarithmic panels, lines named at their ends, an SVG that repeats."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

COLORS = ("#0b6e99", "#c2571a", "#5b3a8e", "#4d7c2f", "#a8326b", "#6f7782")


def save(path: Path, draw: Sequence[Callable[[Axes], None]]) -> None:
    """Draw panels side by side into a file; the same numbers give the same bytes."""
    style: dict[Any, Any] = {
        "svg.hashsalt": path.stem,
        "font.size": 10,
        "axes.titlelocation": "left",
    }
    with mpl.rc_context(style):
        size = (5.4 * len(draw), 4.4)
        figure = Figure(figsize=size, layout="constrained", facecolor="white")
        for axes, panel in zip(figure.subplots(1, len(draw), squeeze=False)[0], draw, strict=True):
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(color="#e6e8eb", linewidth=0.7)
            axes.margins(x=0.06, y=0.12)
            panel(axes)
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(path, metadata=nothing if path.suffix == ".svg" else None)


def lines(
    axes: Axes,
    series: Mapping[str, Sequence[tuple[float, float]]],
    *,
    title: str,
    x_label: str,
    log_y: bool = True,
) -> None:
    """Draw series of points over a logarithmic axis, with a legend.

    Args:
        axes: Where.
        series: Points (x, y) by name.
        title: What is drawn, with its unit.
        x_label: Label of the horizontal axis.
        log_y: Whether the vertical axis is logarithmic; else it begins at 0.
    """
    for (name, points), color in zip(series.items(), COLORS, strict=False):
        x_N, y_N = zip(*points, strict=True)
        axes.plot(x_N, y_N, "o-", color=color, linewidth=1.8, markersize=4, label=name)
    axes.set(title=title, xlabel=x_label, xscale="log")
    places = sorted({x for points in series.values() for x, _ in points})
    axes.set_xticks(places[:: -(-len(places) // 8)])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    axes.xaxis.set_minor_locator(NullLocator())
    if log_y:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.legend(frameon=False, fontsize=9)
