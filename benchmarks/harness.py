"""What the benchmarks share: interleaved timing, facts of the machine, rows of JSON."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from fastclr.facts import hardware, now, versions


def interleaved(
    functions: Mapping[str, Callable[[], object]], repeats: int, warm_ups: int = 2
) -> dict[str, list[float]]:
    """Time functions in turn, so that a busy moment of the machine falls on all of them.

    Args:
        functions: What to time, by name.
        repeats: Measured rounds; each calls every function once.
        warm_ups: Rounds before, not measured.

    Returns:
        Seconds of each call, by name.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for round_ in range(warm_ups + repeats):
        for name, function in functions.items():
            _synchronize()
            before = time.perf_counter()
            function()
            _synchronize()
            if round_ >= warm_ups:
                seconds[name].append(time.perf_counter() - before)
    return seconds


def medians(seconds: Mapping[str, list[float]]) -> dict[str, float]:
    """Return the median of each series of :func:`interleaved`."""
    return {name: statistics.median(values) for name, values in seconds.items()}


def facts() -> dict[str, Any]:
    """Return when, on what and with which software a measurement was made."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {
        "measured": now(),
        "hardware": hardware(device),
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }


def write_rows(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as JSON lines, replacing the file."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    Path(path).write_text(text, encoding="utf-8")


def _synchronize() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
