"""Peak memory of a whole training at a large contrastive batch, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from nt_xent import PeakMemory

from fastclr.facts import num_cores
from peer_parts import contenders, ours, simclr
from peer_parts.names import LIGHTLY, OURS
from pipelines import ShardSet, SimCLRPolicy
from pipelines.photos import write_photo_tiles
from pipelines.writer import write_shards

BENCHMARKS = Path(__file__).parents[1]
BATCH, MICRO_BATCH, STEPS = 4096, 256, 1
ACCUMULATION = {
    "train_batch_size": BATCH,
    "train_micro_batch_size_per_gpu": MICRO_BATCH,
    "gradient_accumulation_steps": BATCH // MICRO_BATCH,
}


class Training(NamedTuple):
    """What a training took.

    Attributes:
        seconds: Of all of it, its start among them.
        extra_bytes: Peak of the process less what it held before; None if the system hides it.
    """

    seconds: float
    extra_bytes: int | None


def ours_at(folder: Path) -> None:
    """Train from shards with gradient caching, as the DeepSpeed JSON says."""
    config = replace(contenders.small_images(), global_batch_size=BATCH)
    policy = SimCLRPolicy(size=32, color_strength=0.5, blur_prob=0)
    ours.seconds_per_step(
        ShardSet.open(folder / "packed"), policy, config, folder / "run",
        warm_up=0, steps=STEPS, ds_config=ACCUMULATION,
    )  # fmt: skip


def lightly_at(folder: Path) -> None:
    """Train lightly's SimCLR from the folder of images, with a worker a core."""
    config = replace(contenders.small_images(), global_batch_size=BATCH)
    images = folder / "images" / "train"
    simclr.lightly_seconds_per_step(images, config, num_cores(), warm_up=1, steps=STEPS)


TRAININGS: dict[str, Callable[[Path], None]] = {
    OURS: ours_at,
    LIGHTLY: lightly_at,
}


def apart(name: str, folder: Path) -> Training:
    """Run a training in a fresh process.

    Args:
        name: Key of :data:`TRAININGS`.
        folder: Folder for the images, which are written at the first call.

    Raises:
        RuntimeError: If it fails; says why.
    """
    if not folder.exists():
        write_photo_tiles(folder / "images", train_per_photo=BATCH // 16, test_per_photo=1)
        write_shards(folder / "images" / "train", folder / "packed")
    path = os.pathsep.join([str(BENCHMARKS.parent), str(BENCHMARKS)])
    done = subprocess.run(
        [sys.executable, "-m", "peer_parts.memory", name, str(folder)],
        env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{name} ended with {done.returncode}: {done.stderr[-2000:]}")
    return Training(**json.loads(done.stdout.splitlines()[-1]))


def main(name: str, folder: Path) -> None:
    """Train, and print the :class:`Training` as JSON."""
    memory, before = PeakMemory("cpu"), time.perf_counter()
    TRAININGS[name](folder)
    extra = memory.extra_mib()
    extra_bytes = None if extra is None else round(extra * 2**20)
    training = Training(time.perf_counter() - before, extra_bytes)
    print(json.dumps(training._asdict()))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
