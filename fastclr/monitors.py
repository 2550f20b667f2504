"""Monitors (TensorBoard, W&B, ...) beside a run, which goes on when they fail or hang."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from fastclr.metrics import Events

logger = logging.getLogger(__name__)

_WAITING = 1000  # rows; further ones are lost
_WARNING_SECONDS = 60.0
_CLOSE_SECONDS = 5.0


class Monitors:
    """Passes events on in a thread of its own; a context, at whose end the rest is written.

    What a monitor raises is warned of once a minute at most, without its words, which may hold a
    password. A monitor that hangs is given up after 1,000 rows, and at the end after 5 seconds.

    Args:
        write_events: Gets (name, value, images).

    Attributes:
        num_lost: Values that no monitor got.
    """

    def __init__(self, write_events: Callable[[Events], None]) -> None:
        self._write_events = write_events
        self._queue: queue.Queue[Events | None] = queue.Queue(_WAITING)
        self._warned = -_WARNING_SECONDS
        self.num_lost = 0
        self._in_hand = 0
        self._thread = threading.Thread(target=self._run, name="fastclr-monitors", daemon=True)
        self._thread.start()

    def write(self, events: Events) -> None:
        """Pass events on; returns at once."""
        try:
            self._queue.put_nowait(events)
        except queue.Full:
            self._lose(len(events), "they do not answer")

    def __enter__(self) -> Monitors:
        return self

    def __exit__(self, *_: object) -> None:
        deadline = time.monotonic() + _CLOSE_SECONDS
        with suppress(queue.Full):
            self._queue.put(None, timeout=_CLOSE_SECONDS)
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self.num_lost += self._in_hand
            while not self._queue.empty():
                self.num_lost += len(self._queue.get() or ())
        if self.num_lost:
            logger.warning(
                "%d values did not reach the monitors; the run's own files have all of them",
                self.num_lost,
            )

    def _run(self) -> None:
        while (events := self._queue.get()) is not None:
            self._in_hand = len(events)
            try:
                self._write_events(events)
            except Exception as error:
                why = f"{type(error).__name__} {getattr(error, 'strerror', None) or ''}".strip()
                self._lose(len(events), why)
            self._in_hand = 0

    def _lose(self, count: int, why: str) -> None:
        """Count lost values; say so once a minute."""
        self.num_lost += count
        now = time.monotonic()
        if now - self._warned >= _WARNING_SECONDS:
            self._warned = now
            logger.warning("monitors: %s; the run goes on without them, values are lost", why)
