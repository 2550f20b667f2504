"""Training on data from S3 that fails now and then, mixed with others' tars, one image damaged."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from tests.pipelines.flaky import drawn, flaky_s3

pytestmark = pytest.mark.slow

SETTINGS = (
    "--global-batch-size 160 --epochs 1 --log-every 1 --evaluation.most-images 100 "
    "--data.cache-gib 0.5"
).split()


def test_a_mixture_of_s3_and_foreign_tars(commands, photos, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    foreign, run_dir = tmp_path / "foreign", tmp_path / "run"
    foreign.mkdir()
    for file in photos.test.glob("*.tar"):
        shutil.copy(file, foreign)
    damaged = shutil.copytree(photos.train, tmp_path / "train")
    _damage(damaged, range(0, 640, 64))
    with flaky_s3("photos") as s3:
        for split in (damaged, photos.test):
            for file in split.iterdir():
                s3.put(f"/photos/{split.name}/{file.name}", file.read_bytes())
        s3.draw = drawn(0.1, 2, ("500", "503", "reset", "cut"))
        mixed = f"s3://photos/train:0.75,{foreign}/*.tar:0.25"
        online = ("--evaluation.train", photos.train, "--evaluation.test", "s3://photos/test")
        command = commands.train(
            *SETTINGS, "--data.train", mixed, "--data.on-damage", "replace",
            "--data.cache-dir", tmp_path / "cache", *online, "--run-dir", run_dir,
        )  # fmt: skip
        done = commands.run(*command)
        assert done.returncode == 0, done.stderr[-3000:]
        assert list(commands.losses(run_dir)) == [1, 2, 3, 4, 5]
        summary = json.loads((run_dir / "summary.json").read_text())
        assert 1 <= summary["damaged_samples"] <= 10
        facts = json.loads((run_dir / "config.json").read_text())
        assert facts["data"]["train"]["path"] == mixed
        assert facts["data"]["train"]["num_samples"] == 800
        assert list((tmp_path / "cache" / "shards").glob("*.shard"))
        tars = f"{foreign}/*.tar"
        for name, *flags in (("evaluate.py", "--train", foreign, "--test", tars), ("report.py",)):
            done = commands.run(f"tools/{name}", "--run", run_dir, *flags)
            assert done.returncode == 0, done.stderr[-3000:]
        assert json.loads((run_dir / "scores.json").read_text())["test"] == tars
        sheet = tmp_path / "views.png"
        show = ("tools/show_views.py", "s3://photos/test", "--out", sheet)
        done = commands.run(*show)
        assert done.returncode == 0 and sheet.exists(), done.stderr[-3000:]
        nowhere = ("--data.train", "s3://photos/nowhere", "--run-dir", tmp_path / "another")
        done = commands.run(*commands.train(*nowhere))
        assert done.returncode == 65 and "s3://photos/nowhere is no shard set" in done.stderr


def _damage(folder: Path, rows: range) -> None:
    """Damage images of the first shard as if it had been packed so: the hashes are right."""
    manifest = json.loads((folder / "manifest.json").read_text())
    shard = manifest["shards"][0]
    index = [json.loads(line) for line in (folder / shard["index"]).read_text().splitlines()]
    with (folder / shard["file"]).open("r+b") as tar:
        for row in rows:
            tar.seek(index[row]["offset"] + index[row]["num_bytes"] // 2)
            tar.write(bytes(index[row]["num_bytes"] // 4))
    shard["sha256"] = hashlib.sha256((folder / shard["file"]).read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))
