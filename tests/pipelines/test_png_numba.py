"""Small PNGs decoded at once: the pixels of `decode` or nothing, whatever the bytes."""

from __future__ import annotations

import io
import os
import shutil
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines import png_numba
from pipelines.decode import SMALL, SMALL_BYTES, DamagedImage, Pixels, decode
from pipelines.index import BLOCK, header_problem
from pipelines.loader import make_loader
from pipelines.mixture import Mixture
from pipelines.png_numba import read_small_pngs
from pipelines.policy import SimCLRPolicy
from pipelines.shards import DamagedSample, ShardSet
from pipelines.writer import write_shards

Picture = Callable[..., Pixels]
Encode = Callable[..., bytes]
Read = Callable[..., list[Pixels | None]]
START = b"\x89PNG\r\n\x1a\n"


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(raw: bytes, height: int, width: int, *more: bytes, cuts: int = 1, level: int = 6) -> bytes:
    """A PNG of filtered rows, its stream cut in parts, with chunks before them."""
    stream = zlib.compress(raw, level)
    step = -(-len(stream) // cuts)
    parts = [chunk(b"IDAT", stream[k : k + step]) for k in range(0, len(stream), step)]
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return START + header + b"".join((*more, *parts)) + chunk(b"IEND", b"")


def filtered(pixels: Pixels, kinds: Iterator[int] | list[int]) -> bytes:
    """Rows as the PNG specification filters them, written from its formulas."""
    height, width, _ = pixels.shape
    padded = np.zeros((height + 1, width + 1, 3), np.int64)
    padded[1:, 1:] = pixels
    x, a, b, c = padded[1:, 1:], padded[1:, :-1], padded[:-1, 1:], padded[:-1, :-1]
    p = a + b - c
    to_a, to_b, to_c = abs(p - a), abs(p - b), abs(p - c)
    nearest = np.where((to_a <= to_b) & (to_a <= to_c), a, np.where(to_b <= to_c, b, c))
    guesses = [0 * a, a, b, (a + b) // 2, nearest]
    rows = [
        bytes([kind]) + ((x - guesses[kind])[y] % 256).astype(np.uint8).tobytes()
        for y, kind in zip(range(height), kinds, strict=False)
    ]
    return b"".join(rows)


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """Put members into a tar and read them at once; their sizes are what `decode` says."""

    def read(images: list[bytes], size: tuple[int, int], name: str = "k.png") -> list:
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for data in images:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        (tmp_path / "all.tar").write_bytes(stream.getvalue())
        with tarfile.open(tmp_path / "all.tar") as tar:
            members = tar.getmembers()
        file = os.open(tmp_path / "all.tar", os.O_RDONLY)
        try:
            return read_small_pngs(
                [file] * len(images),
                np.array([m.offset_data for m in members], np.int64),
                np.array([m.size for m in members], np.int64),
                [name] * len(images),
                np.array([size] * len(images), np.int32),
            )
        finally:
            os.close(file)

    return read


def none_or_the_pixels_of_decode(found: list[Pixels | None], images: list[bytes]) -> int:
    """Check that what was decoded is what `decode` says; return how many were."""
    for pixels, data in zip(found, images, strict=True):
        if pixels is not None:
            assert np.array_equal(pixels, decode(data))
    return sum(pixels is not None for pixels in found)


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (2, 2), (32, 32), (17, 40), (64, 64)])
def test_every_filter_in_every_row(picture: Picture, read: Read, size: tuple[int, int]) -> None:
    pixels, rng = picture(*size), np.random.default_rng(0)
    pixels[::3] = rng.integers(0, 256, pixels[::3].shape)
    choices = [[kind] * size[0] for kind in range(5)]
    choices += [rng.integers(0, 5, size[0]).tolist() for _ in range(20)]
    images = [png(filtered(pixels, kinds), *size) for kinds in choices]
    found = read(images, size)
    assert all(np.array_equal(one, pixels) for one in found if one is not None)
    assert none_or_the_pixels_of_decode(found, images) == 25
    assert all(one is None or one.flags.writeable for one in found)


def test_what_encoders_write(picture: Picture, encode: Encode, read: Read) -> None:
    pixels = picture(48, 64)
    raw = filtered(pixels, [4] * 48)
    images = [encode(pixels, "PNG", compress_level=level) for level in range(10)]
    images += [encode(pixels, "PNG", optimize=True), encode(pixels, "PNG", icc_profile=b"x" * 99)]
    images += [
        png(raw, 48, 64, cuts=cuts, level=level) for cuts in (1, 2, 7) for level in (0, 1, 9)
    ]
    images += [png(raw, 48, 64, chunk(b"gAMA", b"any"), chunk(b"tRNS", bytes(6)))]
    assert none_or_the_pixels_of_decode(read(images, (48, 64)), images) == len(images)


