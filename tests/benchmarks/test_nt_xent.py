"""The benchmark of NT-Xent: rows, reasons, and no time of a wrong loss."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks"
SCRIPT = FOLDER / "nt_xent.py"
TINY = "--sizes 48 --dims 16 8 --repeats 3 --large-sizes 160 --impls reference blocked inf-cl"


@pytest.fixture(scope="module")
def script(imported) -> ModuleType:
    return imported("nt_xent")


def test_rows_page_and_plot(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, SCRIPT, *TINY.split(), "--out", tmp_path],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "nt_xent_cpu.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    measured = [row for row in rows if "error" not in row]
    points = {(row["implementation"], row["num_images"], row["dim"]) for row in measured}
    assert points == {
        *((name, 48, dim) for name in ("reference", "blocked") for dim in (16, 8)),
        ("blocked", 160, 16),
    }
    for row in measured:
        assert row["version"] and row["hardware"] and row["loss"] > 0
        assert 0 < row["lowest_ms"] <= row["median_ms"] <= row["highest_ms"]
        if row["num_images"] < 160:
            assert len(row["rounds_ms"]) == 3
            assert row["floor_ms"] > 0
            assert row["floor_ratio"] > 0
    page = (tmp_path / "nt_xent_cpu.md").read_text(encoding="utf-8")
    for row in (row for row in rows if "error" in row):  # its kernels are for GPUs
        assert row["implementation"] == "inf-cl"
        assert len(row["error"]) > len("AssertionError: ")
        assert row["error"] in page
    assert len(rows) - len(measured) == 2
    assert "fastclr blocked" in (tmp_path / "nt_xent_cpu.svg").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("scale_loss", "scale_gradient", "message"),
    [(1.001, 1.0, "blocked: the loss is"), (1.0, 1.05, "blocked: the gradient is")],
)
def test_no_time_of_a_wrong_loss(
    script: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    scale_loss: float,
    scale_gradient: float,
    message: str,
) -> None:
    right = script.IMPLEMENTATIONS["blocked"]

    def wrong(temperature: float):
        def loss(*z: torch.Tensor) -> torch.Tensor:
            value = right.build(temperature)(*z)
            slope = scale_gradient * value
            return slope + (scale_loss * value - slope).detach()

        return loss

    assert script.check(["blocked"], 8, "cpu") == {}
    monkeypatch.setitem(script.IMPLEMENTATIONS, "blocked", right._replace(build=wrong))
    with pytest.raises(RuntimeError, match=message):
        script.check(["blocked"], 8, "cpu")


def test_too_much_memory_is_a_reason(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "MEMORY_SHARE", 0.0)
    said = script.call_apart("reference", script.Point(2048, 8, "cpu"))
    assert "can't allocate memory" in said


def test_interrupt_keeps_rows(tmp_path: Path) -> None:
    path = tmp_path / "nt_xent_cpu.jsonl"
    flags = "--sizes 48 --dims 8 --repeats 3 --impls blocked --large-sizes 30000"
    process = subprocess.Popen(
        [sys.executable, SCRIPT, *flags.split(), "--out", tmp_path],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not (path.exists() and path.read_text(encoding="utf-8")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"the rows so far are in {path}" in said
    assert [json.loads(line)["num_images"] for line in path.read_text().splitlines()] == [48]
