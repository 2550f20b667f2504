"""Tars made by others: indexed once and when they change, never extracted; losses are named."""

from __future__ import annotations

import io
import json
import logging
import os
import pickle
import subprocess
import sys
import tarfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset as wds

from pipelines.decode import Pixels, decode
from pipelines.foreign import list_tars
from pipelines.shards import ShardError, ShardSet

Picture = Callable[..., Pixels]
Encode = Callable[..., bytes]


class Evil:
    """Leaves a trace if it is ever unpickled."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("unpickled",)


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


@pytest.fixture
def images(picture: Picture, encode: Encode) -> list[bytes]:
    kinds = ("JPEG", "PNG", "WEBP")
    return [encode(picture(8 + k, 9 + 2 * k, k), kinds[k % 3]) for k in range(9)]


@pytest.fixture
def folder(tmp_path: Path, images: list[bytes]) -> Path:
    """Two tars as img2dataset writes them: the same keys are in both."""
    folder = tmp_path / "laion"
    folder.mkdir()
    for number in range(2):
        members = []
        for k in range(4):
            key = f"{k:09d}"
            meta = {"key": key, "caption": "é", "class": number, "width": 1}
            members += [
                (f"{key}.{('jpg', 'png', 'webp')[(4 * number + k) % 3]}", images[4 * number + k]),
                (f"{key}.txt", b"a caption"),
                (f"{key}.json", json.dumps(meta).encode()),
                (f"{key}.cls", str(k).encode()),
            ]
        write(folder / f"{number:05d}.tar", members)
    return folder


def open_quietly(path: str | Path, caplog: pytest.LogCaptureFixture, **more: Any) -> ShardSet:
    with caplog.at_level(logging.WARNING):
        caplog.clear()
        found = ShardSet.open(path, **more)
    assert caplog.text == ""
    return found


def test_a_folder(folder: Path, images: list[bytes], caplog: pytest.LogCaptureFixture) -> None:
    found = open_quietly(folder, caplog)
    assert len(found) == 8 and found.num_shards == 2
    assert [found.read(i) for i in range(8)] == images[:8]
    assert all(np.array_equal(found[i], decode(images[i])) for i in range(8))
    assert found.size_N2.tolist() == [[8 + k, 9 + 2 * k] for k in range(8)]
    assert found.label_N.tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    assert found.class_names == ["0", "1", "2", "3"]
    assert found.source_of(5) == "00001.tar/000000001.webp"
    assert sorted(found.order(0).ids(0, 0, 8).tolist()) == list(range(8))
    with pytest.raises(ShardError, match="no manifest that says its sha256"):
        found.verify()


def test_webdataset_finds_the_same(folder: Path, images: list[bytes]) -> None:
    found = ShardSet.open(folder)
    urls = [str(file) for file in sorted(folder.glob("*.tar"))]
    samples = list(wds.WebDataset(urls, shardshuffle=False).to_tuple("jpg;png;webp", "cls"))
    assert [data for data, _ in samples] == [found.read(i) for i in range(8)]
    assert [int(label) for _, label in samples] == found.label_N.tolist()


def test_labels_from_json(folder: Path) -> None:
    assert ShardSet.open(folder).label_N.tolist() == [0, 1, 2, 3] * 2
    named = ShardSet.open(folder, label_field="class")
    assert named.label_N.tolist() == [0] * 4 + [1] * 4 and named.num_classes == 2
    for field in ("caption", "nowhere"):
        none = ShardSet.open(folder, label_field=field)
        assert none.label_N.tolist() == [-1] * 8 and none.class_names == []


@pytest.mark.parametrize(
    "pattern", ["*.tar", "0000[01].tar", "{00000..00001}.tar", "00000.tar", "0000{0..1}.tar"]
)
def test_patterns(folder: Path, pattern: str) -> None:
    assert len(ShardSet.open(folder / pattern)) == (4 if pattern == "00000.tar" else 8)


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
    tmp_path: Path, images: list[bytes], form: int, caplog: pytest.LogCaptureFixture
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
    file = write(tmp_path / "x.tar", [(n, images[k]) for k, n in enumerate(names)], form)
    with tarfile.open(file) as tar:
        expected = tar.getnames()
    with caplog.at_level(logging.WARNING):
        found = ShardSet.open(file, max_damaged=1)
    read = [found.source_of(i).removeprefix("x.tar/") for i in range(len(found))]
    assert read == [n for n in expected if "c.d" not in n]  # its extension is d.webp
    assert "./a.b/c: has no image, only d.webp" in caplog.text
    assert [found.read(i) for i in range(2)] == images[:2]
    assert not (tmp_path.parent / "up.png").exists()


def test_gnu_tars_of_folders(tmp_path: Path, images: list[bytes]) -> None:
    """As made by hand from torchvision's ImageFolder; links and folders are no samples."""
    for k, data in enumerate(images[:4]):
        (tmp_path / "src" / "cat").mkdir(parents=True, exist_ok=True)
        (tmp_path / "src" / "cat" / f"{k}.jpg").write_bytes(data)
    (tmp_path / "src" / "cat" / "link.jpg").symlink_to("/etc/passwd")
    (tmp_path / "src" / "cat" / ".hidden.jpg").write_bytes(b"no image")
    for form in ("gnu", "pax", "ustar", "v7"):
        command = ["tar", "c", f"--format={form}", "-f", tmp_path / f"{form}.tar", "-C"]
        subprocess.run([*command, tmp_path / "src", "."], check=True)
        found = ShardSet.open(tmp_path / f"{form}.tar")
        assert {found.read(i) for i in range(len(found))} == set(images[:4])
        assert len(found) == 4


