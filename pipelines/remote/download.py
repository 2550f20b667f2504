"""Reading one object whole: tries, pauses, and what is said when there will be no more."""

from __future__ import annotations

import logging

from pipelines.errors import ShardError, StorageError
from pipelines.remote import objects, web
from pipelines.remote.retries import (
    Again,
    Changed,
    Deadline,
    Final,
    Missing,
    NoSuchObject,
    Patience,
    Wrong,
    pause,
)
from pipelines.remote.transfer import Sink, Transfer
from pipelines.remote.urls import protocol_of, redacted

logger = logging.getLogger(__name__)

MAX_WRONG = 3  # downloads of an object that come whole and are not the one expected

DEFAULT = Patience()


def download(
    url: str,
    sink: Sink,
    *,
    num_bytes: int | None = None,
    sha256: str | None = None,
    patience: Patience = DEFAULT,
    deadline: Deadline | None = None,
) -> None:
    """Read an object into a sink; when it returns, all of it is there and as expected.

    A failed try is followed by another that asks for the missing bytes only, if it is certain to be
    the same object (ETag, or a hash to check); otherwise by one from the first byte.

    Args:
        url: What to read, of :data:`~pipelines.remote.urls.PROTOCOLS`.
        sink: Where the bytes go; ``begin`` is called before each first byte.
        num_bytes: Length it must have.
        sha256: Hash it must have, hexadecimal.
        patience: Time-outs.
        deadline: When to give up; by default the patience's, from now.

    Raises:
        StorageError: If it does not come in time, or the answer says that it never will.
        NoSuchObject: If the answer is that it does not exist.
        ShardError: If what comes, several times, is not what is expected.
        ConfigError: If the URL is none that may be read.
    """
    read = web.read if protocol_of(url) in ("http", "https") else objects.read
    deadline = deadline or patience.deadline(num_bytes)
    transfer = Transfer(sink, num_bytes, sha256)
    tries, failures, num_wrong, why = 0, 0, 0, ""
    while True:
        tries += 1
        before = transfer.received
        if not transfer.can_resume:
            transfer.restart()
        try:
            read(url, transfer, deadline, patience)
            return
        except Final as error:
            kind = NoSuchObject if isinstance(error, Missing) else StorageError
            raise kind(_given_up(url, f"{error}", tries, deadline)) from None
        except Again as error:
            last = error
        # A try that the deadline cut short says less than the one before it.
        why = f"{last}; before that, {why}" if why and deadline.left <= 0 else f"{last}"
        if isinstance(last, (Changed, Wrong)):
            transfer.restart()
        num_wrong += isinstance(last, Wrong)
        if num_wrong == MAX_WRONG:
            raise ShardError(
                f"{redacted(url)}: {last}, {MAX_WRONG} times. It changed after its manifest was "
                "written, or something on the way answers in its place: restore it, or make the "
                "set again."
            )
        failures = 1 if transfer.received > before else failures + 1
        seconds = pause(url, failures, patience, last.retry_after)
        if seconds >= deadline.left:
            raise StorageError(_given_up(url, why, tries, deadline))
        logger.warning("%s: %s; try %d in %.1f s", redacted(url), last, tries + 1, seconds)
        deadline.sleep(seconds)


def _given_up(url: str, why: str, tries: int, deadline: Deadline) -> str:
    """Say that an object was not read."""
    return (
        f"{redacted(url)} cannot be read: {why} ({tries} tries in {deadline.elapsed:.1f} "
        f"of {deadline.seconds:.0f} s). Check the address, the network and the credentials, "
        "and start again: a run goes on where it stopped."
    )
