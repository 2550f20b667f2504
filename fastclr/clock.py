"""How long a run took, over all its starts."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Training time without pauses, and time since this process started.

    Args:
        training_seconds: Training time of earlier starts, from the checkpoint.

    Attributes:
        apart_seconds: Time of this start that did not count as training, by what took it.
    """

    def __init__(self, training_seconds: float = 0.0) -> None:
        self._started = time.perf_counter()
        self._before = training_seconds
        self._running_since: float | None = None
        self.apart_seconds: defaultdict[str, float] = defaultdict(float)

    def start(self) -> None:
        """Start or go on counting training time."""
        self._before = self.training_seconds
        self._running_since = time.perf_counter()

    def pause(self) -> None:
        """Stop counting training time."""
        self._before = self.training_seconds
        self._running_since = None

    @contextmanager
    def apart(self, what: str) -> Iterator[None]:
        """Stop counting training time in here; it goes to ``apart_seconds[what]``."""
        self.pause()
        started = time.perf_counter()
        try:
            yield
        finally:
            self.apart_seconds[what] += time.perf_counter() - started
            self.start()

    @property
    def training_seconds(self) -> float:
        """Training time of all starts together."""
        now = time.perf_counter()
        return self._before + (now - self._running_since if self._running_since else 0.0)

    @property
    def program_seconds(self) -> float:
        """Time since this object was made."""
        return time.perf_counter() - self._started
