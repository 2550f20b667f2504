"""Packing that decodes: images re-encoded, shrunk and turned upright; the fast way through PNGs."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fastclr.config import ConfigError
from pipelines.decode import DamagedImage, Pixels, check_and_decode, check_image, decode
from pipelines.shards import ShardError, ShardSet
from pipelines.transform import Transform
from tests.pipelines.packs import files_of, packing

Picture = Callable[..., Pixels]
Encode = Callable[..., bytes]


def modes(picture: Picture, encode: Encode) -> dict[str, bytes]:
    image = Image.fromarray(picture(40, 24, 3))
    deep = (np.arange(960, dtype=np.uint16).reshape(40, 24) * 68).astype(np.uint16)
    return {
        "rgb.jpg": encode(image, "JPEG", quality=95),
        "cmyk.jpg": encode(image.convert("CMYK"), "JPEG"),
        "grey.png": encode(image.convert("L"), "PNG"),
        "deep.png": encode(Image.fromarray(deep), "PNG"),
        "palette.png": encode(image.quantize(9), "PNG", transparency=0),
        "alpha.webp": encode(image.convert("RGBA"), "WEBP", lossless=True),
        "one.png": encode(picture(1, 1), "PNG"),
    }


def test_re_encoding_without_loss_keeps_the_pixels(
    picture: Picture, encode: Encode, target: Path, tmp_path: Path
) -> None:
    (tmp_path / "x").mkdir()
    images = modes(picture, encode)
    for name, data in images.items():
        (tmp_path / "x" / name).write_bytes(data)
    packing(tmp_path / "x", target, transform=Transform("png"))
    packed = ShardSet.open(target)
    assert len(packed) == len(images)
    for i in range(len(packed)):
        assert np.array_equal(packed[i], decode(images[packed.source_of(i)]))
        assert packed.read(i)[:4] == b"\x89PNG"
        assert Image.open(io.BytesIO(packed.read(i))).mode == "RGB"
    manifest = json.loads((target / "manifest.json").read_bytes())
    assert manifest["transform"] == {"encode": "png", "quality": 90, "shorter_side": None}


@pytest.mark.parametrize("kind", ["jpeg", "webp", "png"])
@pytest.mark.parametrize(("side", "size"), [(12, (20, 12)), (40, (40, 24)), (1, (2, 1))])
def test_shorter_side(
    picture: Picture, encode: Encode, kind: str, side: int, size: tuple[int, int]
) -> None:
    for name, data in modes(picture, encode).items():
        new = Transform(kind, 80, side).apply(data, decode(data))
        extension, height, width = check_image(new)
        assert extension == {"jpeg": "jpg"}.get(kind, kind)
        assert (height, width) == ((1, 1) if name == "one.png" else size)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(picture: Picture, encode: Encode, orientation: int) -> None:
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x112] = orientation
    data = encode(picture(20, 30), "PNG", exif=exif)
    new = Transform("png").apply(data, decode(data))
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    assert np.array_equal(decode(new), upright)
    assert Image.open(io.BytesIO(new)).getexif().get(0x112, 1) == 1


def test_hostile_exif_is_no_rotation(picture: Picture, encode: Encode) -> None:
    data = encode(picture(20, 30), "PNG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff" + bytes(20))
    assert np.array_equal(decode(Transform("png").apply(data, decode(data))), decode(data))


def test_quality_counts(picture: Picture, encode: Encode) -> None:
    data = encode(picture(90, 90), "PNG")
    for kind in ("jpeg", "webp"):
        low, high = (len(Transform(kind, q).apply(data, decode(data))) for q in (20, 95))
        assert low < high / 2


def test_what_a_format_cannot_hold_is_rejected(
    picture: Picture, encode: Encode, target: Path, tmp_path: Path
) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "wide.png").write_bytes(encode(picture(1, 17000), "PNG"))
    with pytest.raises(ShardError, match=r"wide.png cannot be encoded as webp"):
        packing(tmp_path / "x", target, transform=Transform("webp"))


@pytest.mark.parametrize(
    ("options", "word"),
    [(("gif",), "encode"), (("jpeg", 0), "quality"), (("jpeg", 90, 0), "shorter_side")],
)
def test_a_transform_that_does_not_exist(options: tuple[Any, ...], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        Transform(*options)


def test_transformed_shards_are_the_same_twice(many: Path, target: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"transform": Transform("jpeg", 80, 4)}
    first = packing(many, target, workers=2, **options)
    second = packing(many, tmp_path / "b" / "train", workers=1, **options)
    assert files_of(first.out) == files_of(second.out)
    assert (
        "--encode jpeg --quality 80 --shorter-side 4"
        in json.loads((target / "manifest.json").read_bytes())["command"]
    )


# The fast way through PNGs.


def test_plain_pngs_decode_as_with_pillow(picture: Picture, encode: Encode) -> None:
    for size in ((1, 1), (3, 5), (64, 33)):
        for level in (0, 1, 9):
            data = encode(picture(*size), "PNG", compress_level=level)
            kind, pixels = check_and_decode(data)
            assert kind == "png" and np.array_equal(pixels, np.array(Image.open(io.BytesIO(data))))
            assert pixels.flags.c_contiguous


@pytest.mark.parametrize("mode", ["RGB", "L", "P"])
def test_a_cut_png_is_damage(mode: str, picture: Picture, encode: Encode) -> None:
    data = encode(Image.fromarray(picture(9, 9)).convert(mode), "PNG")
    for length in range(len(data) - 8):
        with pytest.raises(DamagedImage):
            check_image(data[:length])


@given(st.integers(0, 10**6), st.integers(0, 7))
@settings(max_examples=60, deadline=None)
def test_a_flipped_bit_in_a_png_is_damage(at: int, bit: int) -> None:
    stream = io.BytesIO()
    pixels = np.arange(768, dtype=np.uint8).reshape(16, 16, 3)
    Image.fromarray(pixels).save(stream, "PNG")
    data = bytearray(stream.getvalue())
    at %= len(data)
    data[at] ^= 1 << bit
    try:
        _, found = check_and_decode(bytes(data))
    except ValueError:
        return
    assert np.array_equal(found, pixels), "other pixels were taken for good ones"
