"""Packing that is killed, divided, limited or changed: the same bytes, or a clear end."""

from __future__ import annotations

import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fastclr.config import ConfigError
from pipelines import ustar
from pipelines.decode import DamagedImage, Pixels, check_and_decode, check_image, decode
from pipelines.executors import run_in_processes
from pipelines.packing import facts_file, pack_shard
from pipelines.plan import Plan, Settings
from pipelines.shards import ShardError, ShardSet
from pipelines.transform import Transform
from pipelines.writer import Packing, write_shards

Picture = Callable[..., Pixels]
Encode = Callable[..., bytes]
ROOT = Path(__file__).parents[2]


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory, picture: Picture, encode: Encode) -> Path:
    """Two classes of 20 small images. Read only."""
    root = tmp_path_factory.mktemp("many") / "bilder"
    for k in range(40):
        folder = root / ("ab"[k % 2])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{k}.png").write_bytes(encode(picture(6 + k % 3, 7, k), "PNG"))
    return root


@pytest.fixture(scope="module")
def expected(many: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What packing it in shards of 4 gives."""
    return files_of(packing(many, tmp_path_factory.mktemp("expected") / "train").out)


def packing(source: Path, out: Path, run: bool = True, **options: Any) -> Packing:
    kinds = {k: options.pop(k) for k in ("max_rejected", "executor", "workers") if k in options}
    options = {"samples_per_shard": 4, **options}
    made = Packing(Settings(str(source), out.name, **options), out, **kinds)
    if run:
        made.run()
    return made


@pytest.fixture
def target(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "train"


# The same bytes, however the work is divided.


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_any_number_of_processes(
    many: Path, expected: dict[str, bytes], target: Path, workers: int
) -> None:
    assert files_of(packing(many, target, workers=workers).out) == expected
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.slow
def test_ray(many: Path, expected: dict[str, bytes], target: Path) -> None:
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        assert files_of(packing(many, target, executor="ray").out) == expected
    finally:
        ray.shutdown()


@pytest.mark.parametrize("num_tasks", [1, 3, 16])
def test_task_arrays(many: Path, expected: dict[str, bytes], target: Path, num_tasks: int) -> None:
    made = packing(many, target, run=False)
    for task in reversed(range(num_tasks)):
        with pytest.raises(ConfigError, match=r"--task 0/4|of 10 shards are not packed \("):
            made.merge()
        packed = made.run_task(task, num_tasks)
        assert packed == 4 * len(range(task, 10, num_tasks))
        assert not target.exists()
    summary = made.merge()
    assert (summary.num_samples, summary.num_shards, summary.num_classes) == (40, 10, 2)
    assert files_of(target) == expected and list(target.parent.iterdir()) == [target]
    assert made.merge() == summary, "merging twice does no harm"


def test_tasks_at_the_same_time(many: Path, expected: dict[str, bytes], target: Path) -> None:
    command = [sys.executable, "tools/make_shards.py", many, "--out", target]
    command += ["--samples-per-shard", "4", "--workers", "1"]
    tasks = [subprocess.Popen([*command, "--task", f"{k}/3"], cwd=ROOT) for k in range(3)]
    assert [task.wait() for task in tasks] == [0, 0, 0]
    subprocess.run([*command, "--merge"], cwd=ROOT, check=True)
    assert files_of(target) | {"manifest.json": b""} == expected | {"manifest.json": b""}
    manifest = json.loads((target / "manifest.json").read_bytes())
    assert manifest == json.loads(expected["manifest.json"])


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


# Killed, and taken up again.

KILL = """
import os, signal, sys
from pathlib import Path
import pipelines.packing, pipelines.plan, pipelines.writer
from pipelines.plan import Settings
from pipelines.writer import Packing

def killer(function, at, calls=[]):
    def call(*args, **kwargs):
        calls.append(1)
        if len(calls) == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return call

module, name, at = sys.argv[3].split(":")
owner = getattr(pipelines, module)
for part in name.split(".")[:-1]:
    owner = getattr(owner, part)
last = name.split(".")[-1]
setattr(owner, last, killer(getattr(owner, last), int(at)))
Packing(Settings(sys.argv[1], "train", samples_per_shard=4), Path(sys.argv[2]), workers=1).run()
"""
POINTS = (
    "plan:write_json:1",
    "packing:check_and_decode:1",
    "packing:check_and_decode:23",
    "packing:_HashedFile.finish:10",
    "packing:write_json:1",
    "packing:write_json:10",
    "writer:write_json:1",
    "writer:sync:1",
    "writer:sync:2",
    "writer:_summary:1",
)


@pytest.mark.parametrize("point", POINTS)
def test_resuming_after_a_kill_gives_the_same_bytes(
    many: Path, expected: dict[str, bytes], target: Path, point: str
) -> None:
    done = subprocess.run([sys.executable, "-c", KILL, many, target, point], cwd=ROOT)
    assert done.returncode == -signal.SIGKILL
    published = point in ("writer:sync:2", "writer:_summary:1")
    assert target.exists() == published, "only the rename makes the set appear"
    before = {p: p.stat().st_mtime_ns for p in target.parent.glob("*/set/*.tar")}
    if not published:
        with pytest.raises(ConfigError, match="--resume"):
            packing(many, target)
    kept = packing(many, target, run=False)
    summary = kept.run(resume=True)
    assert summary.num_samples == 40
    assert files_of(target) == expected and list(target.parent.iterdir()) == [target]
    finished = [p for p in before if p.name < "train-000005"] if "23" in point else []
    for file in finished:
        assert (target / file.name).stat().st_mtime_ns == before[file], "packed again"
    ShardSet.open(target).verify()


def test_a_worker_that_is_killed(many: Path, target: Path, tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"ended with -9.*fewer --workers"):
        list(run_in_processes(_die, str(tmp_path), range(4), 2))


def _die(work: str, number: int) -> int:
    if number == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def test_workers_end_with_the_process_that_started_them(tmp_path: Path) -> None:
    program = (
        "import os, sys\nfrom pipelines.executors import run_in_processes\n"
        "from tests_packing_job import wait\n"
        "for pid in run_in_processes(wait, '.', range(6), 2): print(pid, flush=True)\n"
    )
    (tmp_path / "tests_packing_job.py").write_text(
        "import os, time\ndef wait(work, number):\n    time.sleep(0.1)\n    return os.getpid()\n"
    )
    (tmp_path / "main.py").write_text(f"if __name__ == '__main__':\n    exec({program!r})")
    path = {**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}"}
    parent = subprocess.Popen([sys.executable, tmp_path / "main.py"], stdout=-1, env=path)
    assert parent.stdout is not None
    with parent.stdout:
        pid = int(parent.stdout.readline())
        parent.kill()
        parent.wait()
    for _ in range(100):
        if not _runs(pid):
            return
        signal.sigtimedwait([], 0.1)
    pytest.fail("a worker outlived the packing by 10 s")


def _runs(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def test_a_second_packing_of_the_same_target_is_refused(many: Path, target: Path) -> None:
    first = packing(many, target, run=False)
    said = []

    def second(_: int) -> None:
        if not said:
            with pytest.raises(ConfigError) as caught:
                packing(many, target, run=False).run(resume=True)
            said.append(str(caught.value))

    replace(first, on_images=second).run()
    assert "another packing is at work" in said[0]
    assert len(ShardSet.open(target)) == 40


def interrupted(source: Path, target: Path, **options: Any) -> Packing:
    """Pack three shards and stop."""
    made = packing(source, target, run=False, workers=1, **options)

    def stop(count: int, calls: list[int] = []) -> None:  # noqa: B006
        calls.append(count)
        if len(calls) % 4 == 0:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="--resume goes on"):
        replace(made, on_images=stop).run()
    return made


def test_resuming_another_packing_is_refused(many: Path, target: Path) -> None:
    interrupted(many, target)
    for options in ({"seed": 1}, {"samples_per_shard": 5}, {"transform": Transform("png")}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            packing(many, target, run=False, **options).run(resume=True)


def test_resuming_with_another_source_is_refused(many: Path, target: Path, tmp_path: Path) -> None:
    source = shutil.copytree(many, tmp_path / "bilder")
    made = interrupted(source, target)
    (source / "a" / "neu.png").write_bytes((source / "a" / "0.png").read_bytes())
    with pytest.raises(ConfigError, match=r"lists other images.*rm -r"):
        made.run(resume=True)
    (source / "a" / "neu.png").unlink()
    assert made.run(resume=True).num_samples == 40


def test_resuming_what_was_never_begun_begins(many: Path, target: Path) -> None:
    assert packing(many, target, run=False).run(resume=True).num_samples == 40


def test_a_finished_set_is_not_taken_for_another_one(many: Path, target: Path) -> None:
    packing(many, target)
    with pytest.raises(ConfigError, match="not empty"):
        packing(many, target, run=False, seed=1).run(resume=True)


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


def test_a_full_disk_leaves_nothing_that_looks_whole(many: Path, target: Path) -> None:
    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))

    command = [sys.executable, "tools/make_shards.py", many, "--out", target]
    done = subprocess.run(
        [*command, "--workers", "1"], cwd=ROOT, preexec_fn=limit, capture_output=True, text=True
    )
    assert done.returncode == 74 and "File too large" in done.stderr
    assert list(target.parent.iterdir()) == []
    resource_free = subprocess.run(command, cwd=ROOT, capture_output=True)
    assert resource_free.returncode == 0


def test_a_disk_that_fills_later_can_be_resumed(
    many: Path, expected: dict[str, bytes], target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = iter([100] * 3)
    flush = ustar.end

    def full(size: int) -> bytes:
        if next(sizes, None) is None:
            raise OSError(28, "No space left on device")
        return flush(size)

    monkeypatch.setattr("pipelines.ustar.end", full)
    with pytest.raises(OSError, match=r"No space left on device .*--resume") as caught:
        packing(many, target, workers=1)
    assert caught.value.errno == 28
    (work,) = target.parent.iterdir()
    assert not list(work.glob(".train*")), "unfinished files were left"
    monkeypatch.undo()
    packing(many, target, run=False).run(resume=True)
    assert files_of(target) == expected


def test_the_command_tells_what_decides_the_bytes(many: Path, target: Path) -> None:
    transform = Transform("jpeg", 80, 4)
    settings = Settings("s3://me:secret@host/x y/?sig=1", "train", seed=3, transform=transform)
    assert settings.command() == (
        "python tools/make_shards.py 'x y' --out train --seed 3 --encode jpeg --quality 80 "
        "--shorter-side 4"
    )
    assert "secret" not in Settings("s3://me:secret@host", "train").command()


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
    wds2idx = pytest.importorskip("wds2idx")
    for tar in sorted(shard_set.path.glob("*.tar")):
        with wds2idx.IndexCreator(str(tar), str(tmp_path / "x.idx"), verbose=False) as creator:
            creator.create_index()
        assert (tmp_path / "x.idx").read_bytes() == tar.with_suffix(".idx").read_bytes()


# Transforms.


def modes(picture: Picture, encode: Encode) -> dict[str, bytes]:
    image = Image.fromarray(picture(40, 24, 3))
    deep = (np.arange(960, dtype=np.uint16).reshape(40, 24) * 68).astype(np.uint16)
    return {
        "rgb.jpg": encode(image, "JPEG", quality=95),
        "cmyk.jpg": encode(image.convert("CMYK"), "JPEG"),
        "grey.png": encode(image.convert("L"), "PNG"),
        "deep.png": encode(Image.fromarray(deep), "PNG"),
        "palette.png": encode(image.quantize(9), "PNG", transparency=0),
        "alpha.webp": encode(image.convert("RGBA"), "WEBP", lossless=True),
        "one.png": encode(picture(1, 1), "PNG"),
    }


def test_re_encoding_without_loss_keeps_the_pixels(
    picture: Picture, encode: Encode, target: Path, tmp_path: Path
) -> None:
    (tmp_path / "x").mkdir()
    images = modes(picture, encode)
    for name, data in images.items():
        (tmp_path / "x" / name).write_bytes(data)
    packing(tmp_path / "x", target, transform=Transform("png"))
    packed = ShardSet.open(target)
    assert len(packed) == len(images)
    for i in range(len(packed)):
        assert np.array_equal(packed[i], decode(images[packed.source_of(i)]))
        assert packed.read(i)[:4] == b"\x89PNG"
        assert Image.open(io.BytesIO(packed.read(i))).mode == "RGB"
    manifest = json.loads((target / "manifest.json").read_bytes())
    assert manifest["transform"] == {"encode": "png", "quality": 90, "shorter_side": None}


@pytest.mark.parametrize("kind", ["jpeg", "webp", "png"])
@pytest.mark.parametrize(("side", "size"), [(12, (20, 12)), (40, (40, 24)), (1, (2, 1))])
def test_shorter_side(
    picture: Picture, encode: Encode, kind: str, side: int, size: tuple[int, int]
) -> None:
    for name, data in modes(picture, encode).items():
        new = Transform(kind, 80, side).apply(data, decode(data))
        extension, height, width = check_image(new)
        assert extension == {"jpeg": "jpg"}.get(kind, kind)
        assert (height, width) == ((1, 1) if name == "one.png" else size)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(picture: Picture, encode: Encode, orientation: int) -> None:
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x112] = orientation
    data = encode(picture(20, 30), "PNG", exif=exif)
    new = Transform("png").apply(data, decode(data))
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    assert np.array_equal(decode(new), upright)
    assert Image.open(io.BytesIO(new)).getexif().get(0x112, 1) == 1


def test_hostile_exif_is_no_rotation(picture: Picture, encode: Encode) -> None:
    data = encode(picture(20, 30), "PNG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff" + bytes(20))
    assert np.array_equal(decode(Transform("png").apply(data, decode(data))), decode(data))


def test_quality_counts(picture: Picture, encode: Encode) -> None:
    data = encode(picture(90, 90), "PNG")
    for kind in ("jpeg", "webp"):
        low, high = (len(Transform(kind, q).apply(data, decode(data))) for q in (20, 95))
        assert low < high / 2


def test_what_a_format_cannot_hold_is_rejected(
    picture: Picture, encode: Encode, target: Path, tmp_path: Path
) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "wide.png").write_bytes(encode(picture(1, 17000), "PNG"))
    with pytest.raises(ShardError, match=r"wide.png cannot be encoded as webp"):
        packing(tmp_path / "x", target, transform=Transform("webp"))


@pytest.mark.parametrize(
    ("options", "word"),
    [(("gif",), "encode"), (("jpeg", 0), "quality"), (("jpeg", 90, 0), "shorter_side")],
)
def test_a_transform_that_does_not_exist(options: tuple[Any, ...], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        Transform(*options)


def test_transformed_shards_are_the_same_twice(many: Path, target: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"transform": Transform("jpeg", 80, 4)}
    first = packing(many, target, workers=2, **options)
    second = packing(many, tmp_path / "b" / "train", workers=1, **options)
    assert files_of(first.out) == files_of(second.out)
    assert (
        "--encode jpeg --quality 80 --shorter-side 4"
        in json.loads((target / "manifest.json").read_bytes())["command"]
    )


# The fast way through PNGs.


def test_plain_pngs_decode_as_with_pillow(picture: Picture, encode: Encode) -> None:
    for size in ((1, 1), (3, 5), (64, 33)):
        for level in (0, 1, 9):
            data = encode(picture(*size), "PNG", compress_level=level)
            kind, pixels = check_and_decode(data)
            assert kind == "png" and np.array_equal(pixels, np.array(Image.open(io.BytesIO(data))))
            assert pixels.flags.c_contiguous


@pytest.mark.parametrize("mode", ["RGB", "L", "P"])
def test_a_cut_png_is_damage(mode: str, picture: Picture, encode: Encode) -> None:
    data = encode(Image.fromarray(picture(9, 9)).convert(mode), "PNG")
    for length in range(len(data) - 8):
        with pytest.raises(DamagedImage):
            check_image(data[:length])


@given(st.integers(0, 10**6), st.integers(0, 7))
@settings(max_examples=60, deadline=None)
def test_a_flipped_bit_in_a_png_is_damage(at: int, bit: int) -> None:
    stream = io.BytesIO()
    pixels = np.arange(768, dtype=np.uint8).reshape(16, 16, 3)
    Image.fromarray(pixels).save(stream, "PNG")
    data = bytearray(stream.getvalue())
    at %= len(data)
    data[at] ^= 1 << bit
    try:
        _, found = check_and_decode(bytes(data))
    except ValueError:
        return
    assert np.array_equal(found, pixels), "other pixels were taken for good ones"


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


def test_the_plan_alone_is_enough(many: Path, target: Path, expected: dict[str, bytes]) -> None:
    """A shard packed twice at once, in any order, is the same."""
    made = interrupted(many, target)
    plan = Plan.load(made.work)
    for number in (9, 0, 5):
        assert pack_shard(str(made.work), number) == plan.shards[number][0] == 4
        assert facts_file(made.work, number).exists()
        name = f"train-{number:06d}.tar"
        assert (made.work / "set" / name).read_bytes() == expected[name]
