"""How long to wait for storage, when to ask again, and what to say when that is over."""

from __future__ import annotations

import email.utils
import hashlib
import os
import threading
import time
from dataclasses import dataclass

from pipelines.errors import StorageError
from pipelines.order import uniforms

RETRIED = (408, 425, 429)  # of the 4xx; the others say that asking again is useless


@dataclass(frozen=True)
class Patience:
    """How long storage may take.

    Attributes:
        connect_seconds: Longest time for a connection, each address.
        read_seconds: Longest time without a byte (http), or for a block of 8 MiB (others).
        deadline_seconds: Longest time for an object, all tries together, besides the next.
        slowest_bytes_per_second: An object of known length may take what it takes at this rate on
            top, so that a large one on a slow line is not cut off while it comes.
        first_wait_seconds: Pause after the first failure; doubles with each further one.
        longest_wait_seconds: Where doubling ends.
    """

    connect_seconds: float = 10.0
    read_seconds: float = 60.0
    deadline_seconds: float = 300.0
    first_wait_seconds: float = 0.5
    longest_wait_seconds: float = 20.0
    slowest_bytes_per_second: float = 1e6

    def deadline(self, num_bytes: int | None, stop: threading.Event | None = None) -> Deadline:
        """Return the end of the time for an object, from now; an event may end it earlier."""
        longer = (num_bytes or 0) / self.slowest_bytes_per_second
        return Deadline(self.deadline_seconds + longer, stop)


class NoSuchObject(StorageError, FileNotFoundError):
    """Storage that answers, and says that there is no such object."""


class Again(Exception):
    """A try that failed in a way that may pass; its text says how.

    Attributes:
        retry_after: Seconds the server asks to wait; 0 if it does not.
    """

    def __init__(self, what: str, retry_after: float = 0.0) -> None:
        super().__init__(what)
        self.retry_after = retry_after


class Changed(Again):
    """The object is not the one that reading began with: begin at the first byte."""


class Wrong(Again):
    """The object's length or hash contradicts what is expected of it: begin at the first byte."""


class Final(Exception):
    """A failure that trying again would not mend; its text says which."""


class Missing(Final):
    """The storage says that there is no such object."""


class Deadline:
    """The end of the time for one object, and an event that ends it early.

    Args:
        seconds: Time from now.
        stop: Set by another thread to break off.
    """

    def __init__(self, seconds: float, stop: threading.Event | None = None) -> None:
        self.seconds = seconds
        self._started = time.monotonic()
        self._ends = self._started + seconds
        self._stop = stop or threading.Event()

    @property
    def elapsed(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self._started

    @property
    def left(self) -> float:
        """Seconds left; 0 or less when it has passed or was broken off."""
        return 0.0 if self._stop.is_set() else self._ends - time.monotonic()

    def limit(self, seconds: float) -> float:
        """Return a time-out of at most ``seconds`` that ends with the deadline.

        Raises:
            TimeoutError: If nothing is left.
        """
        if (left := self.left) <= 0:
            raise TimeoutError("the deadline passed")
        return min(seconds, left)

    def sleep(self, seconds: float) -> None:
        """Wait, but not longer than the deadline."""
        self._stop.wait(max(0.0, min(seconds, self.left)))


def pause(url: str, failures: int, patience: Patience, retry_after: float = 0.0) -> float:
    """Return the seconds to wait before the next try.

    Exponential with jitter, so that the ranks do not come back together; the jitter is a hash of
    URL, number of failures and process (no generator is touched). A server's Retry-After is the
    least, with the jitter on top.

    Args:
        url: What is being read.
        failures: Failures in a row without a byte of progress, from 1.
        patience: First and longest pause.
        retry_after: Seconds the server asked for.
    """
    longest = min(patience.first_wait_seconds * 2.0 ** min(failures - 1, 30), 1e9)
    longest = min(longest, patience.longest_wait_seconds)
    word = int.from_bytes(hashlib.sha256(url.encode()).digest()[:7], "big")
    jitter = float(uniforms(word, failures, os.getpid())[0])
    return retry_after + longest * (0.5 + 0.5 * jitter if not retry_after else jitter)


def refusal(status: int, retry_after: str | None) -> Again | Final:
    """Return what an http status that is no success means, Retry-After read from its header."""
    if status in RETRIED or status >= 500:
        return Again(f"status {status}", _seconds(retry_after))
    hints = {
        401: ": credentials are missing or wrong; they come from the environment",
        403: ": the credentials (from the environment) may not read it, or it is not there",
        404: ": there is no such object",
        410: ": there is no such object any more",
    }
    kind = Missing if status in (404, 410) else Final
    return kind(f"status {status}{hints.get(status, '')}")


def _seconds(retry_after: str | None) -> float:
    """Read a Retry-After header: seconds or a date; 0 if it is neither."""
    if not retry_after:
        return 0.0
    if retry_after.strip().isdecimal():
        return float(retry_after.strip()[:9])
    try:
        date = email.utils.parsedate_to_datetime(retry_after)
        return max(0.0, date.timestamp() - time.time())
    except (ValueError, OverflowError):
        return 0.0
