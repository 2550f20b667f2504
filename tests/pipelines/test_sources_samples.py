"""WebDataset shards and raw data sets as sources: pixels, classes, splits, damage."""

from __future__ import annotations

import gzip
import io
import json
import struct
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastclr.config import ConfigError
from pipelines.shards import ShardSet
from pipelines.sources import SourceImage, SourceOptions, list_source


def listed(source: Path | str, spool: Path, **options: Any) -> list[SourceImage]:
    return list(list_source(str(source), SourceOptions(**options), spool))


def refused(source: Path | str, spool: Path, *parts: str, **options: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        listed(source, spool, **options)
    for part in parts:
        assert part in str(caught.value), caught.value
    return str(caught.value)


def shard(file: Path, members: dict[str, bytes]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return file


@pytest.fixture
def spool(tmp_path: Path) -> Path:
    return tmp_path / "spool"


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Three shards of two samples, as img2dataset writes them."""
    for number in range(3):
        members: dict[str, bytes] = {}
        for key in (f"{number}0", f"{number}1"):
            members[f"{key}.jpg"] = f"image {key}".encode()
            members[f"{key}.txt"] = b"a caption"
            members[f"{key}.json"] = json.dumps({"kind": f"k{number}", "label": number}).encode()
            members[f"{key}.cls"] = b"%d\n" % number
        shard(tmp_path / "wds" / f"set-{number:03d}.tar", members)
        (tmp_path / "wds" / f"set-{number:03d}_stats.json").write_text("{}")
    return tmp_path / "wds"


@pytest.mark.parametrize("pattern", ["", "/set-{000..002}.tar", "/set-00{0,1,2}.tar", "/*.tar"])
def test_shards_by_folder_and_pattern(shards: Path, spool: Path, pattern: str) -> None:
    images = listed(f"{shards}{pattern}", spool)
    assert [image.name for image in images] == [
        f"set-{n:03d}.tar/{n}{k}" for n in range(3) for k in range(2)
    ]
    assert [image.read() for image in images] == [
        f"image {n}{k}".encode() for n in range(3) for k in range(2)
    ]
    assert [image.class_name for image in images] == ["0", "0", "1", "1", "2", "2"]
    assert not spool.exists()


def test_one_shard_is_no_folder_of_images(shards: Path, spool: Path) -> None:
    images = listed(shards / "set-001.tar", spool)
    assert [image.class_name for image in images] == ["1", "1"]
    (shards / "x.tar.gz").write_bytes(gzip.compress((shards / "set-001.tar").read_bytes()))
    again = listed(shards / "x.tar.gz", spool)
    assert [image.read() for image in again] == [image.read() for image in images]


def test_labels_of_shards(shards: Path, spool: Path) -> None:
    images = listed(shards, spool, label_column="kind")
    assert [image.class_name for image in images] == ["k0", "k0", "k1", "k1", "k2", "k2"]
    assert {image.class_name for image in listed(shards, spool, labels=False)} == {None}
    refused(shards, spool, "set-000.tar", "'00'", "no 'nope'", "kind, label", label_column="nope")


def test_a_set_of_our_own_keeps_its_classes(shard_set: ShardSet, tmp_path: Path) -> None:
    listing = list_source(str(shard_set.path), SourceOptions(), tmp_path)
    assert listing.class_names == shard_set.class_names
    images = list(listing)
    assert len(images) == len(shard_set)
    for number, image in enumerate(images):
        assert image.read() == shard_set.read(number)
        assert image.class_name == shard_set.class_names[shard_set.label_N[number]]
    assert (
        list_source(str(shard_set.path), SourceOptions(labels=False), tmp_path).class_names is None
    )


@pytest.mark.parametrize("file", ["../x.tar", "/etc/passwd", 7])
def test_a_hostile_manifest(shards: Path, spool: Path, file: Any) -> None:
    manifest = {"format": "fastclr-shards", "class_names": [], "shards": [{"file": file}]}
    (shards / "manifest.json").write_text(json.dumps(manifest))
    refused(shards, spool, "manifest.json is damaged")


def test_a_foreign_manifest_is_a_note(shards: Path, spool: Path) -> None:
    (shards / "manifest.json").write_text('{"format": "theirs"}')
    assert len(listed(shards, spool)) == 6
    (shards / "manifest.json").write_text("nothing of the kind")
    assert len(listed(shards, spool)) == 6


def test_which_member_is_the_image(tmp_path: Path, spool: Path) -> None:
    members = {"a/1.left.png": b"l", "a/1.right.png": b"r", "a/1.cls": b"x", "b.2.cls": b"y"}
    source = shard(tmp_path / "x" / "x.tar", members)
    refused(f"{source.parent}", spool, "several images (left.png, right.png)", "--image-")
    images = listed(source.parent, spool, image_column="right.png")
    assert [(i.name, i.class_name, i.read()) for i in images] == [
        ("x.tar/a/1", "x", b"r"),
        ("x.tar/b (no image member)", None, b""),  # rejected as empty, and so counted
    ]
    shard(source, {"1.png": b"i", "1.mask.png": b"m", "1.CLS": b"x"})
    assert [(i.class_name, i.read()) for i in listed(source.parent, spool)] == [("x", b"i")]


@pytest.mark.parametrize(
    ("members", "parts"),
    [
        ({"1.jpg": b"", "1.JPG": b""}, ["sample '1'", "twice"]),
        ({"1.jpg": b"", "1.cls": b"\xff"}, ["sample '1'", "UTF-8"]),
        ({"1.jpg": b"", "1.cls": b"-3"}, ["sample '1'", "label '-3'"]),
        ({"1.jpg": b"", "1.cls": b"x" * (2 << 20)}, ["sample '1'", "2097152 bytes"]),
        ({"../1.jpg": b""}, ["do not trust it"]),
        ({}, ["nothing to pack"]),
    ],
)
def test_samples_that_are_refused(
    tmp_path: Path, spool: Path, members: dict[str, bytes], parts: list[str]
) -> None:
    shard(tmp_path / "x" / "x.tar", members)
    refused(tmp_path / "x", spool, "x", *parts)


@pytest.mark.parametrize("data", [b"[" * 100_000, b"no json", b"[1]", b'{"label": [1]}'])
def test_json_that_holds_no_label(tmp_path: Path, spool: Path, data: bytes) -> None:
    shard(tmp_path / "x" / "x.tar", {"1.jpg": b"", "1.json": data})
    refused(tmp_path / "x", spool, "sample '1'", label_column="label")
    assert len(listed(tmp_path / "x", spool)) == 1


def test_pickles_in_shards_are_not_touched(tmp_path: Path, spool: Path) -> None:
    shard(tmp_path / "x" / "x.tar", {"1.jpg": b"i", "1.pyd": b"cos\nsystem\n", "1.cls": b"3"})
    assert [image.class_name for image in listed(tmp_path / "x", spool)] == ["3"]


def test_a_shard_that_was_cut_or_is_missing(shards: Path, spool: Path) -> None:
    whole = (shards / "set-002.tar").read_bytes()
    (shards / "set-002.tar").write_bytes(whole[:3000])
    refused(shards, spool, "set-002.tar is no plain tar or is damaged")
    (shards / "set-002.tar").unlink()
    refused(f"{shards}/set-{{000..002}}.tar", spool, "set-002.tar is not there")
    refused(f"{shards}/other-*.tar", spool, "nothing fits")
    (shards / "x.zip").write_bytes(b"")
    refused(f"{shards}/*.[tz]*", spool, ".tar, .zip")


# Raw pixels.


def pixels(*shape: int) -> np.ndarray:
    return np.random.default_rng(len(shape)).integers(0, 256, shape, np.uint8)


def decoded(images: list[SourceImage]) -> np.ndarray:
    return np.stack([np.array(Image.open(io.BytesIO(image.read()))) for image in images])


@pytest.fixture
def cifar(tmp_path: Path) -> tuple[Path, np.ndarray]:
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    (folder / "batches.meta.txt").write_text("airplane\nautomobile\nbird\n\n")
    records = pixels(6, 1 + 3072)
    records[:, 0] = [0, 1, 2, 0, 1, 2]
    for number, name in enumerate([*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]):
        (folder / f"{name}.bin").write_bytes(records[number].tobytes())
    return folder, records


@pytest.mark.parametrize("where", ["", ".."])
def test_cifar10(cifar: tuple[Path, np.ndarray], spool: Path, where: str) -> None:
    folder, records = cifar
    listing = list_source(str(folder / where), SourceOptions(), spool)
    assert listing.class_names == ["airplane", "automobile", "bird"]
    images = list(listing)
    assert [i.class_name for i in images] == ["airplane", "automobile", "bird"] * 1 + [
        "airplane",
        "automobile",
    ]
    expected = records[:, 1:].reshape(6, 3, 32, 32).transpose(0, 2, 3, 1)
    assert np.array_equal(decoded(images), expected[:5])
    assert images[1].name == "data_batch_2.bin#0"
    test = listed(folder, spool, split="test")
    assert np.array_equal(decoded(test), expected[5:])
    refused(folder, spool, "no split 'valid'", "train, test", split="valid")


def test_damaged_cifar(cifar: tuple[Path, np.ndarray], spool: Path) -> None:
    folder, records = cifar
    (folder / "data_batch_3.bin").write_bytes(records.tobytes()[:5000])
    refused(folder, spool, "data_batch_3.bin, image 1, has 1927 of 3073 bytes")
    records[2, 0] = 9
    (folder / "data_batch_3.bin").write_bytes(records[2].tobytes())
    refused(folder, spool, "data_batch_3.bin, image 0", "label '9'", "3 class names")
    (folder / "data_batch_3.bin").unlink()
    refused(folder, spool, "not complete", "data_batch_3.bin")


def test_cifar100(tmp_path: Path, spool: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "fine_label_names.txt").write_text("a\nb\n")
    record = pixels(3074)
    record[:2] = 7, 1
    (tmp_path / "x" / "train.bin").write_bytes(record.tobytes())
    (image,) = listed(tmp_path / "x", spool)
    assert image.class_name == "b"
    assert np.array_equal(decoded([image])[0], record[2:].reshape(3, 32, 32).transpose(1, 2, 0))


def test_stl10(tmp_path: Path, spool: Path) -> None:
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    rgb = pixels(2, 96, 96, 3)
    (folder / "train_X.bin").write_bytes(rgb.transpose(0, 3, 2, 1).tobytes())
    (folder / "train_y.bin").write_bytes(bytes([2, 1]))
    (folder / "unlabeled_X.bin").write_bytes(rgb[:1].transpose(0, 3, 2, 1).tobytes())
    (folder / "class_names.txt").write_text("airplane\nbird")
    images = listed(tmp_path, spool)
    assert [i.class_name for i in images] == ["bird", "airplane"]
    assert np.array_equal(decoded(images), rgb)
    assert listed(folder, spool, split="unlabeled")[0].class_name is None
    (folder / "train_y.bin").write_bytes(bytes([2]))
    refused(folder, spool, "image 1, has no label")
    (folder / "train_y.bin").write_bytes(bytes([2, 1, 1]))
    refused(folder, spool, "more labels")


@pytest.mark.parametrize("packed", [False, True])
def test_idx(tmp_path: Path, spool: Path, packed: bool) -> None:
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    grey = pixels(3, 5, 4)
    images = struct.pack(">4I", 0x803, 3, 5, 4) + grey.tobytes()
    labels = struct.pack(">2I", 0x801, 3) + bytes([7, 0, 9])
    for name, data in (("images-idx3", images), ("labels-idx1", labels)):
        end = ".gz" if packed else ""
        content = gzip.compress(data) if packed else data
        (folder / f"train-{name}-ubyte{end}").write_bytes(content)
    found = listed(tmp_path, spool)
    assert [i.class_name for i in found] == ["7", "0", "9"]
    assert np.array_equal(decoded(found), grey)
    file = folder / f"train-images-idx3-ubyte{'.gz' if packed else ''}"
    file.write_bytes(file.read_bytes()[:-3])
    refused(tmp_path, spool, "train-images")
    file.write_bytes(b"\0\0\x0d\3" + bytes(12) if not packed else b"no gzip at all")
    refused(tmp_path, spool, "train-images")


def test_food101(tmp_path: Path, spool: Path) -> None:
    root = tmp_path / "food-101"
    (root / "meta").mkdir(parents=True)
    for name in ("pie", "apple"):
        (root / "images" / name).mkdir(parents=True)
        for number in (1, 2):
            (root / "images" / name / f"{number}.jpg").write_text(f"{name} {number}")
    splits = {"train": 1, "test": 2}
    for split, number in splits.items():
        listing = {name: [f"{name}/{number}"] for name in ("pie", "apple")}
        (root / "meta" / f"{split}.json").write_text(json.dumps(listing))
    images = listed(tmp_path, spool, split="test")
    assert [(i.name, i.class_name) for i in images] == [
        ("apple/2.jpg", "apple"),
        ("pie/2.jpg", "pie"),
    ]
    assert images[0].read() == b"apple 2"
    for evil in ("pie/../../../etc/passwd", "other/1", 7):
        (root / "meta" / "train.json").write_text(json.dumps({"pie": [evil]}))
        refused(root, spool, "do not trust it")
    (root / "meta" / "train.json").write_text("{")
    refused(root, spool, "train.json is damaged")


@pytest.mark.parametrize(
    ("files", "part"),
    [
        (["cifar-10-batches-py/data_batch_1", "cifar-10-batches-py/test_batch"], "binary version"),
        (["train", "test", "meta"], "binary version"),
        (["flowers-102/imagelabels.mat"], "CSV"),
        (["train_32x32.mat"], "Parquet"),
        (["dataset_info.json", "data-00000-of-00001.arrow"], "to_parquet"),
    ],
)
def test_data_sets_that_are_never_unpickled(
    tmp_path: Path, spool: Path, files: list[str], part: str
) -> None:
    for file in files:
        (tmp_path / "x" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "x" / file).write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    refused(tmp_path / "x", spool, part)
