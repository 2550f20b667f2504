"""Archives that are cut, damaged, hostile or large: whole or refused, in bounded memory."""

from __future__ import annotations

import gzip
import io
import os
import random
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastclr.config import ConfigError
from pipelines.sources import spool as spool_module
from tests.pipelines.listings import (
    ARCHIVES,
    FILES,
    contents,
    listed,
    refused,
    tar_bytes,
    zip_bytes,
)


@pytest.mark.parametrize("name", ["x.tar.gz", "x.zip"])
def test_a_spooled_copy_is_made_anew_if_the_source_or_the_copy_changed(
    tmp_path: Path, spool: Path, name: str
) -> None:
    source = tmp_path / name
    source.write_bytes(ARCHIVES[name](FILES))
    listed(source, spool)
    for copy in spool.iterdir():
        if copy.suffix in (".bin", ".plain"):
            os.truncate(copy, copy.stat().st_size // 2)
    assert contents(listed(source, spool)) == FILES
    os.utime(source, ns=(1, 1))
    source.write_bytes(ARCHIVES[name](FILES | {"a/3.png": b"new"}))
    assert contents(listed(source, spool))["a/3.png"] == b"new"


@pytest.mark.parametrize("name", ARCHIVES)
@pytest.mark.parametrize("part", [0, 0.02, 0.3, 0.6, 0.98])
def test_an_archive_that_was_cut(tmp_path: Path, spool: Path, name: str, part: float) -> None:
    random_files = {k: random.Random(k).randbytes(3000) for k in FILES}
    whole = ARCHIVES[name](random_files)
    if name == "x.tar":  # without the padding of the last record
        whole = whole[: whole.rindex(b"ustar") - 257 + 512 + 3072]
    (tmp_path / name).write_bytes(whole[: int(len(whole) * part)])
    refused(tmp_path / name, spool, name)
    if part:  # nothing at all decompresses to nothing
        assert not spool.exists() or not list(spool.iterdir())


@given(st.data())
@settings(max_examples=150, deadline=None)
@pytest.mark.parametrize("name", ["x.tar", "x.tar.gz", "x.zip"])
def test_damaged_archives_are_refused_or_whole(
    tmp_path_factory: pytest.TempPathFactory, name: str, data: st.DataObject
) -> None:
    here = tmp_path_factory.mktemp("fuzz")
    raw = bytearray(ARCHIVES[name](FILES))
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    (here / name).write_bytes(raw)
    try:
        images = listed(here / name, here / "spool")
    except ConfigError:
        return
    for image in images:
        image.read()
    assert len(images) == len(FILES)


@pytest.mark.parametrize("name", ["../x.png", "a/../../x.png", "/etc/passwd"])
@pytest.mark.parametrize("archive", ["x.tar", "x.tar.gz", "x.zip"])
def test_members_that_leave_the_folder(
    tmp_path: Path, spool: Path, archive: str, name: str
) -> None:
    (tmp_path / archive).write_bytes(ARCHIVES[archive](FILES | {name: b"x"}))
    refused(tmp_path / archive, spool, repr(name), "do not trust it")


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_a_name_twice(tmp_path: Path, spool: Path, kind: str) -> None:
    if kind == "tar":
        with tarfile.open(tmp_path / "x.tar", "w") as tar:
            for _ in range(2):
                tar.addfile(tarfile.TarInfo("a/1.png"))
    else:
        with zipfile.ZipFile(tmp_path / "x.zip", "w") as packed:
            for data in (b"1", b"2"):
                packed.writestr("a/1.png", data)
    refused(tmp_path / f"x.{kind}", spool, "'a/1.png' twice")


@pytest.mark.parametrize("name", [n for n in ARCHIVES if n not in ("x.tar", "stored.zip")])
def test_a_bomb(tmp_path: Path, spool: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool_module, "FREE_BYTES", 1 << 19)
    (tmp_path / name).write_bytes(ARCHIVES[name]({"a/1.png": bytes(20 << 20)}))
    refused(tmp_path / name, spool, name, "unpacks to more than 100 times")
    assert not list(spool.iterdir())


# Tars.


def test_a_tar_cut_between_two_members(tmp_path: Path, spool: Path) -> None:
    whole = tar_bytes({"a/1.png": b"1", "a/2.png": b"2"})
    end = whole.rindex(b"ustar") - 257  # where the last header begins
    (tmp_path / "x.tar").write_bytes(whole[:end])
    refused(tmp_path / "x.tar", spool, "no plain tar", "without its end mark", str(end))
    (tmp_path / "x.tar").write_bytes(whole[:end] + b"\x99" * 512 + whole[end:])
    refused(tmp_path / "x.tar", spool, "no header there")


def test_tars_in_one_file(tmp_path: Path, spool: Path) -> None:
    (tmp_path / "x.tar").write_bytes(tar_bytes(FILES) + tar_bytes({"b/1.png": b"1"}))
    refused(tmp_path / "x.tar", spool, "behind its end mark more follows")


@pytest.mark.parametrize("damage", ["gzip", "text", "empty"])
def test_no_tar(tmp_path: Path, spool: Path, damage: str) -> None:
    bad = {"gzip": gzip.compress(tar_bytes(FILES)), "text": b"hello " * 200, "empty": b""}[damage]
    (tmp_path / "bad.tar").write_bytes(bad)
    refused(tmp_path / "bad.tar", spool, str(tmp_path / "bad.tar"), "no plain tar", "decompress")


@pytest.mark.parametrize("kind", ["SYMTYPE", "LNKTYPE", "FIFOTYPE", "CHRTYPE"])
def test_tar_members_that_are_no_files(tmp_path: Path, spool: Path, kind: str) -> None:
    odd = tarfile.TarInfo("a/odd.png")
    odd.type, odd.linkname = getattr(tarfile, kind), "a/1.png"
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.addfile(odd)
    refused(tmp_path / "x.tar", spool, "a/odd.png", "write the tar")


def test_a_sparse_member(tmp_path: Path, spool: Path) -> None:
    with (tmp_path / "1.png").open("wb") as stream:
        stream.truncate(1 << 20)
        stream.write(b"end")
    command = ["tar", "-C", tmp_path, "--sparse", "-cf", tmp_path / "x.tar", "1.png"]
    subprocess.run(command, check=True)
    refused(tmp_path / "x.tar", spool, "1.png", "sparse")


# Zips.


def test_a_zip_of_every_kind_of_member(tmp_path: Path, spool: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as packed:
        packed.writestr("a/stored.png", b"s" * 1000, zipfile.ZIP_STORED)
        packed.writestr("a/deflated.png", b"d" * 1_000_000, zipfile.ZIP_DEFLATED)
        packed.writestr("a/empty.png", b"", zipfile.ZIP_DEFLATED)
        with packed.open("a/wide.png", "w", force_zip64=True) as stream:
            stream.write(b"w" * 70_000)
        packed.comment = b"a comment"
    images = {image.name: image for image in listed(tmp_path / "x.zip", spool)}
    assert images["a/stored.png"].url == str(tmp_path / "x.zip")
    assert images["a/deflated.png"].url.startswith(str(spool))
    assert {name: len(image.read()) for name, image in images.items()} == {
        "a/stored.png": 1000,
        "a/deflated.png": 1_000_000,
        "a/empty.png": 0,
        "a/wide.png": 70_000,
    }
    (tmp_path / "y.zip").write_bytes(b"#!/bin/sh\n" * 99 + (tmp_path / "x.zip").read_bytes())
    assert len(contents(listed(tmp_path / "y.zip", spool))) == 4


def test_a_zip_with_a_wide_directory(
    tmp_path: Path, spool: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 2)  # as if there were 65,536 files
    raw = zip_bytes(FILES)
    assert b"PK\6\6" in raw and b"PK\6\7" in raw
    for number, before in enumerate((b"", b"#!/bin/sh\n")):
        (tmp_path / f"{number}.zip").write_bytes(before + raw)
        assert contents(listed(tmp_path / f"{number}.zip", spool)) == FILES


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        ("encrypted", ["encrypted", "password"]),
        ("bzip2", ["method 12", "zip -0"]),
        ("link", ["a link 'a/odd.png'"]),
        ("crc", ["a/odd.png", "checksum"]),
        ("size", ["a/odd.png", "length"]),
        ("huge", ["a/odd.png", "an image has at most"]),
    ],
)
def test_zip_members_that_cannot_be_read(
    tmp_path: Path, spool: Path, damage: str, parts: list[str]
) -> None:
    info = zipfile.ZipInfo("a/odd.png")
    info.compress_type = zipfile.ZIP_BZIP2 if damage == "bzip2" else zipfile.ZIP_DEFLATED
    info.create_system = 3
    info.external_attr = (0o120777 if damage == "link" else 0o100644) << 16
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as packed:
        packed.writestr(info, b"data" * 100)
    data = bytearray(stream.getvalue())
    at = data.index(b"PK\1\2")
    if damage == "encrypted":
        data[at + 8] |= 1
    if damage == "crc":
        data[at + 16] ^= 1
    if damage == "size":
        data[at + 24 : at + 28] = (401).to_bytes(4, "little")
    if damage == "huge":
        data[at + 24 : at + 28] = (0xF0000000).to_bytes(4, "little")
    (tmp_path / "x.zip").write_bytes(data)
    refused(tmp_path / "x.zip", spool, *parts)
    assert not spool.exists() or not list(spool.iterdir())


