"""A small part of each drill; the whole of each is a command of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

FOLDER = Path(__file__).parent


def run(script: str, *flags: str, timeout: float = 400) -> list[str]:
    """Run a drill; return its lines."""
    gone = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    environ = {k: v for k, v in os.environ.items() if k not in gone}
    command = [sys.executable, str(FOLDER / script), *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environ)
    print(done.stdout)
    if done.returncode == 77:
        pytest.skip(done.stdout.strip().splitlines()[-1])
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    return done.stdout.splitlines()


@pytest.mark.parametrize(("ranks", "stage", "runs"), [(1, 0, 5), (2, 1, 2)])
def test_killed_at_random_instants(ranks, stage, runs):
    flags = ("--runs", runs, "--ranks", ranks, "--stage", stage)
    *_, last = run("kill_resume.py", *map(str, flags))
    assert f"{runs} of {runs} equal bit for bit" in last
    kills = re.search(r"after (\d+) kills", last)
    assert kills and int(kills[1]) >= runs


def test_signals():
    lines = [line for line in run("signals.py", "--instants", "3") if line.startswith("signal")]
    assert len(lines) == 7


def test_faults():
    lines = [line for line in run("faults.py") if line.startswith("fault")]
    assert len(lines) == 9


def test_two_hosts():
    lines = [line for line in run("two_hosts.py") if line.startswith("two hosts")]
    assert len(lines) == 3
