# pyright: basic, reportCallIssue=false, reportPrivateImportUsage=false
# (A compiled function's body is numba's language in Python's syntax; it exports without saying so.)
"""Jitter in any order and grayscale on the CPU: one call without the GIL for a batch.

The arithmetic is the reference's (torchvision on float images): 0..1 in single precision, clipped
after each step, the hue turned in HSV, the contrast around the mean gray at that moment, one
rounding at the end, halves to even. An image becomes three planes and is worked on in tiles, which
stay in the first cache and fill the vector units. What happens to an image depends on nothing
beside it: alone, in a batch, in any thread it has the same bits.

numba compiles at the first import (seconds) and keeps the result in ``__pycache__``, or where that
cannot be written in the user's cache; where neither can, every process compiles anew.
"""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt
from numba import boolean, float32, njit, types, uint8

from pipelines.policy import ADDITION, BRIGHTNESS, CONTRAST, HUE, SATURATION, ViewParams
from pipelines.vectors import compiled, fma

TILE = 1024  # pixels: three planes of float32 are 12 KiB

_f32 = np.float32
# torchvision's weights; they sum to .9999.
_RED, _GREEN, _BLUE = np.float32(0.2989), np.float32(0.587), np.float32(0.114)
_ZERO, _ONE, _TWO, _FOUR, _SIX = map(np.float32, (0, 1, 2, 4, 6))
_SIXTH, _LEVELS, _LEVEL = np.float32(1 / 6), np.float32(255), np.float32(1 / 255)
_TINY = np.float32(1e-30)


@njit(inline="always")
def _clip(x):
    return min(max(x, _ZERO), _ONE)


@njit(inline="always")
def _gray(r, g, b):
    return fma(b, _BLUE, fma(g, _GREEN, r * _RED))


# Bytes are taken apart and put together by themselves: such loops become shuffles of vectors.
@njit
def _part(rgb, n, planes_3T):
    red, green, blue = planes_3T[0], planes_3T[1], planes_3T[2]
    for j in range(n):
        red[j] = rgb[3 * j]
        green[j] = rgb[3 * j + 1]
        blue[j] = rgb[3 * j + 2]


@njit
def _join(planes_3T, n, rgb):
    red, green, blue = planes_3T[0], planes_3T[1], planes_3T[2]
    for j in range(n):
        rgb[3 * j] = red[j]
        rgb[3 * j + 1] = green[j]
        rgb[3 * j + 2] = blue[j]


@njit
def _from_levels(levels, n, x):
    """Divide by 255, correctly rounded."""
    for j in range(n):
        level = _f32(levels[j])
        quotient = level * _LEVEL
        x[j] = fma(fma(-quotient, _LEVELS, level), _LEVEL, quotient)


@njit
def _to_levels(x, n, levels):
    for j in range(n):
        levels[j] = np.uint8(np.int32(np.rint(x[j] * _LEVELS)))  # by int32: four times as fast


@njit
def _load(rgb, n, r, g, b, bytes_3T):
    """Turn levels into planes of 0..1."""
    _part(rgb, n, bytes_3T)
    _from_levels(bytes_3T[0], n, r)
    _from_levels(bytes_3T[1], n, g)
    _from_levels(bytes_3T[2], n, b)


@njit
def _store(r, g, b, n, rgb, bytes_3T):
    """Turn planes of 0..1 into levels."""
    _to_levels(r, n, bytes_3T[0])
    _to_levels(g, n, bytes_3T[1])
    _to_levels(b, n, bytes_3T[2])
    _join(bytes_3T, n, rgb)


@njit
def _scale(r, g, b, n, factor):
    """Brightness."""
    for j in range(n):
        r[j] = _clip(r[j] * factor)
        g[j] = _clip(g[j] * factor)
        b[j] = _clip(b[j] * factor)


@njit
def _add(r, g, b, n, shift):
    """Additive brightness."""
    for j in range(n):
        r[j] = _clip(r[j] + shift)
        g[j] = _clip(g[j] + shift)
        b[j] = _clip(b[j] + shift)


@njit
def _blend_with_mean(r, g, b, n, factor, mean):
    """Contrast."""
    other = mean * (_ONE - factor)
    for j in range(n):
        r[j] = _clip(r[j] * factor + other)
        g[j] = _clip(g[j] * factor + other)
        b[j] = _clip(b[j] * factor + other)


@njit
def _blend_with_gray(r, g, b, n, factor):
    """Saturation."""
    rest = _ONE - factor
    for j in range(n):
        gray = _gray(r[j], g[j], b[j])
        r[j] = _clip(fma(gray, rest, r[j] * factor))
        g[j] = _clip(fma(gray, rest, g[j] * factor))
        b[j] = _clip(fma(gray, rest, b[j] * factor))


@njit
def _drop_colour(r, g, b, n):
    for j in range(n):
        gray = _gray(r[j], g[j], b[j])
        r[j] = gray
        g[j] = gray
        b[j] = gray


@njit(inline="always")
def _channel(sixths, top, spread):
    """One channel of a colour whose hue is that many sixths of a turn away from its own zero."""
    k = sixths - _SIX * np.floor(sixths * _SIXTH)
    return top - spread * max(_ZERO, min(min(k, _FOUR - k), _ONE))


