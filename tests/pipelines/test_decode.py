"""One function decides what a good image is: damage, odd modes, hostile headers."""

from __future__ import annotations

import contextlib
import io
import resource
import struct
import sys
import threading
import warnings
import zlib
from collections.abc import Callable

import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipelines.decode import (
    MAX_PIXELS,
    DamagedImage,
    Pixels,
    check_header,
    check_image,
    decode,
)

Picture = Callable[..., Pixels]
Encode = Callable[..., bytes]


@pytest.fixture(scope="module")
def jpeg(picture: Picture, encode: Encode) -> bytes:
    return encode(picture(224, 224), "JPEG", quality=85)


def noise(data: bytes, patch: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + patch + data[middle + len(patch) :]


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "half": lambda data: data[: len(data) // 2],
    "100 bytes short": lambda data: data[:-100],
    "no end marker": lambda data: data[:-2],
    "random bytes": lambda data: np.random.default_rng(0).bytes(len(data)),
    "empty": lambda data: b"",
    "no start-of-frame": lambda data: data.replace(b"\xff\xc0", b"\x00\x00", 1),
    "500 bytes zeroed": lambda data: noise(data, bytes(500)),
    "500 bytes of noise": lambda data: noise(data, np.random.default_rng(1).bytes(500)),
    "header only": lambda data: data[:2],
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("kind", ["plain", "progressive", "gray"])
def test_damaged_jpegs_are_refused(
    picture: Picture, encode: Encode, damage: str, kind: str
) -> None:
    image = Image.fromarray(picture(224, 224)).convert("L" if kind == "gray" else "RGB")
    good = encode(image, "JPEG", quality=85, progressive=kind == "progressive")
    if kind == "progressive" and damage == "no start-of-frame":
        bad = good.replace(b"\xff\xc2", b"\x00\x00", 1)
    else:
        bad = DAMAGE[damage](good)
    assert check_image(good) == ("jpg", 224, 224) and bad != good
    with pytest.raises(DamagedImage):
        check_image(bad)
    with pytest.raises(DamagedImage):
        decode(bad)


@pytest.mark.parametrize("damage", ["half", "100 bytes short", "empty", "header only"])
@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_cut_png_and_webp_are_refused(
    picture: Picture, encode: Encode, damage: str, kind: str
) -> None:
    bad = DAMAGE[damage](encode(picture(64, 64), kind))
    for function in (check_image, decode):
        with pytest.raises(DamagedImage):
            function(bad)


def test_a_cut_cmyk_jpeg_is_refused(picture: Picture, encode: Encode) -> None:
    data = encode(Image.fromarray(picture(64, 64)).convert("CMYK"), "JPEG")
    assert check_image(data) == ("jpg", 64, 64)
    with pytest.raises(DamagedImage, match="truncated"):
        check_image(data[:-100])


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "PPM", "ICO", "JPEG2000"])
def test_other_formats_are_refused(picture: Picture, encode: Encode, kind: str) -> None:
    with pytest.raises(DamagedImage, match="is no JPEG, PNG or WebP image"):
        check_image(encode(picture(32, 32), kind))


def test_bytes_after_the_end_are_no_damage(jpeg: bytes) -> None:
    assert check_image(jpeg + b"appended by a camera") == ("jpg", 224, 224)


def test_a_camera_jpeg_with_a_second_picture_is_a_jpeg(picture: Picture, encode: Encode) -> None:
    """Pillow calls it MPO; phones write it."""
    image, second = (Image.fromarray(picture(40, 30, k)) for k in range(2))
    data = encode(image, "MPO", save_all=True, append_images=[second])
    assert Image.open(io.BytesIO(data)).format == "MPO"
    assert check_image(data) == ("jpg", 40, 30)
    assert np.array_equal(decode(data), np.array(Image.open(io.BytesIO(data)).convert("RGB")))


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_claiming(width: int, height: int) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + header + pixels + chunk(b"IEND", b"")


