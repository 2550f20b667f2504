"""Folders, and archives like them: every file once, in the order of names; what is not meant."""

from __future__ import annotations

import json
import os
import random
import resource
import socket
import sys
import tarfile
import zipfile
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipelines.sources import SourceImage, sort_class_names
from pipelines.sources.listing import expand_braces
from tests.pipelines.listings import (
    ARCHIVES,
    FILES,
    contents,
    listed,
    refused,
    tar_bytes,
    write_folder,
    zip_bytes,
)

ORDER = ["a-b/1.png", "a/1.png", "a/sub/2.png", "zürich-ß/x y"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    hidden = {".DS_Store": b"", "a/.cache/x.png": b"x", ".git/config": b"x"}
    return write_folder(tmp_path / "folder", FILES | hidden)


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
