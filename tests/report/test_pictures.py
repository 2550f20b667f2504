"""The sections of a run's pictures: what is wrong is marked, what is drawn is what was kept."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from fastclr.config import ConfigError
from fastclr.evaluation import picture_file
from fastclr.evaluation.picture_file import confusion, load, save, spread_queries
from fastclr.report import picture_charts, picture_sections, score_sections


def test_what_is_kept_comes_back(pictures, tmp_path):
    assert load(tmp_path) is None
    assert save(tmp_path, pictures) == tmp_path / picture_file.FILE
    found = load(tmp_path)
    assert found.facts == pictures.facts and list(found.layers) == list(pictures.layers)
    for name, layer in pictures.layers.items():
        for ours, theirs in zip(layer[1:-1], found.layers[name][1:-1], strict=True):
            np.testing.assert_array_equal(ours, theirs)
        for method, at_N2 in layer.points.items():
            np.testing.assert_array_equal(at_N2, found.layers[name].points[method])
        assert found.layers[name].numbers == layer.numbers
    np.testing.assert_array_equal(found.image_NHWC, pictures.image_NHWC)
    np.testing.assert_array_equal(found.confusion_CC, pictures.confusion_CC)
    assert [path.name for path in tmp_path.iterdir()] == [picture_file.FILE]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label_N": np.zeros(3, np.int64)}, r"label has shape \(3,\) instead of \(60,\)"),
        ({"query_Q": np.arange(56, 61)}, "query has places outside of 0..59"),
        ({"confusion_CC": np.zeros((3, 3), int)}, "confusion has shape"),
        ({"found_label_M": np.full(12, 4)}, "found_label has places outside of 0..3"),
    ],
)
def test_pictures_that_do_not_fit_are_refused(pictures, tmp_path, change, message):
    save(tmp_path, replace(pictures, **change))
    with pytest.raises(ConfigError, match=rf"pictures\.npz cannot be drawn \({message}.*pictures"):
        load(tmp_path)


def test_a_damaged_file_is_named(pictures, tmp_path):
    file = save(tmp_path, pictures)
    whole = file.read_bytes()
    for damaged in (b"", whole[:1000], whole[: len(whole) // 2], b"PK\x03\x04 no"):
        file.write_bytes(damaged)
        with pytest.raises(ConfigError, match=r"pictures\.npz cannot be drawn .*make it again"):
            load(tmp_path)


def test_confusions_are_counted():
    label_X, answer_X = np.array([0, 0, 0, 2, 2]), np.array([0, 1, 1, 2, 0])
    expected = [[1, 2, 0], [0, 0, 0], [1, 0, 1]]
    assert confusion(label_X, answer_X, 3).tolist() == expected


def test_queries_are_spread_over_classes():
    label_N = np.array([7, 7, 7, 3, 3, 5])
    assert spread_queries(label_N, 5).tolist() == [3, 5, 0, 4, 1]
    assert spread_queries(label_N, 99).tolist() == [3, 5, 0, 4, 1, 2]


def test_every_image_is_a_dot_of_its_class_in_every_map(pictures):
    html = picture_sections.sections(pictures)[0]
    maps = re.findall(r'<svg class="dots" id="([^"]+)".*?</svg>', html, re.DOTALL)
    assert maps == ["map-0-opentsne", "map-0-umap", "map-1-opentsne", "map-1-umap"]
    for chart in re.findall(r'<svg class="dots".*?</svg>', html, re.DOTALL):
        found = {}
        for number, dots in re.findall(r'data-class="(\d+)"[^>]*>(.*?)</g>', chart):
            for image in re.findall(r'data-i="(\d+)"', dots):
                found[int(image)] = int(number)
        assert [found[i] for i in range(60)] == pictures.label_N.tolist()
        places = [int(x) for x in re.findall(r'c[xy]="(\d+)"', chart)]
        assert min(places) == 20 and max(places) == 980
    assert "not defined" in html and "<td>6.25</td>" in html
    assert "<script>" not in html and "&lt;script&gt;" in html


def test_up_in_the_points_is_up_in_the_map():
    points_N2 = np.array([[0.0, 0.0], [1.0, 2.0]])
    chart = picture_charts.map_chart("m", points_N2, np.array([0, 0]), ["a"], "two dots")
    assert re.findall(r'cx="(\d+)" cy="(\d+)"', chart) == [("20", "980"), ("980", "20")]


def test_the_atlas_has_every_image_at_its_place():
    shade_N = np.linspace(0, 255, 7).astype(np.uint8)
    image_NHWC = np.broadcast_to(shade_N[:, None, None, None], (7, 16, 16, 3))
    uri, columns = picture_charts.atlas(np.ascontiguousarray(image_NHWC))
    atlas = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))))
    assert columns == 3 and atlas.shape == (48, 48, 3)
    found = [atlas[i // 3 * 16 + 8, i % 3 * 16 + 8].mean() for i in range(7)]
    assert found == pytest.approx(shade_N, abs=3)


def test_another_class_than_the_query_s_is_marked(pictures):
    html = picture_sections.sections(pictures)[1]
    sheets = html.split("<h3>")[1:]
    assert len(sheets) == 2
    for sheet, layer in zip(sheets, pictures.layers.values(), strict=True):
        kinds = re.findall(r'<figure class="(\w+)"', sheet)
        is_right_QK = (
            pictures.found_label_M[layer.near_QK] == pictures.label_N[pictures.query_Q][:, None]
        )
        assert is_right_QK.any() and not is_right_QK.all()
        expected = [["query", *("right" if r else "wrong" for r in row)] for row in is_right_QK]
        assert kinds == [kind for row in expected for kind in row]
        assert sheet.count("✗") == (~is_right_QK).sum()
        assert f"similarity {layer.similarity_QK[0, 0]:.3f}" in sheet
    share = (
        pictures.found_label_M[pictures.layers["h"].near_QK]
        == pictures.label_N[pictures.query_Q][:, None]
    ).mean()
    assert f"{share:.0%} by h" in html


def test_the_matrix_shows_shares_of_rows_and_the_list_what_is_confused_most(pictures):
    html = picture_sections.sections(pictures)[2]
    confusion_CC = pictures.confusion_CC
    shares = [float(x) for x in re.findall(r"answered as [^:]*: ([\d.]+)%</title>", html)]
    expected = 100 * confusion_CC / confusion_CC.sum(1, keepdims=True)
    assert shares == pytest.approx(expected.ravel(), abs=0.06)
    assert "62.5%" in html and "the probe&#x27;s protocol" in html
    counts = [int(x) for x in re.findall(r"</td><td>(\d+)</td>", html)]
    wrong = sorted((confusion_CC - np.diag(np.diag(confusion_CC))).ravel().tolist())[::-1]
    assert counts == [count for count in wrong if count][:12]


def test_a_large_matrix_is_pixels(many_classes):
    html = picture_sections.sections(many_classes)[2]
    assert "<svg" not in html and 'class="mosaic pixelated"' in html


def test_a_class_without_test_images_has_an_empty_row(pictures):
    confusion_CC = pictures.confusion_CC.copy()
    confusion_CC[1] = 0
    html = picture_sections.sections(replace(pictures, confusion_CC=confusion_CC))[2]
    assert "nan" not in html.lower().replace("undefined_name", "")


def test_spectra_have_a_line_each(pictures):
    html = picture_sections.sections(pictures)[3]
    assert re.findall(r'<svg class="chart" id="(\w+)"', html) == ["spectra", "weights"]
    for label in ("h<", "projection_head.fc2<", "fc1<", "fc2<"):
        assert label in html
    alone = picture_sections.sections(replace(pictures, weights={}))[3]
    assert 'id="weights"' not in alone


def entries() -> dict:
    forgotten = {"task": "rotation", "chance": 0.25, "top1": {"h": 0.7, "z": 0.3}}
    layer = {"layer": "h", "width": 8, "num_discarded": 2, "ridge_top1": 0.5}
    return {
        "ridge": {"scores": {"top1": 0.5}, "minutes": 0.25, "chosen": {"l2": 1}},
        "layers": {
            "scores": {"h, ridge": 0.5, "h, kNN": 0.4},
            "minutes": 1.5,
            "chosen": {"table": [{**layer, "ridge_l2": 0.1, "knn_top1": 0.4}]},
        },
        "forgetting": {"scores": {"a": 0.7}, "minutes": 2, "chosen": {"table": [forgotten]}},
    }


def test_all_protocols_stand_in_one_table_with_minutes():
    html = score_sections.section(entries())
    assert "3.8 minutes together" in html
    assert "<th>ridge</th><td>top1</td><td>50.00</td><td>0.2</td>" in html
    assert "<th></th><td>h, kNN</td><td>40.00</td><td></td>" in html
    assert "<th>h</th><td>8</td><td>2</td><td>50.0%</td><td>40.0%</td>" in html
    assert "<th>rotation</th><td>25.0%</td><td>70.0%</td><td>30.0%</td>" in html
    few = score_sections.section({"ridge": entries()["ridge"]})
    assert "Every layer" not in few and "What can be told" not in few
