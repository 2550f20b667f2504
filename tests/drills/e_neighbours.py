"""E: what stands beside a run. A batch system, a slow rank, monitors that fail."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from deepspeed.monitor.monitor import MonitorMaster
from drill import ROOT, Cells, Drill
from forks import Ranks, outcome, train

from fastclr import checkpointing

SCONTROL = """#!/bin/sh
echo "$* after $(cat CHECKPOINTS/latest)" >> LOG
"""
COMMAND = (
    "fastclr/train.py --ds-config fastclr/recipes/fp32.json --recipe demo --global-batch-size 16 "
    "--epochs 1000 --checkpoint-every 5 --views.size 16 --encoder.width 0.125 "
    "--encoder.stem small_stride2 --head.output-dim 16"
).split()
JOBS: dict[str, tuple[signal.Signals, dict[str, str], str]] = {
    "an array job, SIGUSR1": (
        signal.SIGUSR1,
        {"SLURM_JOB_ID": "77", "SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": "6"},
        "requeue 70_6",
    ),
    "a job, SIGUSR2": (signal.SIGUSR2, {"SLURM_JOB_ID": "77"}, "requeue 77"),
}


def requeued(cells: Cells) -> None:
    """E2: a job's signal ends in one requeue of the right job, after the save."""
    for name, (number, names, said) in list(JOBS.items())[: 2 if cells.is_long else 1]:
        with cells.cell(name):
            _a_job(
                cells.folder / name.replace(" ", "_"), cells.folder / "train", number, names, said
            )


def _a_job(
    folder: Path, data: Path, number: signal.Signals, names: dict[str, str], said: str
) -> None:
    """Start a job as a batch system does, signal it, and see what it asks the batch system for."""
    run_dir, log = folder / "run", folder / "scontrol.txt"
    (folder / "bin").mkdir(parents=True)
    fake = folder / "bin/scontrol"
    fake.write_text(
        SCONTROL.replace("CHECKPOINTS", str(run_dir / "checkpoints")).replace("LOG", str(log))
    )
    fake.chmod(0o755)
    environ = {**os.environ, **names, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}
    command = ["sh", "tools/slurm.sh", sys.executable, *COMMAND]
    command += ["--data.train", str(data), "--run-dir", str(run_dir)]
    output = (folder / "job.txt").open("w")
    job = subprocess.Popen(command, cwd=ROOT, env=environ, stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + 90
        while not (run_dir / "checkpoints/latest").exists():
            text = (folder / "job.txt").read_text()
            assert job.poll() is None and time.monotonic() < deadline, text[-2000:]
            time.sleep(0.02)
        job.send_signal(number)
        assert job.wait(30) == 75, (folder / "job.txt").read_text()[-2000:]
    finally:
        job.kill()
    (line,) = log.read_text().splitlines()
    saved = checkpointing.latest(run_dir / "checkpoints")
    assert saved is not None and line.startswith(f"{said} after"), line
    assert line.endswith(f'after "{saved.name}"'), (line, saved)
    assert number.name in (folder / "job.txt").read_text()


def a_slow_rank(cells: Cells) -> None:
    """E6: a rank that gets a tenth of its processor is named; nothing is given up."""
    more: dict[str, Any] = {"epochs": 12, "log_every": 5, "checkpoint_every": 20}
    folder, run_dir = cells.folder, cells.folder / "slowed"
    whole = Ranks(folder, 2, partial(train, folder, folder / "whole", **more))
    assert whole.wait() and not any(whole.codes), whole.said()
    assert "is slow" not in whole.said(), whole.said()
    with cells.cell("rank 1, ten times slower"):
        run = Ranks(folder, 2, partial(train, folder, run_dir, **more))
        run.wait_for(run_dir / "metrics.jsonl")
        begun = _last_row(run_dir)
        with _throttled(run.ids[1]):
            while "is slow" not in run.said():
                assert not run.wait(0.05), f"it ended, and nobody was named: {run.said()}"
                assert _last_row(run_dir) <= begun + 55, run.said()
        named = _last_row(run_dir)
        line = next(line for line in run.said().splitlines() if "is slow" in line)
        assert "rank 1 on" in line, line
        factor = float(line.split(" times the median")[0].split()[-1])
        assert 3 <= factor < 100, line
        assert run.wait() and run.codes == [0, 0], run.said()
        assert outcome(run_dir) == outcome(folder / "whole")
        cells.notes.append(f"named {named - begun} steps later, {factor:.1f} times")


@contextmanager
def _throttled(process: int) -> Iterator[None]:
    """Let a process run for a tenth of the time."""
    done = threading.Event()

    def throttle() -> None:
        while not done.is_set():
            os.kill(process, signal.SIGSTOP)
            done.wait(0.045)
            os.kill(process, signal.SIGCONT)
            done.wait(0.005)

    thread = threading.Thread(target=throttle)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        os.kill(process, signal.SIGCONT)


def _last_row(run_dir: Path) -> int:
    """Return the step of the last logged row; 0 if there is none."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return json.loads(lines[-1])["step"] if lines else 0


def failing_monitors(cells: Cells) -> None:
    """E10: a monitor that raises, has no room or hangs: the run is what it is without."""
    folder = cells.folder
    whole = Ranks(folder, 1, partial(train, folder, folder / "whole"))
    assert whole.wait() and not any(whole.codes), whole.said()

    def raises(*_: object) -> None:
        raise RuntimeError("a token hunter2 that is refused")

    def has_no_room(*_: object) -> None:
        raise OSError(28, "No space left on device", "/elsewhere/events")

    def hangs(*_: object) -> None:
        time.sleep(10**6)

    for name, (broken, said) in {
        "raises": (raises, "RuntimeError"),
        "has no room": (has_no_room, "No space left on device"),
        "hangs": (hangs, "values did not reach the monitors"),
    }.items():
        with cells.cell(name), mock.patch.object(MonitorMaster, "write_events", broken):
            run_dir, started = folder / name, time.monotonic()
            run = Ranks(folder, 1, partial(train, folder, run_dir))
            assert run.wait(60) and run.codes == [0], (run.codes, run.said())
            text = run.said()
            assert said in text and "hunter2" not in text, text
            assert text.count("the run goes on without them") <= 1, text
            assert "values did not reach the monitors" in text, text
            assert outcome(run_dir) == outcome(folder / "whole")
            cells.notes.append(f"{name}: {time.monotonic() - started:.1f} s")


DRILLS = {
    "E2": Drill(
        "a batch system's signal: saved, 75, one requeue of the right job after it", requeued, 150
    ),
    "E6": Drill(
        "a rank ten times slower: named with its factor, no abort, the same end", a_slow_rank, 150
    ),
    "E10": Drill(
        "monitors that raise, are full or hang: the same end, one warning a minute",
        failing_monitors,
        90,
    ),
}
