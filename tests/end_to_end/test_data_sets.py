"""Training on data from S3 that fails now and then, mixed with others' tars, one image damaged."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path

import pytest

from pipelines import ShardSet
from tests.pipelines.flaky import drawn, flaky_s3

pytestmark = pytest.mark.slow

SETTINGS = "--global-batch-size 160 --epochs 1 --log-every 1 --data.cache-gib 0.5".split()


def test_a_mixture_of_s3_and_foreign_tars(commands, photos, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    foreign, run_dir = tmp_path / "foreign", tmp_path / "run"
    foreign.mkdir()
    for file in photos.test.glob("*.tar"):
        shutil.copy(file, foreign)
    shard_set = ShardSet.open(photos.train)
    sample = shard_set._indexes[0].sample(5)
    damaged = shutil.copytree(photos.train, tmp_path / "train")
    _damage(damaged, sample.offset, sample.num_bytes)
    with flaky_s3("photos") as s3:
        for split in (damaged, photos.test):
            for file in split.iterdir():
                s3.put(f"/photos/{split.name}/{file.name}", file.read_bytes())
        s3.draw = drawn(0.1, 2, ("500", "503", "reset", "cut"))
        mixed = f"s3://photos/train:0.75,{foreign}/*.tar:0.25"
        online = ("--evaluation.train", foreign, "--evaluation.test", "s3://photos/test")
        command = commands.train(
            *SETTINGS, "--data.train", mixed, "--data.on-damage", "replace",
            "--data.cache-dir", tmp_path / "cache", *online, "--run-dir", run_dir,
        )  # fmt: skip
        done = commands.run(*command)
        assert done.returncode == 0, done.stderr[-3000:]
        assert list(commands.losses(run_dir)) == [1, 2, 3, 4, 5]
        facts = json.loads((run_dir / "config.json").read_text())
        assert facts["data"]["train"]["path"] == mixed
        assert facts["data"]["train"]["num_samples"] == 800
        assert list((tmp_path / "cache" / "shards").glob("*.shard"))
        tools = (("report.py",), ("evaluate.py", "--train", foreign, "--test", "s3://photos/test"))
        for name, *flags in reversed(tools):
            done = commands.run(sys.executable, f"tools/{name}", "--run", run_dir, *flags)
            assert done.returncode == 0, done.stderr[-3000:]
        assert json.loads((run_dir / "scores.json").read_text())["test"] == "s3://photos/test"
        sheet = tmp_path / "views.png"
        show = (sys.executable, "tools/show_views.py", "s3://photos/test", "--out", sheet)
        done = commands.run(*show)
        assert done.returncode == 0 and sheet.exists(), done.stderr[-3000:]
        nowhere = ("--data.train", "s3://photos/nowhere", "--run-dir", tmp_path / "another")
        done = commands.run(*commands.train(*nowhere))
        assert done.returncode == 65 and "s3://photos/nowhere is no shard set" in done.stderr


def _damage(folder: Path, offset: int, num_bytes: int) -> None:
    """Damage an image of the first shard, as it was before it was packed: the hashes are right."""
    manifest = json.loads((folder / "manifest.json").read_text())
    file = folder / manifest["shards"][0]["file"]
    with file.open("r+b") as tar:
        tar.seek(offset + num_bytes // 2)
        tar.write(bytes(num_bytes // 4))
    manifest["shards"][0]["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))
