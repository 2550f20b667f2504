"""Packing beside GNU tar, and its memory: ``python benchmarks/packing.py IMAGES``.

GNU tar copies bytes in the order of the folder. Packing shuffles, decodes every image, indexes,
hashes and waits for the disk: the ratio says what that costs. Processor seconds stand beside the
times, because on a busy machine they move less.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import tyro
from PIL import Image

ROOT = Path(__file__).parents[1]


def speed(images: Path, rounds: int, workers: int) -> list[str]:
    """Time tar and packing in turn; return the lines of a table."""
    with tempfile.TemporaryDirectory() as folder:
        tar, out = Path(folder) / "x.tar", Path(folder) / "train"
        pack = [sys.executable, "tools/make_shards.py", images, "--out", out]
        commands = {
            "GNU tar": ["tar", "cf", tar, "-C", images, "."],
            "GNU tar, then sha256sum": [
                "sh",
                "-c",
                f"tar cf {tar} -C {images} . && sha256sum {tar}",
            ],
            f"make_shards.py, {workers} workers": [*pack, "--workers", str(workers)],
        }
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
        for _ in range(rounds):
            for name, command in commands.items():
                subprocess.run(["rm", "-rf", tar, out], check=True)
                found[name].append(_timed(list(map(str, command))))
    base = [wall for wall, _ in found["GNU tar"]]
    lines = [
        "| | s, best | s, median | processor s, best | x GNU tar, best |",
        "|---|---|---|---|---|",
    ]
    for name, times in found.items():
        walls = [wall for wall, _ in times]
        lines.append(
            f"| {name} | {min(walls):.2f} | {statistics.median(walls):.2f} | "
            f"{min(cpu for _, cpu in times):.2f} | {min(base) / min(walls):.2f} |"
        )
    return lines


def _timed(command: list[str]) -> tuple[float, float]:
    """Run a command; return seconds, and processor seconds of it and its children."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return wall, cpu


def memory(counts: list[int]) -> list[str]:
    """Pack entries that all name one tiny file; return the lines of a table of peak memory."""
    lines = ["| images | peak resident MiB | s |", "|---|---|---|"]
    context = multiprocessing.get_context("spawn")
    for count in counts:
        with context.Pool(1) as pool:
            peak, seconds = pool.apply(_pack_synthetic, (count,))
        lines.append(f"| {count:,} | {peak:.0f} | {seconds:.0f} |")
    return lines


def _pack_synthetic(count: int) -> tuple[float, float]:
    """Pack ``count`` times the same file in this process; return its peak memory and seconds."""
    from pipelines import plan
    from pipelines.sources import Listing, SourceImage
    from pipelines.writer import Packing

    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "a.png"
        Image.new("RGB", (1, 1)).save(file)

        def entries() -> Iterator[SourceImage]:
            for number in range(count):
                yield SourceImage(f"{number % 10}/{number:08d}.png", str(number % 10), str(file))

        plan.list_source = lambda *_: Listing(entries())
        Packing(plan.Settings("synthetic", "train"), Path(folder) / "train", workers=1).run()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return peak, time.perf_counter() - start


def main(
    images: Annotated[Path | None, tyro.conf.Positional] = None,
    rounds: int = 5,
    workers: int = len(os.sched_getaffinity(0)),
    counts: tuple[int, ...] = (1_000, 10_000, 100_000, 1_000_000),
) -> None:
    """Measure and print tables.

    Args:
        images: Folder of images, e.g. the 50,000 PNGs of CIFAR-10; none measures memory alone.
        rounds: Times each command runs, in turn.
        workers: Processes that pack.
        counts: Synthetic images whose packing's memory is measured.
    """
    if images:
        print("\n".join(speed(images.absolute(), rounds, workers)) + "\n")
    if counts:
        print("\n".join(memory(list(counts))))


if __name__ == "__main__":
    tyro.cli(main)
