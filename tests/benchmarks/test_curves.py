"""The benchmark of growth: its arithmetic, its verdicts, and small curves of each kind."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from pipelines import ShardSet

FOLDER = Path(__file__).parents[2] / "benchmarks"
Import = Callable[[str], ModuleType]


@pytest.fixture(scope="module")
def part(imported) -> Import:
    return lambda name: imported(f"curve_parts.{name}")


def row(name: str, variant: str, seconds: float, memory: float = 0, **sizes: int) -> dict[str, Any]:
    return {"name": name, "variant": variant, "p50_seconds": seconds, "peak_bytes": memory,
            "sizes": sizes}  # fmt: skip


def test_powers_and_verdicts(part: Import) -> None:
    page = part("page")
    steps = [row("step", "gradient caching", 2e-3 * b**1.1, batch=b) for b in (512, 2048, 8192)]
    assert page.power(steps, "batch", "p50_seconds") == pytest.approx(1.1)
    assert page.power(steps, "batch", "p50_seconds", least=8192) is None
    reads = [
        row("read", "", seconds, shards=n, samples_per_shard=8, read=64)
        for n, seconds in ((1, 0.1), (10, 1.0), (100, 1.6))
    ]
    starts = [row("start-up", "shards of 10", 1e-6 * n, 40 + n / 1e3, samples=n) for n in (10, 1e4)]
    lines = page.targets([*steps, *reads, *starts])
    assert lines[2].endswith("| <= 1.25 | 1.10 | met |")
    assert lines[3].endswith("| <= 1.5 | 1.60 | **missed** |")  # one shard is read again and again
    assert lines[4].endswith("| <= 0.9 | 1.00 | **missed** |")
    assert lines[5].endswith("| <= 1.5 | 1.25 | met |")
    assert page.targets(steps[:1])[2].endswith("not measured |")


def test_a_set_of_links_is_whole(part: Import, tmp_path: Path) -> None:
    reads = part("reads")
    found = list(reads.measure(tmp_path, (1, 3), 1, 64, lambda _: None))
    assert [r["sizes"]["shards"] for r in found] == [1, 3]
    assert all(r["p50_seconds"] > 0 and r["images_per_second"] > 0 for r in found)
    shards = ShardSet.open(tmp_path / "shards-3")
    shards.verify()
    each = len(shards) // 3
    assert shards.num_shards == 3 and each == 16
    assert shards.read(5) == shards.read(each + 5) == shards.read(2 * each + 5)


def test_each_size_starts_in_its_own_process(part: Import, tmp_path: Path) -> None:
    starts = part("starts")
    found = list(starts.measure(tmp_path, (1_000, 20_000), 1, lambda _: None))
    assert [(r["sizes"]["samples"], r["sizes"]["shards"]) for r in found] == [
        (1_000, 1), (20_000, 2), (1_000, 1), (20_000, 20),
    ]  # fmt: skip
    assert all(r["process_seconds"] > r["p50_seconds"] > 0 for r in found)
    assert all(10e6 < r["peak_bytes"] < 500e6 for r in found)


def test_a_small_run(tmp_path: Path) -> None:
    out = tmp_path / "curves.md"
    out.write_text("# By hand\n\n## Measured\n\nof yesterday\n")
    old = {**row("read", "x", 1.0, shards=1, samples_per_shard=4, read=4), "open_seconds": 0.1,
           "images_per_second": 4.0}  # fmt: skip
    out.with_suffix(".jsonl").write_text(json.dumps(old) + "\n")
    command = [sys.executable, str(FOLDER / "curves.py"), "--only", "step", "--batches", "16",
               "32", "--chunk", "16", "--step-rounds", "1", "--out", str(out)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    text = out.read_text()
    assert "# By hand" in text and "yesterday" not in text
    rows = [json.loads(line) for line in out.with_suffix(".jsonl").open()]
    assert [r["name"] for r in rows] == ["step", "step", "read"]  # the old row of reading stays
    assert [(r["variant"], r["sizes"]["batch"]) for r in rows[:2]] == [
        ("one chunk", 16), ("gradient caching", 32),
    ]  # fmt: skip
    assert all(r["repeats"] == 8 * 16 // r["sizes"]["batch"] for r in rows[:2])
    assert all(0 < r["loss_seconds"] < r["p50_seconds"] for r in rows[:2])
    assert out.with_suffix(".svg").read_text().count("<svg") == 1
    command[command.index("step")] = "steps"
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "no curve is called steps" in done.stderr
