"""Logistic regression is scikit-learn's, the penalty validation's best, then refitted."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from fastclr.config import ConfigError
from fastclr.evaluation import linear_lbfgs
from fastclr.evaluation.draws import balanced_split
from fastclr.evaluation.features import Features
from fastclr.evaluation.linear_lbfgs import L2_GRID, lbfgs_probe


def features(num_rows: int, seed: int, width: int = 12, classes: int = 4, noise=2.0) -> Features:
    """Return class centres with noise, off the origin; labels are not 0, 1, 2."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(0).normal(size=(classes, width)) + 3
    class_X = rng.integers(0, classes, num_rows)
    h_XF = centres[class_X] + noise * rng.normal(size=(num_rows, width))
    return Features(h_XF.astype(np.float32), 3 * class_X + 2)


def reference(rows: Features, l2: float) -> LogisticRegression:
    """Return scikit-learn's fit, to the end."""
    model = LogisticRegression(C=1 / l2, tol=1e-9, max_iter=20_000)
    return model.fit(rows.h_XF.astype(np.float64), rows.label_X)


def fitted(train: Features, l2: float) -> np.ndarray:
    """Return weights and, in the last row, biases (F + 1, C) of one fit from zero."""
    cpu = torch.device("cpu")
    objective = linear_lbfgs._Objective(train, np.unique(train.label_X), cpu)
    weights = objective.fit(objective.start(), l2, linear_lbfgs._FINAL_ITERATIONS)
    weights[-1] -= objective.mean_F @ weights[:-1]
    return weights


def test_the_grid_is_the_papers():
    assert len(L2_GRID) == 45
    assert max(L2_GRID) == pytest.approx(1e5) and min(L2_GRID) == pytest.approx(1e-6)
    steps = np.diff(np.log10(L2_GRID))
    assert np.allclose(steps, steps[0]) and steps[0] < 0, "strong to weak"


@pytest.mark.parametrize("l2", [1e3, 1.0, 1e-2])
def test_weights_are_those_of_scikit_learn(l2, monkeypatch):
    monkeypatch.setattr(linear_lbfgs, "_BLOCK", 77)  # sums over blocks that are not whole
    monkeypatch.setattr(linear_lbfgs, "_DECREASE", 1e-14)
    monkeypatch.setattr(linear_lbfgs, "_GRADIENT", 1e-9)
    train = features(300, 1)
    weights, model = fitted(train, l2), reference(train, l2)
    np.testing.assert_allclose(weights[:-1], model.coef_.T, atol=2e-5, rtol=1e-3)
    bias = weights[-1] - weights[-1].mean()  # a constant added to all classes changes nothing
    np.testing.assert_allclose(bias, model.intercept_ - model.intercept_.mean(), atol=1e-3)


def test_of_two_classes_scikit_learn_penalises_the_difference_alone():
    """It has one vector w where the softmax has w/2 and -w/2: half its penalty is as strong."""
    train, l2 = features(300, 1, classes=2), 4.0
    weights, model = fitted(train, l2), reference(train, l2 / 2)
    difference = weights[:-1, 1] - weights[:-1, 0]
    np.testing.assert_allclose(difference, model.coef_[0], atol=2e-4)


def test_the_score_is_scikit_learns_over_the_same_grid():
    train, test, grid = features(250, 1), features(600, 2), (1e3, 30.0, 1.0, 0.03)
    fitting, held_out = (
        Features(train.h_XF[rows], train.label_X[rows]) for rows in balanced_split(train.label_X, 5)
    )
    scores = tuple(reference(fitting, l2).score(*held_out) for l2 in grid)
    best = max(l2 for l2, s in zip(grid, scores, strict=True) if s == max(scores))
    model = reference(train, best)
    found = lbfgs_probe(train, test, grid=grid, seed=5)
    assert found.l2 == best
    assert found.validation == pytest.approx(scores, abs=1e-9)
    assert found.score == pytest.approx(model.score(*test), abs=0.004)
    assert (found.answer_X == model.predict(test.h_XF)).mean() > 0.995


def test_given_validation_images_choose_and_are_then_fitted_too():
    train, test = features(60, 1, width=30), features(2000, 2, width=30)
    validation = features(600, 3, width=30)
    alone = lbfgs_probe(train, test, validation, grid=(10.0,))
    both = Features(
        np.concatenate([train.h_XF, validation.h_XF]),
        np.concatenate([train.label_X, validation.label_X]),
    )
    assert (alone.answer_X == reference(both, 10.0).predict(test.h_XF)).mean() > 0.998
    assert alone.score > reference(train, 10.0).score(*test) + 0.03


def test_the_metric_chooses_and_scores():
    train, test = features(300, 1), features(300, 2)
    answer_X = lbfgs_probe(train, test, grid=(1.0,)).answer_X
    rights = [(answer_X == test.label_X)[test.label_X == k].mean() for k in np.unique(test.label_X)]
    found = lbfgs_probe(train, test, grid=(1.0,), metric="mean_per_class")
    assert found.score == pytest.approx(np.mean(rights))
    with pytest.raises(ConfigError, match="metric 'top5' is unknown"):
        lbfgs_probe(train, test, metric="top5")


def test_the_whole_walk_warns_of_nothing_and_changes_nothing():
    train, test = features(120, 1), features(80, 2)
    for array in (*train, *test):
        array.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first, second = lbfgs_probe(train, test), lbfgs_probe(train, test)
    assert first.score == second.score > 0.6 and len(first.validation) == 45
    assert 1e-3 < first.l2 < 1e4, "an end of the grid is not the best"


def spoiled(where: str) -> Features:
    good = features(100, 1)
    h_XF, label_X = good.h_XF.copy(), good.label_X.copy()
    if where == "nan":
        h_XF[17, 3] = np.nan
    if where == "unlabelled":
        label_X[17] = -1
    if where == "one class":
        label_X[:] = 2
    if where == "narrow":
        h_XF = h_XF[:, :5]
    return Features(h_XF, label_X)


@pytest.mark.parametrize(
    ("where", "error", "message"),
    [
        ("nan", FloatingPointError, "features of image 17 .* not finite"),
        ("unlabelled", ConfigError, "1 of the 100 training images have no label"),
        ("one class", ConfigError, "there are 1 classes and 100 rows"),
        ("narrow", ConfigError, "training features have 5 dimensions, test features 12"),
    ],
)
def test_bad_input_is_told(where, error, message):
    with pytest.raises(error, match=message):
        lbfgs_probe(spoiled(where), features(100, 2))


def test_too_few_to_hold_any_out():
    train = Features(features(24, 1).h_XF, np.arange(24) // 2)
    with pytest.raises(ConfigError, match="none of the classes has 5"):
        lbfgs_probe(train, train)


@pytest.mark.parametrize("grid", [(), (1.0, 0.0)])
def test_a_grid_that_is_none(grid):
    with pytest.raises(ConfigError, match="give one or more numbers above 0"):
        lbfgs_probe(features(100, 1), features(100, 2), grid=grid)
