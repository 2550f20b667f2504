"""Hostile and damaged shard sets: every error is a ShardError that names the place."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pipelines.packed as shards_of
from fastclr.config import ConfigError
from pipelines.shards import Sample, ShardError, ShardSet

FIELDS = [
    "file",
    "index",
    "dali_index",
    "num_samples",
    "num_bytes",
    "sha256",
    "index_sha256",
    "dali_index_sha256",
]
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


def refuse_at_first_use(packed: Path, *parts: str) -> None:
    """Every way into a shard meets what is wrong with its index."""
    whole = ShardSet.open(packed)
    uses: list[Callable[[], object]] = [
        lambda: whole[3],
        lambda: whole.read(0),
        lambda: whole.sizes(np.array([20, 2])),
        lambda: whole.images(np.array([20, 2])),
        lambda: whole.labels(np.array([7])),
        lambda: whole.label_N,
        lambda: whole.size_N2,
        lambda: whole.source_of(1),
    ]
    for use in uses:
        with pytest.raises(ShardError) as caught:
            use()
        for part in (str(packed), *parts):
            assert part in str(caught.value)
    assert whole[10].shape[2] == 3  # the other shards are as good as before


def test_an_untouched_copy_opens(packed: Path, shard_set: ShardSet) -> None:
    copy = ShardSet.open(str(packed))
    copy.verify()
    assert copy.digest == shard_set.digest and len(copy) == 21
    assert copy.label_N.dtype == np.int64 and copy.size_N2.dtype == np.int32
    assert [image.shape[:2] for image in copy] == [tuple(size) for size in copy.size_N2.tolist()]
    for wrong in (21, -1):
        with pytest.raises(IndexError):
            copy[wrong]
        with pytest.raises(IndexError):
            copy.sizes(np.array([0, wrong]))


@pytest.mark.parametrize("damage", ["nowhere", "a file", "no manifest"])
def test_no_shard_set(packed: Path, damage: str) -> None:
    if damage == "no manifest":
        (packed / "manifest.json").unlink()
    else:
        shutil.rmtree(packed)
        if damage == "a file":
            packed.write_text("hello")
    refuse(packed, "is no shard set", "fastclr shards")


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


@pytest.mark.parametrize("key", FIELDS)
@pytest.mark.parametrize("value", ["gone", None, [1], True], ids=str)
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


@pytest.mark.parametrize("change", [{"version": 1}, {"version": "2"}, {"format": "other"}])
def test_another_format_or_version(packed: Path, change: dict[str, object]) -> None:
    edit_manifest(packed, lambda m: m.update(change))
    refuse(
        packed, "this fastclr reads fastclr-shards version 2", "pack again", str(*change.values())
    )


@pytest.mark.parametrize("key", ["file", "index", "dali_index"])
@pytest.mark.parametrize("name", ["", "../secret", "/etc/passwd", "a/b", "..", "./x", "x/"])
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
    refuse_at_first_use(packed, "train-000000.index.jsonl does not have the sha256 of its manifest")


@pytest.mark.parametrize(
    "raw",
    [b"", b"{}\n", b"[]\n", b"nonsense\n", b"\xff\n", b'{"key": "a"}\n', b"[" * 100_000],
    ids=["empty", "no fields", "list", "no json", "no utf-8", "one field", "deep"],
)
def test_an_index_of_nonsense_with_the_right_hash(packed: Path, raw: bytes) -> None:
    write_index(packed, raw)
    refuse_at_first_use(packed, "train-000000.index.jsonl", "pack again")


@pytest.mark.parametrize(
    "values",
    [
        {"offset": 10**9},
        {"offset": -1},
        {"offset": "0"},
        {"offset": 512.0},
        {"offset": 0},
        {"offset": 513},
        {"offset": 2**70},
        {"height": True},
        {"num_bytes": 0},
        {"height": 2**14, "width": 2**14},
        {"extension": None},
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
    refuse_at_first_use(packed, "train-000000.index.jsonl", "pack again")


@pytest.mark.parametrize("label", [3, -2, 2**31 - 1])
def test_a_label_without_a_class(packed: Path, label: int) -> None:
    edit_index(packed, 0, label=label)
    refuse_at_first_use(packed, f"{label}", "there are 3 classes")


def test_a_key_twice(packed: Path) -> None:
    edit_index(packed, 0, key="000000007")
    refuse_at_first_use(packed, "train-000000.index.jsonl", "a key appears twice")


@pytest.mark.parametrize("key", FIELDS[:3])
def test_a_file_twice(packed: Path, key: str) -> None:
    edit_manifest(packed, lambda m: m["shards"][1].update({key: m["shards"][0][key]}))
    refuse(packed, "manifest.json names a file twice")


@pytest.mark.parametrize("value", ["", "../../etc/passwd", "0" * 63, "G" * 64, "0" * 64 + "\n"])
@pytest.mark.parametrize("key", ["sha256", "index_sha256", "dali_index_sha256"])
def test_a_hash_that_is_none(packed: Path, key: str, value: str) -> None:
    edit_manifest(packed, lambda m: m["shards"][2].update({key: value}))
    refuse(packed, "manifest.json is damaged", key)


def test_counts_that_contradict(packed: Path) -> None:
    edit_manifest(packed, lambda m: m.update(num_samples=22))
    refuse(packed, "hold 21 samples, the manifest says 22")
    edit_manifest(packed, lambda m: m["shards"][0].update(num_samples=9))
    refuse_at_first_use(
        packed, "train-000000.index.jsonl does not fit train-000000.tar", "lists 8", "says 9"
    )


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


def test_an_image_replaced_by_another_of_its_length(packed: Path) -> None:
    """Bytes of another place are found by the tar header before them."""
    first, second = (json.loads(line) for line in index_lines(packed)[:2])
    edit_index(packed, 0, **{k: second[k] for k in ("offset", "num_bytes", "height", "width")})
    shards = ShardSet.open(packed)
    name = rf"{second['key']}\.{second['extension']}"
    with pytest.raises(ShardError, match=rf"key {first['key']} .*the tar has '{name}'"):
        shards.read(0)
    assert shards.read(1)


def test_an_image_of_another_length_than_its_index(packed: Path) -> None:
    num_bytes = json.loads(index_lines(packed)[2])["num_bytes"]
    edit_index(packed, 2, num_bytes=num_bytes - 1)
    with pytest.raises(ShardError, match=rf"has {num_bytes - 1} bytes, the tar says {num_bytes}"):
        ShardSet.open(packed).read(2)


def index_lines(packed: Path) -> list[str]:
    return (packed / "train-000000.index.jsonl").read_text().splitlines()


def test_no_command_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="runs none"):
        ShardSet.open("pipe:touch here")
    assert not (tmp_path / "here").exists()


def test_open_reads_the_manifest_alone(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    parse = shards_of.parse_index
    monkeypatch.setattr(
        shards_of, "parse_index", lambda raw, **more: read.append("x") or parse(raw, **more)
    )
    shards = ShardSet.open(packed)
    assert len(shards) == 21 and read == []
    assert shards[17].shape[2] == 3 and shards.read(20) and read == ["x"]
    assert shards.sizes(np.array([0, 17])).shape == (2, 2) and len(read) == 2


def test_files_stay_open_in_bounded_number(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def open_now() -> int:
        links = [link for link in Path("/proc/self/fd").iterdir() if link.exists()]
        return sum(link.resolve().parent == packed.resolve() for link in links)

    monkeypatch.setattr("pipelines.shards.MOST_FILES", 2)
    opened: list[object] = []
    really_open = os.open
    monkeypatch.setattr(os, "open", lambda *a: opened.append(a[0]) or really_open(*a))
    shards = ShardSet.open(packed)
    for i in (0, 1, 8, 9, 0, 8, 16, 17, 8):
        shards.read(i)
    assert len(opened) == 3 and open_now() == 2  # 16 pushed 0 out
    shards.read(0)
    assert len(opened) == 4 and open_now() == 2
    del shards
    gc.collect()
    assert open_now() == 0


def test_threads_that_read_everywhere(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.shards.MOST_FILES", 1)
    whole = ShardSet.open(packed)
    expected = [whole.read(i) for i in range(21)]
    ids = np.random.default_rng(0).integers(0, 21, 600).tolist()
    with ThreadPoolExecutor(4) as pool:
        for i, data in zip(ids, pool.map(ShardSet.open(packed).read, ids), strict=True):
            assert data == expected[i]


def test_ten_million_samples(tmp_path: Path) -> None:
    """Opening costs the manifest, a sample costs its shard's index."""
    num_samples, num_bytes = 4096, 512 + 4096 * 1024
    raw = "".join(
        Sample(f"{i:09d}", "jpg", 512 + i * 1024, 500, 9, 8, i % 7, f"c/{i}.jpg").line()
        for i in range(num_samples)
    ).encode()
    digest = hashlib.sha256(raw).hexdigest()
    entries = []
    for number in range(2441):
        entry: dict[str, Any] = dict.fromkeys(
            ("sha256", "index_sha256", "dali_index_sha256"), digest
        )
        name = f"x-{number:06d}"
        entry |= {"file": f"{name}.tar", "index": f"{name}.jsonl", "dali_index": f"{name}.idx"}
        entries.append(entry | {"num_samples": num_samples, "num_bytes": num_bytes})
        with (tmp_path / entry["file"]).open("wb") as stream:
            stream.truncate(num_bytes)  # a hole
        (tmp_path / entry["index"]).write_bytes(raw if number in (7, 2400) else b"not read")
    manifest: dict[str, Any] = {"format": "fastclr-shards", "version": 2, "shards": entries}
    manifest |= {"num_samples": 2441 * num_samples, "class_names": list("abcdefg")}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    program = (
        "import sys, time; import numpy as np; from pipelines.shards import ShardSet\n"
        "started = time.process_time(); s = ShardSet.open(sys.argv[1])\n"
        "order = s.order(0); ids = order.ids(3, 5_000_000, 5_000_512)\n"
        "seconds = time.process_time() - started\n"
        "assert len(s) == 9_998_336 and len(set(ids.tolist())) == 512\n"
        "assert s.labels(np.array([2400 * 4096 + 8, 7 * 4096])).tolist() == [1, 0]\n"
        "peak = open('/proc/self/status').read().split('VmHWM:')[1].split()[0]\n"
        "print(seconds, int(peak) / 1024)"
    )
    run = subprocess.run(
        [sys.executable, "-c", program, tmp_path], capture_output=True, text=True, check=True,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    seconds, megabytes = map(float, run.stdout.split())
    assert seconds < 2 and megabytes < 500
