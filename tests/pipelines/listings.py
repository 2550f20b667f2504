"""Four files in three classes, as a folder and as archives of every kind; what listing gives."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from fastclr.config import ConfigError
from pipelines.sources import SourceImage, SourceOptions, list_source

FILES = {"a/1.png": b"one", "a/sub/2.png": b"two" * 9, "a-b/1.png": b"three", "zürich-ß/x y": b"4"}


def listed(source: Path | str, spool: Path, **options: Any) -> list[SourceImage]:
    return list(list_source(str(source), SourceOptions(**options), spool))


def contents(images: list[SourceImage]) -> dict[str, bytes]:
    found = {image.name: image.read() for image in images}
    assert len(found) == len(images)
    return found


def refused(source: Path | str, spool: Path, *parts: str, **options: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        listed(source, spool, **options)
    for part in parts:
        assert part in str(caught.value), caught.value
    return str(caught.value)


def write_folder(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def tar_bytes(files: dict[str, bytes], **options: Any) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", **options) as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return stream.getvalue()


def zip_bytes(files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as packed:
        for name, data in files.items():
            packed.writestr(name, data)
    return stream.getvalue()


def zstd(data: bytes) -> bytes:
    stream = pa.BufferOutputStream()
    with pa.CompressedOutputStream(stream, "zstd") as packed:
        packed.write(data)
    return stream.getvalue().to_pybytes()


ARCHIVES: dict[str, Callable[[dict[str, bytes]], bytes]] = {
    "x.tar": tar_bytes,
    "x.tar.gz": lambda files: gzip.compress(tar_bytes(files)),
    "x.TGZ": lambda files: gzip.compress(tar_bytes(files)),
    "x.tar.bz2": lambda files: bz2.compress(tar_bytes(files)),
    "x.tar.xz": lambda files: lzma.compress(tar_bytes(files)),
    "x.tar.zst": lambda files: zstd(tar_bytes(files)),
    "x.zip": zip_bytes,
    "stored.zip": lambda files: zip_bytes(files, zipfile.ZIP_STORED),
}
