"""t-SNE of features."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastclr.config import ConfigError
from fastclr.evaluation.projection_2d import METHODS, embed, tsne


def clusters(num_points: int = 90, num_features: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """Return features in three far clusters, float32, and the clusters' numbers."""
    rng = np.random.default_rng(0)
    label_X = np.arange(num_points) % 3
    centers = 8 * rng.normal(size=(3, num_features))
    features_XF = rng.normal(size=(num_points, num_features)) + centers[label_X]
    return features_XF.astype(np.float32), label_X


@pytest.mark.parametrize("method", METHODS)
def test_clusters_stay_apart(method):
    features_XF, label_X = clusters()
    points_N2 = embed(features_XF, method)
    assert points_N2.shape == (90, 2)
    assert points_N2.dtype == np.float32
    distance_NN = np.linalg.norm(points_N2[:, None] - points_N2[None], axis=2)
    np.fill_diagonal(distance_NN, np.inf)
    assert (label_X[distance_NN.argmin(axis=1)] == label_X).all()


@pytest.mark.parametrize("method", METHODS)
def test_same_seed_same_picture(method):
    features_XF, _ = clusters(60)
    one, same, other = (embed(features_XF, method, seed=seed) for seed in (3, 3, 4))
    np.testing.assert_array_equal(one, same)
    assert method == "tsne" or not np.array_equal(one, other)  # that begins without a draw


@pytest.mark.parametrize("method", METHODS)
def test_torch_keeps_its_threads(method):
    before = torch.get_num_threads()
    try:
        for num_threads in (1, 3):
            torch.set_num_threads(num_threads)
            embed(clusters(12)[0], method)
            assert torch.get_num_threads() == num_threads
    finally:
        torch.set_num_threads(before)


def test_first_rows_are_taken():
    features_XF, _ = clusters(60)
    np.testing.assert_array_equal(tsne(features_XF, max_points=20), tsne(features_XF[:20]))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("num_points", [4, 5, 10])
def test_few_points(method, num_points):
    points_N2 = embed(clusters(num_points)[0], method)
    assert points_N2.shape == (num_points, 2) and np.isfinite(points_N2).all()


@pytest.mark.parametrize("method", METHODS)
def test_collapsed_features(method):
    assert np.isfinite(embed(np.ones((12, 8), np.float32), method)).all()
    line_XF = np.arange(12.0)[:, None] * np.ones(8)  # one direction is left
    assert np.isfinite(embed(line_XF, method)).all()
    twins_XF = np.repeat(clusters(6)[0], 2, axis=0)
    assert np.isfinite(embed(twins_XF, method)).all()


def test_input_stays_as_it_is():
    features_XF, _ = clusters(12)
    before = features_XF.copy()
    tsne(features_XF)
    np.testing.assert_array_equal(features_XF, before)


def test_bad_input_is_refused():
    with pytest.raises(ConfigError, match="3 points"):
        tsne(np.zeros((3, 8)))
    with pytest.raises(ConfigError, match=r"shape \(8,\)"):
        tsne(np.zeros(8))
    with pytest.raises(ConfigError, match="'pca' is unknown: choose from tsne, opentsne, umap"):
        embed(clusters(12)[0], "pca")
    with pytest.raises(ConfigError, match="row 5"):
        tsne(np.where(np.arange(10)[:, None] == 5, np.nan, np.ones((10, 4))))