# Scale.


def test_sorting_uses_files_beyond_a_run(
    tmp_path: Path, spool: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool_module, "_RUN", 100)
    names = [f"c/{number * 7919 % 1050:05d}" for number in range(1050)]
    (tmp_path / "x.tar").write_bytes(tar_bytes({name: name.encode() for name in names}))
    images = listed(tmp_path / "x.tar", spool)
    assert [image.name for image in images] == sorted(names)
    assert all(image.read() == image.name.encode() for image in images)
    assert not list(spool.iterdir())


MEMORY = """
import resource, sys
from pathlib import Path
from pipelines.sources import SourceOptions, list_source
from pipelines.sources import spool
spool._RUN = 2000
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
number = sum(1 for _ in list_source(sys.argv[1], SourceOptions(), Path(sys.argv[2])))
print(number, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("kind", ["x.tar", "x.csv", "x.zip"])
def test_memory_does_not_grow_with_the_entries(tmp_path: Path, spool: Path, kind: str) -> None:
    names = [f"c/{number:06d}-{'x' * 60}.png" for number in range(20_000)]
    if kind == "x.csv":
        (tmp_path / kind).write_text("path\n" + "\n".join(names))
    elif kind == "x.tar":
        with tarfile.open(tmp_path / kind, "w", format=tarfile.USTAR_FORMAT) as tar:
            for name in names:
                tar.addfile(tarfile.TarInfo(name))
                tar.members.clear()  # type: ignore[attr-defined]
    else:
        with zipfile.ZipFile(tmp_path / kind, "w") as packed:
            for name in names:
                packed.writestr(zipfile.ZipInfo(name), b"")
    command = [sys.executable, "-c", MEMORY, tmp_path / kind, spool]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
    number, kilobytes = map(int, done.stdout.split())
    assert number == 20_000
    assert kilobytes < 5_000, "20,000 images in memory take 8 MB and more"
