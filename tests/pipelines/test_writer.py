"""Packing: whole or not there, the same bytes twice, readable by webdataset and tar."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds

from fastclr.config import ConfigError
from pipelines.decode import Pixels, decode
from pipelines.order import permutation
from pipelines.shards import ShardError, ShardSet
from pipelines.writer import write_shards

Picture = Callable[..., Pixels]
Encode = Callable[..., bytes]


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def index_of(shard_set: ShardSet) -> list[dict]:
    """Read all index lines as they are on disk, with the tar they belong to."""
    manifest = json.loads((shard_set.path / "manifest.json").read_text())
    return [
        json.loads(line) | {"tar": shard["file"]}
        for shard in manifest["shards"]
        for line in (shard_set.path / shard["index"]).read_text().splitlines()
    ]


def tar_of(folder: Path, file: Path, mode: str = "w") -> Path:
    with tarfile.open(file, mode) as tar:  # type: ignore[call-overload]
        tar.add(folder, ".")
    return file


@pytest.fixture
def flat(tmp_path: Path, picture: Picture, encode: Encode) -> Path:
    folder = tmp_path / "flat"
    folder.mkdir()
    for k in range(5):
        (folder / f"{k}.png").write_bytes(encode(picture(9, 8, k), "PNG"))
    return folder


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """A place in an otherwise empty folder: what else appears there was left behind."""
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "train"


def test_round_trip(source: Path, shard_set: ShardSet) -> None:
    files = [p for p in source.rglob("*") if p.is_file() and p.name != ".hidden"]
    names = sorted(p.relative_to(source).as_posix() for p in files)
    assert len(shard_set) == len(names) == 21
    assert [shard_set.source_of(i) for i in range(21)] == [
        names[k] for k in permutation(21, 0, epoch=0)
    ]
    assert shard_set.class_names == ["apfel rot", "birne", "zürich-ß"]
    for i in range(21):
        name = shard_set.source_of(i)
        data = (source / name).read_bytes()
        assert shard_set.read(i) == data
        assert np.array_equal(shard_set[i], decode(data))
        assert shard_set.class_names[shard_set.label_N[i]] == name.split("/")[0]
    shard_set.verify()


def test_index_and_manifest_tell_the_truth(shard_set: ShardSet) -> None:
    manifest = json.loads((shard_set.path / "manifest.json").read_text())
    assert [s["num_samples"] for s in manifest["shards"]] == [8, 8, 5]
    for shard in manifest["shards"]:
        tar, index = (shard_set.path / shard[k] for k in ("file", "index"))
        assert tar.stat().st_size == shard["num_bytes"]
        assert hashlib.sha256(tar.read_bytes()).hexdigest() == shard["sha256"]
        assert hashlib.sha256(index.read_bytes()).hexdigest() == shard["index_sha256"]
        dali = shard_set.path / shard["dali_index"]
        assert hashlib.sha256(dali.read_bytes()).hexdigest() == shard["dali_index_sha256"]
    raw = (shard_set.path / "manifest.json").read_bytes()
    assert shard_set.digest == hashlib.sha256(raw).hexdigest()
    kept = {s[kind] for s in manifest["shards"] for kind in ("file", "index", "dali_index")}
    assert {p.name for p in shard_set.path.iterdir()} == kept | {"manifest.json"}


def test_plain_tar_finds_each_image_at_its_offset(shard_set: ShardSet) -> None:
    samples = index_of(shard_set)
    assert [s["key"] for s in samples] == [f"{i:09d}" for i in range(21)]
    for sample in samples:
        with tarfile.open(shard_set.path / sample["tar"]) as tar:
            member = tar.getmember(f"{sample['key']}.{sample['extension']}")
            assert (member.offset_data, member.size) == (sample["offset"], sample["num_bytes"])
            label = tar.extractfile(f"{sample['key']}.cls")
            assert label is not None and int(label.read()) == sample["label"]
        data = (shard_set.path / sample["tar"]).read_bytes()
        at = sample["offset"]
        pixels = decode(data[at : at + sample["num_bytes"]])
        assert pixels.shape == (sample["height"], sample["width"], 3)


def test_webdataset_reads_the_shards(shard_set: ShardSet) -> None:
    found = []
    for path in sorted(shard_set.path.glob("*.tar")):
        data = wds.WebDataset(str(path), shardshuffle=False).decode("pil")
        found += list(data.to_tuple("jpg;png;webp", "cls"))
    assert [label for _, label in found] == shard_set.label_N.tolist()
    for i, (image, _) in enumerate(found):
        assert (image.height, image.width) == tuple(shard_set.size_N2[i])
        if "deep.png" not in shard_set.source_of(i):  # Pillow clips 16 bit, decode() shifts
            assert np.array_equal(np.array(image), shard_set[i])


def test_the_same_bytes_at_any_time_and_number_of_threads(
    source: Path, shard_set: ShardSet, tmp_path: Path
) -> None:
    copy = shutil.copytree(source, tmp_path / "bilder", copy_function=shutil.copy)
    for file in copy.rglob("*"):
        os.utime(file, (1, 1))
    again = write_shards(copy, tmp_path / "train", samples_per_shard=8, num_workers=3)
    assert files_of(again.path) == files_of(shard_set.path)
    assert again.digest == shard_set.digest


def test_the_seed_shuffles(source: Path, shard_set: ShardSet, tmp_path: Path) -> None:
    other = write_shards(source, tmp_path / "train", seed=1)
    names, others = ([s.source_of(i) for i in range(21)] for s in (shard_set, other))
    assert names != others and sorted(names) == sorted(others)
    assert other.digest != shard_set.digest


def test_a_flat_folder_has_no_labels(flat: Path, target: Path) -> None:
    shard_set = write_shards(flat, target)
    assert shard_set.class_names == [] and shard_set.num_classes == 0
    assert shard_set.label_N.tolist() == [-1] * 5
    assert [s["label"] for s in index_of(shard_set)] == [None] * 5
    with tarfile.open(next(target.glob("*.tar"))) as tar:
        assert [Path(name).suffix for name in tar.getnames()] == [".png"] * 5


def test_a_tar_gives_the_same_shards_as_its_folder(
    picture: Picture, encode: Encode, tmp_path: Path
) -> None:
    # "a-b" sorts before "a/" as text and behind it as a path.
    for name in ("a", "a-b", "a b"):
        (tmp_path / "x" / name).mkdir(parents=True)
        for k in range(3):
            (tmp_path / "x" / name / f"{k}.jpg").write_bytes(encode(picture(9, 9, k), "JPEG"))
    tar = tar_of(tmp_path / "x", tmp_path / "y.tar")
    a = write_shards(tmp_path / "x", tmp_path / "a" / "train")
    b = write_shards(tar, tmp_path / "b" / "train")
    first, second = files_of(a.path), files_of(b.path)
    manifests = [json.loads(f.pop("manifest.json")) for f in (first, second)]
    assert first == second
    assert [m.pop("source") for m in manifests] == ["x", "y.tar"]
    commands = [m.pop("command") for m in manifests]
    assert commands[0] == "fastclr shards x --out train"
    assert commands[0].replace(" x ", " y.tar ") == commands[1]
    assert manifests[0] == manifests[1]


def test_a_tar_of_every_kind_of_image(source: Path, shard_set: ShardSet, tmp_path: Path) -> None:
    packed = write_shards(tar_of(source, tmp_path / "s.tar"), tmp_path / "t", samples_per_shard=8)
    assert [packed.source_of(i) for i in range(21)] == [shard_set.source_of(i) for i in range(21)]
    assert all(packed.read(i) == shard_set.read(i) for i in range(21))


def test_names_that_are_no_utf8(flat: Path, target: Path) -> None:
    os.rename(os.fsencode(flat / "0.png"), os.fsencode(flat) + b"/\xff\xfe.png")  # noqa: PTH104
    shard_set = write_shards(flat, target)
    assert b"\xff\xfe.png" in {os.fsencode(shard_set.source_of(i)) for i in range(5)}


def test_callbacks_count(flat: Path, target: Path) -> None:
    counts: list[int] = []
    totals: list[int] = []
    write_shards(flat, target, samples_per_shard=2, on_start=totals.append, on_images=counts.append)
    assert totals == [5] and counts == [0, 2, 2, 1]


def test_an_empty_target_folder_is_taken(flat: Path, target: Path) -> None:
    target.mkdir()
    assert len(write_shards(flat, target)) == 5


# One clear message each, and nothing left behind.


def refuse(source: Path, target: Path, *parts: str, error: type[Exception] = ConfigError) -> str:
    """Pack, and check the message and that the target's folder is as it was."""
    before = {p: p.stat().st_mtime_ns for p in target.parent.rglob("*")}
    with pytest.raises(error) as caught:
        write_shards(source, target)
    for part in parts:
        assert part in str(caught.value)
    assert {p: p.stat().st_mtime_ns for p in target.parent.rglob("*")} == before
    return str(caught.value)


