"""The command: runs, is interrupted, goes on, reports."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastclr.config import ConfigError
from pipelines.photos import write_photo_tiles
from pipelines.writer import write_shards

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def study():
    """Return the function behind the command; another process would cost ten seconds."""
    return importlib.import_module("fastclr.commands.study").study


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Pack toy images."""
    folder = tmp_path_factory.mktemp("data")
    write_photo_tiles(folder / "images", train_per_photo=8, test_per_photo=4)
    for split in ("train", "test"):
        write_shards(folder / "images" / split, folder / split)
    return str(folder / "train"), str(folder / "test")


def start(*flags):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    command = [sys.executable, "-m", "fastclr", "study", *map(str, flags)]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_study_stops_at_a_signal_and_goes_on(study, data, tmp_path, capsys):
    folder = tmp_path / "results" / "heads" / "toy"
    work = tmp_path / "work"

    def rows():
        return sorted(folder.glob("????????????????.json"))

    process = start("heads", "--scale", "toy", "--data", *data, "--out", tmp_path, "--work", work)
    deadline = time.monotonic() + 250
    while len(rows()) < 2:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 75, err
    assert "start the same command again" in err
    done = len(rows())
    assert 2 <= done < 18
    assert all(json.loads(row.read_text())["scores"] for row in rows())
    assert not (folder / "study.json").exists()

    study("heads", "toy", 3, data, tmp_path, work)
    assert f"heads: 18 runs, {done} of them done before" in capsys.readouterr().out
    found = json.loads((folder / "study.json").read_text())
    assert (found["done"], found["runs"]) == (18, 18)
    assert all("no verdict" not in claim["verdict"] for claim in found["verdicts"])
    for page in ("RESULTS.md", "studies.html"):
        assert "Projection heads" in (tmp_path / page).read_text()


def test_a_report_is_made_of_the_rows_there_are(study, data, tmp_path, capsys):
    study("color_histogram", "toy", 1, data, tmp_path, tmp_path / "work")
    study("all", "toy", 2, data, tmp_path, tmp_path / "work", only_report=True)
    assert "The colour shortcut" in (tmp_path / "RESULTS.md").read_text()
    said = capsys.readouterr().out
    assert "transfer is left out" in said and "losses is left out: none of its runs is" in said
    assert [p.name for p in (tmp_path / "results").iterdir()] == ["color_histogram"]
    found = json.loads((tmp_path / "results/color_histogram/toy/study.json").read_text())
    assert (found["done"], found["runs"]) == (2, 4)


@pytest.mark.parametrize(
    ("name", "scale", "seeds", "message"),
    [
        ("no_such_study", "toy", 3, "'no_such_study' is unknown: choose heads"),
        ("heads", "huge", 3, "scale is 'huge'"),
        ("heads", "toy", 0, "seeds 0"),
        ("transfer", "toy", 3, "behind --transfer"),
        ("heads", "pilot", 3, "has 128 images and this scale takes 5120"),
    ],
)
def test_what_cannot_be_is_refused(study, data, tmp_path, name, scale, seeds, message):
    with pytest.raises(ConfigError, match=message):
        study(name, scale, seeds, data, tmp_path, tmp_path / "work")
