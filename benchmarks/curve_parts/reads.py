"""Reading over the number of shards: the same samples again and again, under many names."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from data_plane_parts.loading import ours
from harness import measurement

from pipelines import ShardSet
from pipelines.packed import MANIFEST
from pipelines.photos import write_photo_tiles
from pipelines.writer import write_shards

SHARDS = (1, 10, 100, 1_000, 10_000)


def write_copies(folder: Path, packed: Path, number: int) -> ShardSet:
    """Write a set of many shards that all are links to the files of one.

    Args:
        folder: To be made.
        packed: A set of one shard.
        number: Shards.
    """
    folder.mkdir()
    manifest = json.loads((packed / MANIFEST).read_text(encoding="utf-8"))
    (only,) = manifest["shards"]
    shards = []
    for k in range(number):
        names = {kind: f"{k:06}-{only[kind]}" for kind in ("file", "index", "dali_index")}
        for kind, name in names.items():
            os.link(packed / only[kind], folder / name)
        shards.append({**only, **names})
    manifest |= {"shards": shards, "num_samples": number * only["num_samples"]}
    (folder / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    return ShardSet.open(folder)


def measure(
    root: Path, numbers: Sequence[int], rounds: int, samples: int, tell: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    """Yield a row for each number of shards; all take turns, each opened anew.

    Args:
        root: For the data.
        numbers: Of shards.
        rounds: How often each is read.
        samples: That are read each time, in the order of an epoch; a shard holds a sixteenth.
        tell: Told of progress.
    """
    per_photo = max(1, samples // 256)
    write_photo_tiles(root / "files", train_per_photo=per_photo, test_per_photo=1)
    packed = root / "packed"
    write_shards(root / "files" / "train", packed, samples_per_shard=16 * per_photo, num_workers=1)
    for number in numbers:
        write_copies(root / f"shards-{number}", packed, number)
    found: dict[int, list[tuple[float, float]]] = {number: [] for number in numbers}
    for round_ in range(rounds):
        for number in numbers:
            found[number].append(_read(root / f"shards-{number}", samples))
        tell(f"reading, round {round_ + 1} of {rounds}")
    for number, times in found.items():
        yield {
            **measurement(
                "read", "order, labels, encoded images", [read for _, read in times],
                sizes={"shards": number, "samples_per_shard": 16 * per_photo, "read": samples},
                images=samples,
            ),
            "open_seconds": sorted(opened for opened, _ in times)[len(times) // 2],
        }  # fmt: skip


def _read(folder: Path, samples: int) -> tuple[float, float]:
    """Return how long opening takes, and reading in the order of an epoch."""
    before = time.perf_counter()
    shards = ShardSet.open(folder)
    opened = time.perf_counter()
    for _ in islice(ours(shards, decoded=False), samples):
        pass
    return opened - before, time.perf_counter() - opened
