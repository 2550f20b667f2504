"""Pack images into WebDataset shards: ``python tools/make_shards.py SOURCE --out data/train``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import tyro
from rich.progress import Progress

from fastclr.cli import guard
from pipelines.writer import write_shards


def make_shards(
    source: Annotated[Path, tyro.conf.Positional],
    out: Path,
    samples_per_shard: int = 4096,
    seed: int = 0,
) -> None:
    """Pack a folder of class folders, a flat folder, or a plain tar of one of these.

    Args:
        source: Images: JPEG, PNG or WebP; the first folder of a path is the class.
        out: Folder to make, e.g. data/train; its name becomes the shards' prefix.
        samples_per_shard: Images in one tar.
        seed: Seed of the order in which images are packed.
    """
    with Progress() as progress:
        task = progress.add_task(f"packing {out}", total=None)
        shard_set = write_shards(
            source,
            out,
            samples_per_shard=samples_per_shard,
            seed=seed,
            on_start=lambda total: progress.update(task, total=total),
            on_image=lambda: progress.advance(task),
        )
    print(f"{out}: {len(shard_set)} images, {shard_set.num_classes} classes")


if __name__ == "__main__":
    sys.exit(guard(lambda: tyro.cli(make_shards)))
