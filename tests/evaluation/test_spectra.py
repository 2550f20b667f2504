"""Spectra and numbers beside pictures, against their definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import silhouette_score

from fastclr.evaluation import collapse, spectra
from fastclr.heads import mlp, none


def features(num_rows: int = 200, num_dims: int = 6) -> np.ndarray:
    rng = np.random.default_rng(0)
    return (rng.normal(size=(num_rows, num_dims)) * np.arange(1, num_dims + 1) + 3).astype("f4")


@pytest.mark.parametrize("block", [7, 2**15])
def test_the_spectrum_is_that_of_the_covariance(block, monkeypatch):
    monkeypatch.setattr(spectra, "_BLOCK", block)
    h_XF = features()
    singular_F = np.linalg.svd(np.cov(h_XF.T.astype(float), bias=True))[1]
    np.testing.assert_allclose(spectra.covariance_spectrum(h_XF), singular_F, rtol=1e-9)
    variances = np.sort(h_XF.astype(float).var(0))
    assert spectra.covariance_spectrum(h_XF).sum() == pytest.approx(variances.sum())


def test_collapsed_dimensions_are_zeros():
    h_XF = np.tile(features()[:, :2], 3)
    spectrum_F = spectra.covariance_spectrum(h_XF)
    assert (spectrum_F >= 0).all() and (spectrum_F[2:] < 1e-12 * spectrum_F[0]).all()
    assert spectra.covariance_spectrum(np.ones((5, 3), np.float32)).tolist() == [0, 0, 0]


def test_effective_ranks_of_known_spectra():
    assert spectra.effective_rank(np.ones(7)) == pytest.approx(7)
    assert spectra.effective_rank(np.array([3.0, 0, 0])) == pytest.approx(1)
    assert spectra.effective_rank(np.zeros(3)) == 0
    assert spectra.effective_rank(np.array([0.5, 0.25, 0.25])) == pytest.approx(2**1.5)


def test_every_linear_layer_of_the_head_has_its_spectrum():
    head = mlp(8, 6, 4)
    found = spectra.weight_spectra(head)
    assert list(found) == ["fc1", "fc2"]
    weight = head.fc1.weight.detach().numpy()
    np.testing.assert_allclose(found["fc1"], np.linalg.svd(weight)[1], rtol=1e-5)
    assert spectra.weight_spectra(none(8)) == {}


def test_numbers_are_those_of_the_definitions():
    h_XF, label_X = features(60), np.arange(60) % 3
    views_NF = torch.from_numpy(features(40))
    found = spectra.numbers(h_XF, label_X, views_NF)
    assert found.silhouette == pytest.approx(silhouette_score(h_XF, label_X, metric="cosine"))
    assert found.effective_rank == spectra.effective_rank(spectra.covariance_spectrum(h_XF))
    singular_F = np.linalg.svd(h_XF.astype(float), compute_uv=False)
    share_F = singular_F / singular_F.sum()
    assert found.rankme == pytest.approx(np.exp(-(share_F * np.log(share_F)).sum()), rel=1e-6)
    unit_NF = torch.nn.functional.normalize(views_NF)
    expected = (unit_NF[:20] - unit_NF[20:]).square().sum(1).mean().item()
    assert found.alignment == pytest.approx(expected, rel=1e-5)
    halves = [collapse.uniformity(view) for view in (views_NF[:20], views_NF[20:])]
    assert found.uniformity == pytest.approx(np.mean(halves))


@pytest.mark.parametrize("label_X", [np.zeros(60, int), np.arange(60)])
def test_silhouettes_that_are_not_defined(label_X):
    assert np.isnan(spectra.numbers(features(60), label_X, torch.ones(2, 6)).silhouette)
