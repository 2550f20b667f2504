"""A small part of the drills; ``make drills`` runs all of tier P."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

FOLDER = Path(__file__).parent
IN_THE_SUITE = "A6,A9,A10,A13,C2,C5,E3,G2,H3"


def run(script: str, *flags: str, timeout: float = 300) -> str:
    """Run a script of this folder; return what it says."""
    gone = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    environ = {k: v for k, v in os.environ.items() if k not in gone}
    command = [sys.executable, str(FOLDER / script), *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environ)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    return done.stdout


def test_drills():
    said = run("run.py", "--only", IN_THE_SUITE)
    assert f"{len(IN_THE_SUITE.split(','))} drills" in said and "all passed" in said


def test_killed_at_random_instants():
    assert "3 of 3 equal bit for bit" in run("kill_resume.py", "--runs", "3")
