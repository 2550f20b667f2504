"""A run that was killed goes on as if nothing had happened."""

from __future__ import annotations

import json
import time

import psutil
import pytest
from safetensors.numpy import load_file

pytestmark = pytest.mark.slow

SETTINGS = (
    "--global-batch-size 32 --epochs 1 --log-every 1 --checkpoint-every 10 "
    "--optimizer.warmup-epochs 0.2"
).split()


def kill_all(process):
    """Send SIGKILL to a process and everything it started."""
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in family:
        member.kill()
    process.wait()


def wait_for(path, process, seconds=120):
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize(("ranks", "stage"), [(1, 0), (2, 2)])
def test_killed_and_resumed_is_uninterrupted_bit_for_bit(commands, photos, tmp_path, ranks, stage):
    ds_config = tmp_path / "ds.json"
    ds_config.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    runs = {name: tmp_path / name for name in ("whole", "killed")}
    command = {
        name: commands.train(
            *(*SETTINGS, "--data.train", photos.train, "--run-dir", path),
            ranks=ranks,
            ds=ds_config,
        )
        for name, path in runs.items()
    }
    assert commands.run(*command["whole"]).returncode == 0

    process = commands.start(*command["killed"])
    wait_for(runs["killed"] / "checkpoints/latest", process)
    kill_all(process)
    assert not (runs["killed"] / "checkpoints/step-0000020").exists(), "killed too late to tell"
    assert not (runs["killed"] / "summary.json").exists()

    done = commands.run(*command["killed"])
    assert done.returncode == 0, done.stderr[-3000:]
    assert "going on from" in done.stdout + done.stderr
    whole, resumed = (commands.losses(path) for path in runs.values())
    assert list(whole) == list(range(1, 21))
    assert resumed == whole
    weights = [
        load_file(path / "checkpoints/step-0000020/model.safetensors") for path in runs.values()
    ]
    assert all((weights[0][key] == weights[1][key]).all() for key in weights[0])


def test_a_damaged_checkpoint_is_refused_by_name(commands, photos, tmp_path):
    flags = ("--data.train", photos.train, "--run-dir", tmp_path / "run", "--epochs", "0.2")
    command = commands.train("--global-batch-size", "32", "--optimizer.warmup-epochs", "0", *flags)
    assert commands.run(*command).returncode == 0
    (weights,) = (tmp_path / "run/checkpoints").glob("step-*/mp_rank_00_model_states.pt")
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    done = commands.run(*command)
    assert done.returncode == 78
    assert "mp_rank_00_model_states.pt does not have the sha256" in done.stderr
    assert "Traceback" not in done.stderr


def test_other_settings_are_refused_with_both_values(commands, photos, tmp_path):
    flags = ("--data.train", photos.train, "--run-dir", tmp_path / "run", "--epochs", "0.1")
    small = ("--global-batch-size", "32", "--optimizer.warmup-epochs", "0")
    assert commands.run(*commands.train(*small, *flags)).returncode == 0
    done = commands.run(*commands.train(*small, *flags, "--loss.temperature", "0.3"))
    assert done.returncode == 78
    assert "loss.temperature: 0.2 before, 0.3 now" in done.stderr
