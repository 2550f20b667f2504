"""The check of a packed set: every kind of damage is found and named, indexes are mended."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastclr.config import ConfigError
from pipelines.check import check_set, check_shards, repair_indexes
from pipelines.shards import ShardError, ShardSet
from pipelines.writer import write_shards
from tests.pipelines.flaky import flaky

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes, 10 PNGs, shards of 4, 4 and 2. Read only."""
    folder = tmp_path_factory.mktemp("check")
    rng = np.random.default_rng(0)
    for k in range(10):
        file = folder / "source" / "ab"[k % 2] / f"{k}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8 + k, 9, 3), np.uint8)).save(file)
    write_shards(folder / "source", folder / "train", samples_per_shard=4)
    return folder / "train"


@pytest.fixture
def packed(original: Path, tmp_path: Path) -> Path:
    return shutil.copytree(original, tmp_path / "train")


def tar(packed: Path, number: int = 0) -> Path:
    return packed / f"train-{number:06d}.tar"


def index(packed: Path, number: int = 0) -> Path:
    return packed / f"train-{number:06d}.index.jsonl"


def edit_manifest(packed: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    fields = json.loads((packed / "manifest.json").read_text())
    edit(fields)
    (packed / "manifest.json").write_text(json.dumps(fields))


def forge(packed: Path, number: int = 0) -> None:
    """Make the manifest say what the files are, as one who knows the format would."""

    def edit(fields: dict[str, Any]) -> None:
        shard = fields["shards"][number]
        shard["num_bytes"] = (packed / shard["file"]).stat().st_size
        for name, key in (("file", "sha256"), ("index", "index_sha256")):
            shard[key] = hashlib.sha256((packed / shard[name]).read_bytes()).hexdigest()

    edit_manifest(packed, edit)


def edit_lines(packed: Path, edit: Callable[[list[dict[str, Any]]], object]) -> None:
    lines = [json.loads(line) for line in index(packed).read_text().splitlines()]
    edit(lines)
    index(packed).write_text("".join(json.dumps(line) + "\n" for line in lines))
    forge(packed)


def found(packed: Path, *parts: str, share: float = 1.0) -> None:
    problems = "\n".join(check_shards(packed, share=share).problems)
    for part in parts:
        assert part in problems, problems


def test_a_whole_set(original: Path) -> None:
    sizes: list[int] = []
    report = check_shards(original, share=1, on_start=sizes.append, on_bytes=sizes.append)
    assert (report.problems, report.num_samples, report.num_decoded) == ([], 10, 10)
    assert sizes[0] == sum(sizes[1:]) and len(sizes) == 4
    assert check_shards(original).num_decoded == 3  # one a shard
    assert check_shards(original, share=0).num_decoded == 0
    for share in (-0.1, 1.1, float("nan")):
        with pytest.raises(ConfigError, match="share is"):
            check_shards(original, share=share)


def test_no_set(tmp_path: Path, packed: Path) -> None:
    (packed / "manifest.json").unlink()
    for folder in (tmp_path / "nowhere", packed):
        for work in (check_shards, repair_indexes):
            with pytest.raises(ShardError, match="no shard set"):
                work(folder)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_missing_files(packed: Path, number: int) -> None:
    for file in (tar(packed, number), index(packed, number), packed / f"train-{number:06d}.idx"):
        kept = file.read_bytes()
        file.unlink()
        found(packed, file.name, "missing")
        file.write_bytes(kept)
    assert check_shards(packed).problems == []


def test_all_that_is_wrong_is_listed(packed: Path) -> None:
    tar(packed, 2).unlink()
    index(packed, 1).write_bytes(b"")
    raw = bytearray(tar(packed).read_bytes())
    raw[600] ^= 1
    tar(packed).write_bytes(raw)
    found(
        packed,
        "train-000002.tar has None bytes",
        "train-000001.index.jsonl does not have the sha256",
        "train-000000.tar has sha256",
        "train-000000.tar has images that are damaged: key 000000000 (from",
    )


def test_a_cut_tar(packed: Path) -> None:
    raw = tar(packed, 1).read_bytes()
    tar(packed, 1).write_bytes(raw[:700])
    found(packed, "train-000001.tar has 700 bytes", "is cut", "it has no 000000004.cls")
    tar(packed, 1).write_bytes(b"")
    found(packed, "train-000001.tar has 0 bytes", "it has no 000000004.png")
    tar(packed, 1).write_bytes(b"hello" * 1000)
    found(packed, "train-000001.tar has 5000 bytes", "cannot be read")


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"offset": 1024}, "the index says 000000001.png"),
        ({"num_bytes": 9}, "the index says 000000001.png of 9 at"),
        ({"key": "000000002"}, "a key appears twice"),
        ({"key": "x"}, "keys are no numbers"),
        ({"height": 5}, "the index says ('png', 5, 9)"),
        ({"extension": "jpg"}, "the index says 000000001.jpg"),
        ({"label": None}, "cls that the index does not list"),
        ({"label": 7}, "a label is 7"),
    ],
    ids=str,
)
def test_an_index_that_lies_with_the_right_hash(
    packed: Path, values: dict[str, Any], says: str
) -> None:
    edit_lines(packed, lambda lines: lines[1].update(values))
    found(packed, says)


