"""The linear probe finds what is linear, and nothing where there is nothing."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from fastclr.evaluation import linear
from fastclr.evaluation.features import Features
from fastclr.evaluation.linear import L2_GRID, PROTOCOL, linear_probe


def blobs(num_rows: int, noise: float, seed: int, width: int = 8, num_classes: int = 4) -> Features:
    """Return class centres with noise."""
    rng = np.random.default_rng(seed)
    centres = 3 * np.random.default_rng(0).normal(size=(num_classes, width))
    label_X = np.arange(num_rows) % num_classes
    h_XF = centres[label_X] + noise * rng.normal(size=(num_rows, width))
    return Features(h_XF.astype(np.float32), label_X)


def test_separable_classes_are_separated():
    score = linear_probe(blobs(200, 0.1, 1), blobs(100, 0.1, 2))
    assert score.top1 == 1
    assert score.l2 in L2_GRID


def test_random_labels_give_chance():
    rng = np.random.default_rng(0)
    train, test = (
        Features(rng.normal(size=(n, 8)).astype(np.float32), rng.integers(0, 4, n))
        for n in (600, 1000)
    )
    assert abs(linear_probe(train, test).top1 - 0.25) < 0.06


def test_scale_and_offset_of_features_do_not_matter():
    train, test = blobs(300, 2.0, 1), blobs(200, 2.0, 2)
    scale = np.logspace(-3, 3, 8).astype(np.float32)
    moved = [Features(f.h_XF * scale + scale * 5, f.label_X) for f in (train, test)]
    assert linear_probe(*moved).top1 == pytest.approx(linear_probe(train, test).top1, abs=0.02)


def test_a_constant_feature_does_no_harm():
    train, test = (
        Features(np.c_[f.h_XF, np.full(len(f.h_XF), 7, np.float32)], f.label_X)
        for f in (blobs(200, 0.1, 1), blobs(100, 0.1, 2))
    )
    assert linear_probe(train, test).top1 == 1


def overfitting() -> tuple[Features, Features]:
    """Return two classes told apart by a few features among many that say nothing."""
    rng = np.random.default_rng(3)
    parts = []
    for num_rows in (400, 1500):
        label_X = rng.integers(0, 2, num_rows)
        h_XF = rng.normal(size=(num_rows, 200)).astype(np.float32)
        h_XF[:, :10] += 0.4 * (2 * label_X[:, None] - 1)
        parts.append(Features(h_XF, label_X))
    return parts[0], parts[1]


def test_the_l2_that_generalises_is_chosen(monkeypatch):
    train, test = overfitting()
    strong, weak = 1.0, 1e-7
    alone = {}
    for l2 in (strong, weak):
        monkeypatch.setattr(linear, "L2_GRID", (l2,))
        alone[l2] = linear_probe(train, test)
        assert alone[l2].l2 == l2
    assert alone[strong].top1 > alone[weak].top1 + 0.03
    for grid in ((strong, weak), (weak, strong)):
        monkeypatch.setattr(linear, "L2_GRID", grid)
        chosen = linear_probe(train, test)
        assert chosen.l2 == strong
        assert chosen.top1 == pytest.approx(alone[strong].top1, abs=0.01)


def test_the_same_seed_gives_the_same_score():
    train, test = overfitting()
    assert linear_probe(train, test, seed=1) == linear_probe(train, test, seed=1)


def test_input_stays_as_it_is_and_nothing_warns():
    train, test = blobs(60, 1.0, 1), blobs(40, 1.0, 2)
    before = train.h_XF.copy(), test.h_XF.copy()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        linear_probe(train, test)
    np.testing.assert_array_equal(train.h_XF, before[0])
    np.testing.assert_array_equal(test.h_XF, before[1])


def test_a_class_with_one_row_is_fitted_like_the_others():
    train = blobs(300, 1.0, 1, num_classes=3)
    train.label_X[7] = 3
    assert linear_probe(train, blobs(300, 1.0, 2, num_classes=3)).top1 > 0.9


@pytest.mark.parametrize(("num_rows", "num_classes"), [(40, 1), (19, 4)])
def test_too_little_data_is_refused(num_rows, num_classes):
    train = blobs(num_rows, 1.0, 1, num_classes=num_classes)
    with pytest.raises(ValueError, match=f"there are {num_classes} classes and {num_rows} rows"):
        linear_probe(train, train)


def test_the_protocol_names_the_grid():
    assert all(f"{l2:g}" in PROTOCOL for l2 in L2_GRID)
