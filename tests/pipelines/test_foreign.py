"""Tars made by others: all their samples, never extracted; indexed once and when they change."""

from __future__ import annotations

import ctypes
import json
import logging
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds

from pipelines.decode import decode
from pipelines.foreign import list_tars
from pipelines.shards import ShardError, ShardSet
from tests.pipelines.tars import open_quietly, write


def test_a_folder(laion: Path, encoded: list[bytes], caplog: pytest.LogCaptureFixture) -> None:
    found = open_quietly(laion, caplog)
    assert len(found) == 8 and found.num_shards == 2
    assert [found.read(i) for i in range(8)] == encoded[:8]
    assert all(np.array_equal(found[i], decode(encoded[i])) for i in range(8))
    assert found.size_N2.tolist() == [[8 + k, 9 + 2 * k] for k in range(8)]
    assert found.label_N.tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    assert found.class_names == ["0", "1", "2", "3"]
    assert found.source_of(5) == "00001.tar/000000001.webp"
    assert sorted(found.order(0).ids(0, 0, 8).tolist()) == list(range(8))
    with pytest.raises(ShardError, match="no manifest that says its sha256"):
        found.verify()


def test_webdataset_finds_the_same(laion: Path, encoded: list[bytes]) -> None:
    found = ShardSet.open(laion)
    urls = [str(file) for file in sorted(laion.glob("*.tar"))]
    samples = list(wds.WebDataset(urls, shardshuffle=False).to_tuple("jpg;png;webp", "cls"))
    assert [data for data, _ in samples] == [found.read(i) for i in range(8)]
    assert [int(label) for _, label in samples] == found.label_N.tolist()


def test_labels_from_json(laion: Path) -> None:
    assert ShardSet.open(laion).label_N.tolist() == [0, 1, 2, 3] * 2
    named = ShardSet.open(laion, label_field="class")
    assert named.label_N.tolist() == [0] * 4 + [1] * 4 and named.num_classes == 2
    for field in ("caption", "nowhere"):
        none = ShardSet.open(laion, label_field=field)
        assert none.label_N.tolist() == [-1] * 8 and none.class_names == []


@pytest.mark.parametrize("label", [b"-1", b"1.0", b"true", b"10000000", b"cat", b"[1]", b""])
def test_labels_that_are_no_classes(tmp_path: Path, encoded: list[bytes], label: bytes) -> None:
    file = write(tmp_path / "x.tar", [("a.jpg", encoded[0]), ("a.cls", label)])
    found = ShardSet.open(file)
    assert found.label_N.tolist() == [-1] and found.num_classes == 0


@pytest.mark.parametrize(
    "pattern", ["*.tar", "0000[01].tar", "{00000..00001}.tar", "00000.tar", "0000{0..1}.tar"]
)
def test_patterns(laion: Path, pattern: str) -> None:
    assert len(ShardSet.open(laion / pattern)) == (4 if pattern == "00000.tar" else 8)


def test_ranges(tmp_path: Path) -> None:
    for n in ("a7", "a8", "a9", "a10", "a07", "b-08-1"):
        (tmp_path / n).touch()
    names = [p.name for p in list_tars(f"{tmp_path}/a{{7..10}}")]
    assert names == ["a7", "a8", "a9", "a10"]
    assert [p.name for p in list_tars(f"{tmp_path}/b-{{08..08}}-{{1..1}}")] == ["b-08-1"]
    for wrong in ("a{7..11}", "a{9..7}", "a{0..99999999}", "a{0..9999}{0..9999}", "z*.tar"):
        with pytest.raises(ShardError):
            list_tars(f"{tmp_path}/{wrong}")


