"""G: resources, time. Nothing grows over a long run; few descriptors are enough; clocks jump."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import psutil
from drill import Cells, Drill
from forks import Ranks, outcome, train

from fastclr import checkpointing
from fastclr.config import DataConfig, FaultsConfig
from pipelines.loader import Loader
from pipelines.remote import fetch
from pipelines.writer import write_shards
from tests.pipelines.flaky import flaky

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
    notes = [f"{STEPS} steps, {STEPS // SAVE_EVERY} saves, {slope:+.2f} MiB in 1,000"]
    half = len(after) // 2
    for column, name in ((2, "descriptors"), (3, "threads and children")):
        # Medians: a save opens files and starts threads, and a sample may fall into one.
        before, later = np.median(after[:half, column]), np.median(after[half:, column])
        cells.check(f"{name}: {before:.0f}, then {later:.0f}", later <= before)
        notes.append(f"{later:.0f} {name}, at most {after[:, column].max():.0f}")
    cells.notes.append("; ".join(notes))


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


HOUR, YEAR = 3600.0, 365.25 * 86400
JUMPS = {"an hour ahead": HOUR, "an hour back": -HOUR, "ten years ahead": 10 * YEAR}


def a_clock_that_jumps(cells: Cells) -> None:
    """G3: the time of day jumps; what waits goes by another clock, what is newest by steps.

    The clock is Python's: the libraries below wait by clocks that nobody sets.
    """
    folder = cells.folder
    whole = Ranks(folder, 2, partial(train, folder, folder / "whole"))
    assert whole.wait() and not any(whole.codes), whole.said()
    for name, seconds in list(JUMPS.items())[0 if cells.is_long else 2 :]:
        with cells.cell(f"{name}, while it waits for data and saves"):
            run_dir = folder / name
            with mock.patch.object(Loader, "make_views", _slow(Loader.make_views, seconds)):
                faults = FaultsConfig(watchdog_seconds=5)
                run = Ranks(folder, 2, partial(train, folder, run_dir, faults=faults))
            assert run.wait(60) and run.codes == [0, 0], (run.codes, run.said())
            assert outcome(run_dir) == outcome(folder / "whole")
        with cells.cell(f"{name}, while storage is asked again"), flaky() as server:
            server.objects["/a"] = b"whole"
            server.plans["/a"] = ["503", "503", "cut"]
            plain, started = time.time, time.monotonic()
            with mock.patch.object(time, "time", lambda p=plain, s=seconds: p() + s):
                assert fetch(server.url("/a")) == b"whole"
            assert time.monotonic() - started < 10
    with cells.cell("the newest checkpoint is the one of the last step"):
        checkpoints = checkpointing.list_checkpoints(folder / "whole/checkpoints")
        for age, checkpoint in enumerate(checkpoints):
            for path in (checkpoint, *checkpoint.iterdir()):
                os.utime(path, (10**9 - 10**6 * age,) * 2)
        assert checkpointing.latest(folder / "whole/checkpoints") == checkpoints[-1]


def _slow(make: Callable[..., Any], seconds: float) -> Callable[..., Any]:
    """Return a loader's work that takes 2 s at the third step; the clock jumps in them."""
    jumped: list[float] = []

    def makes(self: Loader, epoch: int, positions: Any, sample_ids: Any) -> Any:
        if epoch == 0 and 32 <= positions.min() < 48 and not jumped:
            jumped.append(seconds)
            time.sleep(1)
            plain = time.time
            time.time = lambda: plain() + seconds
            time.sleep(1)
        return make(self, epoch, positions, sample_ids)

    return makes


DRILLS = {
    "G1": Drill(
        "20,000 steps, 200 saves: memory, descriptors, threads, children stay", a_long_run,
        2400, 2400, is_long_only=True,
    ),
    "G2": Drill("80 shards under a limit of 160 open files", few_descriptors, 60),
    "G3": Drill("the time of day jumps: no false alarm, no endless wait, the same end",
                a_clock_that_jumps, 120),
}  # fmt: skip
