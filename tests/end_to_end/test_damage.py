"""A run on a damaged shard: it ends, or goes on and says so."""

from __future__ import annotations

import json
import shutil

import pytest

from fastclr import NTXent, SimCLR, Trainer, encoders, heads
from fastclr.config import ConfigError
from fastclr.world import World
from pipelines import ShardSet, SimCLRPolicy, make_loader

pytestmark = pytest.mark.slow

SETTINGS = "--global-batch-size 160 --epochs 1 --log-every 2".split()


def test_damage_ends_a_run_or_is_replaced_and_told(commands, photos, tmp_path):
    data, run_dir = shutil.copytree(photos.train, tmp_path / "train"), tmp_path / "run"
    index = next(data.glob("*.index.jsonl")).read_text().splitlines()
    with next(data.glob("*.tar")).open("r+b") as tar:
        for line in (3, 500):
            sample = json.loads(index[line])
            tar.seek(sample["offset"] + sample["num_bytes"] // 2)
            tar.write(bytes(sample["num_bytes"] // 4))
    command = commands.train(*SETTINGS, "--data.train", data, "--run-dir", run_dir)

    done = commands.run(*command)
    assert done.returncode == 65
    assert ".tar, key " in done.stderr and "Traceback" not in done.stderr

    done = commands.run(*command, "--data.on-damage", "replace", "--data.in-memory")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("The next sample of the order takes its place") == 2
    assert "2 damaged images were replaced" in done.stdout
    rows = (run_dir / "metrics.jsonl").read_text().splitlines()
    assert json.loads(rows[-1])["damaged_samples"] == 2
    assert json.loads((run_dir / "summary.json").read_text())["damaged_samples"] == 2
    config = json.loads((run_dir / "config.json").read_text())["config"]
    assert config["data"]["backend"] != "auto" and config["data"]["backend"] in done.stdout


def test_more_views_than_the_loss_compares_are_refused(photos, tmp_path):
    shard_set, policy = ShardSet.open(photos.train), SimCLRPolicy(size=32)
    loader = make_loader(shard_set, [policy] * 3, micro_batch_size=4, world=World())
    encoder = encoders.create("resnet10", width=0.25, stem="small")
    model = SimCLR(encoder, heads.linear(encoder.feature_dim, output_dim=8))
    trainer = Trainer(
        model, loss=NTXent(temperature=0.2), ds_config={}, run_dir=tmp_path / "r", world=World()
    )
    with pytest.raises(ConfigError, match="makes 3 views of each image, and the loss compares two"):
        trainer.check(loader)
