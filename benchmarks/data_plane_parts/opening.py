"""Opening a very large shard set: the time, and the memory of a process that does nothing else."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from pipelines import ShardSet
from pipelines.packed import FORMAT, MANIFEST, VERSION

ROOT = Path(__file__).parents[2]
MOST_SECONDS, MOST_MEGABYTES = 2, 500


def measure(root: Path, samples: int) -> list[dict[str, Any]]:
    """Open synthetic sets from their manifests, each in a process of its own."""
    found = []
    for per_shard in (10_000, 1_000):
        folder = root / f"opening-{per_shard}"
        write_synthetic(folder, samples // per_shard, per_shard)
        row = in_new_process(folder)
        met = row["seconds"] < MOST_SECONDS and row["peak_megabytes"] < MOST_MEGABYTES
        found.append({**row, "met": met})
    return found


def in_new_process(folder: Path) -> dict[str, Any]:
    """Open a set in a process that does nothing else; see :func:`open_set`."""
    done = subprocess.run(
        [sys.executable, __file__, folder], check=True, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    return json.loads(done.stdout)


def write_synthetic(folder: Path, num_shards: int, per_shard: int) -> None:
    """Write a manifest of many samples, with empty indexes and tars that are holes."""
    folder.mkdir(parents=True)
    num_bytes, no_hash = 10240 + 1024 * per_shard, "0" * 64
    shards = []
    for k in range(num_shards):
        names = {
            "file": f"x-{k:06}.tar", "index": f"x-{k:06}.index.jsonl",
            "dali_index": f"x-{k:06}.idx",
        }  # fmt: skip
        (folder / names["index"]).touch()
        with (folder / names["file"]).open("wb") as tar:
            tar.truncate(num_bytes)
        hashes = dict.fromkeys(("sha256", "index_sha256", "dali_index_sha256"), no_hash)
        shards.append({**names, **hashes, "num_samples": per_shard, "num_bytes": num_bytes})
    manifest = {
        "format": FORMAT, "version": VERSION, "num_samples": num_shards * per_shard,
        "class_names": [], "shards": shards,
    }  # fmt: skip
    (folder / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")


def open_set(folder: Path) -> dict[str, Any]:
    """Open a set and look up a batch in the middle of an epoch; in a new process."""
    before = time.perf_counter()
    shards = ShardSet.open(folder)
    opened = time.perf_counter()
    middle = len(shards) // 2
    ids = shards.order(0).ids(3, middle, middle + 256)
    assert len(set(ids.tolist())) == 256
    return {
        "row": f"{len(shards):,} samples in {shards.num_shards:,} shards",
        "seconds": opened - before,
        "first_batch_seconds": time.perf_counter() - opened,
        "peak_megabytes": _peak_megabytes(),
    }


def _peak_megabytes() -> float:
    """Return the peak of this process; getrusage would tell of the one that started it too."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert found
    return int(found[1]) * 1024 / 1e6


def lines(rows: list[dict[str, Any]]) -> list[str]:
    """Return a table."""
    return [
        "| synthetic manifest | opened in, s | ids in mid-epoch, s | peak memory, MB | target |",
        "|---|--:|--:|--:|---|",
    ] + [
        f"| {r['row']} | {r['seconds']:.2f} | {r['first_batch_seconds']:.2f} | "
        f"{r['peak_megabytes']:.0f} | < {MOST_SECONDS} s and < {MOST_MEGABYTES} MB: "
        f"{'met' if r['met'] else 'MISSED'} |"
        for r in rows
    ]


if __name__ == "__main__":
    print(json.dumps(open_set(Path(sys.argv[1]))))
