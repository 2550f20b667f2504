"""Whose time it is: one timeline of a run on which every moment belongs to one stage."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

BETWEEN = "not explained"  # what no stage claims

Result = TypeVar("Result")


@dataclass
class Lap:
    """One step of the run.

    Attributes:
        label: What kind of step it was.
        host: When it began on the host's clock, seconds.
        stamps: Stages in order, each with the moment from which on time was its.
    """

    label: str
    host: float
    stamps: list[tuple[str, Any]] = field(default_factory=list)


class Marks:
    """Attributes each moment to the innermost open stage.

    On the CPU moments are those of the host's clock. On CUDA they are events in the stream, so that
    a stage gets what the device needed for it, waits included, and the host is not slowed: what the
    host does while the device is busy costs nothing there, as in the run itself.

    Args:
        device: Where the run computes.
        traced: Also name the stages to torch's profiler and to NVTX.

    Attributes:
        laps: Steps so far; the last one is open.
    """

    def __init__(self, device: torch.device, traced: bool = False) -> None:
        self.laps: list[Lap] = []
        self._on_cuda, self._traced, self._is_on = device.type == "cuda", traced, False
        self._stack: list[str] = []
        self._ranges: list[Any] = []

    def lap(self, label: str, is_on: bool) -> None:
        """Begin a step; with ``is_on`` False its stages are not told apart."""
        self._is_on, self._stack = is_on, [BETWEEN]
        self.laps.append(Lap(label, time.perf_counter(), [(BETWEEN, self._now())]))

    def push(self, stage: str, traced: bool = True) -> None:
        """Begin a stage inside the one that is open."""
        if not self._is_on:
            return
        self._stack.append(stage)
        self._stamp()
        if self._traced:
            self._ranges.append(_Range(stage, self._on_cuda) if traced else None)

    def pop(self) -> None:
        """End the innermost stage."""
        if not self._is_on:
            return
        self._stack.pop()
        self._stamp()
        if self._traced and (range_ := self._ranges.pop()):
            range_.close()

    def switch(self, stage: str) -> None:
        """Call the innermost stage something else from here on."""
        if self._is_on:
            self._stack[-1] = stage
            self._stamp()

    @property
    def stage(self) -> str:
        """The innermost stage."""
        return self._stack[-1] if self._stack else BETWEEN

    @contextmanager
    def during(self, stage: str) -> Iterator[None]:
        """Be in a stage in here."""
        self.push(stage)
        try:
            yield
        finally:
            self.pop()

    def within(self, stage: str, function: Callable[..., Result]) -> Callable[..., Result]:
        """Return a function that is a stage."""

        def timed(*args: Any, **kwargs: Any) -> Result:
            with self.during(stage):
                return function(*args, **kwargs)

        return timed

    def seconds(self, label: str) -> list[dict[str, float]]:
        """Return, for each finished step of a kind, the seconds of its stages."""
        if self._on_cuda:
            torch.cuda.synchronize()
        found = []
        for lap, after in zip(self.laps, self.laps[1:], strict=False):
            if lap.label != label:
                continue
            stages: defaultdict[str, float] = defaultdict(float)
            ends = [*lap.stamps[1:], after.stamps[0]]
            for (stage, start), (_, end) in zip(lap.stamps, ends, strict=True):
                stages[stage] += self._between(start, end)
            found.append(dict(stages))
        return found

    def wall(self, label: str) -> list[float]:
        """Return the seconds of each finished step of a kind, by the host's clock."""
        pairs = zip(self.laps, self.laps[1:], strict=False)
        return [after.host - lap.host for lap, after in pairs if lap.label == label]

    def _stamp(self) -> None:
        self.laps[-1].stamps.append((self.stage, self._now()))

    def _now(self) -> Any:
        if not self._on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, start: Any, end: Any) -> float:
        return start.elapsed_time(end) / 1e3 if self._on_cuda else end - start


class _Range:
    """A named range in the profiler's trace and, on CUDA, in NVTX."""

    def __init__(self, name: str, on_cuda: bool) -> None:
        self._record = torch.profiler.record_function(name)
        self._record.__enter__()
        self._on_cuda = on_cuda
        if on_cuda:
            torch.cuda.nvtx.range_push(name)

    def close(self) -> None:
        if self._on_cuda:
            torch.cuda.nvtx.range_pop()
        self._record.__exit__(None, None, None)
