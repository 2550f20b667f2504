"""Why a run stops before its end.

At a signal it finishes the step, saves and leaves; at a second one it leaves at once.

Imports nothing heavy: a command catches signals from its first second, while torch is loading.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
EXIT_PREEMPTED, EXIT_PEER_LOST = 75, 76
# A launcher passes on what its children got themselves; that is not a second wish.
ECHO_SECONDS = 2.0


class Preempted(Exception):
    """The run stopped because of a signal, and what it did is saved; start it again to go on."""


class PeerLost(RuntimeError):
    """Another rank is gone or does not answer; nothing was saved since the last checkpoint."""


class WaitInterrupted(Exception):
    """A signal came inside :meth:`Interruption.breaks_waits`."""


class Interruption:
    """Remembers that one of :data:`SIGNALS` came; a context that may be entered again inside.

    Another one, two seconds after the first or later, ends the process at once with 128 + its
    number. Off the main thread, where Python allows no handlers, nothing is caught.
    """

    def __init__(self) -> None:
        self.requested: signal.Signals | None = None
        self._time = 0.0
        self._depth = 0
        self._breaks_waits = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interruption:
        if self._depth == 0:
            self.requested = None
        if self._depth == 0 and threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        self._depth += 1
        return self

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if self._depth == 0:
            for number, handler in self._before.items():
                signal.signal(number, handler)
            self._before = {}

    @contextmanager
    def breaks_waits(self) -> Iterator[None]:
        """Turn a signal that comes in here, or came before, into :class:`WaitInterrupted`."""
        self._breaks_waits = True
        try:
            if self.requested:
                raise WaitInterrupted
            yield
        finally:
            self._breaks_waits = False

    def _handle(self, number: int, _: FrameType | None) -> None:
        """Note the first signal; leave at the second."""
        now = time.monotonic()
        if self.requested is None:
            self.requested, self._time = signal.Signals(number), now
            os.write(sys.stderr.fileno(), b"stopping: this step is finished and saved first\n")
            if self._breaks_waits:
                raise WaitInterrupted
        elif now - self._time >= ECHO_SECONDS:
            os.write(sys.stderr.fileno(), b"stopping at once: the last checkpoint stands\n")
            os._exit(128 + number)
