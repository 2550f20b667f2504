"""Jitter and grayscale as one matrix an image: faster, and another jitter than the paper's.

Every step is linear in the pixel x and the mean m of its crop, so that all of them together are
y = A x + B m with matrices that come from the drawn numbers alone. What is lost: the clips between
the steps, and the hue in HSV, which becomes a rotation around the gray axis. Against the exact
colours at strength 1 that is 4 levels on average and over 30 for one pixel in a hundred, so it is
a policy with a name (``colour_model="affine"``) and not another way to compute the same.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.policy import BRIGHTNESS, CONTRAST, HUE, SATURATION, ViewParams

# Rows that are the gray of a pixel, in torchvision's weights.
_TO_GRAY = np.tile(np.array([0.2989, 0.587, 0.114]), (3, 1))
_TO_MEAN = np.full((3, 3), 1 / 3)  # the projection on the gray axis
# The cross product with the gray axis.
_AROUND = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / np.sqrt(3)

Matrices = npt.NDArray[np.float32]


def matrices(params: ViewParams) -> tuple[Matrices, Matrices]:
    """Put the colour steps of n views into matrices.

    Args:
        params: Numbers of n views; jitter, factors, order and gray are used.

    Returns:
        A and B, float32 (n, 3, 3): levels y = A x + B m of a pixel with levels x, of a crop with
        mean levels m; to be clipped and rounded.
    """
    n, one = len(params), np.eye(3)
    factors_4N11 = params.factors_N4.T.astype(np.float64)[:, :, None, None]
    steps: dict[int, npt.NDArray[Any]] = {
        BRIGHTNESS: factors_4N11[BRIGHTNESS] * one,
        CONTRAST: factors_4N11[CONTRAST] * one,
        SATURATION: _blended(factors_4N11[SATURATION]),
        HUE: _turned(factors_4N11[HUE] * (2 * np.pi)),
    }
    a_N33, b_N33 = np.tile(one, (n, 1, 1)), np.zeros((n, 3, 3))
    for slot in range(4):
        for number, step_N33 in steps.items():
            rows = np.flatnonzero(params.jitter_N & (params.order_N4[:, slot] == number))
            # The contrast's pivot is the gray of the mean, and that is linear in m as well.
            pivot = _TO_GRAY @ (a_N33[rows] + b_N33[rows])
            a_N33[rows] = step_N33[rows] @ a_N33[rows]
            b_N33[rows] = step_N33[rows] @ b_N33[rows]
            if number == CONTRAST:
                b_N33[rows] += (1 - factors_4N11[CONTRAST][rows]) * pivot
    gray = params.gray_N[:, None, None]
    a_N33, b_N33 = (np.where(gray, _TO_GRAY @ x, x) for x in (a_N33, b_N33))
    return a_N33.astype(np.float32), b_N33.astype(np.float32)


def _blended(factor_N11: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Mix each pixel with its gray."""
    return factor_N11 * np.eye(3) + (1 - factor_N11) * _TO_GRAY


def _turned(angle_N11: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Rotate around the gray axis, by Rodrigues' formula; a third of a turn takes red to green."""
    return np.cos(angle_N11) * (np.eye(3) - _TO_MEAN) + np.sin(angle_N11) * _AROUND + _TO_MEAN