@njit
def _turn(r, g, b, n, turns):
    """Hue, without branches: conversion to HSV and back with value and chroma kept."""
    shift = turns * _SIX
    for j in range(n):
        x, y, z = r[j], g[j], b[j]
        top = max(x, max(y, z))
        spread = top - min(x, min(y, z))
        q = _ONE / max(spread, _TINY)
        of_red, of_green, of_blue = (y - z) * q, (z - x) * q + _TWO, (x - y) * q + _FOUR
        hue = (of_red if top == x else (of_green if top == y else of_blue)) + shift
        r[j] = _channel(hue + _f32(5), top, spread)
        g[j] = _channel(hue + _f32(3), top, spread)
        b[j] = _channel(hue + _f32(1), top, spread)


@njit(fastmath={"reassoc"})  # the sum in lanes
def _sum_of_gray(r, g, b, n):
    total = _ZERO
    for j in range(n):
        total += _gray(r[j], g[j], b[j])
    return total


@njit
def _steps(r, g, b, n, order_4, factors_4, mean, first, end):
    for k in range(first, end):
        step = order_4[k]
        factor = factors_4[step % 4]
        if step == BRIGHTNESS:
            _scale(r, g, b, n, factor)
        elif step == CONTRAST:
            _blend_with_mean(r, g, b, n, factor, mean)
        elif step == SATURATION:
            _blend_with_gray(r, g, b, n, factor)
        elif step == HUE:
            _turn(r, g, b, n, factor)
        elif step == ADDITION:
            _add(r, g, b, n, factor)


@njit
def _colour_image(rgb, factors_4, order_4, jitter, gray, out, planes_3N, bytes_3T):
    num_pixels = len(rgb) // 3
    pivot = 0  # steps before the contrast, which needs the mean of all pixels after them
    mean = _ZERO
    if jitter:
        while pivot < 4 and order_4[pivot] != CONTRAST:
            pivot += 1
        total = 0.0
        for first in range(0, num_pixels, TILE):
            n = min(TILE, num_pixels - first)
            r, g, b = planes_3N[0, first:], planes_3N[1, first:], planes_3N[2, first:]
            _load(rgb[3 * first :], n, r, g, b, bytes_3T)
            _steps(r, g, b, n, order_4, factors_4, mean, 0, pivot)
            total += _sum_of_gray(r, g, b, n)
        mean = _f32(total / num_pixels)
    for first in range(0, num_pixels, TILE):
        n = min(TILE, num_pixels - first)
        r, g, b = planes_3N[0, first:], planes_3N[1, first:], planes_3N[2, first:]
        if jitter:
            _steps(r, g, b, n, order_4, factors_4, mean, pivot, 4)
        else:
            _load(rgb[3 * first :], n, r, g, b, bytes_3T)
        if gray:
            _drop_colour(r, g, b, n)
        _store(r, g, b, n, out[3 * first :], bytes_3T)


_IMAGES_BN = types.Array(types.uint8, 2, "C", readonly=True)  # takes writable ones too
_SIGNATURE = types.void(
    _IMAGES_BN, float32[:, ::1], uint8[:, ::1], boolean[::1], boolean[::1], uint8[:, ::1]
)


@functools.partial(compiled, _SIGNATURE)
def _colour_batch(in_BN, factors_B4, order_B4, jitter_B, gray_B, out_BN):
    planes_3N = np.empty((3, in_BN.shape[1] // 3), np.float32)
    bytes_3T = np.empty((3, TILE), np.uint8)
    for i in range(len(in_BN)):
        if jitter_B[i] or gray_B[i]:
            _colour_image(
                in_BN[i], factors_B4[i], order_B4[i], jitter_B[i], gray_B[i],
                out_BN[i], planes_3N, bytes_3T,
            )  # fmt: skip
        else:
            out_BN[i] = in_BN[i]


def colour(
    crops_NHWC: npt.NDArray[np.uint8], params: ViewParams, out_NHWC: npt.NDArray[np.uint8]
) -> None:
    """Jitter the colours of crops that are resized and flipped already, then drop them where drawn.

    Args:
        crops_NHWC: uint8 (n, H, W, 3), contiguous.
        params: Numbers of n views; jitter, factors, order and gray are used.
        out_NHWC: uint8 of the same shape, contiguous; may be the crops themselves.

    Raises:
        ValueError: If an array has another type or shape, or is not contiguous.
    """
    for array in (crops_NHWC, out_NHWC):
        if (
            array.dtype != np.uint8
            or array.ndim != 4
            or array.shape[3] != 3
            or not array.flags.c_contiguous
        ):
            raise ValueError(f"images are {array.dtype} {array.shape}: give uint8 NHWC, contiguous")
    if crops_NHWC.shape != out_NHWC.shape or len(params) != len(crops_NHWC):
        raise ValueError(
            f"{crops_NHWC.shape} crops, {out_NHWC.shape} views and numbers of {len(params)} views "
            "do not belong together"
        )
    n, height, width, _ = crops_NHWC.shape
    flat = (n, height * width * 3)
    _colour_batch(
        crops_NHWC.reshape(flat),
        np.ascontiguousarray(params.factors_N4, np.float32),
        np.ascontiguousarray(params.order_N4, np.uint8),
        np.ascontiguousarray(params.jitter_N, np.bool_),
        np.ascontiguousarray(params.gray_N, np.bool_),
        out_NHWC.reshape(flat),
    )
