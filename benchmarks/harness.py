"""What the benchmarks share: interleaved timing, and rows of JSON with facts of the machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch

from fastclr.measurements import facts, measurement, write_rows

__all__ = ["facts", "interleaved", "measurement", "medians", "write_rows"]


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


def _synchronize() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
