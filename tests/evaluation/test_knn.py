"""The weighted vote against a loop and scikit-learn; blocks, ties, grids and faiss."""

from __future__ import annotations

import sys
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import KNeighborsClassifier
from threadpoolctl import threadpool_limits

from fastclr.config import ConfigError
from fastclr.evaluation import knn
from fastclr.evaluation.features import Features
from fastclr.evaluation.knn import NEIGHBOURS, PROTOCOL, knn_accuracy, knn_scores


def features(num_rows: int, num_classes: int, seed: int, width: int = 5) -> Features:
    """Return noisy class centres."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(7).normal(size=(num_classes, width))
    label_X = rng.integers(0, num_classes, num_rows)
    h_XF = centres[label_X] + rng.normal(size=(num_rows, width))
    return Features(h_XF.astype(np.float32), label_X)


def slow_accuracy(train: Features, test: Features, neighbours: int, temperature: float) -> float:
    """Vote one test image at a time."""
    right = 0
    keys = [row / np.linalg.norm(row) for row in train.h_XF.astype(np.float64)]
    for row, truth in zip(test.h_XF.astype(np.float64), test.label_X, strict=True):
        similarity = np.array([row @ key / np.linalg.norm(row) for key in keys])
        votes = np.zeros(20)
        for k in np.argsort(-similarity)[:neighbours]:
            votes[train.label_X[k]] += np.exp(similarity[k] / temperature)
        right += int(votes.argmax() == truth)
    return right / len(test.label_X)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    neighbours=st.integers(1, 60),
    temperature=st.sampled_from([0.07, 0.3, 5.0]),
    block=st.sampled_from([1, 7, 512]),
)
def test_it_is_the_vote_of_a_loop(seed, neighbours, temperature, block):
    train, test = features(50, 4, seed), features(30, 4, seed + 1)
    found = knn_accuracy(train, test, neighbours=neighbours, temperature=temperature, block=block)
    assert found == slow_accuracy(train, test, neighbours, temperature)


def test_the_default_is_the_protocol():
    train, test = features(200, 5, 0), features(100, 5, 1)
    assert knn_accuracy(train, test) == slow_accuracy(train, test, 20, 0.07)
    assert str(NEIGHBOURS) in PROTOCOL
    assert "0.07" in PROTOCOL


def test_itself_is_the_nearest():
    train = features(60, 6, 0)
    assert knn_accuracy(train, train, neighbours=1) == 1


def test_near_neighbours_weigh_more_than_many_far_ones():
    h_XF = np.array([[1, 0], [0.6, 0.8], [0.6, 0.8], [0.6, 0.8]], np.float32)
    train = Features(h_XF, np.array([0, 1, 1, 1]))
    test = Features(np.array([[2, 0.1]], np.float32), np.array([0]))
    assert knn_accuracy(train, test, temperature=0.07) == 1
    assert knn_accuracy(train, test, temperature=100) == 0


def test_lengths_do_not_matter():
    train, test = features(60, 4, 0), features(40, 4, 1)
    longer = Features(
        train.h_XF * np.linspace(0.1, 9, 60, dtype=np.float32)[:, None], train.label_X
    )
    assert knn_accuracy(longer, test) == knn_accuracy(train, test)


@pytest.mark.parametrize("label", [0, 9])
def test_a_class_without_training_images_is_never_right(label):
    train = Features(np.eye(3, dtype=np.float32), np.array([1, 2, 3]))
    test = Features(np.eye(3, dtype=np.float32), np.array([1, 2, label]))
    assert knn_accuracy(train, test, neighbours=1) == pytest.approx(2 / 3)


def by_sklearn(train: Features, test: Features, neighbours: int, temperature: float) -> float:
    """Score the same vote by scikit-learn; 1 - cosine similarity is its distance."""
    classifier = KNeighborsClassifier(
        neighbours,
        metric="cosine",
        algorithm="brute",
        weights=lambda distance: np.exp((1 - distance) / temperature),
    )
    classifier.fit(train.h_XF.astype(np.float64), train.label_X)
    with threadpool_limits(1):
        return classifier.score(test.h_XF.astype(np.float64), test.label_X)


def test_the_grid_is_scikit_learns_and_one_at_a_time():
    train, test = features(700, 6, 0, width=9), features(230, 6, 1, width=9)
    grid = {"neighbours": (200, 1, 20, 5), "temperatures": (1.0, 0.07, 0.02)}
    found = knn_scores(train, test, **grid)
    assert list(found) == [(k, t) for k in grid["neighbours"] for t in grid["temperatures"]]
    assert len(set(found.values())) > 5
    for (k, t), top1 in found.items():
        assert top1 == by_sklearn(train, test, k, t)
        assert top1 == knn_accuracy(train, test, neighbours=k, temperature=t)


def test_blocks_of_keys_change_nothing(monkeypatch):
    train, test = features(300, 5, 2), features(80, 5, 3)
    whole = knn_scores(train, test, neighbours=(1, 7, 50))
    for first, most in ((1, 1), (3, 20), (64, 64)):
        monkeypatch.setattr(knn, "_FIRST_KEYS", first)
        monkeypatch.setattr(knn, "_KEYS", most)
        assert knn_scores(train, test, neighbours=(1, 7, 50), block=33) == whole


def nearest(train: Features, test: Features, most: int) -> np.ndarray:
    """Return the neighbours' rows."""
    found = list(knn._by_torch(train, test, most, 8, torch.device("cpu")))
    return torch.cat([row_NK for _, row_NK in found]).numpy()


