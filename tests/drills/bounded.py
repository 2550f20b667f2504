"""Do something hostile in a process of its own, with a bound on its time and memory."""

from __future__ import annotations

import json
import os
import select
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path


def bounded(
    work: Callable[[], object],
    error: type[Exception],
    *,
    seconds: float,
    mib: float,
    may_return: bool = False,
) -> None:
    """Check that work raises this error, or may return, within its bounds.

    Args:
        work: Done in a fork of this process.
        error: What it may raise.
        seconds: Most time.
        mib: Most memory it may take on top, in MiB.
        may_return: Whether doing it without an error is fine too.
    """
    reading, writing = os.pipe()
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _be(work, error, writing)
    os.close(writing)
    ready, _, _ = select.select([reading], [], [], seconds + 1)
    raw = os.read(reading, 60_000) if ready else b""
    os.close(reading)
    took = time.monotonic() - started
    with suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert ready and took <= seconds, f"it took {took:.1f} s"
    assert raw, "its process died"
    found = json.loads(raw)
    assert found["fits"] or (may_return and not found["name"]), f"{found['name']}: {found['text']}"
    assert found["mib"] <= mib, f"it took {found['mib']:.0f} MiB"


def _be(work: Callable[[], object], error: type[Exception], writing: int) -> None:
    """Be the process; never returns."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak is this process's own
    before = _memory("VmRSS")
    name, text, fits = "", "", False
    try:
        work()
    except BaseException as caught:
        name, text, fits = type(caught).__name__, str(caught)[:500], isinstance(caught, error)
    found = {"name": name, "text": text, "fits": fits, "mib": _memory("VmHWM") - before}
    os.write(writing, json.dumps(found).encode())
    os._exit(0)


def _memory(field: str) -> float:
    """Return a field of this process's status in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024
