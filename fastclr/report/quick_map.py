"""The quick map: t-SNE of the test features that every evaluation leaves, drawn with the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from fastclr.config import ConfigError
from fastclr.evaluation.projection_2d import MIN_POINTS, tsne
from fastclr.report import charts, template
from fastclr.report.reading import REMEDY
from fastclr.report.template import Markup, fill

_MAX_TSNE_POINTS = 1000


def section(folder: Path, scores: Mapping | None, thumbnails: Sequence[np.ndarray]) -> Markup:
    """Return t-SNE of h as thumbnails and as dots in class colours, or why there is none."""
    if not (folder / "h_test.npy").exists():
        return fill(template.NO_TSNE)
    features_XF, label_X = _read_features(folder)
    num_rows = min(len(thumbnails) or len(label_X), len(label_X))
    if num_rows < MIN_POINTS:
        return fill(template.FEW_POINTS, num_points=str(num_rows), num_min=str(MIN_POINTS))
    # Test sets are often sorted by class: take rows from all over, not the first thousand.
    row_N = np.linspace(0, num_rows - 1, min(num_rows, _MAX_TSNE_POINTS)).round().astype(int)
    points_N2 = tsne(features_XF[row_N], max_points=_MAX_TSNE_POINTS)
    class_C, class_N = np.unique(label_X[row_N], return_inverse=True)
    palette = charts.class_colors(len(class_C))
    colors = [palette[index] for index in class_N]
    names = dict(enumerate(scores["class_names"] if scores else ()))
    legend = [
        {"color": color, "name": names.get(label, f"class {label}")}
        for color, label in zip(palette, class_C.tolist(), strict=True)
    ]
    mosaic = Markup()
    if len(thumbnails):
        picture = charts.thumbnail_mosaic(points_N2, [thumbnails[row] for row in row_N], colors)
        mosaic = fill(template.MOSAIC, uri=charts.png_data_uri(picture))
    return fill(
        template.TSNE,
        num_points=f"{len(row_N):,}",
        legend=template.fill_each(template.LEGEND_ITEM, legend),
        mosaic=mosaic,
        chart=charts.scatter_chart("tsne", points_N2, colors),
    )


def _read_features(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read h, shape (X, F), and the labels, shape (X,), of the test images."""
    paths = [folder / "h_test.npy", folder / "label_test.npy"]
    try:
        features_XF, label_X = (np.load(path, allow_pickle=False) for path in paths)
    except (OSError, ValueError, EOFError) as error:
        raise ConfigError(f"features in {folder} cannot be read ({error}). {REMEDY}") from error
    shapes_fit = features_XF.ndim == 2 and label_X.shape == features_XF.shape[:1]
    if not shapes_fit or label_X.dtype.kind != "i" or (label_X < 0).any():
        raise ConfigError(
            f"{paths[0]} is {features_XF.shape} and {paths[1]} {label_X.dtype} {label_X.shape}: "
            f"every row of h needs one integer label >= 0. {REMEDY}"
        )
    return features_XF, label_X