@pytest.mark.parametrize("blocks", [(2, 2), (3, 6), (100, 100)])
def test_of_equals_the_first_are_neighbours_in_any_blocks(monkeypatch, blocks):
    monkeypatch.setattr(knn, "_FIRST_KEYS", blocks[0])
    monkeypatch.setattr(knn, "_KEYS", blocks[1])
    rng = np.random.default_rng(0)
    corner_X = rng.integers(0, 4, 60)
    # Rows along the axes: their similarities are 0 and 1 exactly, so that most are equal.
    train = Features(np.eye(4, dtype=np.float32)[corner_X], corner_X)
    test = Features(np.eye(4, dtype=np.float32), np.arange(4))
    similarity = test.h_XF @ train.h_XF.T
    for most in (1, 5, 30, 60):
        expected = np.argsort(-similarity, axis=1, kind="stable")[:, :most]
        np.testing.assert_array_equal(nearest(train, test, most), expected)


def test_low_temperatures_do_not_overflow():
    train, test = features(200, 5, 0), features(100, 5, 1)
    found = knn_scores(train, test, neighbours=(1, 50), temperatures=(1e-4,))
    assert found[50, 1e-4] == found[1, 1e-4]


def test_features_in_a_file_serve_as_well(tmp_path):
    train, test = features(200, 5, 0), features(100, 5, 1)
    np.save(tmp_path / "h.npy", train.h_XF)
    mapped = Features(np.load(tmp_path / "h.npy", mmap_mode="r"), train.label_X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert knn_accuracy(mapped, test) == knn_accuracy(train, test)


def test_extra_memory_is_of_blocks_and_not_of_the_set(monkeypatch):
    monkeypatch.setattr(knn, "_FIRST_KEYS", 64)
    monkeypatch.setattr(knn, "_KEYS", 128)
    shapes = set()
    merge = knn._merge

    def watched(best_NK, nearest_NK, similarity_NM, first, most):
        shapes.add(tuple(similarity_NM.shape))
        return merge(best_NK, nearest_NK, similarity_NM, first, most)

    monkeypatch.setattr(knn, "_merge", watched)
    knn_accuracy(features(1000, 4, 0), features(100, 4, 1), block=32)
    assert max(n for n, _ in shapes) == 32
    assert max(m for _, m in shapes) == 128


class Index:
    """Stands in for faiss.IndexFlatIP; equal keys come in no order."""

    def __init__(self, width: int) -> None:
        self.keys = np.empty((0, width), np.float32)

    def add(self, keys: np.ndarray) -> None:
        assert keys.dtype == np.float32 and keys.flags.c_contiguous
        self.keys = np.concatenate([self.keys, keys])

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        similarity = queries @ self.keys.T
        rows = similarity.shape[1] - 1 - np.argsort(-similarity[:, ::-1], axis=1, kind="stable")
        rows = rows[:, :k]
        return np.take_along_axis(similarity, rows, 1), rows.astype(np.int64)


def test_faiss_by_name_finds_the_same(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", SimpleNamespace(IndexFlatIP=Index))
    train, test = features(300, 5, 2), features(80, 5, 3)
    grid = {"neighbours": (1, 7, 50), "temperatures": (0.07, 1.0)}
    assert knn_scores(train, test, **grid, impl="faiss") == knn_scores(train, test, **grid)
    same = Features(np.ones((6, 3), np.float32), np.array([4, 0, 1, 2, 3, 0]))
    ((_, rows_NK),) = knn._by_faiss(same, same, 6, 8, torch.device("cpu"))
    assert (rows_NK == torch.arange(6)).all()


def test_faiss_that_is_not_installed_is_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ConfigError, match=r"faiss cannot be imported .*: install faiss-cpu"):
        knn_scores(features(30, 3, 0), features(9, 3, 1), impl="faiss")


def test_the_real_faiss_finds_the_same():
    train, test = features(300, 5, 2), features(80, 5, 3)
    assert knn_scores(train, test, impl="faiss") == knn_scores(train, test)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"impl": "annoy"}, "'annoy' are unknown: choose torch, faiss"),
        ({"neighbours": (5, 0)}, r"\[5, 0\] neighbours"),
        ({"neighbours": ()}, r"\[\] neighbours"),
        ({"temperatures": (0.0,)}, r"temperatures \[0.0\]"),
        ({"temperatures": (np.nan,)}, r"temperatures \[nan\]"),
    ],
)
def test_settings_that_make_no_sense_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        knn_scores(features(30, 3, 0), features(9, 3, 1), **change)


def test_features_that_cannot_be_scored_are_refused():
    train, test = features(30, 3, 0), features(9, 3, 1)
    broken = Features(test.h_XF.copy(), test.label_X)
    broken.h_XF[4, 2] = np.nan
    with pytest.raises(FloatingPointError, match="image 4 at the test set's layer"):
        knn_accuracy(train, broken)
    unlabelled = Features(train.h_XF, np.where(np.arange(30) < 3, -1, train.label_X))
    with pytest.raises(ConfigError, match="3 of the 30 training images have no label"):
        knn_accuracy(unlabelled, test)
    with pytest.raises(ConfigError, match="training features have 5 dimensions, test features 4"):
        knn_accuracy(train, Features(test.h_XF[:, :4], test.label_X))
    with pytest.raises(ConfigError, match="the test set has 0 features"):
        knn_accuracy(train, Features(test.h_XF[:0], test.label_X[:0]))
    with pytest.raises(ConfigError, match="9 features and 8 labels"):
        knn_accuracy(train, Features(test.h_XF, test.label_X[:8]))
