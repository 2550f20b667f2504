"""``fastclr train`` on two ranks is ``deepspeed fastclr/train.py``, step for step."""

from __future__ import annotations

import json
import sys

import pytest
from safetensors.numpy import load_file

from tests.starts import free_port

pytestmark = pytest.mark.slow

FLAGS = (
    "--recipe demo --encoder.width 0.25 --optimizer.warmup-epochs 0.2 "
    "--optimizer.base-learning-rate 0.5 --global-batch-size 32 --epochs 0.5 --log-every 1"
).split()
DS_CONFIG = "fastclr/recipes/fp32_clipped.json"
PORT = str(free_port())
DEEPSPEED = ["deepspeed", "--num_accelerators", "2", "--master_port", PORT]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
TORCHRUN += ["--master-port", PORT]


@pytest.fixture(scope="module")
def trained(commands, photos, tmp_path_factory):
    """Return what trains a run by a launcher and program, and says what came of it."""
    folder = tmp_path_factory.mktemp("module")

    def train(name, *start):
        run_dir = folder / name
        own = ("--data.train", photos.train, "--run-dir", run_dir)
        done = commands.launched(*start, *FLAGS, *own)
        assert done.returncode == 0, done.stderr[-3000:]
        weights = load_file(run_dir / "checkpoints/step-0000010/model.safetensors")
        facts = json.loads((run_dir / "config.json").read_text())
        return commands.losses(run_dir), weights, facts["command"]

    return train


@pytest.fixture(scope="module")
def script(trained):
    """Train by the script of the repository."""
    return trained("script", *DEEPSPEED, "fastclr/train.py", "--ds-config", DS_CONFIG)


@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_losses_and_weights_are_equal(script, trained, launcher):
    start = [*DEEPSPEED, "--module"] if launcher == "deepspeed" else [*TORCHRUN, "-m"]
    module = trained(launcher, *start, "fastclr", "train", "--ds-config", "fp32_clipped")
    assert module[0] == script[0] and len(script[0]) == 10
    assert module[1].keys() == script[1].keys()
    assert all((script[1][name] == value).all() for name, value in module[1].items())
    assert script[2].startswith("deepspeed fastclr/train.py --ds-config")
    assert module[2].startswith("deepspeed --module fastclr train --ds-config fp32_clipped")
