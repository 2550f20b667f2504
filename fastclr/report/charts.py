"""Charts of the report: inline SVG and PNG data URIs that suit a light and a dark page.

Matplotlib draws with placeholder colours; the SVG text then gets the page's CSS variables in
their place, so that one drawing follows the colour scheme of the reader.
"""

from __future__ import annotations

import base64
import colorsys
import html
import io
import re
from collections.abc import Mapping, Sequence
from typing import Literal

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter, StrMethodFormatter
from PIL import Image

from fastclr.report.template import COLOURS, Markup

_INK, _GRID, _FIRST, _SECOND, _MUTED = "#010101", "#020202", "#030303", "#040404", "#050505"
_CSS_COLORS = {
    _INK: "var(--muted)",
    _GRID: "var(--line)",
    _FIRST: "var(--first)",
    _SECOND: "var(--second)",
    _MUTED: "var(--third)",
}
ENCODERS = {"trained": _FIRST, "untrained": _SECOND, "pixels": _MUTED}
_CLASS_COLORS = [
    *("#4e79a7", "#f28e2b", "#e15759", "#76b7b2", "#59a14f"),
    *("#d4ae2a", "#b07aa1", "#ff9da7", "#9c755f", "#8a8a94"),
]
FLOOR = 1e-10  # of the largest singular value; what lies below is rounding
_LONG_NAME = 18  # characters of a series that leave room for two beside it
_MAX_LINE_POINTS = 800
_MOSAIC_CELLS, _CELL_PIXELS = 34, 34


