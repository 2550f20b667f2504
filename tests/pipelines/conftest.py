"""What test modules share: small images of every kind that real sources hold, and sets of them."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipelines.decode import Pixels
from pipelines.shards import ShardSet
from pipelines.writer import write_shards
from tests.pipelines.flaky import Flaky, flaky
from tests.pipelines.packs import files_of, packing
from tests.pipelines.tars import write
from tests.pipelines.transfers import DATA

Picture = Callable[..., Pixels]
Encode = Callable[..., bytes]

CLASSES = ("apfel rot", "birne", "zürich-ß")
SIZES = ((24, 40), (40, 24), (32, 32), (57, 33))


def _picture(height: int, width: int, seed: int = 0) -> Pixels:
    """Colourful waves with noise; no two seeds alike."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / a + y / b + c) for a, b, c in rng.uniform(2, 12, (3, 3))]
    pixels = 128 + 95 * np.stack(waves, -1) + rng.normal(0, 10, (height, width, 3))
    return pixels.clip(0, 255).astype(np.uint8)


def _encode(image: Pixels | Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(stream, kind, **options)
    return stream.getvalue()


@pytest.fixture(scope="session")
def picture() -> Picture:
    """``picture(height, width, seed)`` -> uint8 RGB pixels."""
    return _picture


@pytest.fixture(scope="session")
def encode() -> Encode:
    """``encode(pixels or image, "JPEG", **options)`` -> bytes."""
    return _encode


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three class folders with 21 images of all formats, modes and shapes. Read only."""
    root = tmp_path_factory.mktemp("source") / "bilder"
    for number, name in enumerate(CLASSES):
        folder = root / name
        folder.mkdir(parents=True)
        for k, (height, width) in enumerate(SIZES):
            pixels = _picture(height, width, 10 * number + k)
            kind, extension = (("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp"))[k % 3]
            (folder / f"bild {k} é.{extension}").write_bytes(_encode(pixels, kind))
    first, second, third = (root / name for name in CLASSES)
    image = Image.fromarray(_picture(30, 20, 99))
    deep = np.arange(600, dtype=np.uint16).reshape(30, 20) * 109
    exif = Image.Exif()
    exif[0x112] = 6  # rotated by 90 degrees
    (first / "grey.jpeg").write_bytes(_encode(image.convert("L"), "JPEG"))
    (first / "cmyk.JPG").write_bytes(_encode(image.convert("CMYK"), "JPEG"))
    (first / "palette.png").write_bytes(_encode(image.quantize(9), "PNG", transparency=0))
    (second / "deep.png").write_bytes(_encode(Image.fromarray(deep), "PNG"))
    (second / "exif.jpg").write_bytes(_encode(image, "JPEG", exif=exif))
    (second / "alpha.webp").write_bytes(_encode(image.convert("RGBA"), "WEBP", lossless=True))
    (third / "one.png").write_bytes(_encode(_picture(1, 1), "PNG"))
    (third / "sub").mkdir()
    (third / "sub" / "line.png").write_bytes(_encode(_picture(1, 60), "PNG"))
    (third / "progressive").write_bytes(_encode(image, "JPEG", progressive=True))
    (third / ".hidden").write_bytes(b"no image, and left out")
    return root


@pytest.fixture(scope="session")
def shard_set(source: Path, tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """The source, packed into shards of 8, 8 and 5. Read only."""
    out = tmp_path_factory.mktemp("packed") / "train"
    return write_shards(source, out, samples_per_shard=8)


@pytest.fixture
def encoded() -> list[bytes]:
    """Nine images of different sizes, as JPEG, PNG and WEBP by turns."""
    kinds = ("JPEG", "PNG", "WEBP")
    return [_encode(_picture(8 + k, 9 + 2 * k, k), kinds[k % 3]) for k in range(9)]


@pytest.fixture
def laion(tmp_path: Path, encoded: list[bytes]) -> Path:
    """A folder of two tars as img2dataset writes them: the same keys are in both."""
    folder = tmp_path / "laion"
    folder.mkdir()
    for number in range(2):
        members = []
        for k in range(4):
            key = f"{k:09d}"
            meta = {"key": key, "caption": "é", "class": number, "width": 1}
            members += [
                (f"{key}.{('jpg', 'png', 'webp')[(4 * number + k) % 3]}", encoded[4 * number + k]),
                (f"{key}.txt", b"a caption"),
                (f"{key}.json", json.dumps(meta).encode()),
                (f"{key}.cls", str(k).encode()),
            ]
        write(folder / f"{number:05d}.tar", members)
    return folder


@pytest.fixture(scope="session")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of 20 small images. Read only."""
    root = tmp_path_factory.mktemp("many") / "bilder"
    for k in range(40):
        folder = root / ("ab"[k % 2])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{k}.png").write_bytes(_encode(_picture(6 + k % 3, 7, k), "PNG"))
    return root


@pytest.fixture(scope="session")
def many_packed(many: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files that packing them in shards of 4 gives."""
    return files_of(packing(many, tmp_path_factory.mktemp("many_packed") / "train").out)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """A place in an otherwise empty folder: what else appears there was left behind."""
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "train"


@pytest.fixture
def server() -> Iterator[Flaky]:
    """An http server that makes faults when told to; ``DATA`` is its ``/a.bin``."""
    with flaky() as server:
        server.objects["/a.bin"] = DATA
        yield server


@pytest.fixture
def spool(tmp_path: Path) -> Path:
    """Where listing a source may put files."""
    return tmp_path / "spool"
