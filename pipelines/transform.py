"""What packing may do to an image: turn it upright, make it RGB, shrink it, encode it anew."""

from __future__ import annotations

import io
from dataclasses import dataclass

from PIL import Image

from fastclr.config import ConfigError
from pipelines.decode import FORMATS, DamagedImage, Pixels

ENCODINGS = {"jpeg": "JPEG", "webp": "WEBP", "png": "PNG"}  # and what Pillow calls them


@dataclass(frozen=True)
class Transform:
    """Decode, apply the EXIF rotation, convert to 8-bit RGB, shrink, encode.

    Pixels are those of :func:`pipelines.decode.decode`: transparency is dropped, 16 bits become 8.

    Attributes:
        encode: ``jpeg``, ``webp`` or ``png``.
        quality: 1 to 100; png has none.
        shorter_side: Length of the shorter side in pixels; smaller images stay as they are, they
            would gain bytes and no detail. None keeps every size.
    """

    encode: str
    quality: int = 90
    shorter_side: int | None = None

    def __post_init__(self) -> None:
        if self.encode not in ENCODINGS:
            raise ConfigError(f"encode is {self.encode!r}: choose from {', '.join(ENCODINGS)}.")
        if not 1 <= self.quality <= 100:
            raise ConfigError(f"quality is {self.quality}: give 1 to 100.")
        if self.shorter_side is not None and self.shorter_side < 1:
            raise ConfigError(f"shorter_side is {self.shorter_side}: give 1 or more pixels.")

    def apply(self, data: bytes, pixels: Pixels) -> bytes:
        """Return the new encoded image.

        Args:
            data: The source's bytes, for their EXIF rotation.
            pixels: uint8 (H, W, 3), ``data`` decoded.

        Raises:
            DamagedImage: If the format cannot hold it.
        """
        image = Image.fromarray(pixels)
        if (turn := _TURNS.get(_orientation(data))) is not None:
            image = image.transpose(turn)
        if self.shorter_side and min(image.size) > self.shorter_side:
            scale = self.shorter_side / min(image.size)
            width, height = (max(1, round(side * scale)) for side in image.size)
            image = image.resize((width, height), Image.Resampling.BICUBIC)
        quality = {} if self.encode == "png" else {"quality": self.quality}
        stream = io.BytesIO()
        try:
            image.save(stream, ENCODINGS[self.encode], **quality)
        except (OSError, ValueError) as error:  # WebP ends at 16,383 pixels a side
            raise DamagedImage(f"cannot be encoded as {self.encode}: {error}") from error
        return stream.getvalue()


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _orientation(data: bytes) -> int:
    """Return the EXIF orientation, 1 where there is none or it cannot be read."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return int(image.getexif().get(0x112, 1))
    except Exception:  # EXIF is hostile too, and only a hint
        return 1