def test_missing_source(tmp_path: Path, target: Path) -> None:
    refuse(tmp_path / "nowhere", target, str(tmp_path / "nowhere"), "does not exist", "give a")


def test_empty_source(tmp_path: Path, target: Path) -> None:
    (tmp_path / "void").mkdir()
    refuse(tmp_path / "void", target, str(tmp_path / "void"), "nothing to pack")


@pytest.mark.parametrize("hidden", [False, True])
def test_empty_class(flat: Path, target: Path, tmp_path: Path, hidden: bool) -> None:
    (tmp_path / "classes" / "leer").mkdir(parents=True)
    flat.rename(tmp_path / "classes" / "voll")
    if hidden:
        (tmp_path / "classes" / "leer" / ".DS_Store").write_bytes(b"x")
    folder = str(tmp_path / "classes" / "leer")
    refuse(tmp_path / "classes", target, folder, "is empty", "Remove the folder or add images")


def test_files_beside_class_folders(flat: Path, target: Path) -> None:
    (flat / "klasse").mkdir()
    (flat / "4.png").rename(flat / "klasse" / "4.png")
    refuse(flat, target, str(flat), "0.png", "Move it")


def test_files_that_are_no_images(flat: Path, target: Path) -> None:
    good = (flat / "0.png").read_bytes()
    (flat / "readme.txt").write_text("hello")
    (flat / "empty.png").touch()
    (flat / "cut.png").write_bytes(good[:-40])
    message = refuse(flat, target, "3 of 8 files", "Remove or repair", error=ShardError)
    assert "readme.txt is no JPEG, PNG or WebP image" in message
    assert "empty.png is empty (0 bytes)" in message
    assert "cut.png is truncated" in message


