"""One writer for a run's folder: a lock while a start lives, and a number that each start raises.

The lock goes with the process, however that ends. Where it does not hold (its file was removed
because a host is gone and storage keeps its lock, or storage has no locks) the number does: what an
earlier start, waking up, still wants to save is refused.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from fastclr import collectives
from fastclr.config import ConfigError
from fastclr.files import write_json

logger = logging.getLogger(__name__)

WRITER, LOCK = "writer.json", "writer.lock"
_PATIENCE_SECONDS = 1.0  # for another start that only looks


@dataclass(frozen=True)
class Writer:
    """Who writes into a run's folder.

    Attributes:
        run: Drawn at the run's first start; its checkpoints name it.
        number: Counts the starts from 1.
        host: Where rank 0 runs.
        pid: Process of rank 0.
        started: Seconds since 1970.
    """

    run: str
    number: int
    host: str
    pid: int
    started: float


@dataclass(frozen=True)
class Fence:
    """The right to write into a run's folder, as long as no later start has taken it.

    Attributes:
        run_dir: The folder.
        writer: This start.
        is_first: Whether nobody had written down a run's name there before.
    """

    run_dir: Path
    writer: Writer
    is_first: bool = True

    def check(self) -> None:
        """Return if this start is still the last one; rank 0 calls this before it commits.

        Raises:
            ConfigError: If a later start has taken over.
        """
        found = _read(self.run_dir)
        if found is None or (found.run, found.number) != (self.writer.run, self.writer.number):
            by = (
                f"start {found.number}, {_who(found)}" if found else "somebody who removed its file"
            )
            raise ConfigError(
                f"{self.run_dir} was taken over from start {self.writer.number} by {by}: nothing "
                "more of this start is saved. Let the later one go on."
            )


@contextmanager
def taken(run_dir: Path) -> Iterator[Fence]:
    """Take a run's folder for this start; every rank enters this, and rank 0 holds the lock.

    Raises:
        ConfigError: On every rank, if another process writes there.
        OSError: On every rank, if the folder cannot be written.
    """
    lock, fence = None, None
    with collectives.together():
        if collectives.rank() == 0:
            run_dir.mkdir(parents=True, exist_ok=True)
            lock = _lock(run_dir)
            before = _read(run_dir)
            run, number = (before.run, before.number) if before else (secrets.token_hex(8), 0)
            writer = Writer(run, number + 1, socket.gethostname(), os.getpid(), time.time())
            write_json(run_dir / WRITER, asdict(writer))
            fence = Fence(run_dir, writer, before is None)
    try:
        yield collectives.from_first(fence)
    finally:
        if lock is not None:
            os.close(lock)


def refuse_if_taken(run_dir: Path) -> None:
    """Look whether another process writes into a folder, and take nothing.

    Raises:
        ConfigError: If one does.
    """
    with suppress(FileNotFoundError):
        descriptor = os.open(run_dir / LOCK, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _taken(run_dir) from None
        except OSError:
            logger.debug("no locks in %s", run_dir)  # said when it is taken
        finally:
            os.close(descriptor)


def _lock(run_dir: Path) -> int:
    """Lock the folder's lock file and return its descriptor."""
    file, deadline = run_dir / LOCK, time.monotonic() + _PATIENCE_SECONDS
    while True:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        descriptor = os.open(file, flags, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), file.lstat()):
                return descriptor
        except FileNotFoundError:
            pass  # removed between the two: once more
        except BlockingIOError:
            if time.monotonic() > deadline:
                os.close(descriptor)
                raise _taken(run_dir) from None
        except OSError as error:
            logger.warning(
                "%s cannot be locked (%s): two starts at once are noticed at a save only",
                file,
                error,
            )
            return descriptor
        os.close(descriptor)
        time.sleep(0.02)


def _taken(run_dir: Path) -> ConfigError:
    """Say who writes there."""
    found = _read(run_dir)
    who = _who(found) if found else "a process that has not said yet which"
    run = f"run {found.run}: " if found else ""
    return ConfigError(
        f"{run_dir} is being written by {who}: {run}two writers would destroy it. End that "
        f"process, or choose another --run-dir. If its host is gone for good, remove "
        f"{run_dir / LOCK}."
    )


def _who(writer: Writer) -> str:
    """Name a writer."""
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(writer.started))
    return f"process {writer.pid} on {writer.host} since {since}"


def _read(run_dir: Path) -> Writer | None:
    """Return who wrote there last; None if that is not known."""
    try:
        return Writer(**json.loads((run_dir / WRITER).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError):
        return None
