"""Bytes to pixels, with limits; one function decides what a good image is."""

from __future__ import annotations

import io

import numpy as np
import numpy.typing as npt
import simplejpeg
from kornia_rs import io as rust
from PIL import Image

Pixels = npt.NDArray[np.uint8]

MAX_PIXELS = 64 * 1024 * 1024  # a 100 kB file can claim a gigabyte of pixels
FORMATS = ("JPEG", "PNG", "WEBP")
# kornia_rs decodes small PNGs in a sixth of Pillow's time, but holds the GIL meanwhile.
SMALL = 64 * 64  # pixels
# MPO: what Pillow calls the JPEG of a camera that appends a second picture.
_EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}


class DamagedImage(ValueError):
    """Bytes that are no image, or one beyond the limits; the message says why."""


class DamagedImages(DamagedImage):
    """Some images of a batch are damaged.

    Args:
        reasons: What is wrong with an image, by its place in the batch.

    Attributes:
        reasons: The same.
    """

    def __init__(self, reasons: dict[int, str]) -> None:
        self.reasons = reasons
        super().__init__("; ".join(f"image {row} {why}" for row, why in reasons.items()))


def check_image(data: bytes) -> tuple[str, int, int]:
    """Decode strictly and throw the pixels away.

    Returns:
        File extension (``jpg``, ``png`` or ``webp``), height and width in pixels.

    Raises:
        DamagedImage: If the bytes are empty, of another format, truncated, damaged, or larger than
            :data:`MAX_PIXELS`.
    """
    try:
        if data[:2] == b"\xff\xd8" and _is_plain_jpeg(data):
            # All of the file is read at any scale, and an eighth takes half the time.
            simplejpeg.decode_jpeg(data, min_height=1, min_width=1, min_factor=8, strict=True)
            height, width, *_ = simplejpeg.decode_jpeg_header(data)
            return "jpg", int(height), int(width)
        with _open(data) as image:
            image.load()
            return _EXTENSIONS[image.format or ""], image.height, image.width
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
        pixels = _decode_small_png(data)
        if pixels is not None:
            return pixels
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


def _is_plain_jpeg(data: bytes) -> bool:
    """Whether simplejpeg gives the same RGB pixels as Pillow: not for CMYK."""
    height, width, colour, _ = simplejpeg.decode_jpeg_header(data)
    _check_size(int(width), int(height))
    return colour in ("YCbCr", "RGB", "Gray")


def _decode_small_png(data: bytes) -> Pixels | None:
    """Decode a small PNG of 8-bit RGB; None for others, and for what kornia_rs refuses.

    It checks the sums of the header and the pixels, which Pillow does not all, and raises for less:
    no end, unknown chunks. There Pillow decides, as in :func:`check_image`.
    """
    if data[:8] != b"\x89PNG\r\n\x1a\n" or data[12:16] != b"IHDR" or data[24:26] != b"\x08\x02":
        return None
    width, height = int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    if not 0 < width * height <= SMALL:
        return None
    try:
        return rust.decode_image_png_u8(data, (height, width), "rgb")
    except Exception:  # of the class Exception itself
        return None


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode to 8-bit RGB."""
    if image.mode.startswith("I"):  # 16 bit: Pillow's own conversion clips at 255
        samples = np.asarray(image, np.int64) >> 8
        image = Image.fromarray(samples.clip(0, 255).astype(np.uint8))
    return image.convert("RGB")