def jpeg_claiming(jpeg: bytes, width: int, height: int) -> bytes:
    at = jpeg.find(b"\xff\xc0") + 5
    return jpeg[:at] + struct.pack(">HH", height, width) + jpeg[at + 4 :]


HEADER = struct.pack(">IIBBBBB", 48, 64, 8, 2, 0, 0, 0)


def small_png(pixels: Pixels, *more: bytes, stream: bytes | None = None, end: bool = True) -> bytes:
    """A PNG of 64 x 48 RGB pixels, unfiltered, with chunks between its header and its pixels."""
    raw = b"".join(b"\0" + row.tobytes() for row in pixels)
    chunks = [chunk(b"IHDR", HEADER), *more, chunk(b"IDAT", stream or zlib.compress(raw))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks) + (chunk(b"IEND", b"") if end else b"")


CHUNKS = {
    "none": [],
    "transparent colour": [chunk(b"tRNS", bytes([0, 3, 0, 7, 0, 1]))],
    "gamma": [chunk(b"gAMA", struct.pack(">I", 45455))],
    "linear gamma": [chunk(b"gAMA", struct.pack(">I", 100000))],
    "standard colours": [chunk(b"sRGB", b"\0")],
    "chromaticities": [chunk(b"cHRM", struct.pack(">8I", *[31270, 32900] * 4))],
    "fewer bits": [chunk(b"sBIT", bytes([5, 5, 5]))],
    "suggested palette": [chunk(b"PLTE", bytes(range(30)))],
    "text": [chunk(b"tEXt", b"a\0b")],
    "unknown": [chunk(b"prVt", b"x")],
    "unknown and critical": [chunk(b"PRVT", b"x")],
}


@pytest.mark.parametrize("more", CHUNKS)
def test_chunks_of_a_png_change_no_pixel(picture: Picture, more: str) -> None:
    pixels = picture(64, 48)
    data = small_png(pixels, *CHUNKS[more])
    assert np.array_equal(decode(data), pixels)
    assert np.array_equal(np.array(Image.open(io.BytesIO(data)).convert("RGB")), pixels)


def test_a_small_png_is_damaged_or_not_as_the_check_says(picture: Picture) -> None:
    pixels = picture(64, 48)
    raw = b"".join(b"\0" + row.tobytes() for row in pixels)
    filter_9 = b"\x09" + raw[1:]
    damaged = {
        "few pixels": small_png(pixels, stream=zlib.compress(raw[:-100])),
        "stream cut": small_png(pixels, stream=zlib.compress(raw)[:-50]),
        "no such filter": small_png(pixels, stream=zlib.compress(filter_9)),
        "no stream": small_png(pixels, stream=b"x" * 100),
        "header's sum": small_png(pixels).replace(chunk(b"IHDR", HEADER)[-4:], b"\1\2\3\4", 1),
        "no pixels": small_png(pixels)[:40],
    }
    for what, data in damaged.items():
        for function in (check_image, decode):
            with pytest.raises(DamagedImage):
                function(data)
                pytest.fail(what)
    endless, more = small_png(pixels, end=False), small_png(pixels) + b"more"
    with pytest.raises(DamagedImage, match="is truncated"):
        check_image(endless)  # though all of its pixels are there
    assert check_image(more) == ("png", 64, 48)
    assert all(np.array_equal(decode(data), pixels) for data in (endless, more))


def test_small_pngs_take_the_short_way(
    picture: Picture, encode: Encode, monkeypatch: pytest.MonkeyPatch
) -> None:
    small, large = (encode(picture(side, 64), "PNG") for side in (64, 65))
    alpha = encode(Image.fromarray(picture(9, 9)).convert("RGBA"), "PNG")
    monkeypatch.setattr("pipelines.decode._open", None)
    assert np.array_equal(decode(small), picture(64, 64)) and decode(small).flags.writeable
    for data in (large, alpha):
        with pytest.raises(DamagedImage, match="NoneType"):
            decode(data)


@pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("function", [check_image, decode])
@pytest.mark.parametrize("kind", ["png", "jpeg"])
@pytest.mark.parametrize("side", [8200, 9500, 20000, 60000])
def test_too_many_pixels_are_refused_before_decoding(
    function: Callable[[bytes], object], kind: str, side: int, jpeg: bytes
) -> None:
    assert side * side > MAX_PIXELS
    data = png_claiming(side, side) if kind == "png" else jpeg_claiming(jpeg, side, side)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DamagedImage, match=r"pixels, more than the limit|exceeds limit"):
        function(data)
    # In KiB; to decode even the smallest of these takes 200 MB.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


def test_the_limit_itself(monkeypatch: pytest.MonkeyPatch, jpeg: bytes) -> None:
    monkeypatch.setattr("pipelines.decode.MAX_PIXELS", 224 * 224)
    assert check_image(jpeg) == ("jpg", 224, 224)
    monkeypatch.setattr("pipelines.decode.MAX_PIXELS", 224 * 224 - 1)
    for function in (check_image, decode):
        with pytest.raises(DamagedImage, match="has 224 x 224 pixels"):
            function(jpeg)


def test_plain_images_equal_pillows(picture: Picture, encode: Encode) -> None:
    for kind, options in (
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("JPEG", {"subsampling": 0, "quality": 95}),
        ("PNG", {}),
        ("WEBP", {}),
    ):
        data = encode(picture(37, 53), kind, **options)
        assert np.array_equal(decode(data), np.array(Image.open(io.BytesIO(data)).convert("RGB")))
        assert check_image(data)[1:] == (37, 53)


def test_lossless_images_come_back(picture: Picture, encode: Encode) -> None:
    pixels = picture(20, 31)
    for data in (encode(pixels, "PNG"), encode(pixels, "WEBP", lossless=True)):
        assert np.array_equal(decode(data), pixels) and decode(data).dtype == np.uint8


def test_gray_has_three_equal_channels(picture: Picture, encode: Encode) -> None:
    gray = Image.fromarray(picture(20, 30)).convert("L")
    for kind in ("JPEG", "PNG"):
        pixels = decode(encode(gray, kind))
        assert pixels.shape == (20, 30, 3)
        assert (pixels == pixels[..., :1]).all() and pixels.std() > 10
    assert np.array_equal(decode(encode(gray, "PNG"))[..., 0], np.array(gray))


def test_cmyk_has_the_right_colours(picture: Picture, encode: Encode) -> None:
    pixels = picture(40, 40)
    data = encode(Image.fromarray(pixels).convert("CMYK"), "JPEG", quality=98)
    assert simplejpeg.decode_jpeg_header(data)[2] not in ("RGB", "YCbCr", "Gray")
    found = decode(data).astype(int)
    assert found.shape == (40, 40, 3)
    assert abs(found - pixels).mean() < 8  # swapped or inverted channels are tens of levels off


def test_transparency_is_dropped(picture: Picture, encode: Encode) -> None:
    image = Image.fromarray(picture(16, 16))
    palette = image.quantize(16)
    expected = np.array(palette.convert("RGB"))
    assert np.array_equal(decode(encode(palette, "PNG", transparency=0)), expected)
    image.putalpha(0)
    assert np.array_equal(decode(encode(image, "PNG")), picture(16, 16))


@pytest.mark.parametrize("mode", ["1", "LA"])
def test_other_png_modes(picture: Picture, encode: Encode, mode: str) -> None:
    image = Image.fromarray(picture(16, 18)).convert(mode)
    assert np.array_equal(decode(encode(image, "PNG")), np.array(image.convert("RGB")))


def test_16_bit_keeps_the_high_byte(encode: Encode) -> None:
    samples = np.arange(65536, dtype=np.uint16)[::37][:1700].reshape(34, 50)
    data = encode(Image.fromarray(samples), "PNG")
    assert check_image(data) == ("png", 34, 50)
    assert np.array_equal(decode(data), np.stack([samples >> 8] * 3, -1))


