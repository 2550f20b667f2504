"""Linear evaluation in closed protocol: L-BFGS logistic regression on frozen features."""

from __future__ import annotations

import warnings
from copy import deepcopy
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from fastclr.config import ConfigError
from fastclr.evaluation.features import Features

# From strong to weak: each fit starts from the one before.
L2_GRID = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
_MAX_SELECTION = 10_000
_SELECTION_ITERATIONS, _FINAL_ITERATIONS = 60, 100

PROTOCOL = (
    "Multinomial logistic regression (L-BFGS) on frozen, standardised features of un-augmented "
    "images; l2 from {grid}, chosen on a tenth of at most {rows} training images, then fitted on "
    "all of them. Accuracy on the whole test set."
).format(grid=", ".join(f"{l2:g}" for l2 in L2_GRID), rows=f"{_MAX_SELECTION:,}")


class LinearScore(NamedTuple):
    """Result of a linear probe.

    Attributes:
        top1: Test accuracy, 0..1.
        l2: Chosen weight of the penalty: l2/2 |w|^2 beside the mean cross-entropy, or l2 |w|^2
            beside the mean squared error of ridge regression.
    """

    top1: float
    l2: float


def linear_probe(train: Features, test: Features, *, seed: int = 0) -> LinearScore:
    """Fit the probe on training features and score it on test features; see :data:`PROTOCOL`.

    Args:
        train: Labelled features.
        test: Labelled features of the same width.
        seed: Seed of the split that chooses l2.

    Raises:
        ConfigError: If there are fewer than 2 classes, 20 training rows, or 2 rows a class.
    """
    return linear_answers(train, test, seed=seed)[0]


def linear_answers(
    train: Features, test: Features, *, seed: int = 0
) -> tuple[LinearScore, npt.NDArray[np.int64]]:
    """Return :func:`linear_probe`'s score, and its answers to the test images, int64 (X,)."""
    check_labels(train.label_X)
    train, test = standardised(train, test)
    fitting, validation = split(train.label_X, seed)
    held_out = _rows(train, validation)
    model = LogisticRegression(warm_start=True, max_iter=_SELECTION_ITERATIONS, tol=1e-3)
    fits = []
    for l2 in L2_GRID:
        _fit(model, _rows(train, fitting), l2)
        fits.append((model.score(*held_out), l2, deepcopy(model)))
    _, l2, model = max(fits, key=lambda fit: fit[0])
    model.max_iter = _FINAL_ITERATIONS
    _fit(model, train, l2)
    answer_X = model.predict(test.h_XF)
    return LinearScore(float((answer_X == test.label_X).mean()), l2), answer_X


def check_labels(label_X: npt.NDArray[np.int64]) -> None:
    """Refuse training labels that no linear probe can be fitted to.

    Raises:
        ConfigError: If there are fewer than 2 classes, 20 rows, or 2 rows a class.
    """
    num_classes, num_rows = len(np.unique(label_X)), len(label_X)
    if num_classes < 2 or num_rows < 20 or num_rows < 2 * num_classes:
        raise ConfigError(
            f"a linear probe needs 2 classes, 20 rows and 2 rows a class: there are {num_classes} "
            f"classes and {num_rows} rows."
        )


def standardised(train: Features, test: Features) -> tuple[Features, Features]:
    """Give the training features mean 0 and deviation 1, and move the test features alike."""
    mean, deviation = train.h_XF.mean(0), train.h_XF.std(0) + 1e-6
    return (
        Features((train.h_XF - mean) / deviation, train.label_X),
        Features((test.h_XF - mean) / deviation, test.label_X),
    )


def split(
    label_X: npt.NDArray[np.int64], seed: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Choose the rows that choose l2: balanced over classes, every class among the fitted ones.

    Args:
        label_X: Labels of all rows.
        seed: Seed of the choice.

    Returns:
        Indices of the fitted rows and of about a tenth that is held out; at most 10,000 together.
    """
    rows = np.random.default_rng(seed).permutation(len(label_X))
    by_class = rows[np.argsort(label_X[rows], kind="stable")]
    _, first, counts = np.unique(label_X[by_class], return_index=True, return_counts=True)
    place = np.arange(len(rows)) - np.repeat(first, counts)  # of a row within its class
    chosen = np.argsort(place, kind="stable")[:_MAX_SELECTION]
    every = min(10, int(place[chosen].max()) + 1)
    held_out = place[chosen] % every == every - 1
    return by_class[chosen[~held_out]], by_class[chosen[held_out]]


def _rows(features: Features, rows: npt.NDArray[np.int64]) -> Features:
    """Take some rows."""
    return Features(features.h_XF[rows], features.label_X[rows])


def _fit(model: LogisticRegression, features: Features, l2: float) -> None:
    """Fit from the model's present weights; scikit-learn's C weighs the sum of the losses."""
    model.C = 1 / (l2 * len(features.label_X))
    # One BLAS thread: L-BFGS works on short vectors, where threads that wait for each other on a
    # busy machine made it 6.5 times slower.
    with warnings.catch_warnings(), threadpool_limits(1, user_api="blas"):
        warnings.simplefilter("ignore", ConvergenceWarning)  # early stopping costs no accuracy
        model.fit(features.h_XF, features.label_X)