def test_only_the_first_ten_bad_files_are_named(flat: Path, target: Path) -> None:
    for k in range(14):
        (flat / f"{k}.txt").write_text("no")
    message = refuse(flat, target, "14 of 19 files", "and 4 more", error=ShardError)
    assert message.count(".txt is no") == 10


def test_unreadable_file(flat: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(image: object) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pipelines.sources.SourceImage.read", fail)
    refuse(flat, target, "5 of 5 files", "Permission denied", error=ShardError)


@pytest.mark.parametrize("damage", ["gzip", "text", "empty", "cut"])
def test_a_source_file_that_is_no_plain_tar(
    flat: Path, target: Path, tmp_path: Path, damage: str
) -> None:
    whole = tar_of(flat, tmp_path / "whole.tar").read_bytes()
    bad = {
        "gzip": gzip.compress(whole),
        "text": b"hello " * 200,
        "empty": b"",
        "cut": whole[: whole.rindex(b"ustar") + 300],
    }[damage]
    (tmp_path / "bad.tar").write_bytes(bad)
    refuse(tmp_path / "bad.tar", target, str(tmp_path / "bad.tar"), "no plain tar", "decompress")


def tar_with(file: Path, *members: tarfile.TarInfo, data: bytes = b"") -> Path:
    with tarfile.open(file, "w") as tar:
        for member in members:
            member.size = len(data) if member.isreg() else 0
            tar.addfile(member, io.BytesIO(data))
    return file


@pytest.mark.parametrize("name", ["../x.png", "a/../../x.png", "/etc/x.png"])
def test_a_tar_member_that_leaves_its_folder(target: Path, tmp_path: Path, name: str) -> None:
    tar = tar_with(tmp_path / "evil.tar", tarfile.TarInfo(name))
    refuse(tar, target, str(tar), name, "do not trust it")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_a_tar_with_links_loses_no_image_silently(
    picture: Picture, encode: Encode, target: Path, tmp_path: Path, kind: bytes
) -> None:
    link = tarfile.TarInfo("a/2.png")
    link.type, link.linkname = kind, "a/1.png"
    data = encode(picture(8, 8), "PNG")
    tar = tar_with(tmp_path / "links.tar", tarfile.TarInfo("a/1.png"), link, data=data)
    refuse(tar, target, str(tar), "a/2.png", "--hard-dereference")


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_target_that_is_taken(flat: Path, target: Path, kind: str) -> None:
    if kind == "folder":
        target.mkdir()
        (target / "mine").write_text("precious")
    else:
        target.write_text("precious")
    refuse(flat, target, str(target), "not empty", "another --out")


def test_no_samples_in_a_shard(flat: Path, target: Path) -> None:
    with pytest.raises(ConfigError, match="samples_per_shard is 0"):
        write_shards(flat, target, samples_per_shard=0)


class Boom(Exception):
    pass


@pytest.mark.parametrize("error", [Boom, KeyboardInterrupt, SystemExit, MemoryError, OSError])
@pytest.mark.parametrize("where", ["plan", "image", "manifest", "rename"])
def test_any_failure_leaves_no_set_and_can_be_mended(
    flat: Path,
    target: Path,
    where: str,
    error: type[BaseException],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object) -> None:
        raise error

    place = {
        "plan": "pipelines.plan.sort_rows",
        "image": "pipelines.packing.check_and_decode",
        "manifest": "pipelines.writer.write_json",
        "rename": "pipelines.writer.sync",
    }[where]
    monkeypatch.setattr(place, fail)
    if where == "image" and error is OSError:
        error = ShardError  # a file that cannot be read is a damaged one
    with pytest.raises(error) as caught:
        write_shards(flat, target, samples_per_shard=2)
    monkeypatch.undo()
    if where in ("plan", "image"):
        assert list(target.parent.iterdir()) == []
        assert len(write_shards(flat, target)) == 5
        return
    (work,) = target.parent.iterdir()
    if error in (KeyboardInterrupt, OSError):
        assert "--resume" in str(caught.value) and f"rm -r {work}" in str(caught.value)
    before = files_of(work / "set")
    refuse(flat, target, str(work), "--resume", "rm -r")
    assert files_of(work / "set") == before
    shutil.rmtree(work)
    assert len(write_shards(flat, target)) == 5
