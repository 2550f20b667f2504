"""Training on a GPU: the losses of a CPU, every ZeRO stage, kills, evaluation, bad losses."""

from __future__ import annotations

import json
import math
import os

import pytest
import torch

from fastclr.audit import audit
from fastclr.finite import FiniteGuard, NonFiniteLoss
from fastclr.world import World
from tests.end_to_end.test_resume import wait_for

# Without BatchNorm, and at a rate without spikes: both multiply rounding from step to step.
PLAIN = (
    "--encoder.name test_convnext --encoder.width 1 --encoder.stem imagenet --head.norm layer "
    "--optimizer.warmup-epochs 0.2 --optimizer.base-learning-rate 0.02 "
    "--global-batch-size 32 --epochs 1 --log-every 1 --data.backend threads"
).split()
STEPS = list(range(1, 21))


@pytest.fixture(scope="module")
def train(commands, photos):
    """Return a function that trains, with flags and a DeepSpeed JSON, and gives the losses."""

    def start(folder, ds, *flags):
        folder.mkdir()
        (folder / "ds.json").write_text(json.dumps(ds))
        paths = ("--data.train", photos.train, "--run-dir", folder / "run")
        done = commands.run(*commands.train(*flags, *paths, ds=folder / "ds.json"))
        assert done.returncode == 0, done.stderr[-3000:]
        return commands.losses(folder / "run")

    return start


@pytest.fixture(scope="module")
def on_cpu(train, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "CUDA_VISIBLE_DEVICES", "")
        return train(tmp_path_factory.mktemp("cpu") / "0", {}, *PLAIN)


CASES = {
    # Convolutions of a GPU multiply in TF32 unless told otherwise: 3.5e-3 on an H200.
    **{f"stage {stage}": ({"zero_optimization": {"stage": stage}}, 1e-2) for stage in range(4)},
    "4 chunks": ({"gradient_accumulation_steps": 4}, 1e-2),
    "autocast, stage 2": (
        {
            "torch_autocast": {"enabled": True, "dtype": "bfloat16"},
            "zero_optimization": {"stage": 2},
        },
        0.1,
    ),
    "bf16, stage 3": ({"bf16": {"enabled": True}, "zero_optimization": {"stage": 3}}, 0.2),
    # A loss scale so low that no step is left out.
    "fp16, stage 1": (
        {
            "fp16": {"enabled": True, "initial_scale_power": 8},
            "zero_optimization": {"stage": 1},
        },
        0.1,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_losses_are_those_of_a_cpu(case, train, on_cpu, tmp_path):
    ds, limit = CASES[case]
    found = train(tmp_path / "gpu", ds, *PLAIN)
    assert list(found) == list(on_cpu) == STEPS and on_cpu[20] < on_cpu[1] - 0.1
    worst = max(abs(found[step] - on_cpu[step]) for step in STEPS)
    print(f"{case}: losses of 20 steps differ from the CPU's by {worst:.1e} at most")
    assert worst < limit


@pytest.mark.parametrize("backend", ["kornia", "triton", "dali"])
def test_other_back_ends_train_alike(backend, train, on_cpu, tmp_path):
    found = train(tmp_path / "gpu", {}, *PLAIN, "--data.backend", backend)
    worst = max(abs(found[step] - on_cpu[step]) for step in STEPS)
    print(f"{backend}: losses of 20 steps differ from the CPU's by {worst:.1e} at most")
    assert list(found) == STEPS and worst < 0.05


def test_killed_and_resumed_sees_each_image_once(commands, photos, train, tmp_path):
    autocast = {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}
    flags = (*PLAIN, "--checkpoint-every", "5")
    whole = train(tmp_path / "whole", autocast, *flags)
    run_dir = tmp_path / "killed"
    paths = ("--data.train", photos.train, "--run-dir", run_dir)
    command = commands.train(*flags, *paths, ds=tmp_path / "whole/ds.json")
    process = commands.start(*command)
    wait_for(run_dir / "checkpoints/latest", process)
    process.kill()
    done = commands.run(*command)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "going on from" in done.stdout + done.stderr
    assert {row.status for row in audit(run_dir)} == {"pass"}
    resumed = commands.losses(run_dir)
    worst = max(abs(whole[step] - resumed[step]) for step in STEPS)
    print(f"killed and resumed: losses differ by {worst:.1e} at most")
    assert worst < 1e-3


def test_a_run_is_evaluated(commands, photos, tmp_path):
    run_dir = tmp_path / "run"
    data = ("--data.train", photos.train, "--run-dir", run_dir)
    done = commands.run(*commands.train(*data, "--epochs", "4", "--global-batch-size", "64"))
    assert done.returncode == 0, done.stderr[-3000:]
    evaluate = ("tools/evaluate.py", "--run", run_dir, "--train", photos.train)
    done = commands.run(commands.train()[0], *evaluate, "--test", photos.test)
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stdout[-1500:])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_bad_loss_is_told_before_the_update(value):
    guard = FiniteGuard(World())
    weight = torch.ones(3, device="cuda", requires_grad=True)
    loss = (weight * value).sum()
    guard.watch(loss)
    loss.backward()
    with pytest.raises(NonFiniteLoss, match="rank 0"):
        guard.check()
    guard.watch((weight * 2).sum())
    guard.check()
