"""Hostile and damaged shard sets: every error is a ShardError that names the place."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.shards import ShardError, ShardSet

Edit = Callable[[dict[str, Any]], object]


@pytest.fixture
def packed(shard_set: ShardSet, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return shutil.copytree(shard_set.path, tmp_path / "train")


def tar(packed: Path, number: int = 0) -> Path:
    return packed / f"train-{number:06d}.tar"


def edit_manifest(packed: Path, edit: Edit) -> None:
    manifest = json.loads((packed / "manifest.json").read_text())
    edit(manifest)
    (packed / "manifest.json").write_text(json.dumps(manifest))


def edit_index(packed: Path, row: int, **values: Any) -> None:
    """Change a line of the first index, and the hash of it in the manifest."""
    file = packed / "train-000000.index.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    lines[row].update(values)
    write_index(packed, "".join(json.dumps(line) + "\n" for line in lines).encode())


def write_index(packed: Path, raw: bytes) -> None:
    (packed / "train-000000.index.jsonl").write_bytes(raw)
    digest = hashlib.sha256(raw).hexdigest()
    edit_manifest(packed, lambda m: m["shards"][0].update(index_sha256=digest))


def refuse(packed: Path, *parts: str) -> None:
    with pytest.raises(ShardError) as caught:
        ShardSet.open(packed)
    for part in (str(packed), *parts):
        assert part in str(caught.value)


def test_an_untouched_copy_opens(packed: Path, shard_set: ShardSet) -> None:
    copy = ShardSet.open(str(packed))
    copy.verify()
    assert copy.digest == shard_set.digest and len(copy) == 21
    assert copy.label_N.dtype == np.int64 and copy.size_N2.dtype == np.int32
    assert [image.shape[:2] for image in copy] == [tuple(size) for size in copy.size_N2.tolist()]
    with pytest.raises(IndexError):
        copy[21]


@pytest.mark.parametrize("damage", ["nowhere", "a file", "no manifest"])
def test_no_shard_set(packed: Path, damage: str) -> None:
    if damage == "no manifest":
        (packed / "manifest.json").unlink()
    else:
        shutil.rmtree(packed)
        if damage == "a file":
            packed.write_text("hello")
    refuse(packed, "is no shard set", "make_shards.py")


@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b"[]", b"null", b"7", b'"text"', b"\xff\xfe", b"{}", b"[" * 100_000],
    ids=["empty", "cut", "list", "null", "number", "text", "no utf-8", "no keys", "deep"],
)
def test_a_manifest_that_is_no_manifest(packed: Path, raw: bytes) -> None:
    (packed / "manifest.json").write_bytes(raw)
    refuse(packed, "manifest.json is damaged")


@pytest.mark.parametrize("key", ["format", "version", "num_samples", "class_names", "shards"])
def test_a_manifest_without_a_key(packed: Path, key: str) -> None:
    edit_manifest(packed, lambda m: m.pop(key))
    refuse(packed, "manifest.json is damaged", key)


@pytest.mark.parametrize(
    "key", ["file", "index", "num_samples", "num_bytes", "sha256", "index_sha256"]
)
@pytest.mark.parametrize("value", ["gone", None, [1]], ids=str)
def test_a_manifest_with_a_bad_shard_entry(packed: Path, key: str, value: object) -> None:
    edit_manifest(
        packed,
        lambda m: (
            m["shards"][1].pop(key) if value == "gone" else m["shards"][1].update({key: value})
        ),
    )
    refuse(packed, "manifest.json is damaged", key)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_samples", "21"),
        ("class_names", None),
        ("class_names", [1, 2, 3]),
        ("shards", None),
        ("shards", {"file": "x"}),
        ("shards", "train"),
    ],
)
def test_a_manifest_with_a_wrong_type(packed: Path, key: str, value: object) -> None:
    edit_manifest(packed, lambda m: m.update({key: value}))
    refuse(packed, "manifest.json is damaged")


@pytest.mark.parametrize("change", [{"version": 3}, {"version": "2"}, {"format": "other"}])
def test_another_format_or_version(packed: Path, change: dict[str, object]) -> None:
    edit_manifest(packed, lambda m: m.update(change))
    refuse(packed, "this fastclr reads fastclr-shards version 2", str(next(iter(change.values()))))


@pytest.mark.parametrize("key", ["file", "index"])
@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/b", "..", "./x", "x/"])
def test_a_manifest_that_leaves_its_folder(packed: Path, key: str, name: str) -> None:
    (packed.parent / "secret").write_bytes(tar(packed).read_bytes())
    edit_manifest(packed, lambda m: m["shards"][0].update({key: name}))
    refuse(packed, repr(name), "only its own folder's files")


@pytest.mark.parametrize("name", ["", "\0", "\ud800", "x" * 300])
def test_a_manifest_with_impossible_names(packed: Path, name: str) -> None:
    edit_manifest(packed, lambda m: m["shards"][0].update(file=name))
    refuse(packed)


def test_a_missing_tar(packed: Path) -> None:
    tar(packed, 1).unlink()
    refuse(packed, "train-000001.tar has None bytes", "restore it")


def test_a_cut_tar(packed: Path) -> None:
    whole = tar(packed, 1).read_bytes()
    tar(packed, 1).write_bytes(whole[:-1])
    refuse(packed, f"train-000001.tar has {len(whole) - 1} bytes", str(len(whole)))


def test_a_missing_index(packed: Path) -> None:
    (packed / "train-000002.index.jsonl").unlink()
    refuse(packed, "train-000002.index.jsonl is missing or damaged")


def test_a_tampered_index(packed: Path) -> None:
    file = packed / "train-000000.index.jsonl"
    raw = file.read_bytes()
    file.write_bytes(raw.replace(b'"label": 0', b'"label": 1', 1))
    assert file.read_bytes() != raw
    refuse(packed, "train-000000.index.jsonl does not have the sha256 of its manifest")


@pytest.mark.parametrize(
    "raw",
    [b"", b"{}\n", b"[]\n", b"nonsense\n", b"\xff\n", b'{"key": "a"}\n', b"[" * 100_000],
    ids=["empty", "no fields", "list", "no json", "no utf-8", "one field", "deep"],
)
def test_an_index_of_nonsense_with_the_right_hash(packed: Path, raw: bytes) -> None:
    write_index(packed, raw)
    refuse(packed, "train-000000.index.jsonl", "pack again")


@pytest.mark.parametrize(
    "values",
    [
        {"offset": 10**9},
        {"offset": -1},
        {"offset": "0"},
        {"offset": 512.0},
        {"num_bytes": 10**9},
        {"num_bytes": -5},
        {"num_bytes": None},
        {"height": "24"},
        {"height": 0},
        {"width": -3},
        {"width": 2**40},
        {"label": "0"},
        {"label": 0.5},
        {"label": 2**70},
        {"key": 5},
        {"source": None},
        {"extra": 1},
    ],
    ids=str,
)
def test_an_index_line_that_cannot_be(packed: Path, values: dict[str, object]) -> None:
    edit_index(packed, 3, **values)
    refuse(packed, "train-000000.index.jsonl", "pack again")


@pytest.mark.parametrize("label", [3, -2, 2**31 - 1])
def test_a_label_without_a_class(packed: Path, label: int) -> None:
    edit_index(packed, 0, label=label)
    refuse(packed, f"{label}", "there are 3 classes")


def test_a_key_twice(packed: Path) -> None:
    edit_index(packed, 0, key="000000020")  # of the last shard
    refuse(packed, "a key appears twice")


def test_counts_that_contradict(packed: Path) -> None:
    edit_manifest(packed, lambda m: m.update(num_samples=22))
    refuse(packed, "list 21 samples, the manifest says 22")
    edit_manifest(packed, lambda m: m["shards"][0].update(num_samples=7))
    refuse(packed, "train-000000.index.jsonl does not fit train-000000.tar")


def test_no_samples_at_all(packed: Path) -> None:
    edit_manifest(packed, lambda m: m.update(num_samples=0, shards=[]))
    refuse(packed, "0 is not a data set")


@pytest.mark.parametrize("at", [0, 700, -1])
def test_verify_finds_one_flipped_bit(packed: Path, at: int) -> None:
    shards = ShardSet.open(packed)
    sizes: list[int] = []
    shards.verify(sizes.append)
    assert sizes == [tar(packed, k).stat().st_size for k in range(3)]
    raw = bytearray(tar(packed, 1).read_bytes())
    raw[at] ^= 1
    tar(packed, 1).write_bytes(raw)
    ShardSet.open(packed)  # the size is right
    with pytest.raises(ShardError, match=r"train-000001\.tar has sha256 .* changed after packing"):
        shards.verify()


def test_verify_of_a_tar_that_went_away(packed: Path) -> None:
    shards = ShardSet.open(packed)
    tar(packed, 2).unlink()
    with pytest.raises(ShardError, match=r"train-000002\.tar cannot be read"):
        shards.verify()


def test_a_tar_cut_behind_our_back(packed: Path) -> None:
    shards = ShardSet.open(packed)
    with tar(packed, 1).open("r+b") as stream:
        stream.truncate(600)
    place = rf"train-000001\.tar, key 000000015 \(from {shards.source_of(15)}\)"
    for read in (shards.read, shards.__getitem__):
        with pytest.raises(ShardError, match=rf"{place}.* bytes are there.*cut"):
            read(15)
    assert shards[0].shape[2] == 3


def test_a_tar_removed_behind_our_back(packed: Path) -> None:
    shards = ShardSet.open(packed)
    tar(packed, 1).unlink()
    with pytest.raises(ShardError, match=r"train-000001\.tar, key 000000008 .*cannot be read"):
        shards[8]


def test_an_image_overwritten_behind_our_back(packed: Path) -> None:
    shards = ShardSet.open(packed)
    raw = tar(packed).read_bytes()
    tar(packed).write_bytes(bytes(len(raw)))
    with pytest.raises(ShardError, match=r"train-000000\.tar, key 000000002 .*was packed"):
        shards[2]


def test_an_image_of_another_size_than_its_index(packed: Path) -> None:
    height, width = ShardSet.open(packed).size_N2[4].tolist()
    edit_index(packed, 4, height=height + 1)
    shards = ShardSet.open(packed)
    expected = rf"key 000000004 .* is \({height}, {width}\) pixels, .* \({height + 1}, {width}\)"
    with pytest.raises(ShardError, match=expected):
        shards[4]
