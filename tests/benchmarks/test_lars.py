"""The benchmark of LARS: rows, tables, verdicts, and no time of a wrong step."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def script(imported) -> ModuleType:
    return imported("lars")


def test_rows_and_page(tmp_path: Path) -> None:
    out = tmp_path / "lars.md"
    out.write_text("# LARS\n\nWritten by hand.\n\n## Measured\n\nof yesterday\n")
    command = [sys.executable, FOLDER / "lars.py", "--models", "test_resnet", "--rounds", "2"]
    done = subprocess.run([*command, "--out", out], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    page = out.read_text()
    assert "Written by hand." in page and "yesterday" not in page
    rows = [json.loads(line) for line in out.with_suffix(".jsonl").open()]
    assert {"hardware", "threads", "versions"} <= rows[0].keys()
    names = [row["variant"] for row in rows]
    assert {"fastclr", "lightly", "torch-optimizer", "plain loop", "SGD, fused"} < set(names)
    for row in rows:
        assert len(row["seconds"]) == 2 and min(row["seconds"]) > 0
        assert f"| {row['variant']} |" in page
    sizes = rows[0]["sizes"]
    assert (sizes["model"], sizes["parameters"] > 1e5) == ("test_resnet", True)


def test_targets_are_judged(script: ModuleType) -> None:
    seconds = {"fastclr": [1.0, 2.0], "lightly": [3.1, 6.2], "torch-optimizer": [1.4, 2.8]}
    rows = [
        {"variant": name, "seconds": s} for name, s in {**seconds, script.FLOOR: [1, 2]}.items()
    ]
    lightly, torch_optimizer, floor = script.targets(rows)[2:5]
    assert lightly.endswith("| >= 3.0 | 3.10 | met |")
    assert torch_optimizer.endswith("| >= 1.5 | 1.40 | **missed** |")
    assert floor.endswith("| <= 1.4 | 1.00 | met |")


@pytest.mark.parametrize("name", ["lightly", "foreach loop"])
def test_a_wrong_step_is_not_timed(script: ModuleType, monkeypatch, name: str) -> None:
    sizes = [torch.Size((20, 30)), torch.Size((7,))]
    script.check(sizes)
    monkeypatch.setitem(script.CONTENDERS, name, script.CONTENDERS["SGD, fused"])
    with pytest.raises(AssertionError):
        script.check(sizes)


def test_sizes_of_the_thousand(script: ModuleType) -> None:
    assert len(script.shapes("1000-tensors")) == 1000
