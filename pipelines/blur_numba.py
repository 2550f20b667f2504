# pyright: basic, reportCallIssue=false, reportPrivateImportUsage=false
# (A compiled function's body is numba's language in Python's syntax; it exports without saying so.)
"""Gaussian blur on the CPU: one call without the GIL for a batch.

The reference's blur (separable, reflect-101, rounded once at the end, halves to even) with taps as
far as 4 sigma only: what lies further weighs 6e-5 together. A row is blurred down into floats,
which stay in the first cache, and then across.

Compiled as :mod:`pipelines.colour_numba` is.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import numpy.typing as npt
from numba import boolean, float32, int64, njit, types, uint8

from pipelines.policy import ViewParams
from pipelines.vectors import BLOCK, blur_across_block, blur_down_block, compiled

REACH = 4.0  # of the taps, in sigmas


@njit
def _reflected(place, n):
    """Mirror a place outside 0..n - 1 at the outermost pixel."""
    place = abs(place)
    return 2 * (n - 1) - place if place >= n else place


@njit
def _fill_weights(sigma, radius, weight_K):
    """Weights from the first tap to the middle one."""
    total = 0.0
    for k in range(-radius, radius + 1):
        total += math.exp(-0.5 * (k / sigma) ** 2)
    for k in range(radius + 1):
        weight_K[k] = np.float32(math.exp(-0.5 * ((k - radius) / sigma) ** 2) / total)


@njit
def _blur(image, source, height, width, radius, weight_K, offset_K, row):
    n = 3 * width
    for y in range(height):
        for k in range(2 * radius + 1):
            offset_K[k] = _reflected(y + k - radius, height) * n
        down = row[3 * radius :]
        for j in range(0, n, BLOCK):
            blur_down_block(source, min(j, n - BLOCK), offset_K, weight_K, radius, down)
        for k in range(1, radius + 1):
            for c in range(3):
                row[3 * (radius - k) + c] = down[3 * k + c]
                down[3 * (width - 1 + k) + c] = down[3 * (width - 1 - k) + c]
        for j in range(0, n, BLOCK):
            blur_across_block(row, min(j, n - BLOCK), weight_K, radius, image, y * n)


_SIGNATURE = types.void(uint8[:, ::1], int64, int64, boolean[::1], float32[::1], int64)


@functools.partial(compiled, _SIGNATURE)
def _blur_batch(image_BN, height, width, blur_B, sigma_B, most):
    source = np.empty(image_BN.shape[1], np.uint8)
    weight_K, offset_K = np.empty(most + 1, np.float32), np.empty(2 * most + 1, np.int64)
    row = np.empty(3 * (width + 2 * most), np.float32)
    for i in range(len(image_BN)):
        if blur_B[i]:
            sigma = np.float64(sigma_B[i])
            radius = min(most, np.int64(math.ceil(REACH * sigma)))
            _fill_weights(sigma, radius, weight_K)
            source[:] = image_BN[i]
            _blur(image_BN[i], source, height, width, radius, weight_K, offset_K, row)


def blur(views_NHWC: npt.NDArray[np.uint8], params: ViewParams, taps: int) -> None:
    """Blur views in place where drawn.

    Args:
        views_NHWC: uint8 (n, H, W, 3), contiguous; H and W larger than half the taps, W at least 6.
        params: Numbers of n views; blur and sigma are used.
        taps: The most that are used along an axis, odd; 1 is no blur.

    Raises:
        ValueError: If the views have another type or shape, or are not contiguous.
    """
    n, height, width, channels = views_NHWC.shape
    if views_NHWC.dtype != np.uint8 or channels != 3 or not views_NHWC.flags.c_contiguous:
        raise ValueError(
            f"views are {views_NHWC.dtype} {views_NHWC.shape}: give uint8 NHWC, contiguous"
        )
    if min(height, width) <= taps // 2 or width < 6 or n != len(params):
        raise ValueError(
            f"{views_NHWC.shape} views, numbers of {len(params)} and {taps} taps do not go together"
        )
    if taps > 1:
        _blur_batch(
            views_NHWC.reshape(n, height * width * 3), height, width,
            np.ascontiguousarray(params.blur_N, np.bool_),
            np.ascontiguousarray(params.sigma_N, np.float32), taps // 2,
        )  # fmt: skip