def test_a_packed_folder_is_not_foreign(shard_set: ShardSet, tmp_path: Path) -> None:
    """What a killed packing left must not be read as if it were all."""
    for file in shard_set.path.glob("*"):  # type: ignore[union-attr]
        if file.name != "manifest.json":
            (tmp_path / file.name).symlink_to(file)
    with pytest.raises(ShardError, match="packing was never finished"):
        ShardSet.open(tmp_path)
    assert len(ShardSet.open(shard_set.path)) == 21
    assert not list(Path(shard_set.path).glob("*fastclr-index*"))


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_strange_names(
    tmp_path: Path, encoded: list[bytes], form: int, caplog: pytest.LogCaptureFixture
) -> None:
    names = [
        "x" * 99 + "/" + "y" * 150 + ".jpg",
        "ü/é.png",
        "./a.b/c.d.webp",
        "a b\n.jpg",
        "../up.png",
        "/root.webp",
        "UPPER.JPG",
        "b/\udcff.png",
    ]
    if form == tarfile.PAX_FORMAT:
        names.pop()  # Python refuses to write it
    file = write(tmp_path / "x.tar", [(n, encoded[k]) for k, n in enumerate(names)], form)
    with tarfile.open(file) as tar:
        expected = tar.getnames()
    with caplog.at_level(logging.WARNING):
        found = ShardSet.open(file, max_damaged=1)
    read = [found.source_of(i).removeprefix("x.tar/") for i in range(len(found))]
    assert read == [n for n in expected if "c.d" not in n]  # its extension is d.webp
    assert "./a.b/c: has no image, only d.webp" in caplog.text
    assert [found.read(i) for i in range(2)] == encoded[:2]
    assert not (tmp_path.parent / "up.png").exists()


def test_gnu_tars_of_folders(tmp_path: Path, encoded: list[bytes]) -> None:
    """As made by hand from torchvision's ImageFolder; links and folders are no samples."""
    for k, data in enumerate(encoded[:4]):
        (tmp_path / "src" / "cat").mkdir(parents=True, exist_ok=True)
        (tmp_path / "src" / "cat" / f"{k}.jpg").write_bytes(data)
    (tmp_path / "src" / "cat" / "link.jpg").symlink_to("/etc/passwd")
    (tmp_path / "src" / "cat" / ".hidden.jpg").write_bytes(b"no image")
    for form in ("gnu", "pax", "ustar", "v7"):
        command = ["tar", "c", f"--format={form}", "-f", tmp_path / f"{form}.tar", "-C"]
        subprocess.run([*command, tmp_path / "src", "."], check=True)
        found = ShardSet.open(tmp_path / f"{form}.tar")
        assert {found.read(i) for i in range(len(found))} == set(encoded[:4])
        assert len(found) == 4


def test_a_neighbour_of_the_same_key_is_one_sample(tmp_path: Path, encoded: list[bytes]) -> None:
    members = [("a.jpg", encoded[0]), ("a.png", encoded[1]), ("b.png", encoded[1])]
    found = ShardSet.open(write(tmp_path / "x.tar", [*members, ("a.jpg", encoded[3])]))
    assert [found.read(i) for i in range(3)] == [encoded[0], encoded[1], encoded[3]]


# The index.


def caches(folder: Path) -> list[Path]:
    return sorted(folder.glob(".*.tar.fastclr-index"))


def scanned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    import pipelines.foreign_index as module

    names: list[str] = []
    really = module.scan
    monkeypatch.setattr(
        module, "scan", lambda s, name, *a: names.append(Path(name).name) or really(s, name, *a)
    )
    return names


