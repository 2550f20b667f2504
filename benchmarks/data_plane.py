"""Everything the data plane has to show: speed, parity, damage, opening; and on demand training.

python benchmarks/data_plane.py [--only speed parity] [--train] [--triton]

Rows of other runs stay in the results where a run leaves their part out. Exits with 1 where a
target is missed. The parts themselves are in ``data_plane_parts/``.
"""

from __future__ import annotations

import os
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from data_plane_parts import page
from harness import facts

from fastclr.facts import num_cores

RESULTS = Path(__file__).with_name("results") / "data_plane.md"


@dataclass
class Settings:
    """How much is measured.

    Attributes:
        rounds: Rounds; each runs every row once. Ratios are medians of the ratios within a round.
        seconds: Seconds a row of the speed tables is timed in a round, after its start.
        threads: Threads of our loader and workers of torch's; 0 for the cores.
        samples: Samples a row of the table without augmentation takes in a round.
        images: Images each comparison of pixels takes; at least 16 for a fair 99th percentile.
        side: Side of most of these in pixels.
        opened: Samples of the synthetic manifests.
        epochs: Length of the trainings of ``--train``.
        seeds: Their seeds.
        tiles: Their training tiles of each class.
    """

    rounds: int = 5
    seconds: float = 1.2
    threads: int = 0
    samples: int = 8000
    images: int = 16
    side: int = 224
    opened: int = 10**7
    epochs: int = 4
    seeds: int = 2
    tiles: int = 125


Rows = list[dict[str, Any]]


def speed(settings: Settings, root: Path) -> Rows:
    """Measure views a second."""
    from data_plane_parts import speed

    rows: Rows = []
    for name in speed.CASES:
        rows += speed.measure(
            name, root / name, rounds=settings.rounds, seconds=settings.seconds,
            num_threads=settings.threads or num_cores(),
        )  # fmt: skip
    return rows


def loading(settings: Settings, root: Path) -> Rows:
    """Measure samples a second without augmentation."""
    from data_plane_parts import loading

    return loading.measure(root / "loading", rounds=settings.rounds, samples=settings.samples)


def opening(settings: Settings, root: Path) -> Rows:
    """Open very large sets."""
    from data_plane_parts import opening

    return opening.measure(root, settings.opened)


def parity(settings: Settings, root: Path) -> Rows:
    """Compare pixels with the reference's."""
    from data_plane_parts import parity

    return parity.measure(("threads", "kornia", "dali"), settings.images, settings.side)


def damage(settings: Settings, root: Path) -> Rows:
    """Show damaged images to everyone."""
    from data_plane_parts import parity

    return parity.damage(("threads", "kornia", "dali", "reference"))


def training(settings: Settings, root: Path) -> Rows:
    """Train and evaluate with each back-end."""
    from data_plane_parts import training

    return list(
        training.measure(
            root / "training", epochs=settings.epochs, seeds=settings.seeds, tiles=settings.tiles
        )
    )


def triton(settings: Settings, root: Path) -> Rows:
    """Compare the pixels of interpreted kernels, on few small images."""
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton
    from data_plane_parts import parity

    return parity.measure(("triton",), 4, 32)


# Each imports its packages when it runs; the interpreter has to be chosen before any of them.
PARTS: dict[str, Callable[[Settings, Path], Rows]] = {
    "triton": triton,
    "speed": speed,
    "loading": loading,
    "opening": opening,
    "parity": parity,
    "damage": damage,
    "training": training,
}
ON_DEMAND = ("triton", "training")


def main(
    settings: tyro.conf.OmitArgPrefixes[Settings],
    only: tuple[str, ...] = (),
    train: bool = False,
    triton: bool = False,
    out: Path = RESULTS,
) -> None:
    """Measure, print and write the results.

    Args:
        settings: How much is measured.
        only: Parts to run; all that are quick if none is named.
        train: Also train and evaluate with every back-end: minutes a run.
        triton: Also compare Triton's interpreted kernels.
        out: Page of results, replaced below "Measured"; its rows go beside it, ``.jsonl``.
    """
    chosen = set(only or [part for part in PARTS if part not in ON_DEMAND])
    chosen |= {"training"} if train else set()
    chosen |= {"triton"} if triton else set()
    if unknown := chosen - PARTS.keys():
        raise SystemExit(f"no part is called {', '.join(unknown)}: choose of {', '.join(PARTS)}")
    command = shlex.join(["python", "benchmarks/data_plane.py", *sys.argv[1:]])
    missed = 0
    with tempfile.TemporaryDirectory() as root:
        for part, run in PARTS.items():
            if part not in chosen:
                continue
            before = time.perf_counter()
            rows = run(settings, Path(root))
            about = {
                **facts(), "command": command, "torch_threads": torch.get_num_threads(),
                "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
                "seconds": round(time.perf_counter() - before, 1),
            }  # fmt: skip
            page.write(out, part, about, rows)
            print("\n".join(["", *page.TABLES[part].lines(rows)]), flush=True)
            missed += sum(not row.get("met", True) for row in rows)
    raise SystemExit(f"{missed} targets missed" if missed else 0)


if __name__ == "__main__":
    tyro.cli(main)
