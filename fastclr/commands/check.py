"""Check a data set: ``fastclr check data/train``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

from pipelines.check import CheckReport, check_set, check_shards, repair_indexes
from pipelines.errors import ShardError
from pipelines.packed import MANIFEST
from pipelines.remote import redacted_urls


def check(
    path: Annotated[str, tyro.conf.Positional],
    share: float = 0.01,
    all: bool = False,
    repair_index: bool = False,
) -> None:
    """Compare every file with the manifest and every index with its tar; decode some images.

    Args:
        path: A set made by fastclr shards, here or behind a URL; others' tars; a mixture.
        share: Share of the images that are decoded, at least one a shard.
        all: Decode all images.
        repair_index: First make missing or damaged indexes again from tars that are whole; of a
            packed folder on this machine.
    """
    name = redacted_urls(path)
    if repair_index:
        repaired = _with_bar(f"repairing {name}", repair_indexes, path)
        print(f"{name}: {len(repaired.files)} indexes written again")
        if repaired.num_lost:
            print(f"the sources of {repaired.num_lost} images could not be read and are lost")
        if repaired.digest_changed:
            print("the set has another digest now: runs that used it cannot go on with it")
    found = _with_bar(f"checking {name}", _checked, path, share=1 if all else share)
    what = f"{found.num_samples} images in place, {found.num_decoded} of them decoded"
    if found.problems:
        lines = "\n  ".join(found.problems)
        raise ShardError(f"{name}: {what}; {len(found.problems)} problems:\n  {lines}")
    print(f"{name}: {what}; all is well")


def _checked(path: str, **options: Any) -> CheckReport:
    """Check a packed folder with whatever is missing in it, or what opens as a set."""
    packed = (Path(path) / MANIFEST).is_file()
    return check_shards(path, **options) if packed else check_set(path, **options)


def _with_bar(what: str, work: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Run with a progress bar."""
    with Progress(*Progress.get_default_columns()[:1], BarColumn(), DownloadColumn(),
                  TimeRemainingColumn()) as bar:  # fmt: skip
        task = bar.add_task(what, total=None)
        return work(
            *args,
            on_start=lambda total: bar.update(task, total=total),
            on_bytes=lambda num_bytes: bar.advance(task, num_bytes),
            **options,
        )
