"""Tars on the disk compared with their manifest while they are read.

A hash of a whole tar cannot be had from the images that are read here and there in it: a thread of
its own reads each tar once, when it is about to be used. That is early enough to stop a run soon
after damage was read, costs a few per cent of a core while a set is read for the first time, and
nothing later.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable

from pipelines.errors import ShardError

logger = logging.getLogger(__name__)


class Comparison:
    """Compares tars with their hashes, one after the other, each once; from any thread.

    Args:
        verify: Compares a tar; raises ShardError if it differs.

    Attributes:
        problem: What was wrong with the first tar that differed; "" until then.
    """

    def __init__(self, verify: Callable[[int], object]) -> None:
        self._verify, self.problem = verify, ""
        self._lock = threading.Lock()
        self._seen: set[int] = set()
        self._waiting: deque[tuple[int, bool]] = deque()
        self._is_running = False

    def begin(self, numbers: Iterable[int], tolerant: bool = False) -> None:
        """Begin to compare tars; returns at once.

        Args:
            numbers: Of the tars.
            tolerant: Warn of one that differs, instead of calling it the problem.
        """
        with self._lock:
            new = [number for number in numbers if number not in self._seen]
            self._seen.update(new)
            self._waiting.extend((number, tolerant) for number in new)
            if self._is_running or not self._waiting:
                return
            self._is_running = True
        # A daemon: a process that is done does not wait for it.
        threading.Thread(target=self._run, name="fastclr-compare", daemon=True).start()

    def check(self) -> None:
        """Return if no difference was found so far.

        Raises:
            ShardError: If one was.
        """
        if self.problem:
            raise ShardError(self.problem)

    def _run(self) -> None:
        while True:
            with self._lock:
                if self.problem or not self._waiting:
                    self._is_running = False
                    return
                number, tolerant = self._waiting.popleft()
            try:
                self._verify(number)
            except ShardError as error:
                if tolerant:
                    logger.warning("%s What of it decodes is read as it is.", error)
                else:
                    self.problem = str(error)
