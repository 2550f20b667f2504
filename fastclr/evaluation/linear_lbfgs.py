"""Linear evaluation by the transfer protocol: logistic regression, 45 penalties, one refit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import scipy.optimize
import torch
from threadpoolctl import threadpool_limits

from fastclr.config import ConfigError
from fastclr.evaluation.draws import Int64, balanced_split
from fastclr.evaluation.features import Features, check_pair
from fastclr.evaluation.linear import check_labels
from fastclr.evaluation.scoring import metric as metric_by_name

# From strong to weak: each fit starts from the one before.
L2_GRID = tuple(float(l2) for l2 in np.logspace(5, -6, 45))
PROTOCOL = (
    "Multinomial logistic regression (L-BFGS) on frozen features of un-augmented images, as they "
    "are; l2/2 |W|^2 beside the sum of the cross-entropies, 45 values of l2 from 1e-6 to 1e5, "
    "chosen on validation images (a fifth of the training images where there is no such set), then "
    "fitted on training and validation images together. Chen et al. 2020, B.8."
)
_BLOCK = 2**15  # rows at a time, in float64
_SELECTION_ITERATIONS, _FINAL_ITERATIONS = 200, 1000
_GRADIENT, _DECREASE = 1e-6, 1e-9  # where a fit ends; of the mean cross-entropy

Array = npt.NDArray[np.float64]


class LBFGSProbe(NamedTuple):
    """Result of the probe.

    Attributes:
        score: Test score in the metric, 0..1.
        l2: Chosen penalty; of equals the strongest.
        answer_X: int64 answers to the test images.
        validation: Validation score of each l2 of the grid.
    """

    score: float
    l2: float
    answer_X: Int64
    validation: tuple[float, ...]


def lbfgs_probe(
    train: Features,
    test: Features,
    validation: Features | None = None,
    *,
    metric: str = "top1",
    grid: Sequence[float] = L2_GRID,
    seed: int = 0,
    device: torch.device = torch.device("cpu"),  # noqa: B008
) -> LBFGSProbe:
    """Choose l2 on validation features, fit on training and validation features, score on test.

    Args:
        train: Labelled features.
        test: Labelled features of the same width.
        validation: The same; None takes a fifth of each class of the training features.
        metric: Key of :data:`~fastclr.evaluation.scoring.METRICS`, also for the choice.
        grid: Penalties in any order.
        seed: Seed of the split.
        device: Where the sums over rows are made.

    Raises:
        ConfigError: If labels are missing, too few or of one class, or widths differ.
        FloatingPointError: If a feature is not finite.
    """
    for other in (test, validation or test):
        check_pair(train, other)
    check_labels(train.label_X)
    if not grid or min(grid) <= 0:
        raise ConfigError(f"l2 grid {tuple(grid)}: give one or more numbers above 0.")
    measure = metric_by_name(metric)
    fitting, held_out = (train, validation) if validation else _halves(train, seed)
    together = _joined(fitting, held_out)
    known_C = np.unique(together.label_X)
    objective = _Objective(fitting, known_C, device)
    weights, found = objective.start(), []
    for l2 in sorted(grid, reverse=True):
        weights = objective.fit(weights, l2, _SELECTION_ITERATIONS)
        answer_X = objective.answers(weights, held_out.h_XF)
        found.append((measure(answer_X, held_out.label_X), l2, weights))
    _, l2, weights = max(found, key=lambda fit: fit[0])
    # The mean of before: the weights then mean the same, and the fit starts where it ended.
    objective = _Objective(together, known_C, device, objective.mean_F)
    weights = objective.fit(weights, l2, _FINAL_ITERATIONS)
    answer_X = objective.answers(weights, test.h_XF)
    scores = {l2: score for score, l2, _ in found}
    return LBFGSProbe(
        measure(answer_X, test.label_X), l2, answer_X, tuple(scores[l2] for l2 in grid)
    )


def _halves(train: Features, seed: int) -> tuple[Features, Features]:
    """Split off validation features."""
    rows, held_out = balanced_split(train.label_X, seed)
    if not len(held_out):
        raise ConfigError(
            f"none of the classes has 5 of the {len(train.label_X)} training images: l2 cannot be "
            "chosen on a fifth of them. Give a validation set, or more images."
        )
    return (
        Features(train.h_XF[rows], train.label_X[rows]),
        Features(train.h_XF[held_out], train.label_X[held_out]),
    )


def _joined(first: Features, second: Features) -> Features:
    """Stack features."""
    return Features(
        np.concatenate([first.h_XF, second.h_XF]), np.concatenate([first.label_X, second.label_X])
    )


class _Objective:
    """Mean cross-entropy and penalty over rows; the features' mean is taken away.

    The biases carry no penalty, so that the mean changes nothing but the number of iterations.
    """

    def __init__(
        self, rows: Features, known_C: Int64, device: torch.device, mean_F: Array | None = None
    ) -> None:
        self._h_XF = torch.from_numpy(np.require(rows.h_XF, requirements="W")).to(device)
        self._class_X = torch.from_numpy(np.searchsorted(known_C, rows.label_X)).to(device)
        self._known_C, self._device = known_C, device
        self.mean_F = rows.h_XF.mean(0, dtype=np.float64) if mean_F is None else mean_F
        self._shift_F = torch.from_numpy(self.mean_F).to(device)

    def start(self) -> Array:
        """Return zeros: all classes are equally likely."""
        return np.zeros((self._h_XF.shape[1] + 1, len(self._known_C)))

    def fit(self, weights: Array, l2: float, max_iterations: int) -> Array:
        """Return the weights where the objective is least, sought from others."""
        # One BLAS thread: see linear.py; the large products are torch's.
        with threadpool_limits(1, user_api="blas"):
            found = scipy.optimize.minimize(
                self._value_and_gradient,
                weights.ravel(),
                args=(l2 / len(self._class_X),),
                jac=True,
                method="L-BFGS-B",
                options={"maxiter": max_iterations, "gtol": _GRADIENT, "ftol": _DECREASE},
            )
        return found.x.reshape(weights.shape)

    def answers(self, weights: Array, h_XF: npt.NDArray[np.float32]) -> Int64:
        """Return the likeliest label of each row."""
        W_FC = torch.from_numpy(weights).to(self._device)
        blocks = torch.from_numpy(np.require(h_XF, requirements="W")).split(_BLOCK)
        parts = [self._logits(W_FC, h_NF.to(self._device)).argmax(1) for h_NF in blocks]
        return self._known_C[torch.cat(parts).cpu().numpy()]

    def _logits(self, W_FC: torch.Tensor, h_NF: torch.Tensor) -> torch.Tensor:
        """Return scores of classes, float64."""
        return (h_NF.double() - self._shift_F) @ W_FC[:-1] + W_FC[-1]

    def _value_and_gradient(self, flat: Array, penalty: float) -> tuple[float, Array]:
        """Return the objective and its gradient."""
        W_FC = torch.from_numpy(flat.reshape(-1, len(self._known_C))).to(self._device)
        gradient_FC = torch.zeros_like(W_FC)
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        for h_NF, class_N in zip(
            self._h_XF.split(_BLOCK), self._class_X.split(_BLOCK), strict=True
        ):
            h_NF = h_NF.double() - self._shift_F
            log_p_NC = (h_NF @ W_FC[:-1] + W_FC[-1]).log_softmax(1)
            total -= log_p_NC.gather(1, class_N[:, None]).sum()
            error_NC = log_p_NC.exp_()
            error_NC.scatter_add_(1, class_N[:, None], -torch.ones_like(error_NC[:, :1]))
            gradient_FC[:-1] += h_NF.T @ error_NC
            gradient_FC[-1] += error_NC.sum(0)
        gradient_FC /= len(self._class_X)
        gradient_FC[:-1] += penalty * W_FC[:-1]
        value = total / len(self._class_X) + penalty / 2 * W_FC[:-1].square().sum()
        return value.item(), gradient_FC.cpu().numpy().ravel()