def test_damaged_samples_are_counted_and_named(
    folder: Path, images: list[bytes], caplog: pytest.LogCaptureFixture
) -> None:
    bad = [
        ("a.txt", b"no image here"),
        ("b.jpg", b"not an image"),
        ("c.png", b""),
        ("d.webp", images[2][:20]),
        ("e.jpg", images[0]),
    ]
    write(folder / "00002.tar", bad)
    with pytest.raises(ShardError, match=r"4 of 13 samples cannot be used, .*max_damaged=0\.01"):
        ShardSet.open(folder)
    with caplog.at_level(logging.WARNING):
        found = ShardSet.open(folder, max_damaged=0.5)
    assert len(found) == 9 and found.read(8) == images[0]
    assert "4 of 13 samples cannot be used and are left out" in caplog.text
    for text in ("00002.tar, a: has no image, only txt", "b: is no JPEG", "c: ", "d: "):
        assert text in caplog.text
    assert found[8].shape[2] == 3


def test_an_image_of_too_many_pixels(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    header = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + (2**30).to_bytes(4, "big") * 2 + b"\x08\2\0\0\0"
    import zlib

    huge = header + zlib.crc32(header[12:]).to_bytes(4, "big") + b"\0\0\0\0IDAT\x35\xaf\x06\x1e"
    write(folder / "00002.tar", [("a.png", huge)])
    with caplog.at_level(logging.WARNING):
        assert len(ShardSet.open(folder, max_damaged=1)) == 8
    assert "00002.tar, a: " in caplog.text


def test_pickles_are_never_loaded(
    folder: Path, images: list[bytes], caplog: pytest.LogCaptureFixture, monkeypatch: Any
) -> None:
    monkeypatch.chdir(folder.parent)
    evil = pickle.dumps(Evil())
    stream = io.BytesIO()
    np.save(stream, np.array([Evil()]), allow_pickle=True)
    kinds = [("pyd", evil), ("pkl", evil), ("pth", evil), ("npy", stream.getvalue())]
    members = [("a.jpg", images[0]), ("a.cls", evil), *((f"a.{e}", data) for e, data in kinds)]
    write(folder / "00002.tar", [*members, ("a.json", evil)])
    for field in (None, "class"):
        with caplog.at_level(logging.WARNING):
            caplog.clear()
            found = ShardSet.open(folder, label_field=field)
        assert found.labels(np.array([8])).tolist() == [-1] and found.read(8) == images[0]
        assert "4 pickled members are ignored" in caplog.text
    assert not Path("unpickled").exists()


@pytest.mark.parametrize("label", [b"-1", b"1.0", b"true", b"10000000", b"cat", b"[1]", b""])
def test_labels_that_are_no_classes(tmp_path: Path, images: list[bytes], label: bytes) -> None:
    file = write(tmp_path / "x.tar", [("a.jpg", images[0]), ("a.cls", label)])
    found = ShardSet.open(file)
    assert found.label_N.tolist() == [-1] and found.num_classes == 0


@pytest.mark.parametrize(
    ("cut", "kept", "says"),
    [(2600, 1, "cut"), (1, 8, ""), (10240 - 512, 8, "")],
    ids=["in an image", "in the end's zeros", "at a member's end"],
)
def test_cut_tars(
    tmp_path: Path,
    images: list[bytes],
    cut: int,
    kept: int,
    says: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    file = write(tmp_path / "x.tar", [(f"{k}.jpg", images[0]) for k in range(8)])
    with tarfile.open(file) as tar:
        end = max(m.offset_data + -(-m.size // 512) * 512 for m in tar)
        second = tar.getmembers()[1]
    lengths = {2600: second.offset_data + 5, 1: file.stat().st_size - 1, 10240 - 512: end}
    with file.open("r+b") as stream:
        stream.truncate(lengths[cut])
    with caplog.at_level(logging.WARNING):
        found = ShardSet.open(file, max_damaged=1)
    assert len(found) == kept and says in caplog.text
    assert bool(caplog.text) == bool(says)


@pytest.mark.parametrize("garbage", [b"x" * 700, b"\0" * 512 + b"garbage", bytes(5000)])
def test_trailing_garbage(
    tmp_path: Path, images: list[bytes], garbage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """Behind the end mark nothing counts; without one it is damage that hides what follows."""
    whole = write(tmp_path / "x.tar", [("a.jpg", images[0])]).read_bytes()
    end = 512 + -(-len(images[0]) // 512) * 512
    file = tmp_path / "x.tar"
    file.write_bytes(whole + garbage)
    assert open_quietly(file, caplog).read(0) == images[0]
    file.write_bytes(whole[:end] + garbage)
    with caplog.at_level(logging.WARNING):
        assert len(ShardSet.open(file, max_damaged=1)) == 1
    assert ("damaged or cut at byte" in caplog.text) == garbage.startswith(b"x")


def test_a_damaged_header_in_the_middle(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = folder / "00001.tar"
    with tarfile.open(file) as tar:
        at = tar.getmembers()[8].offset
    raw = bytearray(file.read_bytes())
    raw[at : at + 100] = b"\xff" * 100
    file.write_bytes(raw)
    with pytest.raises(ShardError, match=f"damaged or cut at byte {at}"):
        ShardSet.open(folder)
    with caplog.at_level(logging.WARNING):
        assert len(ShardSet.open(folder, max_damaged=1)) == 6
    assert f"damaged or cut at byte {at}" in caplog.text


def test_sparse_members_are_left_out(
    tmp_path: Path, images: list[bytes], caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.jpg").write_bytes(images[0])
    with (tmp_path / "s.jpg").open("wb") as stream:
        stream.write(images[0])
        stream.truncate(10**6)
    command = ["tar", "c", "-S", "--hole-detection=raw", "-f", "x.tar", "s.jpg", "a.jpg"]
    subprocess.run(command, cwd=tmp_path, check=True)
    with caplog.at_level(logging.WARNING):
        found = ShardSet.open(tmp_path / "x.tar", max_damaged=1)
    assert [found.read(i) for i in range(len(found))] == [images[0]]
    assert "s: is sparse" in caplog.text


def test_no_tars(tmp_path: Path, images: list[bytes]) -> None:
    empty, zeros, text = (tmp_path / f"{n}.tar" for n in ("empty", "zeros", "text"))
    empty.touch(), zeros.write_bytes(bytes(10240)), text.write_bytes(b"hello" * 1000)
    for file in (empty, zeros):
        with pytest.raises(ShardError, match="no usable sample"):
            ShardSet.open(file)
    with pytest.raises(ShardError, match="is no plain tar"):
        ShardSet.open(text)
    with tarfile.open(tmp_path / "packed.tar", "w:gz") as tar:
        add(tar, "a.jpg", images[0])
    with pytest.raises(ShardError, match=r"no plain tar.*decompress"):
        ShardSet.open(tmp_path / "packed.tar")
    write(tmp_path / "good.tar", [("a.jpg", images[0])])
    text.unlink(), (tmp_path / "packed.tar").unlink()
    found = ShardSet.open(tmp_path)  # empty ones among others are no harm
    assert len(found) == 1 and found.num_shards == 1
    with pytest.raises(ShardError, match="is no shard set"):
        ShardSet.open(tmp_path / "nothing")


def chained(num: int) -> bytes:
    """A tar of long names of long names."""
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 5
    return (info.tobuf(tarfile.USTAR_FORMAT) + b"abcd\0".ljust(512, b"\0")) * num


def header_of(name: str) -> bytes:
    return tarfile.TarInfo(name).tobuf(tarfile.GNU_FORMAT)


def test_hostile_headers(
    folder: Path, images: list[bytes], caplog: pytest.LogCaptureFixture
) -> None:
    with tarfile.open(folder / "00000.tar") as tar:
        last = tar.getmembers()[-1]
    good = (folder / "00000.tar").read_bytes()[: last.offset_data + 512]
    huge = tarfile.TarInfo("z.jpg")
    huge.size = 2**60
    pax = tarfile.TarInfo("p")
    pax.type, pax.size = tarfile.XHDTYPE, 2**40
    back = tarfile.TarInfo("z.jpg")
    back.size = -5120
    records = b"15 size=-10240\n".ljust(512, b"\0")
    pax_back = tarfile.TarInfo("p")
    pax_back.type, pax_back.size = tarfile.XHDTYPE, 15
    tails = [info.tobuf(tarfile.GNU_FORMAT) for info in (huge, pax, back, pax_back)]
    tails[-1] += records + header_of("z.jpg")
    for tail in (chained(5000), *tails):
        (folder / "00000.tar").write_bytes(good + tail)
        with caplog.at_level(logging.WARNING):
            caplog.clear()
            found = ShardSet.open(folder, max_damaged=1)
        assert len(found) == 8 and "left out" in caplog.text


def caches(folder: Path) -> list[Path]:
    return sorted(folder.glob(".*.tar.fastclr-index"))


def scanned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    import pipelines.foreign_index as module

    names: list[str] = []
    really = module.scan
    monkeypatch.setattr(module, "scan", lambda f, *a: names.append(f.name) or really(f, *a))
    return names


def test_indexed_once_and_again_when_changed(
    folder: Path, images: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = scanned(monkeypatch)
    first = ShardSet.open(folder)
    assert sorted(names) == ["00000.tar", "00001.tar"] and len(caches(folder)) == 2
    names.clear()
    again = ShardSet.open(folder)
    assert names == [] and again.digest == first.digest
    assert again.label_N.tolist() == first.label_N.tolist() and names == []
    unused = ShardSet.open(folder)
    old = (folder / "00001.tar").stat()
    write(folder / "00001.tar", [("z.png", images[1])])
    changed = ShardSet.open(folder)
    assert names == ["00001.tar"] and len(changed) == 5 and changed.digest != first.digest
    with pytest.raises(ShardError, match="changed while it was in use"):
        unused[4]
    with pytest.raises(ShardError, match=r"the tar has 'z\.png' in its place"):
        first[4]
    names.clear()
    raw = bytearray((folder / "00001.tar").read_bytes())  # the same length and time
    raw[-1] ^= 1
    (folder / "00001.tar").write_bytes(raw)
    os.utime(folder / "00001.tar", ns=(old.st_atime_ns, old.st_mtime_ns))
    ShardSet.open(folder)
    assert names == ["00001.tar"]
    names.clear()
    ShardSet.open(folder, label_field="class")
    assert sorted(names) == ["00000.tar", "00001.tar"]


@pytest.mark.parametrize("damage", ["lines", "head", "cut", "empty", "deep", "a folder"])
def test_damaged_caches_are_made_again(folder: Path, damage: str) -> None:
    first = ShardSet.open(folder)
    file = caches(folder)[0]
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
    again = ShardSet.open(folder, cache_dir=folder.parent / "cache")
    assert again.digest == first.digest and again.read(0) == first.read(0)
    assert again.size_N2.tolist() == first.size_N2.tolist()


def test_a_cache_with_lies_is_found(folder: Path) -> None:
    """A stranger's index beside his tar, with the right hash, does not reach outside the tar."""
    ShardSet.open(folder)
    file = caches(folder)[0]
    head, _, lines = file.read_bytes().partition(b"\n")
    import hashlib

    lies = lines.replace(b'"offset": 512', b'"offset": 1536')
    digest = hashlib.sha256(lies).hexdigest()
    file.write_bytes(json.dumps(json.loads(head) | {"sha256": digest}).encode() + b"\n" + lies)
    with pytest.raises(ShardError, match="key 000000000"):
        ShardSet.open(folder).read(0)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_as_a_user(folder: Path, tmp_path: Path) -> None:
    folder.chmod(0o555)
    assert len(ShardSet.open(folder, cache_dir=tmp_path / "cache")) == 8
    folder.chmod(0o755)
    assert caches(folder) == []


def test_a_read_only_folder(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pipelines.foreign_index as module

    really = module.write_shared

    def refuse(file: Path, data: bytes) -> None:
        if file.parent == folder:
            raise OSError(30, "Read-only file system")
        really(file, data)

    monkeypatch.setattr(module, "write_shared", refuse)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    names = scanned(monkeypatch)
    for _ in range(2):
        assert len(ShardSet.open(folder)) == 8
    assert len(names) == 2 and caches(folder) == []
    assert len(list((tmp_path / "xdg" / "fastclr" / "foreign").iterdir())) == 2


def test_two_processes_at_the_same_time(folder: Path) -> None:
    program = (
        "import sys; from pipelines.shards import ShardSet\n"
        "s = ShardSet.open(sys.argv[1]); print(s.digest, s.label_N.tolist())"
    )

    def start(_: int) -> str:
        return subprocess.run(
            [sys.executable, "-c", program, folder], capture_output=True, text=True, check=True,
            cwd=Path(__file__).parents[2],
        ).stdout  # fmt: skip

    with ThreadPoolExecutor(3) as pool:
        assert len(set(pool.map(start, range(3)))) == 1
    names = {p.name for p in folder.iterdir()}
    assert names == {"00000.tar", "00001.tar", *(p.name for p in caches(folder))}


def test_a_neighbour_of_the_same_key_is_one_sample(tmp_path: Path, images: list[bytes]) -> None:
    members = [("a.jpg", images[0]), ("a.png", images[1]), ("b.png", images[1])]
    found = ShardSet.open(write(tmp_path / "x.tar", [*members, ("a.jpg", images[3])]))
    assert [found.read(i) for i in range(3)] == [images[0], images[1], images[3]]


def test_many_tars_are_indexed_in_processes(
    folder: Path, images: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.foreign_index._LITTLE", 0)
    monkeypatch.chdir(folder)
    names = scanned(monkeypatch)  # in this process
    found = ShardSet.open(".")
    assert names == [] and len(caches(folder)) == 2
    assert [found.read(i) for i in range(8)] == images[:8]
    (folder / "00002.tar").write_bytes(b"no tar" * 99)
    with pytest.raises(ShardError, match=r"00002\.tar is no plain tar"):
        ShardSet.open(folder)
    assert names == ["00002.tar"]  # told here
