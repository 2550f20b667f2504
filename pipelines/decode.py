"""Bytes to pixels, with limits; one function decides what a good image is."""

from __future__ import annotations

import io
import zlib

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image

Pixels = npt.NDArray[np.uint8]

MAX_PIXELS = 64 * 1024 * 1024  # a 100 kB file can claim a gigabyte of pixels
FORMATS = ("JPEG", "PNG", "WEBP")
# MPO: what Pillow calls the JPEG of a camera that appends a second picture.
_EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
_PNG = b"\x89PNG\r\n\x1a\n"
_RGB_8 = b"\x08\x02\x00\x00\x00"  # 8 bits, RGB, deflate, five filters, not interlaced


class DamagedImage(ValueError):
    """Bytes that are no image, or one beyond the limits; the message says why."""


def check_image(data: bytes) -> tuple[str, int, int]:
    """Decode strictly and throw the pixels away.

    Returns:
        File extension (``jpg``, ``png`` or ``webp``), height and width in pixels.

    Raises:
        DamagedImage: If the bytes are empty, of another format, truncated, damaged, or larger than
            :data:`MAX_PIXELS`.
    """
    extension, pixels = check_and_decode(data)
    return extension, *pixels.shape[:2]


def check_and_decode(data: bytes) -> tuple[str, Pixels]:
    """Decode strictly: the check of :func:`check_image` and the pixels of :func:`decode` in one.

    Returns:
        File extension (``jpg``, ``png`` or ``webp``) and uint8 (H, W, 3).

    Raises:
        DamagedImage: See :func:`check_image`.
    """
    try:
        if data[:8] == _PNG:
            _check_png(data)
            if (pixels := _decode_plain_png(data)) is not None:
                return "png", pixels
        with _open(data) as image:
            extension = _EXTENSIONS[image.format or ""]
            if extension == "jpg" and _is_plain_jpeg(data):
                return extension, simplejpeg.decode_jpeg(data, colorspace="RGB", strict=True)
            return extension, np.array(_to_rgb(image))
    except DamagedImage:
        raise
    except Exception as error:  # decoders raise anything on hostile bytes
        raise DamagedImage(f"does not decode: {error}") from error


def decode(data: bytes) -> Pixels:
    """Decode an image to RGB.

    EXIF rotation is not applied, as in torchvision. Gray, palette, CMYK and 16-bit images become
    8-bit RGB; transparency is dropped.

    Returns:
        uint8 (H, W, 3).

    Raises:
        DamagedImage: See :func:`check_image`.
    """
    try:
        if data[:2] == b"\xff\xd8" and _is_plain_jpeg(data):
            return simplejpeg.decode_jpeg(data, colorspace="RGB")
        with _open(data) as image:
            return np.array(_to_rgb(image))
    except DamagedImage:
        raise
    except Exception as error:  # decoders raise anything on hostile bytes
        raise DamagedImage(f"does not decode: {error}") from error


def _open(data: bytes) -> Image.Image:
    """Read the header; refuse other formats and too many pixels before any is decoded."""
    if not data:
        raise DamagedImage("is empty (0 bytes)")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.UnidentifiedImageError:
        raise DamagedImage("is no JPEG, PNG or WebP image") from None
    _check_size(*image.size)
    return image


def _check_size(width: int, height: int) -> None:
    """Refuse more pixels than MAX_PIXELS."""
    if width * height > MAX_PIXELS:
        raise DamagedImage(f"has {width} x {height} pixels, more than the limit of {MAX_PIXELS}")


def _check_png(data: bytes) -> None:
    """Check the checksum of every chunk: Pillow passes over those of the pixels."""
    at = 8
    while (kind := data[at + 4 : at + 8]) != b"IEND":
        end = at + 8 + int.from_bytes(data[at : at + 4], "big")
        if not kind or end + 4 > len(data):
            raise DamagedImage("is truncated")
        if zlib.crc32(data[at + 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
            raise DamagedImage(f"is damaged: chunk {kind!r} has another checksum")
        at = end + 4


def _decode_plain_png(data: bytes) -> Pixels | None:
    """Decode an 8-bit RGB PNG six times as fast as Pillow; None leaves it to Pillow.

    What kornia_rs refuses is judged by Pillow, which says why.
    """
    if data[12:16] != b"IHDR" or data[24:29] != _RGB_8:
        return None
    width, height = int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    _check_size(width, height)
    from kornia_rs.io import decode_image_png_u8

    try:
        return decode_image_png_u8(data, (height, width), "rgb")
    except Exception:  # it raises several kinds
        return None


def _is_plain_jpeg(data: bytes) -> bool:
    """Whether simplejpeg gives the same RGB pixels as Pillow: not for CMYK."""
    height, width, colour, _ = simplejpeg.decode_jpeg_header(data)
    _check_size(int(width), int(height))
    return colour in ("YCbCr", "RGB", "Gray")


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode to 8-bit RGB."""
    if image.mode.startswith("I"):  # 16 bit: Pillow's own conversion clips at 255
        samples = np.asarray(image, np.int64) >> 8
        image = Image.fromarray(samples.clip(0, 255).astype(np.uint8))
    return image.convert("RGB")
