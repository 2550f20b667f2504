"""The probes find what is there, nothing that is not, and agree with scikit-learn's MLP."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from sklearn.exceptions import ConvergenceWarning
from sklearn.neural_network import MLPClassifier
from threadpoolctl import threadpool_limits

from fastclr.config import ConfigError
from fastclr.evaluation import forgetting
from fastclr.evaluation.features import Features
from fastclr.evaluation.forgetting import (
    PROTOCOL,
    TASKS,
    VIEWS,
    forgetting_markdown,
    forgetting_scores,
    mlp_probe,
    task_features,
)


def views_of(num_images: int, seed: int) -> dict[str, dict[str, Features]]:
    """Return views of which h knows everything, and z the image only."""
    rng = np.random.default_rng(seed)
    image_XF = rng.normal(size=(num_images, 6))
    label_X = rng.integers(0, 3, num_images)
    codes = np.random.default_rng(9).normal(size=(len(VIEWS), 6)) * 3
    found = {}
    for view, code in zip(VIEWS, codes, strict=True):
        layers = {"h": image_XF + code, "z": image_XF + 0.5 * rng.normal(size=image_XF.shape)}
        found[view] = {n: Features(x.astype(np.float32), label_X) for n, x in layers.items()}
    return found


def test_what_is_kept_is_found_and_what_is_gone_is_not(monkeypatch):
    monkeypatch.setattr(forgetting, "EPOCHS", 12)
    said = []
    table = forgetting_scores(views_of(160, 0), views_of(160, 1), say=said.append)
    assert [row.task for row in table] == list(TASKS)
    for row, chance in zip(table, (0.8, 0.25, 0.5, 0.5), strict=True):
        assert row.chance == pytest.approx(chance)
        assert row.top1["h"] > 0.97
        assert row.top1["z"] < chance + 0.1
    assert len(said) == 8
    lines = forgetting_markdown(table).splitlines()
    assert lines[0] == "| what changed | chance | h | z |"
    assert lines[2].startswith("| colour or grayscale | 80.0% | ")
    assert len({line.count("|") for line in lines}) == 1


def exclusive_or(num_rows: int, seed: int, noise: float) -> Features:
    """Return features whose label no linear probe can tell: whether two signs differ."""
    rng = np.random.default_rng(seed)
    h_XF = rng.normal(size=(num_rows, 8))
    label_X = (h_XF[:, 0] * h_XF[:, 1] > 0).astype(np.int64)
    flipped = rng.random(num_rows) < noise
    return Features(h_XF.astype(np.float32), np.where(flipped, 1 - label_X, label_X))


@pytest.mark.parametrize(("noise", "low", "high"), [(0.0, 0.93, 1.0), (0.5, 0.44, 0.56)])
def test_the_probe_is_as_good_as_scikit_learns(noise, low, high):
    train, test = exclusive_or(1500, 0, noise), exclusive_or(1500, 1, noise)
    with threadpool_limits(1):
        other = MLPClassifier((128,), max_iter=40, tol=0, random_state=0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            other.fit(train.h_XF, train.label_X)
    ours, theirs = mlp_probe(train, test), other.score(test.h_XF, test.label_X)
    assert low <= ours <= high
    assert abs(ours - theirs) < 0.05  # four standard errors of 1,500 images


def test_the_probe_is_a_function_of_its_seed():
    train, test = exclusive_or(120, 0, 0.2), exclusive_or(300, 1, 0.2)
    found = [mlp_probe(train, test, seed=seed) for seed in (0, 1, 2, 0)]
    assert found[0] == found[3]
    assert len(set(found)) > 1


def test_pairs_are_of_one_image_and_gray_ones_are_a_fifth():
    views = views_of(40, 0)
    found = task_features(views, "h", TASKS["colour or grayscale"])
    assert np.bincount(found.label_X).tolist() == [40, 10]
    np.testing.assert_array_equal(found.h_XF[:40], views["original"]["h"].h_XF)
    np.testing.assert_array_equal(found.h_XF[40:], views["grayscale"]["h"].h_XF[::4])
    assert np.bincount(task_features(views, "z", TASKS["rotation"]).label_X).tolist() == [40] * 4


def test_views_of_other_images_or_none_are_refused():
    views = views_of(40, 0)
    for broken in (
        {view: layers for view, layers in views.items() if view != "noise"},
        {**views, "noise": views_of(40, 1)["noise"]},
        {**views, "noise": views_of(39, 0)["noise"]},
    ):
        with pytest.raises(ConfigError, match="view 'noise' at layer h is missing or"):
            forgetting_scores(views, broken)
    nan = views_of(40, 0)
    nan["original"]["h"].h_XF[3, 0] = np.nan
    with pytest.raises(FloatingPointError, match="image 3 at"):
        forgetting_scores(views, nan)


def test_the_protocol_says_its_numbers():
    assert all(word in PROTOCOL for word in ("512", "30 epochs", "batch 128", "0.001", "0.0001"))
