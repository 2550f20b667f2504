"""Packing that is divided, limited or given damage: the same bytes, all counted, or a clear end."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import wds2idx
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fastclr.config import ConfigError
from pipelines import ustar
from pipelines.decode import Pixels
from pipelines.plan import Settings
from pipelines.shards import ShardError, ShardSet
from pipelines.transform import Transform
from pipelines.writer import write_shards
from tests.pipelines.packs import ROOT, files_of, packing

Picture = Callable[..., Pixels]
Encode = Callable[..., bytes]


# The same bytes, however the work is divided.


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_any_number_of_processes(
    many: Path, many_packed: dict[str, bytes], target: Path, workers: int
) -> None:
    assert files_of(packing(many, target, workers=workers).out) == many_packed
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.slow
def test_ray(many: Path, many_packed: dict[str, bytes], target: Path) -> None:
    import ray  # here: it takes seconds

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        assert files_of(packing(many, target, executor="ray").out) == many_packed
    finally:
        ray.shutdown()


@pytest.mark.parametrize("num_tasks", [1, 3, 16])
def test_task_arrays(
    many: Path, many_packed: dict[str, bytes], target: Path, num_tasks: int
) -> None:
    made = packing(many, target, run=False)
    for task in reversed(range(num_tasks)):
        with pytest.raises(ConfigError, match=r"--task 0/4|of 10 shards are not packed \("):
            made.merge()
        packed = made.run_task(task, num_tasks)
        assert packed == 4 * len(range(task, 10, num_tasks))
        assert not target.exists()
    summary = made.merge()
    assert (summary.num_samples, summary.num_shards, summary.num_classes) == (40, 10, 2)
    assert files_of(target) == many_packed and list(target.parent.iterdir()) == [target]
    assert made.merge() == summary, "merging twice does no harm"


def test_tasks_at_the_same_time(many: Path, many_packed: dict[str, bytes], target: Path) -> None:
    command = [sys.executable, "tools/make_shards.py", many, "--out", target]
    command += ["--samples-per-shard", "4", "--workers", "1"]
    tasks = [subprocess.Popen([*command, "--task", f"{k}/3"], cwd=ROOT) for k in range(3)]
    assert [task.wait() for task in tasks] == [0, 0, 0]
    subprocess.run([*command, "--merge"], cwd=ROOT, check=True)
    assert files_of(target) | {"manifest.json": b""} == many_packed | {"manifest.json": b""}
    manifest = json.loads((target / "manifest.json").read_bytes())
    assert manifest == json.loads(many_packed["manifest.json"])


def test_tasks_of_other_settings_do_not_mix(many: Path, target: Path) -> None:
    packing(many, target, run=False).run_task(0, 2)
    other = packing(many, target, run=False, seed=1)
    with pytest.raises(ConfigError, match="seed: 0, now 1"):
        other.run_task(1, 2)
    with pytest.raises(ConfigError, match="seed: 0, now 1"):
        other.merge()


@pytest.mark.parametrize("task", [(3, 3), (-1, 3), (0, 0)])
def test_a_task_that_does_not_exist(many: Path, target: Path, task: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match="tasks count from 0"):
        packing(many, target, run=False).run_task(*task)
    assert list(target.parent.iterdir()) == []


def test_the_command_tells_what_decides_the_bytes(many: Path, target: Path) -> None:
    transform = Transform("jpeg", 80, 4)
    settings = Settings("s3://me:secret@host/x y/?sig=1", "train", seed=3, transform=transform)
    assert settings.command() == (
        "fastclr shards 'x y' --out train --seed 3 --encode jpeg --quality 80 --shorter-side 4"
    )
    assert "secret" not in Settings("s3://me:secret@host", "train").command()


def test_memory_does_not_grow_with_the_source(tmp_path: Path) -> None:
    """Peak memory of planning and packing 15,000 entries of one file beside that of 1,000."""
    program = (
        "import resource, sys\nfrom pathlib import Path\nimport pipelines.disk_sort\n"
        "import pipelines.plan as p\nfrom pipelines.sources import Listing, SourceImage\n"
        "from pipelines.writer import Packing\n"
        "pipelines.disk_sort._RUN = 500\n"
        "n, file, out = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])\n"
        "p.list_source = lambda *_: Listing(SourceImage(f'{k % 7}/{k}', str(k % 7), file)"
        " for k in range(n))\n"
        "made = Packing(p.Settings('x', 'train', samples_per_shard=1000), out, workers=1)\n"
        "assert made.run().num_samples == n\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)\n"
    )
    image = tmp_path / "a.png"
    Image.new("RGB", (1, 1)).save(image)
    peaks = []
    for count in (1_000, 15_000):
        command = [
            sys.executable,
            "-c",
            program,
            str(count),
            image,
            tmp_path / f"{count}" / "train",
        ]
        peaks.append(int(subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout))
    assert peaks[1] < peaks[0] + 10, f"MiB: {peaks}"


# Damage.


@pytest.fixture
def damaged(many: Path, tmp_path: Path) -> Path:
    source = shutil.copytree(many, tmp_path / "bilder")
    (source / "a" / "leer.png").touch()
    (source / "a" / "text.png").write_text("kein Bild")
    (source / "b" / "lücke.png").write_bytes((source / "a" / "0.png").read_bytes()[:-30])
    os.mkfifo(source / "b" / "pipe.png")
    (source / "b" / "weg.png").symlink_to(tmp_path / "nirgends")
    return source


def test_damaged_images_are_listed(damaged: Path, target: Path) -> None:
    packing(damaged, target, max_rejected=5, workers=2)
    rows = [json.loads(line) for line in (target / "rejected.jsonl").read_text().splitlines()]
    reasons = {row["source"]: row["reason"] for row in rows}
    left_out = {"a/leer.png", "a/text.png", "b/lücke.png"}
    assert set(reasons) - {"b/pipe.png", "b/weg.png"} == left_out
    assert reasons["a/leer.png"] == "is empty (0 bytes)"
    manifest = json.loads((target / "manifest.json").read_bytes())
    assert manifest["num_rejected"] == len(rows) and manifest["num_samples"] == 40
    packed = ShardSet.open(target)
    packed.verify()
    assert len(packed) == 40
    keys = [json.loads(s)["key"] for f in sorted(target.glob("*.index.jsonl")) for s in f.open()]
    assert len(set(keys)) == 40 and keys == sorted(keys)
    assert int(keys[-1]) < 40 + len(rows)
    for tar, index in ((f, f.with_suffix(".index.jsonl")) for f in target.glob("*.tar")):
        for sample in map(json.loads, index.open()):
            data = (damaged / sample["source"]).read_bytes()
            at, end = sample["offset"], sample["offset"] + sample["num_bytes"]
            assert tar.read_bytes()[at:end] == data


@pytest.mark.parametrize("limit", [0, 2, 0.01])
def test_too_many_damaged_images(damaged: Path, target: Path, limit: float) -> None:
    with pytest.raises(ShardError, match=r"files cannot be used, so nothing(.|\n)*text.png"):
        packing(damaged, target, max_rejected=limit)
    assert list(target.parent.iterdir()) == []


def test_a_part_of_all_images(damaged: Path, target: Path) -> None:
    packing(damaged, target, max_rejected=0.2)
    assert len(ShardSet.open(target)) == 40


def test_a_shard_of_damaged_images_is_left_out(damaged: Path, target: Path) -> None:
    packing(damaged, target, max_rejected=0.2, samples_per_shard=1)
    assert len(ShardSet.open(target)) == len(list(target.glob("*.tar"))) == 40


def test_nothing_but_damaged_images(target: Path, tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "a.png").touch()
    with pytest.raises(ShardError, match="1 of 1 files"):
        packing(tmp_path / "x", target, max_rejected=1)


@pytest.mark.parametrize("limit", [-1, 1.5, float("nan")])
def test_a_limit_that_means_nothing(many: Path, target: Path, limit: float) -> None:
    with pytest.raises(ConfigError, match="max_rejected"):
        packing(many, target, max_rejected=limit)


def test_a_huge_header_is_damage(many: Path, target: Path, tmp_path: Path) -> None:
    source = shutil.copytree(many, tmp_path / "bilder")
    data = bytearray((source / "a" / "0.png").read_bytes())
    data[16:24] = (100_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    (source / "a" / "0.png").write_bytes(data)
    with pytest.raises(ShardError, match="100000 x 100000 pixels"):
        packing(source, target)


def test_a_source_that_changes_between_plan_and_packing(
    many: Path, target: Path, tmp_path: Path
) -> None:
    source = shutil.copytree(many, tmp_path / "bilder")
    made = packing(source, target, run=False, max_rejected=2, drop_duplicates=True)
    made.run_task(0, 10)
    first = {json.loads(s)["source"] for s in next(made.work.glob("set/*.jsonl")).open()}
    gone, other = sorted({p.relative_to(source).as_posix() for p in source.rglob("*.png")} - first)[
        :2
    ]
    (source / gone).unlink()
    shutil.copy(source / next(iter(first)), source / other)
    for task in range(1, 10):
        made.run_task(task, 10)
    assert made.merge().num_rejected == 2
    rows = map(json.loads, (target / "rejected.jsonl").open())
    reasons = {row["source"]: row["reason"] for row in rows}
    assert reasons == {gone: "No such file or directory", other: "changed while it was packed"}


# Duplicates.


def test_duplicates(many: Path, target: Path, tmp_path: Path) -> None:
    source = shutil.copytree(many, tmp_path / "bilder")
    for number in (4, 6, 8):
        shutil.copy(source / "a" / f"{number}.png", source / "b" / f"copy {number}.png")
        shutil.copy(source / "a" / f"{number}.png", source / "a" / f"z{number}.png")
    made = packing(source, target, drop_duplicates=True, workers=2)
    manifest = json.loads((target / "manifest.json").read_bytes())
    assert (manifest["num_duplicates"], manifest["num_samples"]) == (6, 40)
    assert manifest["command"].endswith("--samples-per-shard 4 --drop-duplicates")
    plain = packing(many, tmp_path / "plain" / "train")
    first, second = files_of(made.out), files_of(plain.out)
    del first["manifest.json"], second["manifest.json"]
    assert first == second, "as if the duplicates had never been there"


def test_damaged_duplicates_are_damage(target: Path, tmp_path: Path, many: Path) -> None:
    source = shutil.copytree(many, tmp_path / "bilder")
    for k in range(3):
        (source / "a" / f"x{k}.png").touch()
    packing(source, target, drop_duplicates=True, max_rejected=1)
    rows = [json.loads(line) for line in (target / "rejected.jsonl").open()]
    assert [row["source"] for row in rows] == ["a/x0.png"]


# Shards by bytes.


@pytest.mark.parametrize("limit", [1, 700, 10**9])
def test_shards_by_bytes(many: Path, target: Path, limit: int) -> None:
    packing(many, target, shard_bytes=limit, samples_per_shard=7)
    manifest = json.loads((target / "manifest.json").read_bytes())
    sums = []
    for shard in manifest["shards"]:
        sizes = [json.loads(line)["num_bytes"] for line in (target / shard["index"]).open()]
        sums.append(sum(sizes))
        assert len(sizes) <= 7 and (sum(sizes) <= limit or len(sizes) == 1)
    if limit == 700:
        assert min(map(len, (sums,))) > 6 and max(sums) > 400, "shards are not filled"
    assert len(manifest["shards"]) == {1: 40, 10**9: 6}.get(limit, len(sums))
    order = [
        json.loads(s)["source"] for f in sorted(target.glob("*.index.jsonl")) for s in f.open()
    ]
    plain = write_shards(many, target.parent / "plain")
    assert order == [plain.source_of(i) for i in range(40)]


# Tar and statistics.


@given(st.binary(max_size=2000), st.text("abc019._-", min_size=1, max_size=100))
@settings(max_examples=40, deadline=None)
def test_tar_blocks_are_those_of_tarfile(data: bytes, name: str) -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        member = tarfile.TarInfo(name)
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))
    ours = ustar.header(name.encode(), len(data)) + data + ustar.padding(len(data))
    assert ours + ustar.end(len(ours)) == stream.getvalue()


def test_a_tar_header_that_does_not_fit() -> None:
    for name, size in ((b"x" * 101, 1), (b"x", 8**11), (b"x", -1)):
        with pytest.raises(ValueError, match="cannot hold"):
            ustar.header(name, size)


def test_channel_statistics(source: Path, shard_set: ShardSet) -> None:
    manifest = json.loads((shard_set.path / "manifest.json").read_bytes())
    pixels = np.concatenate([shard_set[i].reshape(-1, 3) for i in range(len(shard_set))]) / 255
    assert np.allclose(manifest["channel_mean"], pixels.mean(0), atol=1e-12)
    assert np.allclose(manifest["channel_std"], pixels.std(0), atol=1e-12)


@pytest.mark.parametrize("value", [0, 255])
def test_statistics_of_large_plain_images(
    value: int, encode: Encode, target: Path, tmp_path: Path
) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "a.png").write_bytes(encode(np.full((700, 311, 3), value, np.uint8), "PNG"))
    packing(tmp_path / "x", target)
    manifest = json.loads((target / "manifest.json").read_bytes())
    assert manifest["channel_mean"] == [value / 255] * 3
    assert manifest["channel_std"] == [0, 0, 0]


def test_dali_index_is_that_of_wds2idx(shard_set: ShardSet, tmp_path: Path) -> None:
    for tar in sorted(shard_set.path.glob("*.tar")):
        with wds2idx.IndexCreator(str(tar), str(tmp_path / "x.idx"), verbose=False) as creator:
            creator.create_index()
        assert (tmp_path / "x.idx").read_bytes() == tar.with_suffix(".idx").read_bytes()
