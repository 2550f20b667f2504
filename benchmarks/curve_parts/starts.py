"""Start-up over the number of samples: a synthetic manifest opened by a process of its own."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from data_plane_parts.opening import in_new_process, write_synthetic
from harness import measurement

SAMPLES = (10**3, 10**4, 10**5, 10**6, 10**7)
PER_SHARD = (10_000, 1_000)  # as many as there are, where that is less


def measure(
    root: Path, samples: Sequence[int], rounds: int, tell: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    """Yield a row for each size of set and of shard; all take turns."""
    folders: dict[tuple[int, int], Path] = {}
    for per_shard in PER_SHARD:
        for number in samples:
            folder = root / f"{number}-by-{per_shard}"
            inside = min(per_shard, number)
            write_synthetic(folder, number // inside, inside)
            folders[number, per_shard] = folder
    found: dict[tuple[int, int], list[dict[str, float]]] = {key: [] for key in folders}
    for round_ in range(rounds):
        for key, folder in folders.items():
            before = time.perf_counter()
            row = in_new_process(folder)
            found[key].append({**row, "process_seconds": time.perf_counter() - before})
        tell(f"start-up, round {round_ + 1} of {rounds}")
    for (number, per_shard), rows in found.items():
        yield {
            **measurement(
                "start-up", f"shards of {per_shard:,}",
                [row["seconds"] + row["first_batch_seconds"] for row in rows],
                sizes={"samples": number, "shards": max(1, number // per_shard)},
                peak_bytes=max(int(row["peak_megabytes"] * 1e6) for row in rows),
            ),
            "process_seconds": sorted(row["process_seconds"] for row in rows)[len(rows) // 2],
        }  # fmt: skip
