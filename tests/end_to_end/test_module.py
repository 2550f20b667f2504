"""``fastclr train`` on two ranks is ``deepspeed fastclr/train.py``, step for step."""

from __future__ import annotations

import json
import os
import sys

import pytest
from safetensors.numpy import load_file

pytestmark = pytest.mark.slow

FLAGS = (
    "--recipe demo --encoder.width 0.25 --optimizer.warmup-epochs 0.2 "
    "--optimizer.base-learning-rate 0.5 --global-batch-size 32 --epochs 1 --log-every 1"
).split()


@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_losses_and_weights_are_equal(commands, photos, tmp_path, launcher):
    port = str(29900 + os.getpid() % 90)
    ranks = ["--num_accelerators", "2", "--master_port", port]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    module = {
        "deepspeed": ["deepspeed", *ranks, "--module", "fastclr", "train"],
        "torchrun": [*torchrun, "--master-port", port, "-m", "fastclr", "train"],
    }
    script = ["deepspeed", *ranks, "fastclr/train.py"]
    found = []
    for name, start, ds_config in (
        ("script", script, "fastclr/recipes/fp32_clipped.json"),
        ("module", module[launcher], "fp32_clipped"),
    ):
        run_dir = tmp_path / name
        own = ("--data.train", photos.train, "--run-dir", run_dir)
        done = commands.run(*start, "--ds-config", ds_config, *FLAGS, *own)
        assert done.returncode == 0, done.stderr[-3000:]
        weights = load_file(run_dir / "checkpoints/step-0000020/model.safetensors")
        facts = json.loads((run_dir / "config.json").read_text())
        found.append((commands.losses(run_dir), weights, facts))
    (one, weights_one, before), (two, weights_two, after) = found
    assert one == two and len(one) == 20 and one[20] < one[1]
    assert all((weights_one[name] == value).all() for name, value in weights_two.items())
    assert before["command"].startswith("deepspeed fastclr/train.py --ds-config")
    assert after["command"].startswith("deepspeed --module fastclr train --ds-config fp32_clipped")
