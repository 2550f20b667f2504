"""The weighted vote against a loop."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastclr.evaluation.features import Features
from fastclr.evaluation.knn import NEIGHBOURS, PROTOCOL, knn_accuracy


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