def line_chart(
    name: str,
    x_N: np.ndarray,
    y_N: np.ndarray,
    *,
    x_label: str,
    y_label: str,
    percent: bool = False,
    from_zero: bool = False,
    reference: float | None = None,
) -> Markup:
    """Draw a noisy series pale and its running mean bold.

    Args:
        name: Chart name, unique on the page; the SVG's ids start with it.
        x_N: Horizontal values, shape (N,), N >= 1.
        y_N: Vertical values, shape (N,), finite.
        x_label: Label of the horizontal axis, with the unit.
        y_label: Label of the vertical axis, with the unit; also the text alternative.
        percent: Whether `y_N` is a fraction to show as per cent, on an axis from 0.
        from_zero: Whether the vertical axis starts at 0.
        reference: Level to mark with a dotted line, such as chance.

    Returns:
        An `<svg>` element.
    """
    figure, axes = new_axes()
    stride = -(-len(x_N) // _MAX_LINE_POINTS)
    marker = "o" if len(x_N) == 1 else ""
    axes.plot(x_N[::stride], y_N[::stride], color=_FIRST, alpha=0.3, linewidth=0.9)
    mean_N = _running_mean(y_N, max(1, len(y_N) // 25))
    axes.plot(x_N[::stride], mean_N[::stride], color=_FIRST, linewidth=2, marker=marker)
    if reference is not None:
        axes.axhline(reference, color=_INK, linewidth=1.2, linestyle=":")
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    if percent or from_zero:
        axes.set_ylim(bottom=0)
    if percent:
        axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    return svg(figure, name, f"{y_label} over {x_label}")


def series_chart(
    name: str, x_N: np.ndarray, series: Mapping[str, np.ndarray], *, x_label: str, y_label: str
) -> Markup:
    """Draw fractions as they are, with a dot for each measurement.

    Args:
        name: Chart name, unique on the page.
        x_N: Horizontal values, shape (N,), N >= 1.
        series: Up to three series by their names in the legend; shape (N,), values 0..1.
        x_label: Label of the horizontal axis, with the unit.
        y_label: Label of the vertical axis; also the text alternative.

    Returns:
        An `<svg>` element.
    """
    figure, axes = new_axes()
    for (label, y_N), color in zip(series.items(), series_colors(len(series)), strict=True):
        axes.plot(x_N, y_N, color=color, linewidth=2, marker="o", markersize=4, label=label)
    highest = max(y_N.max() for y_N in series.values())
    axes.set(xlabel=x_label, ylabel=y_label, ylim=(0, 1.08 * highest or 1))
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    add_legend(axes)
    return svg(figure, name, f"{y_label} over {x_label}: {', '.join(series)}")


def score_chart(name: str, scores: Mapping[str, Mapping[str, float]], *, chance: float) -> Markup:
    """Draw linear and kNN top-1 of the trained encoder beside its two baselines.

    Args:
        name: Chart name, unique on the page.
        scores: {"trained" | "untrained" | "pixels": {"linear_top1", "knn_top1"}}, values 0..1.
        chance: Top-1 accuracy of a guess, 0..1, marked with a dotted line.

    Returns:
        An `<svg>` element.
    """
    figure, axes = new_axes()
    for index, (encoder, color) in enumerate(ENCODERS.items()):
        values = [scores[encoder]["linear_top1"], scores[encoder]["knn_top1"]]
        bars = axes.bar(np.arange(2) + (index - 1) * 0.27, values, 0.24, color=color, label=encoder)
        axes.bar_label(bars, [f"{value:.1%}" for value in values], padding=3, color=_INK)
    axes.axhline(chance, color=_INK, linewidth=1.2, linestyle=":")
    axes.set_xticks(np.arange(2), ["linear top-1", "kNN top-1"])
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    add_legend(axes)
    return svg(figure, name, "linear and kNN top-1 accuracy: trained, untrained, pixels")


def bars_chart(
    name: str,
    labels: Sequence[str],
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    x_label: str,
    reference: float | None = None,
) -> Markup:
    """Draw horizontal bars of fractions with their standard errors, a group a label.

    Args:
        name: Chart name, unique on the page.
        labels: Names of the G groups, from the top.
        series: Up to three by their names in the legend: G means and G errors, 0..1; a mean or
            error that is NaN is left out.
        x_label: Label of the horizontal axis; also the text alternative.
        reference: Level to mark with a dotted line, such as chance.

    Returns:
        An `<svg>` element.
    """
    figure = Figure(
        figsize=(6.4, 0.9 + 0.24 * len(labels) * (len(series) + 0.4)), layout="constrained"
    )
    axes = _quiet(figure.add_subplot(), "x")
    place_G = np.arange(len(labels))
    height = 0.8 / max(1, len(series))
    for index, (label, (mean_G, error_G)) in enumerate(series.items()):
        color = (_FIRST, _SECOND, _MUTED)[index]
        y_G = place_G + (index - (len(series) - 1) / 2) * height
        axes.barh(y_G, np.nan_to_num(mean_G), 0.88 * height, color=color, label=label)
        at_G = np.where(np.isnan(error_G), np.nan, mean_G)
        axes.errorbar(at_G, y_G, xerr=error_G, fmt="none", ecolor=_INK, elinewidth=1.2, capsize=2)
    if reference is not None:
        axes.axvline(reference, color=_INK, linewidth=1.2, linestyle=":")
    axes.set_yticks(place_G, labels)
    axes.invert_yaxis()
    axes.set(xlabel=x_label)
    axes.xaxis.set_major_formatter(PercentFormatter(xmax=1))
    add_legend(axes)
    return svg(figure, name, f"{x_label}: {', '.join(series)}")


def grid_chart(name: str, labels: Sequence[str], value_GG: np.ndarray, *, title: str) -> Markup:
    """Draw a square of fractions, each written into its cell on a colour that is its size.

    Args:
        name: Chart name, unique on the page.
        labels: Names of the G rows and columns.
        value_GG: Fractions, shape (G, G); NaN leaves a cell empty.
        title: What the numbers are; also the text alternative.

    Returns:
        An `<svg>` element.
    """
    side = 1.6 + 0.62 * len(labels)
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = _quiet(figure.add_subplot(), None)
    low, high = np.nanmin(value_GG), np.nanmax(value_GG)
    for row, column in np.argwhere(np.isfinite(value_GG)):
        value = value_GG[row, column]
        share = (value - low) / (high - low) if high > low else 1.0
        # The text must be readable on it in both colour schemes: never more than half opaque.
        axes.fill_between(
            [column - 0.48, column + 0.48], row - 0.48, row + 0.48,
            color=_FIRST, alpha=0.05 + 0.45 * share, linewidth=0,
        )  # fmt: skip
        axes.text(column, row, f"{100 * value:.1f}", ha="center", va="center", color=_INK)
    axes.set_xticks(np.arange(len(labels)), labels, rotation=35)
    axes.set_yticks(np.arange(len(labels)), labels)
    axes.set(xlim=(-0.5, len(labels) - 0.5), ylim=(len(labels) - 0.5, -0.5), title=title)
    axes.title.set_color(_INK)
    axes.title.set_fontsize(10)
    return svg(figure, name, title)


def histograms_chart(name: str, rows: Mapping[str, np.ndarray]) -> Markup:
    """Draw histograms of several crops of several images over each other.

    Args:
        name: Chart name, unique on the page.
        rows: By what was done to the crops: shares of equal bins of 0..1, shape (images, crops,
            bins).

    Returns:
        An `<svg>` element.
    """
    num_images, num_crops, num_bins = next(iter(rows.values())).shape
    figure = Figure(figsize=(7.2, 0.3 + 1.7 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), num_images, squeeze=False, sharex=True, sharey=True)
    centre_K = (np.arange(num_bins) + 0.5) / num_bins
    for axes_I, (label, share_IVK) in zip(grid, rows.items(), strict=True):
        for axes, share_VK in zip(axes_I, share_IVK, strict=True):
            _quiet(axes, "y").set(title=label)
            axes.title.set(color=_INK, fontsize=10)
            for share_K, color in zip(share_VK, series_colors(num_crops), strict=True):
                axes.plot(centre_K, share_K, color=color, linewidth=1.4)
            axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    return svg(figure, name, f"histograms of intensities: {', '.join(rows)}")


def spaces_chart(
    name: str,
    rows: Mapping[str, tuple[Mapping[str, np.ndarray], np.ndarray, Mapping[str, np.ndarray]]],
) -> Markup:
    """Draw maps side by side and spectra beside them, a row for each model.

    Args:
        name: Chart name, unique on the page.
        rows: By the model's name: positions, shape (N, 2), of two maps by their names; the class of
            each point, (N,); falling values above 0 of spectra by their names.

    Returns:
        An `<svg>` element.
    """
    figure = Figure(figsize=(7.2, 0.3 + 2.5 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), 3, squeeze=False)
    for axes_3, (model, (maps, class_N, spectra)) in zip(grid, rows.items(), strict=True):
        colors = np.array(class_colors(int(class_N.max()) + 1))
        for axes, (label, at_N2) in zip(axes_3, maps.items(), strict=False):
            _quiet(axes, None).scatter(*at_N2.T, s=8, c=colors[class_N].tolist(), linewidths=0)
            axes.set(xticks=[], yticks=[], title=f"{model}: {label}")
        axes = _quiet(axes_3[2], "y")
        for (label, value_K), color in zip(
            spectra.items(), series_colors(len(spectra)), strict=True
        ):
            shown_K = value_K[value_K > FLOOR * value_K[0]]
            axes.plot(np.arange(1, len(shown_K) + 1), shown_K, color=color, label=label)
        axes.set(yscale="log", title="singular values")
        axes.minorticks_off()
        axes.legend(frameon=False, labelcolor=_INK, fontsize=8)
        for axes in axes_3:
            axes.title.set(color=_INK, fontsize=10)
    return svg(figure, name, f"maps and spectra of {', '.join(rows)}")


def standalone(chart: Markup) -> str:
    """Return a chart as an SVG file of its own, with the page's colours and font inside."""
    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    head, rest = chart.split(">", 1)
    return f"{head.replace('<svg', f'<svg {names}', 1)}><style>{COLOURS}</style>{rest}\n"


def scatter_chart(name: str, points_N2: np.ndarray, colors_N: Sequence[str]) -> Markup:
    """Draw one dot per image at its t-SNE position.

    Args:
        name: Chart name, unique on the page.
        points_N2: Positions, shape (N, 2).
        colors_N: CSS hex colour of every point.

    Returns:
        A square `<svg>` element.
    """
    figure = Figure(figsize=(5.4, 5.4))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    unit_N2 = unit_square(points_N2)
    axes.scatter(unit_N2[:, 0], unit_N2[:, 1], s=22, c=list(colors_N), alpha=0.85, linewidths=0)
    axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
    return svg(figure, name, "t-SNE of the representation h, one dot per image")


def thumbnail_mosaic(
    points_N2: np.ndarray, thumbnails: Sequence[np.ndarray], colors_N: Sequence[str]
) -> np.ndarray:
    """Lay thumbnails out at their t-SNE positions on a grid, framed in their class colour.

    A grid cell holds the first image that falls in it: overlapping photographs are unreadable.

    Args:
        points_N2: Positions, shape (N, 2).
        thumbnails: N images, uint8 (H, W, 3) of any size.
        colors_N: CSS hex colour of every frame.

    Returns:
        RGBA picture, uint8, square, transparent where there is no image.
    """
    side, inner_side = _MOSAIC_CELLS * _CELL_PIXELS, _CELL_PIXELS - 4
    canvas = Image.new("RGBA", (side, side))
    cells_N2 = np.round(unit_square(points_N2) * (_MOSAIC_CELLS - 1)).astype(int)
    taken: set[tuple[int, int]] = set()
    for (column, row), thumbnail, color in zip(cells_N2, thumbnails, colors_N, strict=True):
        if (column, row) in taken:
            continue
        taken.add((column, row))
        left, top = column * _CELL_PIXELS, (_MOSAIC_CELLS - 1 - row) * _CELL_PIXELS
        canvas.paste(color, (left, top, left + _CELL_PIXELS, top + _CELL_PIXELS))
        inner = Image.fromarray(thumbnail).resize((inner_side, inner_side))
        canvas.paste(inner, (left + 2, top + 2))
    return np.asarray(canvas)


def class_colors(num_classes: int) -> list[str]:
    """Return one CSS hex colour a class, mid-toned for light and dark pages alike."""
    if num_classes <= len(_CLASS_COLORS):
        return _CLASS_COLORS[:num_classes]
    # Golden-ratio steps keep neighbouring class numbers far apart in hue.
    rgb = [colorsys.hls_to_rgb(i * 0.618034 % 1, 0.55, 0.55) for i in range(num_classes)]
    return ["#" + "".join(f"{round(channel * 255):02x}" for channel in color) for color in rgb]


def series_colors(num_series: int) -> list[str]:
    """Return one colour a series, the page's own first."""
    return [_FIRST, _SECOND, _MUTED, *_CLASS_COLORS[1:], *class_colors(num_series)][:num_series]


def png_data_uri(image: np.ndarray, *, max_side: int | None = None) -> str:
    """Encode uint8 (H, W, 3 or 4) as a PNG data URI, shrunk to `max_side` pixels if larger."""
    picture = Image.fromarray(image)
    if max_side is not None:
        picture.thumbnail((max_side, max_side))
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def unit_square(points_N2: np.ndarray) -> np.ndarray:
    """Scale positions, shape (N, 2), to 0..1 on both axes; an axis without spread becomes 0."""
    low_2, high_2 = points_N2.min(axis=0), points_N2.max(axis=0)
    return (points_N2 - low_2) / np.where(high_2 > low_2, high_2 - low_2, 1.0)


def _running_mean(y_N: np.ndarray, window: int) -> np.ndarray:
    """Mean over a centred window, which is cut off at both ends of the series."""
    # An odd window no longer than the series: "same" then returns N centred values.
    kernel = np.ones(min(window | 1, len(y_N)))
    total_N = np.convolve(y_N, kernel, mode="same")
    return total_N / np.convolve(np.ones(len(y_N)), kernel, mode="same")


def new_axes() -> tuple[Figure, Axes]:
    """Return an empty figure with the report's quiet axes."""
    figure = Figure(figsize=(4.9, 3.0), layout="constrained")
    return figure, _quiet(figure.add_subplot(), "y")


def _quiet(axes: Axes, grid: Literal["x", "y"] | None) -> Axes:
    """Take from axes what is not needed; a grid across one of them at most."""
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_GRID)
    axes.tick_params(colors=_INK, length=0, labelsize=10)
    if grid:
        axes.grid(axis=grid, color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.xaxis.label.set_color(_INK)
    axes.yaxis.label.set_color(_INK)
    return axes


def add_legend(axes: Axes) -> None:
    """Name the series above the chart, side by side as far as their names leave room."""
    longest = max(map(len, axes.get_legend_handles_labels()[1]))
    axes.legend(
        frameon=False,
        ncols=3 if longest <= _LONG_NAME else 2,
        labelcolor=_INK,
        loc="lower center",
        bbox_to_anchor=(0.5, 1.02),
    )


def svg(figure: Figure, name: str, description: str) -> Markup:
    """Render a figure to an `<svg>` element with its own ids and the page's colours and font."""
    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    # What precedes </style> is for a file of its own: XML prologue, fixed size, global CSS.
    head, body = buffer.getvalue().split("</style>", maxsplit=1)
    view_box = head.split('viewBox="')[1].split('"')[0]
    body = re.sub(r'(\sid="|url\(#|href="#)', rf"\g<1>{name}-", body.split("</defs>", 1)[1])
    body = re.sub(r"'DejaVu Sans'[^;\"]*", "var(--sans)", body)
    body = re.sub("|".join(_CSS_COLORS), lambda match: _CSS_COLORS[match.group()], body)
    label = html.escape(description)
    tag = f'<svg class="chart" id="{name}" role="img" aria-label="{label}" viewBox="{view_box}">'
    return Markup(tag + body)