def test_another_label_than_the_tar(packed: Path) -> None:
    edit_lines(packed, lambda lines: lines[1].update(label=1 - lines[1]["label"]))
    found(packed, "000000001.cls holds", "the index says")


def test_lines_out_of_order(packed: Path) -> None:
    edit_lines(packed, lambda lines: lines.reverse())
    found(packed, "keys do not count up")


def test_a_tar_with_more_than_the_index_with_the_right_hash(packed: Path) -> None:
    with tarfile.open(tar(packed), "a", format=tarfile.USTAR_FORMAT) as more:
        info = tarfile.TarInfo("000000009.json")
        info.size = 2
        more.addfile(info, io.BytesIO(b"{}"))
    forge(packed)
    found(packed, "it has 000000009.json that the index does not list")


def test_a_link_between_the_members(packed: Path) -> None:
    with tarfile.open(tar(packed)) as whole, tarfile.open(packed / "x", "w") as more:
        for number, info in enumerate(whole):
            if number == 2:
                link = tarfile.TarInfo("link")
                link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
                more.addfile(link)
            more.addfile(info, whole.extractfile(info))
    (packed / "x").replace(tar(packed))
    edit_lines(
        packed,
        lambda lines: [line.update(offset=line["offset"] + 512) for line in lines[1:]],
    )
    found(packed, "something else stands before 000000001.png")


def test_shards_that_changed_places(packed: Path) -> None:
    edit_manifest(packed, lambda fields: fields["shards"].reverse())
    found(packed, "comes after", "one is there twice or shards changed places")


def test_strangers_and_rejected(packed: Path) -> None:
    shutil.copy(tar(packed), packed / "train-000003.tar")
    (packed / "rejected.jsonl").write_text('{"source": "x", "reason": "y"}\n')
    found(packed, "does not name: train-000003.tar", "has 1 lines, the manifest says 0")


def test_dali_index_of_another_tar(packed: Path) -> None:
    shutil.copy(packed / "train-000001.idx", packed / "train-000000.idx")
    found(packed, "train-000000.idx does not have the sha256", "does not fit")


def test_repair_gives_the_same_files_while_sources_are_known(packed: Path, original: Path) -> None:
    (packed / "train-000000.idx").unlink()
    (packed / "train-000001.idx").write_text("v1.2 0\n")
    raw = index(packed, 2).read_bytes()
    index(packed, 2).write_bytes(raw.replace(b'"offset": 512', b'"offset": 0'))
    report = repair_indexes(packed)
    assert (len(report.files), report.num_lost, report.digest_changed) == (6, 0, False)
    for file in original.iterdir():
        assert (packed / file.name).read_bytes() == file.read_bytes()
    assert repair_indexes(packed).files == []