def test_exif_rotation_is_not_applied(picture: Picture, encode: Encode) -> None:
    exif = Image.Exif()
    exif[0x112] = 6
    pixels = picture(20, 30)
    data = encode(pixels, "JPEG", exif=exif)
    assert check_image(data) == ("jpg", 20, 30)
    assert np.array_equal(decode(data), decode(encode(pixels, "JPEG")))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_any_damage_gives_an_image_or_damaged_image(
    kind: str, data: st.DataObject, encode: Encode, picture: Picture
) -> None:
    """No other exception escapes, and what passes the check decodes to the size it told."""
    raw = bytearray(encode(picture(16, 16), kind))
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    damaged = bytes(raw[: data.draw(st.integers(0, len(raw)))] if data.draw(st.booleans()) else raw)
    try:
        extension, height, width = check_image(damaged)
    except DamagedImage as error:
        assert str(error)
    else:
        assert extension in ("jpg", "png", "webp")
        assert decode(damaged).shape == (height, width, 3)


def test_threads_leave_the_warning_filters_alone(jpeg: bytes) -> None:
    """warnings.catch_warnings, which holds for the whole process, must not come back."""
    before, interval = list(warnings.filters), sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    threads = [
        threading.Thread(target=lambda: [check_image(jpeg) for _ in range(30)]) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sys.setswitchinterval(interval)
    assert list(warnings.filters) == before


def test_headers_tell_the_size_of_every_mode(picture: Picture, encode: Encode) -> None:
    image = Image.fromarray(picture(20, 31))
    gray, cmyk = image.convert("L"), image.convert("CMYK")
    deep = Image.fromarray(np.arange(620, dtype=np.uint16).reshape(20, 31))
    images = [(image, kind) for kind in ("JPEG", "PNG", "WEBP")]
    images += [(gray, "JPEG"), (cmyk, "JPEG"), (deep, "PNG"), (image.quantize(9), "PNG")]
    for source, kind in images:
        assert check_header(encode(source, kind)) == (20, 31)
    assert check_header(encode(image, "JPEG") + b"appended by a camera") == (20, 31)
    for kind in ("JPEG", "PNG", "WEBP"):
        assert check_header(encode(picture(1, 1), kind)) == (1, 1)


def test_headers_are_read_without_decoding(
    jpeg: bytes, picture: Picture, encode: Encode, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = [encode(picture(9, 9 + k), kind) for k in (0, 1) for kind in ("PNG", "WEBP")]
    monkeypatch.setattr("pipelines.decode.check_image", lambda data: pytest.fail("decoded"))
    found = [check_header(data) for data in (jpeg, *others)]
    assert found == [(224, 224), (9, 9), (9, 9), (9, 10), (9, 10)]


@pytest.mark.parametrize("damage", ["half", "100 bytes short", "no end marker", "empty"])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_what_is_cut_is_refused_by_its_header(
    picture: Picture, encode: Encode, damage: str, kind: str
) -> None:
    """As by the strict check: a cut that costs no pixel is no damage to it either."""
    bad = DAMAGE[damage](encode(picture(64, 64), kind))
    try:
        expected = check_image(bad)[1:]
    except DamagedImage:
        with pytest.raises(DamagedImage):
            check_header(bad)
    else:
        assert check_header(bad) == expected


@pytest.mark.parametrize("kind", ["png", "jpeg"])
def test_headers_of_too_many_pixels_are_refused(kind: str, jpeg: bytes) -> None:
    data = png_claiming(9500, 9500) if kind == "png" else jpeg_claiming(jpeg, 9500, 9500)
    with pytest.raises(DamagedImage, match=r"pixels, more than the limit|exceeds limit"):
        check_header(data)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_no_header_raises_anything_else(
    kind: str, data: st.DataObject, encode: Encode, picture: Picture
) -> None:
    raw = bytearray(encode(picture(16, 16), kind))
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, min(40, len(raw) - 1)))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(DamagedImage):
        height, width = check_header(bytes(raw))
        assert height > 0 and width > 0 and height * width <= MAX_PIXELS


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_one_pixel_is_an_image(picture: Picture, encode: Encode, kind: str) -> None:
    data = encode(picture(1, 1), kind)
    assert check_image(data)[1:] == (1, 1) and decode(data).shape == (1, 1, 3)