def test_what_is_odd_is_left_to_decode(picture: Picture, encode: Encode, read: Read) -> None:
    pixels = picture(20, 30)
    image, raw = Image.fromarray(pixels), filtered(pixels, [0] * 20)
    good = png(raw, 20, 30)
    stream = zlib.compress(raw)
    head, end = good[:33], good[-12:]
    odd = {
        "gray": encode(image.convert("L"), "PNG"),
        "palette": encode(image.quantize(9), "PNG"),
        "alpha": encode(image.convert("RGBA"), "PNG"),
        "interlaced": good[:28] + b"\1" + good[29:],
        "jpeg": encode(image, "JPEG"),
        "another size": png(filtered(picture(21, 30), [0] * 21), 21, 30),
        "filter 5": png(b"\5" + raw[1:], 20, 30),
        "a byte less": png(raw[:-1], 20, 30),
        "a byte more": png(raw + b"x", 20, 30),
        "bytes after the end": good + b"x",
        "no end": good[:-12],
        "end with a byte": good[:-12] + chunk(b"IEND", b"x"),
        "no pixels": head + end,
        "stream without its sum": head + chunk(b"IDAT", stream[:-4]) + end,
        "another sum": head + chunk(b"IDAT", stream[:-4] + b"wrng") + end,
        "bytes after the stream": head + chunk(b"IDAT", stream + b"more") + end,
        "two headers": head + head[8:] + good[33:],
        "parts not together": png(raw, 20, 30, cuts=2)[:-12] + chunk(b"tIME", bytes(7)) + end,
        "unknown and critical": png(raw, 20, 30, chunk(b"PRVT", b"x")),
        "palette suggested": png(raw, 20, 30, chunk(b"PLTE", bytes(30))),
        "endless chunk": head + struct.pack(">I", 2**32 - 1) + good[37:],
        "negative chunk": head + struct.pack(">I", 2**31) + good[37:],
        "no chunks": good[:33],
        "one byte": b"\x89",
    }
    assert read([good], (20, 30))[0] is not None
    for name, data in odd.items():
        assert read([data], (20, 30)) == [None], name
    neighbours = [good, *odd.values(), good]  # the buffers are shared
    found = read(neighbours, (20, 30))
    assert [one is not None for one in found] == [True] + [False] * len(odd) + [True]


def test_cut_at_every_byte(picture: Picture, read: Read) -> None:
    good = png(filtered(picture(5, 6), [4] * 5), 5, 6, chunk(b"gAMA", bytes(4)), cuts=3)
    images = [good[:k] for k in range(1, len(good) + 1)]
    assert [one is not None for one in read(images, (5, 6))] == [False] * (len(good) - 1) + [True]


@pytest.mark.parametrize("mended", [False, True])
def test_mutations_have_the_verdict_of_decode(picture: Picture, read: Read, mended: bool) -> None:
    """Where checksums are mended the damage reaches what they guard."""
    rng = np.random.default_rng(mended)
    pixels = picture(8, 11)
    images: list[bytes] = []
    for _ in range(1500):
        raw = filtered(pixels, rng.integers(0, 5, 8).tolist())
        header = bytearray(struct.pack(">IIBBBBB", 11, 8, 8, 2, 0, 0, 0))
        stream = bytearray(zlib.compress(raw, int(rng.integers(10))))
        if mended and rng.random() < 0.2:
            header[rng.choice([3, 7, 8, 9, 10, 11, 12])] = rng.integers(256)
        elif mended:
            stream[rng.integers(len(stream))] = rng.integers(256)
        mutated = bytearray(START + chunk(b"IHDR", bytes(header)) + chunk(b"IDAT", bytes(stream)))
        mutated += chunk(b"IEND", b"")
        for _ in range(0 if mended else rng.integers(1, 4)):
            mutated[rng.integers(len(mutated))] = rng.integers(256)
        images.append(bytes(mutated))
    found = read(images, (8, 11))
    refused = 0
    for one, data in zip(found, images, strict=True):
        try:
            expected = decode(data)
        except DamagedImage:
            refused += 1
            assert one is None
        else:
            assert one is None or np.array_equal(one, expected)
    assert refused > 300


def test_tar_headers_are_judged_as_by_python(picture: Picture, tmp_path: Path) -> None:
    data = png(filtered(picture(4, 4), [0] * 4), 4, 4)
    info = tarfile.TarInfo("00.png")
    info.size = len(data)
    good = info.tobuf(tarfile.USTAR_FORMAT)
    rng = np.random.default_rng(0)
    headers = [good, good[:100] + b"x" + good[101:]]
    for _ in range(400):
        header = bytearray(good)
        header[rng.choice([0, 3, 6, 99, 124, 130, 135, 148, 153, 155, 300])] = rng.integers(256)
        if rng.random() < 0.5:  # the sum mended
            header[148:156] = b" " * 8
            header[148:156] = b"%06o\0 " % sum(header)
        headers.append(bytes(header))
    file = tmp_path / "t"
    file.write_bytes(b"".join(header + data for header in headers))
    n, step = len(headers), BLOCK + len(data)
    sizes = np.full((n, 2), 4, np.int32)
    offsets, lengths = np.arange(n) * step + BLOCK, np.full(n, len(data))
    with file.open("rb") as stream:
        found = read_small_pngs([stream.fileno()] * n, offsets, lengths, ["00.png"] * n, sizes)
        late = read_small_pngs(
            [stream.fileno()], offsets[-1:] + 1, lengths[:1], ["00.png"], sizes[:1]
        )
    closed = read_small_pngs([99_999], offsets[:1], lengths[:1], ["00.png"], sizes[:1])
    assert late == closed == [None]
    taken = [not header_problem(header, "00.png", len(data)) for header in headers]
    assert found[0] is not None and found[1] is None and sum(taken) > 5
    for one, is_fine in zip(found, taken, strict=True):
        assert one is None or is_fine