def test_repair_without_the_old_index(packed: Path, original: Path) -> None:
    index(packed).unlink()
    first, *_ = raw = index(packed, 1).read_bytes().splitlines(keepends=True)
    index(packed, 1).write_bytes(first + b"garbage\n[]\n" + b"[" * 9999 + b"\n" + raw[2][:40])
    report = repair_indexes(packed)
    assert (report.num_lost, report.digest_changed) == (4 + 3, True)
    assert check_shards(packed, share=1).problems == []
    mended, whole = ShardSet.open(packed), ShardSet.open(original)
    assert mended.label_N.tolist() == whole.label_N.tolist()
    assert mended.size_N2.tolist() == whole.size_N2.tolist()
    assert [mended.read(i) for i in range(10)] == [whole.read(i) for i in range(10)]
    assert mended.source_of(0) == "" and mended.source_of(4) == whole.source_of(4)
    fields = [json.loads((p / "manifest.json").read_text()) for p in (packed, original)]
    assert fields[0].keys() == fields[1].keys() and fields[0]["seed"] == fields[1]["seed"]


def test_no_repair_from_a_changed_tar(packed: Path) -> None:
    index(packed, 0).unlink()
    index(packed, 1).unlink()
    raw = bytearray(tar(packed).read_bytes())
    raw[-1] ^= 1
    tar(packed).write_bytes(raw)
    with pytest.raises(ShardError, match=r"whole tar:\n.*train-000000.tar has sha256"):
        repair_indexes(packed)
    assert not index(packed, 0).exists() and index(packed, 1).exists()
    tar(packed, 1).unlink()
    index(packed, 1).unlink()
    with pytest.raises(ShardError, match=r"train-000001\.tar cannot be read"):
        repair_indexes(packed)


def test_no_repair_from_a_tar_of_something_else(packed: Path) -> None:
    with tarfile.open(tar(packed), "w") as other:
        info = tarfile.TarInfo("000000000.pickle")
        info.size = 3
        other.addfile(info, io.BytesIO(b"abc"))
    forge(packed)
    with pytest.raises(ShardError, match="something else than samples: 000000000 has pickle"):
        repair_indexes(packed)


def run(*args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fastclr", "check", *map(str, args)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_command(packed: Path) -> None:
    done = run(packed, "--all")
    assert done.returncode == 0 and "10 images in place, 10 of them decoded" in done.stdout
    index(packed).unlink()
    done = run(packed)
    assert done.returncode == 65 and "1 problems:" in done.stderr and "Traceback" not in done.stderr
    assert "train-000000.index.jsonl is missing" in " ".join(done.stderr.split())
    done = run(packed, "--repair-index")
    assert done.returncode == 0 and "the sources of 4 images could not be read" in done.stdout
    assert "2 indexes written again" in done.stdout and "all is well" in done.stdout
    assert run(packed / "nowhere").returncode == 65 and run(packed, "--share", 2).returncode == 78


def test_sets_that_are_no_packed_folder(packed: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    for number in (0, 1):
        shutil.copy(tar(packed, number), foreign / f"{number}.tar")
    tars = sorted(packed.glob("*.tar"))
    with flaky() as server:
        for file in packed.iterdir():
            server.objects[f"/set/{file.name}"] = file.read_bytes()
        url = server.url("/set")
        mixed = f"{url}:0.5,{foreign}/{{0..1}}.tar:0.25,{packed}:0.25"
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
            report = check_set(mixed, share=1)
            assert report.problems == []
            assert report.num_samples == report.num_decoded == 20 + 8
            done = run(url)
            assert done.returncode == 0 and "10 images in place" in done.stdout
            server.objects[f"/set/{tars[0].name}"] = tars[0].read_bytes()[::-1]
            patch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))
            (problem,) = check_set(url, share=1).problems
            assert "has sha256" in problem and tars[0].name in problem
    raw = bytearray((foreign / "0.tar").read_bytes())
    sample = ShardSet.open(foreign)._indexes[0].sample(1)
    raw[sample.offset + 20 : sample.offset + sample.num_bytes] = bytes(sample.num_bytes - 20)
    (foreign / "0.tar").write_bytes(raw)
    done = run(foreign, "--all")
    assert done.returncode == 65, done.stdout
