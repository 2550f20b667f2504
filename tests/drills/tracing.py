"""Stop a run before it saves, and let strace kill it, or fail a call, at an exact place."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from drill import Skipped
from forks import Ranks, train

from fastclr import checkpointing

WRITING = (
    "write pwrite64 writev fsync fdatasync rename renameat renameat2 unlink unlinkat rmdir mkdir "
    "mkdirat ftruncate fchmod fchmodat chmod"
).split()
SAVED, SAVING = 2, 4  # a run has saved the first step, and is stopped before it saves the second


def need_strace() -> None:
    """Skip the drill where nothing can be traced."""
    if shutil.which("strace") is None:
        raise Skipped("strace is not installed")
    done = subprocess.run(["strace", "-qq", "true"], capture_output=True, text=True)
    if done.returncode:
        raise Skipped(f"strace may not trace here: {done.stderr.strip()[:100]}")


@contextmanager
def saves(before: int | None = None, after: int | None = None) -> Iterator[None]:
    """Stop ranks that are forked in here before they save a step, or end them after it."""
    save = checkpointing.save

    def stopping(engine: Any, folder: Path, facts: Any, *args: Any, **options: Any) -> Path:
        if facts["step"] == before:
            os.kill(os.getpid(), signal.SIGSTOP)
        made = save(engine, folder, facts, *args, **options)
        if facts["step"] in (before, after):
            os._exit(0)
        return made

    with mock.patch.object(checkpointing, "save", stopping):
        yield


def begun(folder: Path, ranks: int = 1, stage: int = 0) -> Path:
    """Return the folder of a run that has saved step 2 and no more."""
    run_dir = folder / f"begun{ranks}"
    with saves(after=SAVED):
        run = Ranks(folder, ranks, partial(train, folder, run_dir, stage))
    assert run.wait() and not any(run.codes), run.said()
    return run_dir


def stopped(folder: Path, run_dir: Path) -> Ranks:
    """Go on with such a run until it is about to save step 4."""
    with saves(before=SAVING):
        run = Ranks(folder, 1, partial(train, folder, run_dir))
    deadline = time.monotonic() + 60
    while _field(run.ids[0], "State")[:1] != "T":
        assert time.monotonic() < deadline and not run.wait(0.005), run.said()
    return run


def traced(run: Ranks, *flags: str, log: Path = Path(os.devnull)) -> int:
    """Let a stopped run go on under strace; return its exit code, negative for a signal."""
    (rank,) = run.ids
    command = ["strace", "-f", "-qq", "-y", "-o", str(log), *flags, "-p", str(rank)]
    tracer = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 30
        threads = Path(f"/proc/{rank}/task")
        while any(_field(f"{rank}/task/{t.name}", "TracerPid") == "0" for t in threads.iterdir()):
            assert time.monotonic() < deadline and tracer.poll() is None, "strace does not attach"
            time.sleep(0.005)
        os.kill(rank, signal.SIGCONT)
        assert run.wait(60), run.said()
    finally:
        tracer.terminate()
        tracer.communicate()
        run.kill()
    assert run.codes[0] is not None
    return run.codes[0]


def _field(process: int | str, name: str) -> str:
    """Return a field of a process's status."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(name)), "")
