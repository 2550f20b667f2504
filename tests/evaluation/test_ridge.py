"""The quick probe is scikit-learn's ridge classifier, with its l2 chosen on held-out rows."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import RidgeClassifier
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_info, threadpool_limits

from fastclr.config import ConfigError
from fastclr.evaluation import ridge
from fastclr.evaluation.features import Features
from fastclr.evaluation.linear import LinearScore, split
from fastclr.evaluation.ridge import L2_GRID, PROTOCOL, ridge_probe


def features(
    num_rows: int, width: int, seed: int, num_classes: int = 4, noise: float = 1.5
) -> Features:
    """Return class centres with much noise, in units and with offsets of their own."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(0).normal(size=(num_classes, width))
    label_X = rng.integers(0, num_classes, num_rows) * 3 + 2  # not 0, 1, 2
    label_X[: num_rows // 3] = 2  # classes that are not equally many
    h_XF = centres[label_X // 3] + noise * rng.normal(size=(num_rows, width))
    return Features((h_XF * np.logspace(-2, 2, width) + 5).astype(np.float32), label_X)


def reference(
    train: Features, rows: np.ndarray, l2: float
) -> tuple[StandardScaler, RidgeClassifier]:
    """Return scikit-learn's fit to some rows, standardised by all of them."""
    scaler = StandardScaler().fit(train.h_XF.astype(np.float64))
    model = RidgeClassifier(alpha=l2 * len(rows))
    return scaler, model.fit(scaler.transform(train.h_XF[rows]), train.label_X[rows])


@pytest.mark.parametrize("num_classes", [2, 4])
@pytest.mark.parametrize(("num_rows", "width"), [(300, 8), (120, 40), (60, 90)])
@pytest.mark.parametrize("l2", L2_GRID)
def test_predictions_are_those_of_scikit_learn(monkeypatch, num_rows, width, num_classes, l2):
    monkeypatch.setattr(ridge, "L2_GRID", (l2,))
    train = features(num_rows, width, 1, num_classes)
    test = features(1000, width, 2, num_classes)
    scaler, model = reference(train, np.arange(num_rows), l2)
    answers = model.predict(scaler.transform(test.h_XF))
    assert len(np.unique(answers)) == num_classes or l2 == max(L2_GRID)
    assert ridge_probe(train, Features(test.h_XF, answers)) == LinearScore(1.0, l2)
    truth = float((answers == test.label_X).mean())
    assert ridge_probe(train, test).top1 == pytest.approx(truth, abs=1e-9)


def test_features_that_nearly_repeat_each_other_are_told_apart(monkeypatch):
    """In float32 the covariance's rounding would weigh as much as so weak a penalty."""
    monkeypatch.setattr(ridge, "L2_GRID", (l2 := 1e-6,))
    rng = np.random.default_rng(0)
    factors, label_X = rng.normal(size=(3000, 4)), rng.integers(0, 3, 3000)
    detail = 1e-3 * (np.eye(60)[label_X] + 0.5 * rng.normal(size=(3000, 60)))
    h_XF = (factors @ rng.normal(size=(4, 60)) + detail).astype(np.float32)
    train, test = Features(h_XF[:1500], label_X[:1500]), Features(h_XF[1500:], label_X[1500:])
    scaler, model = reference(train, np.arange(1500), l2)
    answers = model.predict(scaler.transform(test.h_XF))
    assert (answers == test.label_X).mean() > 0.6
    assert ridge_probe(train, Features(test.h_XF, answers)).top1 > 0.995


@pytest.mark.parametrize("seed", range(30))
def test_l2_is_the_strongest_of_the_best_on_the_held_out_tenth(seed):
    train = features(150, 40, seed, noise=4.0)
    fitting, held_out = split(train.label_X, seed)
    right = {}
    for l2 in L2_GRID:
        scaler, model = reference(train, fitting, l2)
        right[l2] = model.score(scaler.transform(train.h_XF[held_out]), train.label_X[held_out])
    best = max(l2 for l2 in L2_GRID if right[l2] == max(right.values()))
    assert ridge_probe(train, train, seed=seed).l2 == best


def test_the_order_of_the_grid_does_not_matter(monkeypatch):
    train, test = features(150, 60, 1), features(100, 60, 2)
    found = ridge_probe(train, test)
    monkeypatch.setattr(ridge, "L2_GRID", L2_GRID[::-1])
    assert ridge_probe(train, test) == found


def test_one_eigendecomposition_serves_all_l2_on_one_thread(monkeypatch):
    calls = []

    def noted(name):
        compute = getattr(np.linalg, name)

        def call(x, *rest):
            pools = threadpool_info()
            threads = {pool["num_threads"] for pool in pools if pool["user_api"] == "blas"}
            calls.append((name, x.shape, threads))
            return compute(x, *rest)

        return call

    for name in ("eigh", "solve"):
        monkeypatch.setattr(np.linalg, name, noted(name))
    with threadpool_limits(2, user_api="blas"):
        ridge_probe(features(150, 12, 1), features(100, 12, 2))
    assert calls == [("eigh", (12, 12), {1}), ("solve", (12, 12), {1})]


def test_features_that_do_not_vary_do_no_harm():
    train, test = features(200, 8, 1), features(300, 8, 2)
    wider = [
        Features(np.c_[f.h_XF, np.full(len(f.h_XF), 1e4 / 3, np.float32)], f.label_X)
        for f in (train, test)
    ]
    assert ridge_probe(*wider).top1 == ridge_probe(train, test).top1


def test_a_collapsed_encoder_gives_the_most_frequent_class():
    train, test = features(200, 8, 1), features(300, 8, 2)
    same = [Features(np.full_like(f.h_XF, 0.1), f.label_X) for f in (train, test)]
    assert ridge_probe(*same).top1 == float((test.label_X == 2).mean())


def test_a_class_without_training_images_is_never_right():
    train, test = features(200, 8, 1), features(300, 8, 2)
    assert ridge_probe(train, Features(test.h_XF, np.full(300, 3))).top1 == 0
    assert ridge_probe(train, Features(test.h_XF, np.full(300, 99))).top1 == 0


def test_input_stays_as_it_is():
    train, test = features(60, 8, 1), features(40, 8, 2)
    before = train.h_XF.copy(), test.h_XF.copy()
    ridge_probe(train, test)
    np.testing.assert_array_equal(train.h_XF, before[0])
    np.testing.assert_array_equal(test.h_XF, before[1])


def test_too_little_data_is_refused():
    train = features(19, 8, 1)
    with pytest.raises(ConfigError, match="there are 4 classes and 19 rows"):
        ridge_probe(train, train)


def test_the_protocol_names_the_grid():
    assert all(f"{l2:g}" in PROTOCOL for l2 in L2_GRID)
