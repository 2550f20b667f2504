# pyright: basic, reportCallIssue=false, reportPrivateImportUsage=false
# (A compiled function's body is numba's language in Python's syntax; it exports without saying so.)
"""Read and decode many small PNGs of tars in one call without the GIL.

Python's own reading and decoding hold the GIL for most of a small image's time, and give it up and
take it back at each read: two threads were slower than one. Here the C functions of the process
(``pread``, and zlib's ``crc32`` and ``uncompress2``) are called from compiled code.

Only what leaves no doubt is decoded: the tar header that is expected, then an 8-bit RGB PNG, not
interlaced, of the expected size, whose chunks are in order, with right checksums, and nothing after
them. For all else the caller has :func:`pipelines.decode.decode`, which also says what is wrong.
Lengths out of a file are compared with what is there before they are used.
"""

from __future__ import annotations

import ctypes
import functools
import sys
import zlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from numba import int32, int64, njit, types, uint8

from pipelines.decode import PNG, RGB_8, SMALL, SMALL_BYTES, Pixels
from pipelines.index import BLOCK
from pipelines.order import Int64
from pipelines.vectors import call_c, compiled

_NAME = 100  # bytes of a name in a tar header

_SIGNATURE_AND_KIND = np.frombuffer(PNG + b"\0\0\0\rIHDR", np.uint8)
_FORM = np.frombuffer(RGB_8, np.uint8)
_IDAT, _IEND = (int.from_bytes(kind, "big") for kind in (b"IDAT", b"IEND"))
# Whatever these hold, kornia_rs passes over them where they stand before the pixels.
_PASSED_OVER = np.array(
    [
        int.from_bytes(kind, "big")
        for kind in (
            b"bKGD", b"cHRM", b"eXIf", b"gAMA", b"iCCP", b"iTXt", b"pHYs", b"sBIT", b"sRGB",
            b"tEXt", b"tIME", b"tRNS", b"zTXt",
        )
    ],
    np.int64,
)  # fmt: skip


@functools.cache
def _functions() -> Int64 | None:
    """Return the addresses of pread, crc32 and uncompress2; None where they are not found."""
    if sys.maxsize < 2**32 or sys.platform == "win32":  # lengths are passed in 64 bits
        return None
    for name in (getattr(zlib, "__file__", None), "libz.so.1", "libz.dylib"):
        try:
            libc, libz = ctypes.CDLL(None), ctypes.CDLL(name)
            found = libc.pread, libz.crc32, libz.uncompress2
        except (OSError, AttributeError):
            continue
        return np.array([ctypes.cast(f, ctypes.c_void_p).value for f in found], np.int64)
    return None


@njit
def _is_equal(bytes_, start, expected):
    """Whether some bytes are the expected ones."""
    for k in range(len(expected)):  # noqa: SIM110 - numba compiles no generators
        if bytes_[start + k] != expected[k]:
            return False
    return True


@njit
def _number(bytes_, start):
    """Return four bytes as a number, the highest first."""
    value = int64(0)
    for k in range(4):
        value = value << 8 | bytes_[start + k]
    return value


@njit
def _octal(bytes_, start, stop):
    """Return a number of a tar header as it is usually written, -1 for all else.

    That is octal digits, then nothing but zero bytes and blanks, at least one.
    """
    value, at = int64(0), start
    while at < stop and 48 <= bytes_[at] < 56:
        value = value << 3 | int64(bytes_[at] - 48)
        at += 1
    if at in (start, stop):
        return int64(-1)
    for k in range(at, stop):
        if bytes_[k] != 0 and bytes_[k] != 32:
            return int64(-1)
    return value


@njit
def _is_expected(header, name, num_bytes):
    """Whether a tar header is whole, and that of a member of this name and length."""
    total = int64(0)
    for k in range(BLOCK):
        total += 32 if 148 <= k < 156 else int64(header[k])
    return (
        _octal(header, 148, 156) == total
        and _octal(header, 124, 136) == num_bytes
        and _is_equal(header, 0, name)
    )


@njit
def _gather(file, start, stop, height, width, c, stream):
    """Check a PNG but for its pixels; gather these, compressed; return their length, or -1."""
    if stop - start < 33 or not _is_equal(file, start, _SIGNATURE_AND_KIND):
        return int64(-1)
    if _number(file, start + 16) != width or _number(file, start + 20) != height:
        return int64(-1)
    if not _is_equal(file, start + 24, _FORM):
        return int64(-1)
    length = int64(0)
    at = start + 8
    while stop - at >= 12:
        num_bytes, kind = _number(file, at), _number(file, at + 4)
        if num_bytes > stop - at - 12:
            return int64(-1)
        checksum = call_c(c[1], (int64(0), int64(file.ctypes.data) + at + 4, num_bytes + 4))
        if checksum & 0xFFFFFFFF != _number(file, at + 8 + num_bytes):
            return int64(-1)
        if kind == _IEND:
            return length if num_bytes == 0 and at + 12 == stop else int64(-1)
        if kind == _IDAT:
            for k in range(num_bytes):
                stream[length + k] = file[at + 8 + k]
            length += num_bytes
        elif at > start + 8 and (length or not (kind == _PASSED_OVER).any()):
            return int64(-1)
        at += num_bytes + 12
    return int64(-1)


@njit
def _inflate(stream, length, raw, expected, c, lengths):
    """Inflate all of a stream to exactly the bytes expected; False if it is otherwise."""
    lengths[0], lengths[1] = expected, length
    arguments = (
        int64(raw.ctypes.data), int64(lengths.ctypes.data),
        int64(stream.ctypes.data), int64(lengths.ctypes.data) + 8,
    )  # fmt: skip
    state = call_c(c[2], arguments) & 0xFFFFFFFF
    return state == 0 and lengths[0] == expected and lengths[1] == length


