"""A run that was killed goes on as if nothing had happened."""

from __future__ import annotations

import json
import shutil
import time

import numpy as np
import psutil
import pytest
from safetensors.numpy import load_file

from fastclr.audit import audit
from tests.starts import free_port

pytestmark = pytest.mark.slow

SETTINGS = (
    "--global-batch-size 32 --epochs 1 --log-every 1 --checkpoint-every 10 "
    "--optimizer.warmup-epochs 0.2"
).split()


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
            *(*SETTINGS, "--data.train", photos.train, "--run-dir", path), ds=ds_config
        )
        for name, path in runs.items()
    }
    assert commands.run(*command["whole"], ranks=ranks).returncode == 0

    process = commands.start(*command["killed"], ranks=ranks)
    wait_for(runs["killed"] / "checkpoints/latest", process)
    process.kill()
    assert not (runs["killed"] / "checkpoints/step-0000020").exists(), "killed too late to tell"
    assert not (runs["killed"] / "summary.json").exists()

    done = commands.run(*command["killed"], ranks=ranks)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "going on from" in done.stdout + done.stderr
    whole, resumed = (commands.losses(path) for path in runs.values())
    assert list(whole) == list(range(1, 21))
    assert resumed == whole
    weights = [
        load_file(path / "checkpoints/step-0000020/model.safetensors") for path in runs.values()
    ]
    assert all((weights[0][key] == weights[1][key]).all() for key in weights[0])
    _account(commands, runs["killed"], ranks)


def _account(commands, run_dir, ranks):
    """The ledger proves what was seen, a step can be taken again, and what is wrong shows."""
    assert {row.status for row in audit(run_dir)} == {"pass"}
    if ranks == 2:
        done = commands.run("tools/replay.py", run_dir, "--step", "13", ranks=2)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        assert "steps 11 to 13" in done.stdout
    file = max((run_dir / "ledger").glob("start-*-rank-00000.jsonl"))
    lines = file.read_text().splitlines(keepends=True)
    fields = [json.loads(line) for line in lines]
    views = {**fields[1], "views": fields[2]["views"]}
    ids = {**fields[1], "ids": fields[2]["ids"]}
    for wrong, failing in (
        (json.dumps(views) + "\n", {"batches of "}),
        (json.dumps(ids) + "\n", {"images of 20 steps", "images twice", "images never"}),
        ("", {"ranks that lack one of the steps to 20"}),
    ):
        file.write_text("".join([lines[0], wrong, *lines[2:]]))
        found = {row.what for row in audit(run_dir, num_views=100) if row.status == "FAIL"}
        assert all(any(what.startswith(words) for what in found) for words in failing), found
    file.write_text("".join(lines))


def rank_process(process, rank):
    """Return the process of a rank that a launcher started."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for child in psutil.Process(process.pid).children(recursive=True):
            try:
                is_rank = child.environ().get("RANK") == str(rank)
                if is_rank and "fastclr/train.py" in child.cmdline():
                    return child
            except psutil.Error:
                continue
    raise AssertionError(f"no process of rank {rank}")


def test_launchers_pass_on_a_preemption_and_restart_a_dead_rank(commands, photos, tmp_path):
    def train(run_dir):
        flags = (*SETTINGS, "--epochs", "2", "--checkpoint-every", "5")
        data = ("--data.train", photos.train, "--run-dir", run_dir)
        return commands.train(*flags, *data)

    assert commands.run(*train(tmp_path / "whole"), ranks=2).returncode == 0
    run_dir = tmp_path / "stopped"
    deepspeed = ["deepspeed", "--num_accelerators", "2", "--master_port", f"{free_port()}"]
    process = commands.launch(*deepspeed, *train(run_dir))
    wait_for(run_dir / "checkpoints/step-0000005", process)
    rank_process(process, 1).terminate()
    assert process.wait(60) == 75
    saved = json.loads((run_dir / "checkpoints/latest").read_text())
    assert saved < "step-0000040", "stopped too late to tell"

    torchrun = ["torchrun", "--nproc-per-node", "2", "--max-restarts", "1"]
    torchrun += ["--master-port", f"{free_port()}"]
    process = commands.launch(*torchrun, *train(run_dir))
    wait_for(run_dir / f"checkpoints/step-{(int(saved[5:]) // 5 + 1) * 5:07d}", process)
    rank_process(process, 1).kill()
    assert process.wait(180) == 0
    assert commands.losses(run_dir) == commands.losses(tmp_path / "whole")


def test_other_ranks_and_stages_go_on_from_whole_layers(commands, photos, tmp_path):
    # Without BatchNorm, and at a rate without spikes: both multiply rounding from step to step.
    plain = (
        "--encoder.name test_convnext --encoder.width 1 --encoder.stem imagenet --head.norm layer "
        "--optimizer.base-learning-rate 0.02"
    ).split()

    def train(run_dir, stage):
        ds_config = tmp_path / f"stage{stage}.json"
        ds_config.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
        flags = (*SETTINGS, *plain, "--data.train", photos.train, "--run-dir", run_dir)
        return commands.train(*flags, ds=ds_config)

    assert commands.run(*train(tmp_path / "whole", 0)).returncode == 0
    whole = commands.losses(tmp_path / "whole")
    process = commands.start(*train(tmp_path / "killed", 1), ranks=2)
    wait_for(tmp_path / "killed/checkpoints/latest", process)
    process.kill()
    assert not (tmp_path / "killed/checkpoints/step-0000020").exists(), "killed too late to tell"
    for ranks, stage in ((1, 0), (2, 3)):
        run_dir = tmp_path / f"{ranks} ranks, stage {stage}"
        shutil.copytree(tmp_path / "killed", run_dir)
        done = commands.run(*train(run_dir, stage), ranks=ranks)
        assert done.returncode == 0, done.stderr[-3000:]
        resumed = commands.losses(run_dir)
        assert list(resumed) == list(range(1, 21))
        assert max(abs(resumed[step] - whole[step]) for step in whole) < 1e-5
        ends = [
            p / "checkpoints/step-0000020/model.safetensors" for p in (tmp_path / "whole", run_dir)
        ]
        one, other = (np.concatenate([w.ravel() for w in load_file(end).values()]) for end in ends)
        distance = np.linalg.norm(one - other) / np.linalg.norm(one)
        print(f"{ranks} ranks, stage {stage}: weights {distance:.1e} from those of one whole run")
        assert distance < 1e-6


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
    assert "no whole checkpoint of the 1 there" in done.stderr
    assert "Traceback" not in done.stderr


def test_other_settings_are_refused_with_both_values(commands, photos, tmp_path):
    flags = ("--data.train", photos.train, "--run-dir", tmp_path / "run", "--epochs", "0.1")
    small = ("--global-batch-size", "32", "--optimizer.warmup-epochs", "0")
    assert commands.run(*commands.train(*small, *flags)).returncode == 0
    done = commands.run(*commands.train(*small, *flags, "--loss.temperature", "0.3"))
    assert done.returncode == 78
    assert "loss.temperature: 0.2 before, 0.3 now" in done.stderr
