"""Scores on two ranks are those of one; a probe beside a training changes nothing of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("evaluate_ranks.py")


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    """Return what the script finds."""
    gone = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    environ = {k: v for k, v in os.environ.items() if k not in gone} | {"OMP_NUM_THREADS": "1"}
    result = tmp_path_factory.mktemp("ranks") / "found.json"
    command = [sys.executable, str(SCRIPT), str(result)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environ)
    assert done.returncode == 0, done.stderr[-6000:]
    return {**json.loads(result.read_text()), "said": done.stderr}


@pytest.mark.parametrize("how", ["", " in chunks", " on 2 ranks"])
def test_a_training_does_not_notice_the_probe_beside_it(found, how):
    joint, alone = found[f"joint{how}"], found[f"alone{how}"]
    for name in ("model.safetensors", "lars.safetensors", "losses", "step", "loader"):
        assert joint[name] == alone[name]
    assert joint["probe"] and alone["probe"] is None
    for row, other in zip(joint["rows"], alone["rows"], strict=True):
        assert 0 <= row["joint_top1"] <= 1 and "joint_top1" not in other
        assert all(row[key] == other[key] for key in other if key != "evaluation_seconds")


def test_the_probe_goes_on_where_it_was(found):
    for name in ("probe", "model.safetensors", "losses"):
        assert found["resumed"][name] == found["joint"][name]
    assert found["resumed"]["rows"][-1]["joint_top1"] == found["joint"]["rows"][-1]["joint_top1"]


def test_the_probe_of_two_ranks_is_that_of_one(found):
    one, two = found["probes"]
    assert two == pytest.approx(one, abs=1e-6)
    assert max(map(abs, one)) > 0.001


def test_two_ranks_have_the_scores_of_one(found):
    one, two = found["scored"]
    assert one["codes"][0] == one["codes"][1] == [0] and two["codes"][0] == [0, 0]
    assert len(one["scores"]) == 9
    assert two["scores"] == one["scores"]
    assert two["settings"] == one["settings"]
    assert two["chosen"] == one["chosen"]
    assert two["features"] == one["features"]
    assert one["unchanged"] and two["unchanged"]


def test_the_saved_probe_is_scored_as_in_training(found):
    last = found["joint"]["rows"][-1]
    assert found["scored"][0]["scores"]["linear-joint"]["top1"] == last["joint_top1"]


def test_what_one_rank_refuses_ends_all(found):
    for scored in found["scored"]:
        num_ranks = len(scored["codes"][0])
        assert scored["codes"][2:] == 2 * [num_ranks * [78]]
    assert found["said"].count("error: the model has no layer 'nothing'") == 2
    assert found["said"].count("error: 9 layers of the projection head are to be kept") == 2
