"""A small part of the drills; ``make drills`` runs all of tier P."""

from __future__ import annotations

import importlib
import json
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


def test_results_take_the_place_of_older_ones(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    results = importlib.import_module("results")
    drills = {"A1": "first", "B1": "second", "C1": "third"}

    def add(name, failures=(), skipped=""):
        cells = 0 if skipped else 5
        result = results.Result(
            name, 3, cells, len(failures), list(failures), 2.0, 1.0, "5 | seen", skipped
        )
        results.add(tmp_path, result, "L", drills)

    def state():
        rows = [json.loads(line) for line in (tmp_path / "drills.jsonl").read_text().splitlines()]
        return [row["variant"] for row in rows], (tmp_path / "drills.md").read_text()

    add("C1")
    add("A1", ["it hung\nand more"])
    add("B1", skipped="no root")
    names, page = state()
    assert names == ["A1", "B1", "C1"]
    assert "2 drills,\n10 cells, failed: A1." in page and "not run: no root" in page
    assert "| A1 | first | L | 3 | 4 of 5 | 2.0 | 1.0 | it hung; 5 / seen |" in page
    add("A1")
    names, page = state()
    assert names == ["A1", "B1", "C1"] and "none failed" in page and "5 of 5" in page