@njit
def _paeth(left, up, corner):
    """Return the one of three that is nearest to left + up - corner."""
    to_left, to_up = abs(up - corner), abs(left - corner)
    to_corner = abs(left + up - 2 * corner)
    if to_left <= to_up and to_left <= to_corner:
        return left
    return up if to_up <= to_corner else corner


@njit
def _unfilter(raw, height, n, out, place):
    """Undo the filters of rows of n bytes; False if there is an unknown one."""
    for y in range(height):
        source, row = y * (n + 1) + 1, place + y * n
        above = row - n
        kind = raw[source - 1]
        if kind > 4:
            return False
        if y == 0:  # over the image are zeros, and Paeth's choice is the left
            kind = (0, 1, 0, 5, 1)[kind]
        if kind == 0:
            for k in range(n):
                out[row + k] = raw[source + k]
        elif kind == 2:
            for k in range(n):
                out[row + k] = raw[source + k] + out[above + k]
        else:
            for k in range(3):
                up = int32(0) if kind == 5 or kind == 1 else int32(out[above + k])
                out[row + k] = raw[source + k] + (up if kind == 4 else up >> 1)
            if kind == 1:
                for k in range(3, n):
                    out[row + k] = raw[source + k] + out[row + k - 3]
            elif kind == 4:
                for k in range(3, n):
                    guess = _paeth(
                        int32(out[row + k - 3]), int32(out[above + k]), int32(out[above + k - 3])
                    )
                    out[row + k] = raw[source + k] + guess
            else:
                for k in range(3, n):
                    up = int32(0) if kind == 5 else int32(out[above + k])
                    out[row + k] = raw[source + k] + ((int32(out[row + k - 3]) + up) >> 1)
    return True


_SIGNATURE = types.void(
    int64[::1], int64[::1], int64[::1], uint8[:, ::1], int32[:, ::1], int64[::1], int64[::1],
    uint8[::1], uint8[::1],
)  # fmt: skip


@functools.partial(compiled, _SIGNATURE)
def _read_batch(file_N, offset_N, num_bytes_N, name_N, size_N2, c, place_N, out, done_N):
    room = num_bytes_N.max()
    file, stream = np.empty(BLOCK + room, np.uint8), np.empty(room, np.uint8)
    raw = np.empty(4 * SMALL, np.uint8)  # of pixels and a filter a row: at most 4 bytes a pixel
    lengths = np.empty(2, np.int64)
    for i in range(len(file_N)):
        stop = BLOCK + num_bytes_N[i]
        arguments = file_N[i], int64(file.ctypes.data), stop, offset_N[i] - BLOCK
        if call_c(c[0], arguments) != stop:  # cut, or interrupted
            continue
        if not _is_expected(file, name_N[i], num_bytes_N[i]):
            continue
        height, width = int64(size_N2[i, 0]), int64(size_N2[i, 1])
        length = _gather(file, BLOCK, stop, height, width, c, stream)
        if length < 0 or not _inflate(stream, length, raw, height * (3 * width + 1), c, lengths):
            continue
        done_N[i] = _unfilter(raw, height, 3 * width, out, place_N[i])


def read_small_pngs(
    files: Sequence[int],
    offset_N: Int64,
    num_bytes_N: Int64,
    names: Sequence[str],
    size_N2: npt.NDArray[np.int32],
) -> list[Pixels | None]:
    """Read members of tars and decode those that are plain PNGs.

    Args:
        files: Open file descriptors, one for each of n members.
        offset_N: int64, places of the members' first bytes; each has its tar header before it.
        num_bytes_N: int64, lengths of the members in bytes, up to
            :data:`~pipelines.decode.SMALL_BYTES`.
        names: Names of the members.
        size_N2: int32 heights and widths in pixels, up to :data:`~pipelines.decode.SMALL` pixels.

    Returns:
        uint8 (H, W, 3), the pixels of :func:`pipelines.decode.decode`; None for members that it
        has to decode, or that cannot be read.

    Raises:
        ValueError: If arrays do not belong together, or a size is beyond its limit.
    """
    n, c = len(files), _functions()
    if not n == len(offset_N) == len(num_bytes_N) == len(names) == len(size_N2):
        raise ValueError(f"{n} files, {len(names)} names, {len(size_N2)} sizes: give equally many")
    if not n or c is None:
        return [None] * n
    pixels_N = size_N2.astype(np.int64).prod(1)
    least, most = num_bytes_N.min(), num_bytes_N.max()
    if size_N2.min() < 1 or pixels_N.max() > SMALL or not 0 < least <= most <= SMALL_BYTES:
        raise ValueError(f"an image is larger than {SMALL} pixels or {SMALL_BYTES} bytes, or empty")
    # A name that is longer or has other letters is another one here, and Python compares it.
    name_N = np.array([name.encode("ascii", "replace") for name in names], f"S{_NAME}")
    end_N = 3 * np.cumsum(pixels_N)
    out, done_N = np.empty(end_N[-1], np.uint8), np.zeros(n, np.uint8)
    _read_batch(
        np.array(files, np.int64),
        np.ascontiguousarray(offset_N, np.int64),
        np.ascontiguousarray(num_bytes_N, np.int64),
        name_N.view(np.uint8).reshape(n, _NAME),
        np.ascontiguousarray(size_N2, np.int32),
        c,
        end_N - 3 * pixels_N,
        out,
        done_N,
    )
    shapes = zip(end_N.tolist(), pixels_N.tolist(), size_N2.tolist(), done_N.tolist(), strict=True)
    return [
        out[end - 3 * pixels : end].reshape(*shape, 3) if done else None
        for end, pixels, shape, done in shapes
    ]
