"""G: resources. Nothing grows over a long run; few descriptors are enough."""

from __future__ import annotations

import resource
import time
from functools import partial
from pathlib import Path

import numpy as np
import psutil
from drill import Cells, Drill
from forks import Ranks, outcome, train

from fastclr.config import DataConfig
from pipelines.writer import write_shards

STEPS, SAVE_EVERY = 20_000, 100


def a_long_run(cells: Cells) -> None:
    """G1: memory, descriptors and threads of a long run stay where they are."""
    epochs = STEPS // 5
    work = partial(
        train, cells.folder, cells.folder / "long", epochs=epochs, checkpoint_every=SAVE_EVERY,
        log_every=10,
    )  # fmt: skip
    run = Ranks(cells.folder, 1, work)
    process, rows = psutil.Process(run.ids[0]), []
    while not run.wait(2):
        try:
            memory, count = process.memory_info().rss / 2**20, process.num_threads()
            rows.append((time.monotonic(), memory, process.num_fds(), count))
            children = process.children()
        except psutil.Error:
            break
        if children:
            rows[-1] = (*rows[-1][:3], count + 100 * len(children))
    assert run.wait() and run.codes == [0], run.said()
    after = np.array(rows[len(rows) // 5 :])  # the beginning fills caches
    place = np.linspace(0, STEPS * 4 / 5, len(after))
    slope = float(np.polyfit(place, after[:, 1], 1)[0]) * 1000
    cells.check(f"memory grows by {slope:.2f} MiB in 1,000 steps", slope < 1)
    for column, name in ((2, "descriptors"), (3, "threads and children")):
        half = len(after) // 2
        before, later = after[:half, column].max(), after[half:, column].max()
        cells.check(f"{name}: {before:.0f}, then {later:.0f}", later <= before)
    cells.notes.append(f"{STEPS} steps, {STEPS // SAVE_EVERY} saves, {slope:+.2f} MiB in 1,000")


def few_descriptors(cells: Cells) -> None:
    """G2: 80 shards under a limit of 160 open files: the run of one shard set with none."""
    images = (cells.folder / "train").resolve().parent / "images/train"
    packed = Path(write_shards(images, cells.folder / "set/many", samples_per_shard=1).path)
    data = DataConfig(train=str(packed))
    with cells.cell("80 shards"):
        ends = []
        for limit in (None, 160):
            run_dir = cells.folder / f"limit{limit}"
            run = Ranks(cells.folder, 1, partial(_limited, limit, cells.folder, run_dir, data))
            assert run.wait() and run.codes == [0], run.said()
            ends.append(outcome(run_dir))
        assert ends[0] == ends[1]


def _limited(limit: int | None, folder: Path, run_dir: Path, data: DataConfig) -> None:
    if limit:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    train(folder, run_dir, data=data)


DRILLS = {
    "G1": Drill(
        "20,000 steps, 200 saves: memory, descriptors, threads, children stay", a_long_run,
        2400, 2400, is_long_only=True,
    ),
    "G2": Drill("80 shards under a limit of 160 open files", few_descriptors, 60),
}  # fmt: skip
