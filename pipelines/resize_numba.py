# pyright: basic, reportCallIssue=false, reportPrivateImportUsage=false
# (A compiled function's body is numba's language in Python's syntax; it exports without saying so.)
"""Crop, resize and flip many images in one call without the GIL: Pillow's pixels, bit for bit.

Pillow's antialiased bicubic in its own integers: weights in 22 bits, sums in 32, rounded to 8 bit
after each pass, across first. The pass across works on strips of source rows that are turned, so
that the rows of a strip fill the vector units where neighbours in a row would not.

Compiled as :mod:`pipelines.colour_numba` is, with strips of as many rows as a vector has bytes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from numba import boolean, carray, int32, int64, njit, types, uint8

from pipelines.vectors import BITS, BLOCK, bytes_at, compiled, sum_block, turn_block


@njit
def _cubic(x):
    """Keys' kernel with a = -.5, in the order of Pillow's operations."""
    x = abs(x)
    if x < 1.0:
        return (1.5 * x - 2.5) * x * x + 1.0
    if x < 2.0:
        return (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5
    return 0.0


@njit
def _taps(num_in, num_out):
    """Return how many weights an output has at most, in fours."""
    return -(-(2 * math.ceil(2 * max(num_in / num_out, 1.0)) + 1) // 4) * 4


@njit
def _weigh(num_in, num_out, mirrored, first_S, weight_SK, exact_K):
    """Fill the first sources and the weights of each output; those behind the last are zero."""
    scale = num_in / num_out
    widening = max(scale, 1.0)
    used = 0
    for o in range(num_out):
        centre = (o + 0.5) * scale
        low = max(0, int(centre - 2 * widening + 0.5))
        high = min(num_in, int(centre + 2 * widening + 0.5))
        total = 0.0
        for k in range(high - low):
            exact_K[k] = _cubic((k + low - centre + 0.5) * (1.0 / widening))
            total += exact_K[k]
        place = num_out - 1 - o if mirrored else o
        first_S[place] = low
        for k in range(high - low):
            weight = exact_K[k] / total * (1 << BITS)
            weight_SK[place, k] = np.int32(weight - 0.5 if weight < 0 else weight + 0.5)
        weight_SK[place, high - low :] = 0
        used = max(used, high - low)
    return -(-used // 4) * 4


@njit
def _turn(source, start, stride, last, n, turned):
    """Turn a strip of rows of n bytes: byte m of row r comes to 16 m + r."""
    if n < BLOCK:
        for r in range(BLOCK):
            for m in range(n):
                turned[BLOCK * m + r] = source[start + min(r, last) * stride + m]
    else:
        for m in range(0, n, BLOCK):
            m = min(m, n - BLOCK)  # the last overlaps the one before: nothing outside is read
            turn_block(source, start + m, stride, last, turned, BLOCK * m, BLOCK)


@njit
def _turn_back(turned, n, rows, start):
    """Undo :func:`_turn`; rows are n bytes apart."""
    for m in range(0, n, BLOCK):
        m = min(m, n - BLOCK)
        turn_block(turned, BLOCK * m, BLOCK, BLOCK, rows, start + m, n)


@njit
def _resize(source, start, stride, height, width, mirrored, size, out, work):
    first_S, weights, exact_K, turned, across, rows = work
    weight_SK = weights.reshape(size, -1)
    room = weight_SK.shape[1]
    n = 3 * size
    taps = _weigh(width, size, mirrored, first_S, weight_SK, exact_K)
    for top in range(0, height, BLOCK):
        _turn(source, start + top * stride, stride, height - 1 - top, 3 * width, turned)
        for o in range(size):
            for channel in range(3):
                sum_block(
                    turned, (3 * first_S[o] + channel) * BLOCK, 3 * BLOCK,
                    weights, o * room, taps, across, (3 * o + channel) * BLOCK,
                )  # fmt: skip
        _turn_back(across, n, rows, top * n)
    taps = _weigh(height, size, False, first_S, weight_SK, exact_K)
    for o in range(size):
        for j in range(0, n, BLOCK):
            j = min(j, n - BLOCK)
            sum_block(rows, first_S[o] * n + j, n, weights, o * room, taps, out, o * n + j)


@njit
def _work(height, width, size):
    """Allocate what images up to a size need."""
    taps = max(_taps(height, size), _taps(width, size))
    return (
        np.empty(size, np.int64),
        np.empty(size * taps, np.int32),
        np.empty(taps),
        np.empty(3 * BLOCK * (width + taps), np.uint8),
        np.empty(3 * BLOCK * size, np.uint8),
        np.empty((height + taps + BLOCK) * 3 * size, np.uint8),
    )


_SIGNATURE = types.void(
    int64[::1], int32[:, ::1], int32[:, ::1], boolean[::1], int64, uint8[:, ::1]
)


@functools.partial(compiled, _SIGNATURE)
def _resize_batch(address_B, size_B2, box_B4, flip_B, size, out_BN):
    work = _work(box_B4[:, 2].max(), box_B4[:, 3].max(), size)
    for i in range(len(address_B)):
        top, left, height, width = box_B4[i, 0], box_B4[i, 1], box_B4[i, 2], box_B4[i, 3]
        rows, stride = np.int64(size_B2[i, 0]), np.int64(3 * size_B2[i, 1])
        source = carray(bytes_at(address_B[i]), (rows * stride,))
        start = top * stride + 3 * left
        _resize(source, start, stride, height, width, flip_B[i], size, out_BN[i], work)


def resize(
    images: Sequence[npt.NDArray[np.uint8]],
    box_N4: npt.NDArray[np.int32],
    flip_N: npt.NDArray[np.bool_],
    out_NHWC: npt.NDArray[np.uint8],
) -> None:
    """Crop images of any sizes, resize to squares with Pillow's bicubic, and flip where drawn.

    Args:
        images: n images, uint8 (H, W, 3) of any sizes.
        box_N4: int32 top, left, height, width of the crops; each inside its image.
        flip_N: bool; mirror left and right.
        out_NHWC: uint8 (n, size, size, 3), contiguous, size at least 6.

    Raises:
        ValueError: If an array has another type or shape, or a crop leaves its image.
    """
    n, size = out_NHWC.shape[:2]
    if out_NHWC.shape != (n, size, size, 3) or out_NHWC.dtype != np.uint8 or size < 6:
        raise ValueError(f"views are {out_NHWC.dtype} {out_NHWC.shape}: give uint8 (n, S, S, 3)")
    if not len(images) == len(box_N4) == len(flip_N) == n:
        raise ValueError(
            f"{len(images)} images, {len(box_N4)} crops, {len(flip_N)} flips and {n} views do not "
            "belong together"
        )
    if not n:
        return
    # Held until the kernel is done, which has their addresses alone.
    images = [np.ascontiguousarray(image) for image in images]
    for image in images:
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"an image is {image.dtype} {image.shape}: give uint8 (H, W, 3)")
    address_N = np.array([image.__array_interface__["data"][0] for image in images], np.int64)
    size_N2 = np.array([image.shape[:2] for image in images], np.int32)
    box_N4 = np.ascontiguousarray(box_N4, np.int32)
    outside_N = (
        (box_N4[:, :2] < 0) | (box_N4[:, 2:] < 1) | (size_N2 - box_N4[:, 2:] < box_N4[:, :2])
    )
    if outside_N.any():
        i = int(outside_N.any(1).argmax())
        raise ValueError(
            f"image {i} has {size_N2[i, 0]} x {size_N2[i, 1]} pixels, and its crop (top, left, "
            f"height, width) is {box_N4[i].tolist()}: a crop must lie inside"
        )
    flip_N = np.ascontiguousarray(flip_N, np.bool_)
    _resize_batch(address_N, size_N2, box_N4, flip_N, size, out_NHWC.reshape(n, size * size * 3))
