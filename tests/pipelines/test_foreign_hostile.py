"""Tars of others that are damaged, cut or hostile: nothing runs; losses are counted and named."""

from __future__ import annotations

import io
import logging
import os
import pickle
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.shards import ShardError, ShardSet
from tests.pipelines.tars import add, open_quietly, write


class Evil:
    """Leaves a trace if it is ever unpickled."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("unpickled",)


def test_damaged_samples_are_counted_and_named(
    laion: Path, encoded: list[bytes], caplog: pytest.LogCaptureFixture
) -> None:
    bad = [
        ("a.txt", b"no image here"),
        ("b.jpg", b"not an image"),
        ("c.png", b""),
        ("d.webp", encoded[2][:20]),
        ("e.jpg", encoded[0]),
    ]
    write(laion / "00002.tar", bad)
    with pytest.raises(ShardError, match=r"4 of 13 samples cannot be used, .*max_damaged=0\.01"):
        ShardSet.open(laion)
    with caplog.at_level(logging.WARNING):
        found = ShardSet.open(laion, max_damaged=0.5)
    assert len(found) == 9 and found.read(8) == encoded[0]
    assert "4 of 13 samples cannot be used and are left out" in caplog.text
    for text in ("00002.tar, a: has no image, only txt", "b: is no JPEG", "c: ", "d: "):
        assert text in caplog.text
    assert found[8].shape[2] == 3


def test_an_image_of_too_many_pixels(laion: Path, caplog: pytest.LogCaptureFixture) -> None:
    header = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + (2**30).to_bytes(4, "big") * 2 + b"\x08\2\0\0\0"
    import zlib

    huge = header + zlib.crc32(header[12:]).to_bytes(4, "big") + b"\0\0\0\0IDAT\x35\xaf\x06\x1e"
    write(laion / "00002.tar", [("a.png", huge)])
    with caplog.at_level(logging.WARNING):
        assert len(ShardSet.open(laion, max_damaged=1)) == 8
    assert "00002.tar, a: " in caplog.text


def test_pickles_are_never_loaded(
    laion: Path, encoded: list[bytes], caplog: pytest.LogCaptureFixture, monkeypatch: Any
) -> None:
    monkeypatch.chdir(laion.parent)
    evil = pickle.dumps(Evil())
    stream = io.BytesIO()
    np.save(stream, np.array([Evil()]), allow_pickle=True)
    kinds = [("pyd", evil), ("pkl", evil), ("pth", evil), ("npy", stream.getvalue())]
    members = [("a.jpg", encoded[0]), ("a.cls", evil), *((f"a.{e}", data) for e, data in kinds)]
    write(laion / "00002.tar", [*members, ("a.json", evil)])
    for field in (None, "class"):
        with caplog.at_level(logging.WARNING):
            caplog.clear()
            found = ShardSet.open(laion, label_field=field)
        assert found.labels(np.array([8])).tolist() == [-1] and found.read(8) == encoded[0]
        assert "4 pickled members are ignored" in caplog.text
    assert not Path("unpickled").exists()


@pytest.mark.parametrize(
    ("cut", "kept", "says"),
    [(2600, 1, "cut"), (1, 8, ""), (10240 - 512, 8, "damaged or cut")],  # its end mark is gone
    ids=["in an image", "in the end's zeros", "at a member's end"],
)
def test_cut_tars(
    tmp_path: Path,
    encoded: list[bytes],
    cut: int,
    kept: int,
    says: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    file = write(tmp_path / "x.tar", [(f"{k}.jpg", encoded[0]) for k in range(8)])
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
    tmp_path: Path, encoded: list[bytes], garbage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """Behind the end mark nothing counts; without one it is damage that hides what follows."""
    whole = write(tmp_path / "x.tar", [("a.jpg", encoded[0])]).read_bytes()
    end = 512 + -(-len(encoded[0]) // 512) * 512
    file = tmp_path / "x.tar"
    file.write_bytes(whole + garbage)
    assert open_quietly(file, caplog).read(0) == encoded[0]
    file.write_bytes(whole[:end] + garbage)
    with caplog.at_level(logging.WARNING):
        assert len(ShardSet.open(file, max_damaged=1)) == 1
    assert ("damaged or cut at byte" in caplog.text) == garbage.startswith(b"x")


def test_a_damaged_header_in_the_middle(laion: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = laion / "00001.tar"
    with tarfile.open(file) as tar:
        at = tar.getmembers()[8].offset
    raw = bytearray(file.read_bytes())
    raw[at : at + 100] = b"\xff" * 100
    file.write_bytes(raw)
    with pytest.raises(ShardError, match=f"damaged or cut at byte {at}"):
        ShardSet.open(laion)
    with caplog.at_level(logging.WARNING):
        assert len(ShardSet.open(laion, max_damaged=1)) == 6
    assert f"damaged or cut at byte {at}" in caplog.text


def test_sparse_members_are_left_out(
    tmp_path: Path, encoded: list[bytes], caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.jpg").write_bytes(encoded[0])
    with (tmp_path / "s.jpg").open("wb") as stream:
        stream.write(encoded[0])
        stream.truncate(10**6)
    command = ["tar", "c", "-S", "--hole-detection=raw", "-f", "x.tar", "s.jpg", "a.jpg"]
    subprocess.run(command, cwd=tmp_path, check=True)
    with caplog.at_level(logging.WARNING):
        found = ShardSet.open(tmp_path / "x.tar", max_damaged=1)
    assert [found.read(i) for i in range(len(found))] == [encoded[0]]
    assert "s: is sparse" in caplog.text


def test_no_tars(tmp_path: Path, encoded: list[bytes]) -> None:
    empty, zeros, text = (tmp_path / f"{n}.tar" for n in ("empty", "zeros", "text"))
    empty.touch(), zeros.write_bytes(bytes(10240)), text.write_bytes(b"hello" * 1000)
    for file in (empty, zeros):
        with pytest.raises(ShardError, match="no usable sample"):
            ShardSet.open(file)
    with pytest.raises(ShardError, match="is no plain tar"):
        ShardSet.open(text)
    with tarfile.open(tmp_path / "packed.tar", "w:gz") as tar:
        add(tar, "a.jpg", encoded[0])
    with pytest.raises(ShardError, match=r"no plain tar.*decompress"):
        ShardSet.open(tmp_path / "packed.tar")
    write(tmp_path / "good.tar", [("a.jpg", encoded[0])])
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
    laion: Path, encoded: list[bytes], caplog: pytest.LogCaptureFixture
) -> None:
    with tarfile.open(laion / "00000.tar") as tar:
        last = tar.getmembers()[-1]
    good = (laion / "00000.tar").read_bytes()[: last.offset_data + 512]
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
        (laion / "00000.tar").write_bytes(good + tail)
        with caplog.at_level(logging.WARNING):
            caplog.clear()
            found = ShardSet.open(laion, max_damaged=1)
        assert len(found) == 8 and "left out" in caplog.text
