"""The benchmark of the data plane: its arithmetic, its page, and a tiny run of its quick parts."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"

Import = Callable[[str], ModuleType]


@pytest.fixture(scope="module")
def part(imported) -> Import:
    return lambda name: imported(f"data_plane_parts.{name}")


def test_ratios_are_taken_within_a_round(part: Import) -> None:
    """A round on a busy machine slows both rows: 5, 5 and 4 times, whatever the medians say."""
    speed = part("speed")
    rates = {"a": [50.0, 500.0, 40.0], "b": [10.0, 100.0, 10.0]}
    assert speed.ratio(rates, "a", "b") == 5
    assert speed.ratio(rates, "b", "a") == 0.2
    with pytest.raises(ValueError, match="zip"):
        speed.ratio({"a": [1.0], "b": [1.0, 2.0]}, "a", "b")


def test_each_target_is_judged_by_its_own_base(part: Import) -> None:
    speed = part("speed")
    rates = {
        speed.LIGHTLY: [10.0, 20.0], speed.THREADS: [50.0, 99.0], speed.DALI: [40.0, 80.0],
        speed.OUR_KORNIA: [3.0, 6.0], speed.KORNIA: [1.0, 2.0],
    }  # fmt: skip
    found = {row["row"]: row for row in speed.judge("224-jpeg", rates, 2)}
    assert found[speed.THREADS]["times"] == pytest.approx(4.975) and not found[speed.THREADS]["met"]
    assert found[speed.DALI]["times"] == 4 and found[speed.DALI]["met"]
    assert found[speed.OUR_KORNIA]["base"] == speed.KORNIA
    assert found[speed.OUR_KORNIA]["times"] == 3 and found[speed.OUR_KORNIA]["met"]
    assert found[speed.OUR_KORNIA]["times_lightly"] == pytest.approx(0.3)
    assert found[speed.LIGHTLY]["target"] is None and found[speed.LIGHTLY]["met"]
    text = "\n".join(speed.lines([*found.values()]))
    assert text.count("MISSED") == 1 and "(3.0): met" in text


def test_a_rate_leaves_the_start_out(part: Import) -> None:
    taken: list[int] = []
    closed: list[bool] = []

    def batches() -> Iterator[int]:
        try:
            for k in range(10**9):
                taken.append(k)
                yield 10
        finally:
            closed.append(True)

    found = part("speed").rate(batches, 0.05)
    assert closed == [True] and len(taken) > 4
    assert found <= 10 * (len(taken) - 3) / 0.05


def test_seed_noise_decides_whether_a_back_end_is_the_same(part: Import) -> None:
    def row(backend: str, seed: int, score: float) -> dict[str, Any]:
        scores = {"knn_top1": score, "linear_top1": score}
        return {"backend": backend, "seed": seed, "epochs": 1, "tiles": 16, **scores}

    rows = [row("reference", 0, 0.70), row("reference", 1, 0.74), row("threads", 0, 0.69),
            row("threads", 1, 0.71), row("other", 0, 0.60), row("other", 1, 0.60)]  # fmt: skip
    threads, other = part("training").lines(rows)[-2:]
    assert "70.0 (69.0 to 71.0)" in threads and "-2.0, -2.0 | yes" in threads
    assert "-12.0, -12.0 | NO" in other


def test_a_part_keeps_its_rows_while_others_are_measured(part: Import, tmp_path: Path) -> None:
    page, out = part("page"), tmp_path / "page.md"
    about = {"measured": "today", "hardware": {"cores": 2}, "torch_threads": 2, "seconds": 1.0,
             "OMP_NUM_THREADS": None, "command": "the command"}  # fmt: skip
    opened = {"row": "ten samples", "seconds": 0.1, "first_batch_seconds": 0.2,
              "peak_megabytes": 50.0, "met": True}  # fmt: skip
    refused = {"kind": "empty", "refused_by": {"check_image": "check_image", "dali": ""}}
    out.write_text("Written by hand.\n\n## Measured\n\nof yesterday\n")
    page.write(out, "damage", about, [{**refused, "met": False}])
    page.write(out, "opening", {**about, "measured": "tomorrow"}, [opened])
    text = out.read_text()
    assert "Written by hand." in text and "yesterday" not in text
    assert "| empty | refused by check_image | taken | NO |" in text
    assert text.index("tomorrow") < text.index("ten samples") < text.index("today")
    rows = [json.loads(line) for line in out.with_suffix(".jsonl").open()]
    assert [row["part"] for row in rows] == ["opening", "opening", "damage", "damage"]


def test_the_quick_parts_run(tmp_path: Path) -> None:
    out = tmp_path / "page.md"
    numbers = ["--images", "2", "--side", "32", "--opened", "20000", "--out", str(out)]
    command = [sys.executable, str(FOLDER / "data_plane.py"), *numbers]
    parts = ["--only", "parity", "damage", "opening"]
    done = subprocess.run([*command, *parts], capture_output=True, text=True, timeout=100)
    rows = [json.loads(line) for line in out.with_suffix(".jsonl").open()]
    missed = [row for row in rows if not row.get("met", True)]
    assert done.returncode == (1 if missed else 0), done.stdout + done.stderr
    # The 99th percentile of so few pixels may miss a limit of levels.
    assert all((row["backend"], row["stage"]) == ("dali", "crop, resize, flip") for row in missed)
    assert "20,000 samples in 2 shards" in out.read_text()
    stages = {row["stage"] for row in rows if row["part"] == "parity" and "stage" in row}
    assert len(stages) == 9
    done = subprocess.run([*command, "--only", "sped"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "no part is called sped" in done.stderr
