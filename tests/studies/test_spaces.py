"""Numbers, maps and spectra of h and z."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import silhouette_score

from fastclr.evaluation.collapse import alignment, effective_rank
from fastclr.evaluation.features import extract
from fastclr.simclr import SimCLR
from fastclr.studies import scoring, spaces
from fastclr.studies.scales import TOY
from pipelines.loader import make_loader
from pipelines.policy import SimCLRPolicy

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model():
    return SimCLR.from_config(TOY.base).eval()


def test_numbers_are_of_test_images_and_of_two_views(model, images):
    found = spaces.numbers(model, images, TOY.base, CPU)
    assert list(found) == ["h", "z"]
    features = extract(model.encoder, images.batches(images.test))
    expected = silhouette_score(features.h_XF, features.label_X, metric="cosine")
    assert found["h"]["silhouette"] == pytest.approx(float(expected))
    loader = make_loader(
        images.test, SimCLRPolicy(size=32, color_strength=0.5, blur_prob=0), micro_batch_size=64,
        seed=0, backend="threads",
    )  # fmt: skip
    with torch.no_grad():
        h_NF, z_ND = model(next(iter(loader)).views_VBCHW)
    assert found["h"]["alignment"] == pytest.approx(alignment(h_NF), rel=1e-4)
    assert found["z"]["alignment"] == pytest.approx(alignment(z_ND), rel=1e-4)
    assert found["h"] != found["z"]


def test_without_a_head_z_is_h(images):
    none = replace(TOY.base, head=replace(TOY.base.head, kind="none"))
    found = spaces.numbers(SimCLR.from_config(none).eval(), images, none, CPU)
    assert found["h"] == found["z"]


def test_what_is_not_defined_is_left_out(model, images, monkeypatch):
    monkeypatch.setattr(spaces, "NUM_IMAGES", 1)  # an image has no other class
    assert "silhouette" not in spaces.numbers(model, images, TOY.base, CPU)["h"]


def test_ranks_are_those_of_the_weights(model):
    ranks = scoring.head_ranks(model)
    assert list(ranks) == ["fc1", "fc2"]
    assert ranks["fc1"] == effective_rank(model.projection_head.fc1.weight.detach())


def test_pictures_have_maps_and_spectra(model, images):
    shares, pictures = spaces.pictured(model, images, 0, CPU, lambda _: None)
    assert set(shares) == {"h", "z"} == set(pictures["maps"])
    assert all(0 <= share <= 1 for share in shares.values())
    assert pictures["label"] == images.test.labels(np.arange(64)).tolist()
    for at in pictures["maps"].values():
        assert np.array(at).shape == (64, 2)
        assert np.array(at).min() == 0 and np.array(at).max() == 1000
    assert list(pictures["spectra"]) == ["h", "z", "fc1", "fc2"]
    for values in pictures["spectra"].values():
        assert values[0] == 1 and values == sorted(values, reverse=True)
    assert pictures == spaces.pictured(model, images, 0, CPU, lambda _: None)[1]


def test_neighbours_in_the_plane():
    at_N2 = np.array([[0.0, 0.0], [0.1, 0.0], [5.0, 5.0], [5.0, 5.1], [5.3, 5.0]])
    assert spaces._same_class(at_N2, np.array([0, 0, 1, 1, 0])) == 4 / 5
    assert spaces._same_class(at_N2, np.array([0, 1, 0, 1, 0])) == 1 / 5
    placed = spaces._placed(np.array([[1.0, 7.0], [3.0, 7.0], [2.0, 7.0]]))
    assert placed == [[0, 0], [1000, 0], [500, 0]]
