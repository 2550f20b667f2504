"""A phase that is too long ends the process, time in which it was stopped is not counted."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from fastclr.watchdog_timer import Watchdog


def watched(folder: Path, stopped: float, hangs: float) -> tuple[int, float]:
    """Fork a process that is stopped for a while and then hangs; return its code, and its time."""
    child = os.fork()
    if child == 0:
        with Watchdog(0.8, 0, 1, folder) as watchdog, watchdog.phase("data", 3):
            (folder / "ready").touch()
            time.sleep(0.3)  # is stopped in here
            time.sleep(hangs)
        os._exit(0)
    while not (folder / "ready").exists():
        time.sleep(0.01)
    started = time.monotonic()
    if stopped:
        os.kill(child, signal.SIGSTOP)
        time.sleep(stopped)
        os.kill(child, signal.SIGCONT)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), time.monotonic() - started


def test_a_phase_that_lasts_too_long_ends_with_76(tmp_path: Path) -> None:
    code, seconds = watched(tmp_path, 0.0, 30.0)
    assert code == 76 and seconds < 10
    assert "in watched" in (tmp_path / "stacks-rank0.txt").read_text()


def test_a_process_that_was_stopped_goes_on_when_it_wakes(tmp_path: Path) -> None:
    assert watched(tmp_path, 3.5, 0.0)[0] == 0


def test_one_that_hangs_after_it_was_stopped_ends_too(tmp_path: Path) -> None:
    code, seconds = watched(tmp_path, 3.5, 30.0)
    assert code == 76 and 3.5 < seconds < 15
