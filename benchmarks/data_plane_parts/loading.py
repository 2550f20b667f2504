"""Samples a second without augmentation, beside webdataset."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import count, islice
from pathlib import Path
from statistics import median
from typing import Any

import webdataset as wds

from pipelines import ShardSet
from pipelines.photos import write_photo_tiles
from pipelines.writer import write_shards

AT_ONCE = 256  # samples whose ids and labels are looked up together, as for a batch
TARGET = 3


def ours(shards: ShardSet, *, decoded: bool) -> Iterator[Any]:
    """Yield image and label in the order of our loader, without end."""
    order = shards.order(0)
    get = shards.__getitem__ if decoded else shards.read
    for epoch in count():
        for start in range(0, len(shards), AT_ONCE):
            ids = order.ids(epoch, start, min(start + AT_ONCE, len(shards)))
            for sample_id, label in zip(ids.tolist(), shards.labels(ids).tolist(), strict=True):
                yield get(sample_id), label


def webdataset(folder: Path, *, decoded: bool) -> Iterator[Any]:
    """Yield samples as webdataset does, without end."""
    tars = [str(tar) for tar in sorted(folder.glob("*.tar"))]
    data = wds.WebDataset(tars, shardshuffle=len(tars)).shuffle(1000)
    if decoded:
        data = data.decode("rgb8")
    while True:
        yield from data


def measure(root: Path, *, rounds: int, samples: int) -> list[dict[str, Any]]:
    """Take the samples of both in turn, in this process and thread."""
    write_photo_tiles(root / "files", train_per_photo=250, test_per_photo=1)
    shards = write_shards(root / "files" / "train", root / "packed", samples_per_shard=500)
    streams: dict[str, Callable[[bool], Iterator[Any]]] = {
        "order, read": lambda decoded: ours(shards, decoded=decoded),
        "webdataset, shuffle(1000)": lambda decoded: webdataset(root / "packed", decoded=decoded),
    }
    found = []
    for decoded in (False, True):
        rates = {name: [] for name in streams}
        for _ in range(rounds):
            for name, make in streams.items():
                rates[name].append(_rate(make(decoded), samples))
        ours_, theirs = rates.values()
        times = median(a / b for a, b in zip(ours_, theirs, strict=True))
        for name, values in rates.items():
            is_ours = values is ours_
            found.append(
                {"row": f"{name}{', decoded' if decoded else ''}", "per_second": median(values),
                 "microseconds": 1e6 / median(values), "times": times if is_ours else 1.0,
                 "target": TARGET if is_ours and not decoded else None,
                 "met": not is_ours or decoded or times >= TARGET}
            )  # fmt: skip
    return found


def _rate(stream: Iterator[Any], samples: int) -> float:
    """Return samples a second, after a start that fills webdataset's buffer."""
    for _ in islice(stream, 1500):
        pass
    before = time.perf_counter()
    for _ in islice(stream, samples):
        pass
    return samples / (time.perf_counter() - before)


def lines(rows: list[dict[str, Any]]) -> list[str]:
    """Return a table."""
    table = [
        "| one process, one thread, 32-px PNG | samples/s | us a sample | x webdataset | target |",
        "|---|--:|--:|--:|---|",
    ]
    for r in rows:
        target = f">= {r['target']}x: {'met' if r['met'] else 'MISSED'}" if r["target"] else ""
        table.append(
            f"| {r['row']} | {r['per_second']:,.0f} | {r['microseconds']:.1f} | "
            f"{r['times']:.1f} | {target} |"
        )
    return table
