"""Tars as others write them, and sets opened without a word of warning."""

from __future__ import annotations

import io
import logging
import tarfile
from pathlib import Path
from typing import Any

import pytest

from pipelines.shards import ShardSet


def add(tar: tarfile.TarFile, name: str, data: bytes, **fields: Any) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in fields.items():
        setattr(info, key, value)
    tar.addfile(info, io.BytesIO(data))


def write(file: Path, members: list[tuple[str, bytes]], form: int = tarfile.GNU_FORMAT) -> Path:
    with tarfile.open(file, "w", format=form) as tar:
        for name, data in members:
            add(tar, name, data)
    return file


def open_quietly(path: str | Path, caplog: pytest.LogCaptureFixture, **more: Any) -> ShardSet:
    with caplog.at_level(logging.WARNING):
        caplog.clear()
        found = ShardSet.open(path, **more)
    assert caplog.text == ""
    return found
