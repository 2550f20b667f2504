"""Charts of the pictures: maps with a dot an image, an atlas of thumbnails, a confusion matrix."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np
from matplotlib.ticker import MaxNLocator
from PIL import Image

from fastclr.report import charts
from fastclr.report.template import Markup

_SIDE, _MARGIN = 1000, 20  # of a map; the page's script knows the first
_MOST_CELLS = 30  # classes of a matrix of cells; more are pixels


def map_chart(
    name: str,
    points_N2: np.ndarray,
    class_N: np.ndarray,
    class_names: Sequence[str],
    description: str,
) -> Markup:
    """Draw one dot an image, in the colour of its class; the page's script shows images.

    Args:
        name: Chart name, unique on the page.
        points_N2: Positions, shape (N, 2).
        class_N: Numbers of the classes in ``class_names``.
        class_names: Names of all classes, which decide the colours.
        description: Text alternative.

    Returns:
        A square `<svg>` element; each dot has the image's number in ``data-i``.
    """
    at_N2 = _MARGIN + (_SIDE - 2 * _MARGIN) * charts.unit_square(points_N2)
    radius = 8 if len(at_N2) <= 1000 else 6
    groups = []
    for number, color in enumerate(charts.class_colors(len(class_names))):
        rows = np.flatnonzero(class_N == number)
        dots = "".join(
            f'<circle cx="{x:.0f}" cy="{_SIDE - y:.0f}" r="{radius}" data-i="{row}"/>'
            for row, (x, y) in zip(rows.tolist(), at_N2[rows].tolist(), strict=True)
        )
        label = escape(class_names[number])
        groups.append(
            f'<g fill="{color}" data-class="{number}" data-name="{label}">{dots}</g>'
            if dots
            else ""
        )
    return Markup(
        f'<svg class="dots" id="{name}" role="img" aria-label="{escape(description)}" '
        f'viewBox="0 0 {_SIDE} {_SIDE}">{"".join(groups)}</svg>'
    )


def atlas(image_NHWC: np.ndarray) -> tuple[str, int]:
    """Return all thumbnails in one JPEG as a data URI, row after row, and images in a row."""
    side, columns = image_NHWC.shape[1], math.ceil(math.sqrt(len(image_NHWC)))
    canvas = Image.new("RGB", (side * columns, side * math.ceil(len(image_NHWC) / columns)))
    for number, image in enumerate(image_NHWC):
        canvas.paste(Image.fromarray(image), (number % columns * side, number // columns * side))
    stream = io.BytesIO()
    canvas.save(stream, format="JPEG", quality=90, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode("ascii"), columns


def confusion_chart(name: str, confusion_CC: np.ndarray, class_names: Sequence[str]) -> Markup:
    """Draw a confusion matrix: share of each row, as cells with numbers, or pixels if it is large.

    Args:
        name: Chart name, unique on the page.
        confusion_CC: Numbers of images by class and by answer.
        class_names: Names of the classes.
    """
    share_CC = confusion_CC / np.maximum(confusion_CC.sum(1, keepdims=True), 1)
    if len(class_names) > _MOST_CELLS:
        return _confusion_pixels(share_CC)
    num, cell = len(class_names), 40
    left = 16 + 9 * max(len(_short(class_name)) for class_name in class_names)
    parts = []
    for k, class_name in enumerate(class_names):
        label, middle = escape(_short(class_name)), k * cell + cell / 2
        parts.append(
            f'<text class="name" x="{left - 8}" y="{left + middle + 5:.0f}" font-size="15" '
            f'text-anchor="end">{label}</text>'
            f'<text class="name" font-size="15" transform="translate({left + middle + 5:.0f},'
            f'{left - 8}) rotate(-90)">{label}</text>'
        )
    for row, column in np.ndindex(num, num):
        x, y, share = left + column * cell, left + row * cell, share_CC[row, column]
        title = f"{class_names[row]} answered as {class_names[column]}: {share:.1%}"
        parts.append(
            f'<g><title>{escape(title)}</title><rect class="cell" x="{x}" y="{y}" width="{cell}" '
            f'height="{cell}" fill-opacity="{0.02 + 0.7 * share:.3f}"/>'
        )
        if num <= 16 and share >= 0.005:
            parts.append(
                f'<text x="{x + cell / 2}" y="{y + cell / 2 + 5}" font-size="14" '
                f'text-anchor="middle">{100 * share:.0f}</text>'
            )
        parts.append("</g>")
    side = left + num * cell
    frame = (
        f'<rect class="frame" x="{left}" y="{left}" width="{num * cell}" height="{num * cell}"/>'
    )
    return Markup(
        f'<svg class="confusion" id="{name}" role="img" aria-label="confusion matrix" '
        f'viewBox="0 0 {side + 2} {side + 2}">{"".join(parts)}{frame}</svg>'
    )


def _confusion_pixels(share_CC: np.ndarray) -> Markup:
    """Draw a matrix of many classes, a pixel a cell."""
    rgba_CC4 = np.zeros((*share_CC.shape, 4), np.uint8)
    rgba_CC4[..., :3] = (0x6A, 0x70, 0xEE)
    rgba_CC4[..., 3] = np.round(255 * np.sqrt(share_CC))
    uri = charts.png_data_uri(rgba_CC4)
    return Markup(f'<img class="mosaic pixelated" src="{uri}" alt="confusion matrix">')


def _short(text: str, most: int = 16) -> str:
    """Cut a long name."""
    return text if len(text) <= most else text[: most - 1] + "…"


def spectrum_chart(
    name: str, spectra: Mapping[str, np.ndarray], *, relative: bool, y_label: str
) -> Markup:
    """Draw falling singular values on a logarithmic axis, as far as they are above rounding.

    Args:
        name: Chart name, unique on the page.
        spectra: Values by their names in the legend, each falling.
        relative: Whether each is divided by its largest value.
        y_label: Label of the vertical axis; also the text alternative.
    """
    figure, axes = charts.new_axes()
    for (label, value_K), color in zip(
        spectra.items(), charts.series_colors(len(spectra)), strict=True
    ):
        shown_K = value_K[value_K > charts.FLOOR * value_K[0]] / (value_K[0] if relative else 1.0)
        marker = "o" if len(shown_K) < 3 else ""
        place_K = np.arange(1, len(shown_K) + 1)
        axes.plot(place_K, shown_K, color=color, linewidth=2, marker=marker, label=label)
    widest = max(len(value_K) for value_K in spectra.values())
    axes.set(xlabel="place of the singular value", ylabel=y_label, yscale="log")
    axes.set_xlim(1 - 0.04 * widest, 1.04 * widest)
    axes.minorticks_off()
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    charts.add_legend(axes)
    return charts.svg(figure, name, f"{y_label}: {', '.join(spectra)}")
