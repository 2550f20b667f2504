"""Two-dimensional t-SNE picture of the representation h."""

from __future__ import annotations

import numpy as np
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

from fastclr.config import ConfigError

_MIN_POINTS = 4
_PCA_DIMS = 50
_MAX_PERPLEXITY = 30.0


def tsne(features_XF: np.ndarray, *, seed: int = 0, max_points: int = 1000) -> np.ndarray:
    """Embed representations in the plane: standardise, PCA to 50 dimensions, then t-SNE.

    Row i of the result belongs to row i of the input. A caller with more rows than `max_points`
    chooses which ones come first. The same input and seed give the same picture on one machine.
    Source: van der Maaten and Hinton, "Visualizing Data using t-SNE", JMLR 2008.

    Args:
        features_XF: Finite representations, shape (X, F) with X >= 4 and F >= 2, any real dtype.
        seed: Seed of every random draw.
        max_points: Only the first `max_points` rows are embedded; at least 4.

    Returns:
        Coordinates without unit, shape (min(X, max_points), 2), float32; all zero where the
        representation has collapsed to one point.

    Raises:
        ConfigError: If the shape is wrong, there are too few points or a value is not finite.
    """
    points_NF = _checked(features_XF, max_points)
    varies_F = np.ptp(points_NF, axis=0) > 0
    if not varies_F.any():
        return np.zeros((len(points_NF), 2), np.float32)
    spread_F = np.where(varies_F, points_NF.std(axis=0), 1.0)
    points_NF = (points_NF - points_NF.mean(axis=0)) / spread_F
    pca = PCA(min(_PCA_DIMS, *points_NF.shape), svd_solver="full")
    # Every point needs neighbours within the perplexity: a third of the points at most.
    perplexity = min(_MAX_PERPLEXITY, (len(points_NF) - 1) / 3)
    embedding = TSNE(perplexity=perplexity, init="pca", random_state=seed)
    return embedding.fit_transform(pca.fit_transform(points_NF)).astype(np.float32)


def _checked(features_XF: np.ndarray, max_points: int) -> np.ndarray:
    """Return the rows to embed as float64, or raise what is wrong with them."""
    if features_XF.ndim != 2 or features_XF.shape[1] < 2:
        raise ConfigError(
            f"t-SNE got features of shape {features_XF.shape}: it embeds one row per image with "
            "at least 2 columns. Pass an array of shape (images, representation width)."
        )
    points_NF = features_XF[:max_points].astype(np.float64)
    if len(points_NF) < _MIN_POINTS:
        raise ConfigError(
            f"t-SNE got {len(points_NF)} points: neighbourhoods mean nothing below {_MIN_POINTS}. "
            f"Evaluate on at least {_MIN_POINTS} images (and max_points >= {_MIN_POINTS})."
        )
    if not np.isfinite(points_NF).all():
        bad_row = int(np.flatnonzero(~np.isfinite(points_NF).all(axis=1))[0])
        raise ConfigError(
            f"t-SNE got a NaN or infinite feature in row {bad_row}: distances to it are undefined. "
            "The encoder has diverged; train again with a smaller learning rate."
        )
    return points_NF
