"""Folders and archives: every file once, in the order of names, and nothing that is not meant."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import random
import resource
import socket
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastclr.config import ConfigError
from pipelines.sources import SourceImage, SourceOptions, list_source, sort_class_names
from pipelines.sources import spool as spool_module
from pipelines.sources.listing import expand_braces

FILES = {"a/1.png": b"one", "a/sub/2.png": b"two" * 9, "a-b/1.png": b"three", "zürich-ß/x y": b"4"}
ORDER = ["a-b/1.png", "a/1.png", "a/sub/2.png", "zürich-ß/x y"]


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


@pytest.fixture
def spool(tmp_path: Path) -> Path:
    return tmp_path / "spool"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    hidden = {".DS_Store": b"", "a/.cache/x.png": b"x", ".git/config": b"x"}
    return write_folder(tmp_path / "folder", FILES | hidden)


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


def test_a_folder(folder: Path, spool: Path) -> None:
    images = listed(folder, spool)
    assert [image.name for image in images] == ORDER
    assert [image.class_name for image in images] == ["a-b", "a", "a", "zürich-ß"]
    assert contents(images) == FILES
    assert not spool.exists()
    assert all(SourceImage(**json.loads(json.dumps(asdict(image)))) == image for image in images)


@pytest.mark.parametrize("name", ARCHIVES)
def test_an_archive_is_as_its_folder(folder: Path, tmp_path: Path, spool: Path, name: str) -> None:
    shuffled = list((FILES | {"a/.hidden": b"x"}).items())
    random.Random(1).shuffle(shuffled)
    (tmp_path / name).write_bytes(ARCHIVES[name](dict(shuffled)))
    images = listed(tmp_path / name, spool)
    plain = [(image.name, image.class_name) for image in listed(folder, spool)]
    assert [(image.name, image.class_name) for image in images] == plain
    assert contents(images) == FILES
    before = {p: p.stat().st_mtime_ns for p in spool.iterdir()}
    assert contents(listed(tmp_path / name, spool)) == FILES
    assert {p: p.stat().st_mtime_ns for p in spool.iterdir()} == before


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


def test_a_flat_source_has_no_classes(tmp_path: Path, spool: Path) -> None:
    files = {"2.png": b"2", "1.png": b"1"}
    for source in (write_folder(tmp_path / "flat", files), tmp_path / "flat.tar"):
        (tmp_path / "flat.tar").write_bytes(tar_bytes({f"./{k}": v for k, v in files.items()}))
        images = listed(source, spool)
        assert [(i.name, i.class_name) for i in images] == [("1.png", None), ("2.png", None)]


def test_labels_off_takes_any_tree(tmp_path: Path, spool: Path) -> None:
    root = write_folder(tmp_path / "x", {"loose.png": b"l", "2020/a.png": b"a", "test/b.png": b"b"})
    (root / "empty").mkdir()
    images = listed(root, spool, labels=False)
    assert {image.class_name for image in images} == {None} and len(images) == 3


@given(st.lists(st.lists(st.text("ab-/é\U0001f600 \n", min_size=1), min_size=2), max_size=6))
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_folder_and_archives_agree_on_any_names(
    tmp_path_factory: pytest.TempPathFactory, parts: list[list[str]]
) -> None:
    paths = {"c/" + "/".join(p.strip("/") or "x" for p in path) for path in parts} | {"c/0"}
    paths = {os.path.normpath(path) for path in paths}
    paths = {p for p in paths if not any(q.startswith(p + "/") for q in paths)}
    files = {path: path.encode() for path in sorted(paths)}
    here = tmp_path_factory.mktemp("agree")
    (here / "x.tar").write_bytes(tar_bytes(files, format=tarfile.PAX_FORMAT))
    (here / "x.zip").write_bytes(zip_bytes(files))
    sources = (write_folder(here / "x", files), here / "x.tar", here / "x.zip")
    lists = [listed(source, here / "spool") for source in sources]
    assert [contents(images) for images in lists] == [files] * 3
    names = [[image.name for image in images] for images in lists]
    assert names == [sorted(files, key=os.fsencode)] * 3


def test_names_that_are_no_utf8(tmp_path: Path, spool: Path) -> None:
    root = os.fsencode(write_folder(tmp_path / "x", {"c/1.png": b"1"}))
    for data, name in ((b"2", b"\xff\xfe.png"), (b"3", b"new\nline.png")):
        with open(root + b"/c/" + name, "wb") as stream:  # noqa: PTH123
            stream.write(data)
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.add(tmp_path / "x", ".")
    images = listed(tmp_path / "x", spool)
    assert sorted(contents(images).values()) == [b"1", b"2", b"3"]
    assert contents(listed(tmp_path / "x.tar", spool)) == contents(images)
    assert json.loads(json.dumps(images[-1].name)) == images[-1].name


def test_a_relative_source_gives_absolute_places(
    folder: Path, spool: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    images = listed("folder", Path("spool"))
    monkeypatch.chdir("/")
    assert contents(images) == FILES
    assert contents(listed(f"file://{folder}", spool)) == FILES


# Reading.


def test_a_file_that_was_cut_after_listing(tmp_path: Path, spool: Path) -> None:
    (tmp_path / "x.tar").write_bytes(tar_bytes(FILES))
    images = listed(tmp_path / "x.tar", spool)
    os.truncate(tmp_path / "x.tar", images[-1].offset)
    with pytest.raises(OSError, match=r"x\.tar: 0 of 1 bytes are there.*changed"):
        images[-1].read()


def test_a_file_that_comes_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x").write_bytes(b"0123456789")
    whole = os.pread
    monkeypatch.setattr(os, "pread", lambda file, size, at: whole(file, min(size, 3), at))
    assert SourceImage("x", None, str(tmp_path / "x"), 1).read() == b"123456789"
    assert SourceImage("x", None, str(tmp_path / "x"), 1, 8).read() == b"12345678"


def test_what_is_no_image_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for name in ("fifo", "."):
        with pytest.raises(OSError, match="no regular file"):
            SourceImage("x", None, str(tmp_path / name)).read()
    with pytest.raises(FileNotFoundError):
        SourceImage("x", None, str(tmp_path / "nowhere")).read()


def test_a_file_of_a_gigabyte_is_no_image(tmp_path: Path) -> None:
    with (tmp_path / "big").open("wb") as stream:
        stream.truncate(3 << 30)
    with pytest.raises(OSError, match="an image at most"):
        SourceImage("x", None, str(tmp_path / "big")).read()


# What is refused.


@pytest.mark.parametrize("name", ["nowhere", "nowhere.csv", "", "x" * 5000, "a\0b"])
def test_missing(tmp_path: Path, spool: Path, name: str) -> None:
    refused(name and f"{tmp_path}/{name}", spool, "does not exist", "give a")


@pytest.mark.parametrize("name", ["void", *ARCHIVES])
def test_nothing_in_it(tmp_path: Path, spool: Path, name: str) -> None:
    files = {".hidden": b"x"}
    if name == "void":
        write_folder(tmp_path / "void", files)
    else:
        (tmp_path / name).write_bytes(ARCHIVES[name](files))
    refused(tmp_path / name, spool, str(tmp_path / name), "nothing to pack")


@pytest.mark.parametrize("kind", ["folder", "tar", "zip"])
def test_an_empty_class(tmp_path: Path, spool: Path, kind: str) -> None:
    source = write_folder(tmp_path / "x", {"voll/1.png": b"1", "leer/.hidden": b"2"})
    if kind == "tar":
        with tarfile.open(tmp_path / "x.tar", "w") as tar:
            tar.add(source, ".")
        source = tmp_path / "x.tar"
    if kind == "zip":
        with zipfile.ZipFile(tmp_path / "x.zip", "w") as packed:
            packed.mkdir("leer")
            packed.writestr("voll/1.png", b"1")
        source = tmp_path / "x.zip"
    refused(source, spool, f"class folder {source}/leer is empty", "Remove the folder")


@pytest.mark.parametrize("name", ["folder", *ARCHIVES])
def test_files_beside_class_folders(tmp_path: Path, spool: Path, name: str) -> None:
    files = FILES | {"loose.png": b"x"}
    if name == "folder":
        write_folder(tmp_path / name, files)
    else:
        (tmp_path / name).write_bytes(ARCHIVES[name](files))
    refused(tmp_path / name, spool, "files beside them (loose.png)", "Move it")


def test_splits_are_no_classes(tmp_path: Path, spool: Path) -> None:
    root = write_folder(tmp_path / "x", {"train/a/1.png": b"1", "val/a/1.png": b"1"})
    refused(root, spool, "train, val", f"{root}/train", "splits")
    assert len(listed(root / "train", spool)) == 1


def test_what_is_neither_file_nor_folder_is_listed_and_refused_when_read(
    folder: Path, spool: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder / "a")
    os.mkfifo("fifo")
    with socket.socket(socket.AF_UNIX) as odd:
        odd.bind("socket")
        images = {image.name: image for image in listed(folder, spool)}
    assert len(images) == len(FILES) + 2
    for name in ("a/fifo", "a/socket"):
        with pytest.raises(OSError, match=r"no regular file|No such device"):
            images[name].read()


def test_links(folder: Path, tmp_path: Path, spool: Path) -> None:
    secret = write_folder(tmp_path / "secret", {"key": b"secret"})
    (folder / "a" / "same.png").symlink_to("1.png")
    (folder / "a" / "gone.png").symlink_to("nothing.png")
    (folder / "a" / "self.png").symlink_to("self.png")
    (folder / "a" / "away.png").symlink_to("/nowhere/x.png")
    images = {image.name: image for image in listed(folder, spool)}
    assert images["a/same.png"].read() == b"one"
    for name in ("gone", "self", "away"):  # rejected when read, and so counted
        with pytest.raises(OSError):
            images[f"a/{name}.png"].read()
    (folder / "b").mkdir()
    (folder / "b" / "out.png").symlink_to("../../secret/key")
    refused(folder, spool, "b/out.png", "out of the folder", "allow-outside")
    assert contents([i for i in listed(folder, spool, allow_outside=True) if i.name[0] == "b"]) == {
        "b/out.png": b"secret"
    }
    (folder / "b" / "out.png").unlink()
    (folder / "b" / "linked").symlink_to(secret)
    refused(folder, spool, "b/linked", "to a folder")
    assert "b/linked/key" in {i.name for i in listed(folder, spool, allow_outside=True)}
    (folder / "b" / "linked" / "circle").symlink_to(folder / "b")
    refused(folder, spool, "circle", "no end", allow_outside=True)


@pytest.mark.parametrize("kind", [".pkl", ".npz", ".mat", ".arrow", ".rar"])
def test_files_that_are_never_read(tmp_path: Path, spool: Path, kind: str) -> None:
    (tmp_path / f"x{kind}").write_bytes(b"x")
    refused(tmp_path / f"x{kind}", spool, f"x{kind} is" if kind != ".npz" else "arrays", "tar")


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


@pytest.mark.parametrize("name", ["../x.png", "a/../../x.png", "/etc/passwd"])
@pytest.mark.parametrize("archive", ["x.tar", "x.tar.gz", "x.zip"])
def test_members_that_leave_the_folder(
    tmp_path: Path, spool: Path, archive: str, name: str
) -> None:
    (tmp_path / archive).write_bytes(ARCHIVES[archive](FILES | {name: b"x"}))
    refused(tmp_path / archive, spool, repr(name), "do not trust it")


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


@pytest.mark.parametrize("name", [n for n in ARCHIVES if n not in ("x.tar", "stored.zip")])
def test_a_bomb(tmp_path: Path, spool: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool_module, "FREE_BYTES", 1 << 19)
    (tmp_path / name).write_bytes(ARCHIVES[name]({"a/1.png": bytes(20 << 20)}))
    refused(tmp_path / name, spool, name, "unpacks to more than 100 times")
    assert not list(spool.iterdir())


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


def test_deep_folders_take_neither_open_files_nor_recursion(tmp_path: Path, spool: Path) -> None:
    deep = tmp_path.joinpath("x", *["d"] * 200)
    deep.mkdir(parents=True)
    (deep / "1.png").touch()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    recursion = sys.getrecursionlimit()
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, hard))
    sys.setrecursionlimit(180)
    try:
        images = listed(tmp_path / "x", spool)
    finally:
        sys.setrecursionlimit(recursion)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert [image.class_name for image in images] == ["d"]


# Small things.


def test_class_names_in_order() -> None:
    assert sort_class_names({"10", "9", "0"}) == ["0", "9", "10"]
    assert sort_class_names({"b", "10", "a"}) == ["10", "a", "b"]
    assert sort_class_names({"²", "1"}) == ["1", "²"]


def test_braces() -> None:
    assert list(expand_braces("a-{08..10}.tar")) == ["a-08.tar", "a-09.tar", "a-10.tar"]
    assert list(expand_braces("{a,b}{2..1}")) == ["a2", "a1", "b2", "b1"]
    assert list(expand_braces("a{b}c")) == ["a{b}c"]
    endless = expand_braces("{0..999999999999}")
    assert next(iter(endless)) == "0"
