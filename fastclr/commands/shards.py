"""Pack images into WebDataset shards: ``fastclr shards SOURCE --out data/train``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.progress import Progress

from fastclr.config import ConfigError
from pipelines.plan import Settings
from pipelines.sources import SourceOptions
from pipelines.transform import Transform
from pipelines.writer import REJECTED, Packing

_OPTIONS = SourceOptions()


def make_shards(
    source: Annotated[str, tyro.conf.Positional],
    out: Path,
    samples_per_shard: int = 4096,
    shard_bytes: int | None = None,
    seed: int = 0,
    encode: Literal["jpeg", "webp", "png"] | None = None,
    quality: int | None = None,
    shorter_side: int | None = None,
    drop_duplicates: bool = False,
    max_rejected: float = 0,
    resume: bool = False,
    workers: int = 0,
    executor: Literal["processes", "ray"] = "processes",
    task: str | None = None,
    merge: bool = False,
    options: tyro.conf.OmitArgPrefixes[SourceOptions] = _OPTIONS,
) -> None:
    """Pack images into WebDataset shards with an index and a manifest.

    Args:
        source: Folder, tar, zip, table (CSV, JSONL, Parquet), shards, or the raw files of CIFAR,
            STL-10, MNIST or Food-101; a path or a URL. In folders the first one is the class.
        out: Folder to make, e.g. data/train; its name becomes the shards' prefix.
        samples_per_shard: Most images in one tar.
        shard_bytes: Most bytes of source images in one tar.
        seed: Seed of the order in which images are packed.
        encode: Decode each image, apply its EXIF rotation, convert it to RGB and encode it so.
            Without it bytes are packed as they are.
        quality: Of the new encoding, 1 to 100; 90 if left out.
        shorter_side: With --encode: shrink larger images to this length of the shorter side.
        drop_duplicates: Of images with equal bytes, pack only the first by name.
        max_rejected: Damaged images to leave out and list; below 1 a part of all of them.
        resume: Go on where a killed run of the same command stopped.
        workers: Processes; 0 for one a core. The bytes do not depend on it.
        executor: Where they run; ray uses the cluster of RAY_ADDRESS, or one started here.
        task: K/N, K from 0: pack every N-th shard only, into a work folder that N tasks share.
        merge: Publish what the tasks have packed.
        options: How the source is read.
    """
    settings = Settings(
        source,
        out.name,
        options,
        samples_per_shard=samples_per_shard,
        shard_bytes=shard_bytes,
        seed=seed,
        transform=_transform(encode, quality, shorter_side),
        drop_duplicates=drop_duplicates,
    )
    with Progress() as progress:
        bar = progress.add_task(f"packing {out}", total=None)
        packing = Packing(
            settings,
            out,
            max_rejected=max_rejected,
            executor=executor,
            workers=workers,
            on_start=lambda total: progress.update(bar, total=total),
            on_images=lambda count: progress.advance(bar, count),
        )
        if task:
            print(f"task {task}: {packing.run_task(*_task(task))} images are packed; --merge ends")
            return
        summary = packing.merge() if merge else packing.run(resume=resume)
    packed = (
        _counted(summary.num_samples, "image"),
        _counted(summary.num_classes, "class", "es"),
        _counted(summary.num_shards, "shard"),
    )
    print(f"{out}: {', '.join(packed)}")
    if summary.num_duplicates:
        print(f"left out: {_counted(summary.num_duplicates, 'exact duplicate')}")
    if summary.num_rejected:
        print(f"left out: {_counted(summary.num_rejected, 'damaged image')}, see {out / REJECTED}")


def _counted(number: int, what: str, plural: str = "s") -> str:
    """Return a number of things in words."""
    return f"{number} {what}{plural * (number != 1)}"


def _transform(
    encode: str | None, quality: int | None, shorter_side: int | None
) -> Transform | None:
    if encode:
        return Transform(encode, 90 if quality is None else quality, shorter_side)
    if quality is not None or shorter_side is not None:
        raise ConfigError(
            "--quality and --shorter-side mean that images are encoded anew: say how with "
            "--encode jpeg, webp or png."
        )
    return None


def _task(text: str) -> tuple[int, int]:
    """Parse K/N."""
    task, _, num_tasks = text.partition("/")
    if not (task.isdecimal() and num_tasks.isdecimal()):
        raise ConfigError(f"--task is {text!r}: give K/N, as in 0/4 to 3/4.")
    return int(task), int(num_tasks)