def test_other_names_are_left_to_python(picture: Picture, read: Read) -> None:
    data = png(filtered(picture(4, 4), [0] * 4), 4, 4)
    assert read([data], (4, 4), "a" * 96 + ".png")[0] is not None
    assert read([data], (4, 4), "zürich.png") == [None]


def test_limits_are_kept(picture: Picture) -> None:
    one, names = np.ones(1, np.int64), ["k.png"]
    for size, num_bytes in (((65, 64), 9), ((0, 4), 9), ((4, 4), SMALL_BYTES + 1), ((4, 4), 0)):
        with pytest.raises(ValueError, match="is larger than"):
            read_small_pngs([0], one, num_bytes * one, names, np.array([size], np.int32))
    with pytest.raises(ValueError, match="2 names"):
        read_small_pngs([0], one, one, names * 2, np.ones((1, 2), np.int32))
    assert read_small_pngs([], one[:0], one[:0], [], np.ones((0, 2), np.int32)) == []


def test_without_zlib_all_is_left_to_decode(
    picture: Picture, read: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = png(filtered(picture(4, 4), [0] * 4), 4, 4)
    assert png_numba._functions() is not None, "not found here: the short way is never taken"
    monkeypatch.setattr(png_numba, "_functions", lambda: None)
    assert read([data], (4, 4)) == [None]


# In a set.


@pytest.fixture(scope="module")
def small_set(
    tmp_path_factory: pytest.TempPathFactory, picture: Picture, encode: Encode
) -> ShardSet:
    """70 PNGs in shards of 16, of which one is large, one gray, and one is a JPEG."""
    root = tmp_path_factory.mktemp("small")
    (root / "files").mkdir()
    for k in range(70):
        data = encode(picture(9 + k % 3, 12, k), "PNG")
        if k == 20:
            data = encode(picture(SMALL // 64 + 1, 64), "PNG")
        if k == 30:
            data = encode(Image.fromarray(picture(9, 9)).convert("L"), "PNG")
        name = f"{k}.png"
        if k == 40:
            data, name = encode(picture(9, 9), "JPEG"), "40.jpg"
        (root / "files" / name).write_bytes(data)
    return write_shards(root / "files", root / "packed", samples_per_shard=16)


def test_a_set_gives_what_it_gives_one_by_one(small_set: ShardSet) -> None:
    order = np.random.default_rng(0).permutation(70)
    order = np.concatenate([order, order[:5]])
    found = small_set.images(order)
    assert sum(one is None for one in found) == 3 + sum(found[k] is None for k in range(70, 75))
    for sample_id, one in zip(order.tolist(), found, strict=True):
        assert one is None or np.array_equal(one, small_set[sample_id])
    mixed = Mixture([(small_set, 2), (small_set, 1)])
    both = mixed.images(np.arange(140))
    for k in range(70):
        for one in (both[k], both[70 + k]):
            assert one is None or np.array_equal(one, small_set[k])
    assert sum(one is None for one in both) == 6
    assert small_set.images(np.empty(0, np.int64)) == []


@pytest.mark.parametrize("at_once", [True, False])
def test_damage_is_replaced_the_same_way(
    small_set: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: bool
) -> None:
    folder = Path(shutil.copytree(small_set.path, tmp_path / "packed"))
    packed = ShardSet.open(folder)
    victims = (3, 17, 18, 66)
    for sample_id in victims:
        number, row = packed._find(sample_id)
        tar = sorted(folder.glob("*.tar"))[number]
        with tar.open("r+b") as file:
            file.seek(int(packed._indexes[number].offset_N[row]) + 70)
            file.write(bytes(40))
    if not at_once:
        monkeypatch.setattr(packed, "images", lambda ids: [None] * len(ids))
    policy = SimCLRPolicy(size=12, blur_prob=0)
    loader = make_loader(
        packed, policy, micro_batch_size=35, backend="threads", num_threads=2, on_damage="replace"
    )
    batches = list(islice(loader, 4))
    assert sorted(loader.damaged) == sorted(victims)
    assert all("decode" in why for why in loader.damaged.values())
    whole = make_loader(small_set, policy, micro_batch_size=35, backend="threads", num_threads=2)
    for batch, expected in zip(batches, islice(whole, 4), strict=False):
        same = batch.sample_id_B == expected.sample_id_B
        assert 30 < same.sum() < 35
        pairs = (b.views_VBCHW[:, same] for b in (batch, expected))
        assert torch.equal(*pairs)
    with pytest.raises(DamagedSample, match="does not decode"):
        strict = make_loader(packed, policy, micro_batch_size=70, backend="threads")
        next(iter(strict))