def test_indexed_once_and_again_when_changed(
    laion: Path, encoded: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = scanned(monkeypatch)
    first = ShardSet.open(laion)
    assert sorted(names) == ["00000.tar", "00001.tar"] and len(caches(laion)) == 2
    names.clear()
    again = ShardSet.open(laion)
    assert names == [] and again.digest == first.digest
    assert again.label_N.tolist() == first.label_N.tolist() and names == []
    unused = ShardSet.open(laion)
    old = (laion / "00001.tar").stat()
    write(laion / "00001.tar", [("z.png", encoded[1])])
    changed = ShardSet.open(laion)
    assert names == ["00001.tar"] and len(changed) == 5 and changed.digest != first.digest
    with pytest.raises(ShardError, match="changed while it was in use"):
        unused[4]
    with pytest.raises(ShardError, match=r"the tar has 'z\.png' in its place"):
        first[4]
    names.clear()
    raw = bytearray((laion / "00001.tar").read_bytes())  # the same length and time
    raw[-1] ^= 1
    (laion / "00001.tar").write_bytes(raw)
    os.utime(laion / "00001.tar", ns=(old.st_atime_ns, old.st_mtime_ns))
    ShardSet.open(laion)
    assert names == ["00001.tar"]
    names.clear()
    ShardSet.open(laion, label_field="class")
    assert sorted(names) == ["00000.tar", "00001.tar"]


@pytest.mark.parametrize("damage", ["lines", "head", "cut", "empty", "deep", "a folder"])
def test_damaged_caches_are_made_again(laion: Path, damage: str) -> None:
    first = ShardSet.open(laion)
    file = caches(laion)[0]
    head, _, lines = file.read_bytes().partition(b"\n")
    fields = json.loads(head)
    if damage == "a folder":
        file.unlink()
        file.mkdir()
    else:
        file.write_bytes(
            {
                "lines": head + b"\n" + lines.replace(b'"offset": 512', b'"offset": 1024'),
                "head": json.dumps(fields | {"num_samples": -4}).encode() + b"\n" + lines,
                "cut": file.read_bytes()[:-9],
                "empty": b"",
                "deep": b"[" * 100_000,
            }[damage]
        )
    again = ShardSet.open(laion, cache_dir=laion.parent / "cache")
    assert again.digest == first.digest and again.read(0) == first.read(0)
    assert again.size_N2.tolist() == first.size_N2.tolist()


def test_a_cache_with_lies_is_found(laion: Path) -> None:
    """A stranger's index beside his tar, with the right hash, does not reach outside the tar."""
    ShardSet.open(laion)
    file = caches(laion)[0]
    head, _, lines = file.read_bytes().partition(b"\n")
    import hashlib

    lies = lines.replace(b'"offset": 512', b'"offset": 1536')
    digest = hashlib.sha256(lies).hexdigest()
    file.write_bytes(json.dumps(json.loads(head) | {"sha256": digest}).encode() + b"\n" + lies)
    with pytest.raises(ShardError, match="key 000000000"):
        ShardSet.open(laion).read(0)


@contextmanager
def held_to_modes() -> Iterator[None]:
    """Hold this thread to the modes of files, root's too: without CAP_DAC_OVERRIDE."""
    libc = ctypes.CDLL(None)
    version_3 = (ctypes.c_uint32 * 2)(0x20080522, 0)
    before = (ctypes.c_uint32 * 6)()  # twice effective, permitted, inheritable
    assert libc.capget(version_3, before) == 0
    fewer = (ctypes.c_uint32 * 6)(*before)
    fewer[0] &= ~0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    assert libc.capset(version_3, fewer) == 0
    try:
        yield
    finally:
        assert libc.capset(version_3, before) == 0


def test_a_folder_that_may_not_be_written(laion: Path, tmp_path: Path) -> None:
    laion.chmod(0o555)
    with held_to_modes():
        with pytest.raises(PermissionError):
            (laion / "x").touch()
        assert len(ShardSet.open(laion, cache_dir=tmp_path / "cache")) == 8
    laion.chmod(0o755)
    assert caches(laion) == []


def test_a_read_only_folder(laion: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pipelines.foreign_index as module

    really = module.write_shared

    def refuse(file: Path, data: bytes) -> None:
        if file.parent == laion:
            raise OSError(30, "Read-only file system")
        really(file, data)

    monkeypatch.setattr(module, "write_shared", refuse)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    names = scanned(monkeypatch)
    for _ in range(2):
        assert len(ShardSet.open(laion)) == 8
    assert len(names) == 2 and caches(laion) == []
    assert len(list((tmp_path / "xdg" / "fastclr" / "foreign").iterdir())) == 2


def test_two_processes_at_the_same_time(laion: Path) -> None:
    program = (
        "import sys; from pipelines.shards import ShardSet\n"
        "s = ShardSet.open(sys.argv[1]); print(s.digest, s.label_N.tolist())"
    )

    def start(_: int) -> str:
        return subprocess.run(
            [sys.executable, "-c", program, laion], capture_output=True, text=True, check=True,
            cwd=Path(__file__).parents[2],
        ).stdout  # fmt: skip

    with ThreadPoolExecutor(3) as pool:
        assert len(set(pool.map(start, range(3)))) == 1
    names = {p.name for p in laion.iterdir()}
    assert names == {"00000.tar", "00001.tar", *(p.name for p in caches(laion))}


def test_many_tars_are_indexed_in_processes(
    laion: Path, encoded: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.foreign_index._LITTLE", 0)
    monkeypatch.chdir(laion)
    names = scanned(monkeypatch)  # in this process
    found = ShardSet.open(".")
    assert names == [] and len(caches(laion)) == 2
    assert [found.read(i) for i in range(8)] == encoded[:8]
    (laion / "00002.tar").write_bytes(b"no tar" * 99)
    with pytest.raises(ShardError, match=r"00002\.tar is no plain tar"):
        ShardSet.open(laion)
    assert names == ["00002.tar"]  # told here
