"""A linear probe quick enough for the middle of a training: ridge regression, in closed form."""

from __future__ import annotations

import functools
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

from fastclr.evaluation.features import Features
from fastclr.evaluation.linear import LinearScore, check_labels, split, standardised

Array: TypeAlias = npt.NDArray[np.floating]
Int64: TypeAlias = npt.NDArray[np.int64]

L2_GRID = (10.0, 1.0, 1e-1, 1e-2, 1e-3, 1e-4)
PROTOCOL = (
    "Ridge regression of one-hot labels on frozen, standardised features of un-augmented images; "
    "l2 from {grid}, chosen on a tenth of the training images, then fitted on all of them."
).format(grid=", ".join(f"{l2:g}" for l2 in L2_GRID))


def ridge_probe(train: Features, test: Features, *, seed: int = 0) -> LinearScore:
    """Fit the probe on training features and score it on test features; see :data:`PROTOCOL`.

    It minimises the mean of |W h + b - one-hot label|^2 plus l2 |W|^2 (Hoerl & Kennard 1970). One
    eigendecomposition of the features' covariance serves all l2: O(X F^2 + F^3), in float64.

    Args:
        train: Labelled features, finite.
        test: Labelled features of the same width.
        seed: Seed of the split that chooses l2.

    Raises:
        ConfigError: If there are fewer than 2 classes, 20 training rows, or 2 rows a class.
    """
    check_labels(train.label_X)
    train, test = standardised(train, test)
    known_C, class_X = np.unique(train.label_X, return_inverse=True)
    h_XF = train.h_XF.astype(np.float64)
    fitting, held_out = split(train.label_X, seed)
    l2 = _choose(
        _moments(h_XF[fitting], class_X[fitting], len(known_C)), h_XF[held_out], class_X[held_out]
    )
    moments = _moments(h_XF, class_X, len(known_C))
    with _one_thread():
        weight_FC = np.linalg.solve(
            moments.covariance_FF + l2 * np.eye(h_XF.shape[1]), moments.cross_FC
        )
    found_X = known_C[_classify(moments, weight_FC, test.h_XF)]
    return LinearScore(float((found_X == test.label_X).mean()), l2)


# In the middle of a training the cores are busy, and LAPACK's threads wait for each other: the
# eigendecomposition of 256 features took 3 s on two of them, and 0.02 s on one.
_one_thread = functools.partial(threadpool_limits, 1, user_api="blas")


class _Moments(NamedTuple):
    """What the closed form needs of rows: covariances of features and one-hot labels, and means."""

    covariance_FF: Array
    cross_FC: Array
    mean_F: Array
    mean_C: Array


def _moments(h_XF: Array, class_X: Int64, num_classes: int) -> _Moments:
    """Return the moments of rows."""
    target_XC = np.eye(num_classes)[class_X]
    mean_F, mean_C = h_XF.mean(0), target_XC.mean(0)
    h_XF = h_XF - mean_F
    scale = len(h_XF)
    return _Moments(h_XF.T @ h_XF / scale, h_XF.T @ (target_XC - mean_C) / scale, mean_F, mean_C)


def _choose(moments: _Moments, h_XF: Array, class_X: Int64) -> float:
    """Return the l2 under which the held-out rows are classified best; of equals the strongest."""
    with _one_thread():
        eigenvalue_F, axis_FF = np.linalg.eigh(moments.covariance_FF)
    cross_FC = axis_FF.T @ moments.cross_FC

    def num_right(l2: float) -> int:
        weight_FC = axis_FF @ (cross_FC / (eigenvalue_F + l2)[:, None])
        return int((_classify(moments, weight_FC, h_XF) == class_X).sum())

    return max(sorted(L2_GRID, reverse=True), key=num_right)


def _classify(moments: _Moments, weight_FC: Array, h_XF: Array) -> Int64:
    """Return the class with the highest score of each row."""
    return ((h_XF - moments.mean_F) @ weight_FC + moments.mean_C).argmax(1)
