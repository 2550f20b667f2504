"""The sections of a run's pictures: maps, neighbours, confusions, spectra."""

from __future__ import annotations

import numpy as np

from fastclr.evaluation.picture_file import LayerPictures, Pictures
from fastclr.evaluation.projection_2d import NAMES
from fastclr.evaluation.spectra import Numbers
from fastclr.report import charts, picture_charts, template
from fastclr.report import picture_templates as templates
from fastclr.report.template import Markup, fill, fill_each

_MOST_CONFUSIONS = 12
_NUMBERS = ("silhouette", "effective rank", "RankMe", "alignment", "uniformity")


def sections(pictures: Pictures) -> list[Markup]:
    """Return the sections that show a run's pictures."""
    return [_maps(pictures), _retrieval(pictures), _confusion(pictures), _spectra(pictures)]


def _titles(pictures: Pictures) -> dict[str, str]:
    """Return what the page calls each layer."""
    found = {}
    for name, layer in pictures.layers.items():
        known = {
            "h": "h, the representation",
            pictures.facts.get("z"): f"z, the projection ({name})",
        }
        found[name] = f"{known.get(name, name)} · {len(layer.spectrum_F)} dimensions"
    return found


def _maps(pictures: Pictures) -> Markup:
    """Return every layer's maps and numbers."""
    names, label_N = pictures.facts["class_names"], pictures.label_N
    uri, columns = picture_charts.atlas(pictures.image_NHWC)
    palette = charts.class_colors(len(names))
    legend = [
        {"number": number, "color": palette[number], "name": names[number]}
        for number in np.unique(label_N).tolist()
    ]
    layers = []
    for k, (name, title) in enumerate(_titles(pictures).items()):
        maps = [
            _map(pictures, f"map-{k}-{method}", name, method)
            for method in pictures.layers[name].points
        ]
        layers.append(fill(templates.LAYER, name=title, maps=Markup("".join(maps))))
    first = next(iter(pictures.layers))
    columns_of_cells = [_cells(layer) for layer in pictures.layers.values()]
    rows = zip(_NUMBERS, *columns_of_cells, strict=True)
    return fill(
        templates.MAPS,
        num_points=f"{len(label_N):,}",
        atlas=uri,
        side=pictures.image_NHWC.shape[1],
        columns=columns,
        legend=fill_each(templates.LEGEND_ITEM, legend),
        layers=Markup("".join(layers)),
        mosaic=_mosaic(pictures, first, [palette[label] for label in label_N]),
        numbers=template.table(("", *pictures.layers), rows),
    )


def _map(pictures: Pictures, chart: str, name: str, method: str) -> Markup:
    """Return one map."""
    drawn = picture_charts.map_chart(
        chart,
        pictures.layers[name].points[method],
        pictures.label_N,
        pictures.facts["class_names"],
        f"{NAMES[method]} of {name}, a dot an image",
    )
    return fill(templates.MAP, chart=drawn, method=f"{NAMES[method]} ({method})", name=name)


def _mosaic(pictures: Pictures, name: str, colors: list[str]) -> Markup:
    """Return the images at their places in a layer's first map."""
    method, points_N2 = next(iter(pictures.layers[name].points.items()))
    picture = charts.thumbnail_mosaic(points_N2, list(pictures.image_NHWC), colors)
    uri = charts.png_data_uri(picture)
    return fill(templates.MOSAIC, uri=uri, method=NAMES[method], name=name)


def _cells(layer: LayerPictures) -> list[str]:
    """Return a layer's numbers as text."""
    values = [layer.numbers.get(field) for field in Numbers._fields]
    return ["not defined" if value is None else f"{value:.3g}" for value in values]


def _retrieval(pictures: Pictures) -> Markup:
    """Return a sheet of queries and what they find, for each layer."""
    sheets, found, count = [], [], 0
    for name, title in _titles(pictures).items():
        layer = pictures.layers[name]
        count = layer.near_QK.shape[1]
        rows = [_sheet_row(pictures, layer, q) for q in range(len(pictures.query_Q))]
        sheet = fill(templates.SHEET, name=title, count=count, rows=Markup("".join(rows)))
        sheets.append(sheet)
        query_label_Q1 = pictures.label_N[pictures.query_Q][:, None]
        share = (pictures.found_label_M[layer.near_QK] == query_label_Q1).mean()
        found.append(f"{share:.0%} by {name}")
    summary = f"Of the images found here, the right class: {', '.join(found)}."
    return fill(templates.RETRIEVAL, count=count, summary=summary, sheets=Markup("".join(sheets)))


def _sheet_row(pictures: Pictures, layer: LayerPictures, q: int) -> Markup:
    """Return a query and what it finds."""
    names, place = pictures.facts["class_names"], int(pictures.query_Q[q])
    label = int(pictures.label_N[place])
    query = _sheet_image(
        pictures.image_NHWC[place], "query", names[label], f"query: {names[label]}"
    )
    images = []
    for m, similarity in zip(layer.near_QK[q].tolist(), layer.similarity_QK[q], strict=True):
        is_right, name = pictures.found_label_M[m] == label, names[pictures.found_label_M[m]]
        title = f"{name}, similarity {similarity:.3f}"
        kind, caption = ("right", name) if is_right else ("wrong", f"✗ {name}")
        images.append(_sheet_image(pictures.found_MHWC[m], kind, caption, title))
    return fill(templates.SHEET_ROW, query=query, found=Markup("".join(images)))


def _sheet_image(image: np.ndarray, kind: str, caption: str, title: str) -> Markup:
    """Return one image of a sheet."""
    uri = charts.png_data_uri(image)
    return fill(templates.SHEET_IMAGE, kind=kind, title=title, uri=uri, alt=title, caption=caption)


def _confusion(pictures: Pictures) -> Markup:
    """Return the confusion matrix and the most frequent confusions."""
    facts, confusion_CC = pictures.facts, pictures.confusion_CC
    names = facts["class_names"]
    wrong_CC = confusion_CC - np.diag(np.diag(confusion_CC))
    rows = []
    for place in np.argsort(-wrong_CC.ravel(), kind="stable")[:_MOST_CONFUSIONS]:
        truth, answer = np.unravel_index(place, wrong_CC.shape)
        if count := wrong_CC[truth, answer]:
            share = count / confusion_CC[truth].sum()
            rows.append((names[truth], names[answer], f"{count:,}", f"{share:.1%}"))
    return fill(
        templates.CONFUSION,
        chart=picture_charts.confusion_chart("confusion", confusion_CC, names),
        top1=f"{facts['linear_top1']:.1%}",
        num_test=f"{facts['num_test']:,}",
        protocol=facts["linear"],
        table=template.table(("class", "answered as", "images", "of the class"), rows),
    )


def _spectra(pictures: Pictures) -> Markup:
    """Return the spectra of layers and of the head's weights."""
    layers = {name: layer.spectrum_F for name, layer in pictures.layers.items()}
    weights = template.NO_RANK
    if pictures.weights:
        chart = picture_charts.spectrum_chart(
            "weights", pictures.weights, relative=False, y_label="singular value"
        )
        weights = fill(templates.WEIGHTS, chart=chart)
    return fill(
        templates.SPECTRA,
        layers=picture_charts.spectrum_chart(
            "spectra", layers, relative=True, y_label="share of the largest"
        ),
        weights=weights,
    )
