"""Scores: every module of the head, no test image in a choice, means of the log."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from fastclr import data_sets
from fastclr.evaluation.features import extract
from fastclr.evaluation.ridge import ridge_probe
from fastclr.simclr import SimCLR
from fastclr.studies import colour_histograms, scoring
from fastclr.studies.colour_histograms import BINS, histograms, matching
from fastclr.studies.scales import TOY
from pipelines.loader import make_loader

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model():
    return SimCLR.from_config(TOY.base).eval()


def test_every_module_of_the_head_is_scored(model, images):
    said = []
    scores = scoring.layer_scores(model, images, CPU, said.append)
    assert list(scores) == ["h", "fc1", "relu1", "fc2", "z", "weights"]
    assert scores["z"] == scores["fc2"]
    assert said == ["scoring h", "scoring fc1", "scoring relu1", "scoring fc2"]
    assert list(scores["weights"]) == ["fc1", "fc2"]
    for layer in ("h", "fc1", "relu1", "fc2"):
        assert set(scores[layer]) == {"linear", "knn", "validation", "rank"}
        assert 0 <= scores[layer]["linear"] <= 1
    assert 1 < scores["z"]["rank"] <= 8
    train, test = (extract(model.encoder, images.batches(of)) for of in (images.train, images.test))
    assert scores["h"]["linear"] == ridge_probe(train, test).top1


def test_no_head_is_h_alone(images):
    none = replace(TOY.base, head=replace(TOY.base.head, kind="none"))
    scores = scoring.layer_scores(SimCLR.from_config(none).eval(), images, CPU, lambda _: None)
    assert scores["z"] == scores["h"]
    assert scores["weights"] == {}


def test_the_validation_score_sees_no_test_image(model, images):
    blind = replace(images, test=images.train)
    scores = [scoring.layer_scores(model, of, CPU, lambda _: None) for of in (images, blind)]
    assert scores[0]["h"]["validation"] == scores[1]["h"]["validation"]
    assert scores[0]["h"]["linear"] != scores[1]["h"]["linear"]


def test_the_log_is_averaged_over_its_end(tmp_path):
    rows = [
        {"step": step, "loss": float(step), "contrastive_accuracy": step / 100,
         "contrastive_entropy": 1.0}
        for step in range(1, 101)
    ]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = scoring.logged_means(tmp_path)
    assert found == {"loss": 95.5, "accuracy": pytest.approx(0.955), "entropy": 1.0}
    (tmp_path / "metrics.jsonl").write_text(json.dumps({**rows[0], "head_gain": 0.25}))
    assert scoring.logged_means(tmp_path)["head_gain"] == 0.25


def test_changes_are_told_from_h_and_z(model, images):
    told = scoring.changes_told(model, images, 48, CPU, lambda _: None)
    assert list(told) == [
        "colour_or_grayscale", "rotation", "original_or_noise", "original_or_Sobel",
    ]  # fmt: skip
    assert all(set(found) == {"h", "z", "chance"} for found in told.values())
    assert told["rotation"]["chance"] == 0.25
    assert told["original_or_Sobel"]["h"] > 0.7


def test_histograms_count_pixels_of_each_channel():
    views = np.zeros((2, 3, 4, 4), np.uint8)
    views[0, 1] = 255
    views[1, 2, :2] = 16
    found = histograms(views).reshape(2, 3, BINS)
    np.testing.assert_allclose(found.sum(2), 1)
    assert found[0, 0, 0] == found[0, 1, BINS - 1] == 1
    assert found[1, 2, 0] == found[1, 2, 1] == 0.5


def test_crops_are_matched_by_their_colours_until_those_are_distorted(images, monkeypatch):
    plain = replace(TOY.base, views=replace(TOY.base.views, jitter_prob=0, grayscale_prob=0))
    found = matching(plain, images)
    distorted = matching(TOY.base, images)
    assert found["chance"] == distorted["chance"] == 1 / 64
    assert found["found"] > 0.4
    assert distorted["found"] < found["found"] / 2
    assert found["found_half"] == found["found"] / 2
    assert matching(plain, images) == found
    assert matching(replace(plain, seed=1), images) != found
    monkeypatch.setattr(colour_histograms, "CANDIDATES", 16)
    assert matching(plain, images)["found"] > found["found"]


def test_pictured_histograms_are_of_crops_of_two_images(images):
    found = colour_histograms.pictured(TOY.base, images)
    share_IVK = np.array(found["histograms"])
    assert share_IVK.shape == (2, 4, BINS)
    np.testing.assert_allclose(share_IVK.sum(2), 1, atol=1e-3)
    assert found == colour_histograms.pictured(TOY.base, images)
    views = next(iter(make_loader(
        images.test, data_sets.policies_of(TOY.base), micro_batch_size=2, seed=0, backend="threads",
    ))).views_VBCHW.numpy()  # fmt: skip
    expected = histograms(views[1, :1]).reshape(3, BINS).mean(0)
    np.testing.assert_allclose(share_IVK[0, 1], expected, atol=1e-4)


def test_whole_images_are_always_matched(images):
    whole = replace(
        TOY.base.views, crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), jitter_prob=0,
        grayscale_prob=0,
    )  # fmt: skip
    assert matching(replace(TOY.base, views=whole), images)["found"] == 1
