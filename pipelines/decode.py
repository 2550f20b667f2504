"""Bytes to pixels, with limits; one function decides what a good image is."""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import simplejpeg
from kornia_rs import io as rust
from PIL import Image

Pixels = npt.NDArray[np.uint8]

MAX_PIXELS = 64 * 1024 * 1024  # a 100 kB file can claim a gigabyte of pixels
FORMATS = ("JPEG", "PNG", "WEBP")
_JPEG_START = b"\xff\xd8"
# kornia_rs decodes small PNGs in a sixth of Pillow's time, but holds the GIL meanwhile.
SMALL = 64 * 64  # pixels
SMALL_BYTES = 2**16  # of a file with so few pixels: they are 12 kB, and the rest may be a profile
# MPO: what Pillow calls the JPEG of a camera that appends a second picture.
_EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
PNG = b"\x89PNG\r\n\x1a\n"
RGB_8 = b"\x08\x02\x00\x00\x00"  # 8 bits, RGB, deflate, five filters, not interlaced


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
    with _damage_named():
        if data[:2] == _JPEG_START and _is_plain_jpeg(data):
            # All of the file is read at any scale, and an eighth takes half the time.
            simplejpeg.decode_jpeg(data, min_height=1, min_width=1, min_factor=8, strict=True)
            height, width, *_ = simplejpeg.decode_jpeg_header(data)
            return "jpg", int(height), int(width)
    extension, pixels = check_and_decode(data)
    return extension, *pixels.shape[:2]


def check_and_decode(data: bytes) -> tuple[str, Pixels]:
    """Decode strictly: the check of :func:`check_image` and the pixels of :func:`decode` in one.

    Returns:
        File extension (``jpg``, ``png`` or ``webp``) and uint8 (H, W, 3).

    Raises:
        DamagedImage: See :func:`check_image`.
    """
    with _damage_named():
        if data[:8] == PNG:
            _check_png(data)
            if (pixels := _decode_plain_png(data, MAX_PIXELS)) is not None:
                return "png", pixels
        with _open(data) as image:
            extension = _EXTENSIONS[image.format or ""]
            if extension == "jpg" and _is_plain_jpeg(data):
                return extension, simplejpeg.decode_jpeg(data, colorspace="RGB", strict=True)
            return extension, np.array(_to_rgb(image))


def check_header(data: bytes) -> tuple[int, int]:
    """Check what costs no decoding: format, number of pixels, and that the end is there.

    An image without its end marker in the last place (cut, or with bytes appended, which is no
    damage) is decoded once, strictly. Damage between header and end is left to the decoder.

    Returns:
        Height and width in pixels.

    Raises:
        DamagedImage: See :func:`check_image`.
    """
    if not _has_end(data):
        return check_image(data)[1:]
    with _damage_named():
        if data[:2] == _JPEG_START:
            height, width, *_ = simplejpeg.decode_jpeg_header(data)
            _check_size(int(width), int(height))
            return int(height), int(width)
        with _open(data) as image:
            return image.height, image.width


def _has_end(data: bytes) -> bool:
    """Whether the bytes end where their format says."""
    if data[:2] == _JPEG_START:
        return data.endswith(b"\xff\xd9")
    if data[:4] == b"RIFF":  # WebP tells its length, without the first 8 bytes
        return int.from_bytes(data[4:8], "little") + 8 == len(data)
    return data.endswith(b"\0\0\0\0IEND\xaeB`\x82")


def decode(data: bytes) -> Pixels:
    """Decode an image to RGB.

    What becomes of images that are not 8-bit RGB, the same for every back-end:

    - gray and black-and-white: three equal channels;
    - 16 bit: the high byte of each sample, not scaled to the image's range;
    - palette: its colours;
    - CMYK and YCCK: Pillow's conversion, without colour management;
    - transparency: dropped, whatever colour lies under it;
    - EXIF rotation: not applied here, as in torchvision; packing may have applied it;
    - any size from 1 x 1 (a crop is then that pixel, repeated) to :data:`MAX_PIXELS` pixels; more
      is refused before anything is decoded.

    Returns:
        uint8 (H, W, 3).

    Raises:
        DamagedImage: See :func:`check_image`.
    """
    with _damage_named():
        if data[:2] == _JPEG_START and _is_plain_jpeg(data):
            return simplejpeg.decode_jpeg(data, colorspace="RGB")
        if (pixels := _decode_plain_png(data, SMALL)) is not None:
            return pixels
        with _open(data) as image:
            return np.array(_to_rgb(image))


@contextmanager
def _damage_named() -> Iterator[None]:
    """Turn whatever decoders raise on hostile bytes into DamagedImage."""
    try:
        yield
    except DamagedImage:
        raise
    except Exception as error:
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


def _decode_plain_png(data: bytes, most_pixels: int) -> Pixels | None:
    """Decode an 8-bit RGB PNG six times as fast as Pillow; None for others.

    kornia_rs checks the sums of header and pixels, which Pillow does not all, and raises for less:
    no end, unknown chunks. What it refuses is judged by Pillow, which says why.
    """
    if data[:8] != PNG or data[12:16] != b"IHDR" or data[24:29] != RGB_8:
        return None
    width, height = int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    _check_size(width, height)
    if not 0 < width * height <= most_pixels:
        return None
    try:
        return rust.decode_image_png_u8(data, (height, width), "rgb")
    except Exception:  # of the class Exception itself
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
