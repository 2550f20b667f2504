"""Features in the plane: t-SNE and UMAP, by name."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

from fastclr.config import ConfigError

MIN_POINTS = 4
_PCA_DIMS = 50
_MAX_PERPLEXITY, _MAX_NEIGHBOURS = 30.0, 15


def embed(
    features_XF: np.ndarray, method: str, *, seed: int = 0, max_points: int = 1000
) -> np.ndarray:
    """Embed features in the plane: standardise, PCA to 50 dimensions, then the method.

    Row i of the result belongs to row i of the input. A caller with more rows than `max_points`
    chooses which ones come first. The same input and seed give the same picture on one machine.

    Args:
        features_XF: Finite features, shape (X, F) with X >= 4 and F >= 2, any real dtype.
        method: Key of :data:`METHODS`.
        seed: Seed of every random draw.
        max_points: Only the first `max_points` rows are embedded; at least 4.

    Returns:
        Coordinates without unit, shape (min(X, max_points), 2), float32; all zero where the
        features have collapsed to one point.

    Raises:
        ConfigError: If the method is unknown or its package not installed, the shape is wrong,
            there are too few points or a value is not finite.
    """
    if method not in METHODS:
        raise ConfigError(f"a picture by {method!r} is unknown: choose from {', '.join(METHODS)}.")
    points_NF = _checked(features_XF, max_points)
    varies_F = np.ptp(points_NF, axis=0) > 0
    if not varies_F.any():
        return np.zeros((len(points_NF), 2), np.float32)
    spread_F = np.where(varies_F, points_NF.std(axis=0), 1.0)
    points_NF = (points_NF - points_NF.mean(axis=0)) / spread_F
    pca = PCA(min(_PCA_DIMS, *points_NF.shape), svd_solver="full")
    return np.asarray(METHODS[method](pca.fit_transform(points_NF), seed), np.float32)


def tsne(features_XF: np.ndarray, *, seed: int = 0, max_points: int = 1000) -> np.ndarray:
    """Embed by scikit-learn's t-SNE; see :func:`embed`."""
    return embed(features_XF, "tsne", seed=seed, max_points=max_points)


def _perplexity(num_points: int) -> float:
    """Return a perplexity within which every point has neighbours: at most a third of them."""
    return min(_MAX_PERPLEXITY, (num_points - 1) / 3)


def _sklearn(points_NP: np.ndarray, seed: int) -> np.ndarray:
    """Van der Maaten & Hinton, "Visualizing Data using t-SNE", JMLR 2008."""
    embedding = TSNE(perplexity=_perplexity(len(points_NP)), init="pca", random_state=seed)
    return embedding.fit_transform(points_NP)


def _open_tsne(points_NP: np.ndarray, seed: int) -> np.ndarray:
    """Policar et al., "openTSNE", 2019; exact neighbours and one thread, so that it repeats."""
    module = _imported("openTSNE", "openTSNE", "t-SNE by opentsne")
    return module.TSNE(
        perplexity=_perplexity(len(points_NP)),
        initialization=_first_axes(points_NP, seed, 1e-4),
        neighbors="exact",
        negative_gradient_method="bh",
        random_state=seed,
        n_jobs=1,
    ).fit(points_NP)


def _umap(points_NP: np.ndarray, seed: int) -> np.ndarray:
    """McInnes et al., "UMAP", 2018; begins with the first principal axes, one thread."""
    module = _imported("umap", "umap-learn", "UMAP")
    num_threads = torch.get_num_threads()
    try:
        return module.UMAP(
            n_neighbors=min(_MAX_NEIGHBOURS, len(points_NP) - 1),
            init=_first_axes(points_NP, seed, 1.0).astype(np.float32),
            random_state=seed,
            n_jobs=1,
        ).fit_transform(points_NP)
    finally:
        torch.set_num_threads(num_threads)  # Numba gives this process's OpenMP all cores


def _first_axes(points_NP: np.ndarray, seed: int, deviation: float) -> np.ndarray:
    """Return the first two principal axes, the first of a deviation; no two points are one."""
    start_N2 = np.zeros((len(points_NP), 2))
    start_N2[:, : points_NP.shape[1]] = points_NP[:, :2]
    start_N2 *= deviation / start_N2[:, 0].std()
    noise = np.random.Generator(np.random.Philox(seed)).normal(size=start_N2.shape)
    return start_N2 + 1e-3 * deviation * noise


def _imported(module: str, package: str, what: str) -> Any:
    """Import a package that a picture alone needs.

    Raises:
        ConfigError: If it cannot be.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"{what} needs {package}, which cannot be imported ({error}): pip install {package}, "
            "or choose another method."
        ) from error


METHODS: dict[str, Callable[[np.ndarray, int], Any]] = {
    "tsne": _sklearn,
    "opentsne": _open_tsne,
    "umap": _umap,
}
NAMES = {"tsne": "t-SNE", "opentsne": "t-SNE", "umap": "UMAP"}


def _checked(features_XF: np.ndarray, max_points: int) -> np.ndarray:
    """Return the rows to embed as float64, or raise what is wrong with them."""
    if features_XF.ndim != 2 or features_XF.shape[1] < 2:
        raise ConfigError(
            f"a picture got features of shape {features_XF.shape}: it embeds one row per image "
            "with at least 2 columns. Pass an array of shape (images, representation width)."
        )
    points_NF = features_XF[:max_points].astype(np.float64)
    if len(points_NF) < MIN_POINTS:
        raise ConfigError(
            f"a picture got {len(points_NF)} points: neighbourhoods mean nothing below "
            f"{MIN_POINTS}. Evaluate on at least {MIN_POINTS} images (and max_points >= "
            f"{MIN_POINTS})."
        )
    if not np.isfinite(points_NF).all():
        bad_row = int(np.flatnonzero(~np.isfinite(points_NF).all(axis=1))[0])
        raise ConfigError(
            f"a picture got a NaN or infinite feature in row {bad_row}: distances to it are "
            "undefined. The encoder has diverged; train again with a smaller learning rate."
        )
    return points_NF
