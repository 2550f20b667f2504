"""Whole verified copies of remote shards on local disk, shared by the processes of a node.

A copy is named by the hash of what it holds. It is written under ``NAME.partial``, which its writer
holds locked (flock): the lock is the sign that somebody is downloading, it goes with the process
however that ends, and a temporary file without it is rubbish. A whole copy is renamed to
``NAME.shard``. Its modification time is a fixed number made from its name, its seal: whoever writes
into it later breaks that, and it is read anew. Access times, set by hand, order the copies by use.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import queue
import re
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from fastclr.config import ConfigError
from pipelines.errors import ShardError, StorageError
from pipelines.remote.download import DEFAULT, download
from pipelines.remote.retries import Deadline, Patience
from pipelines.remote.urls import redacted

logger = logging.getLogger(__name__)

Wanted = tuple[str, int | None, str | None]
"""URL, length in bytes and sha256 of a shard."""

_STEP = 64 << 20  # bytes reserved at a time for an object that does not say how long it is
_OURS = re.compile(r"[0-9a-f]{64}\.(shard|partial)")
_CREATE = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC


class ShardCache:
    """A folder of whole copies, the least recently used of which make room for new ones.

    Any number of threads and processes may use a folder at once, also after a fork. Its size is
    that of the files in it, those being written included; a copy that was removed while a
    descriptor is open keeps its disk space until that is closed.

    Args:
        folder: Where the copies lie, on a disk of this node; made if it is missing. Nobody else may
            write to it.
        max_bytes: Most bytes in it.
        patience: Time-outs; the deadline covers waiting for another process's download too.
        num_threads: Threads that read ahead.

    Raises:
        ConfigError: If the folder cannot be used.
    """

    def __init__(
        self,
        folder: str | Path,
        max_bytes: int,
        *,
        patience: Patience = DEFAULT,
        num_threads: int = 2,
    ) -> None:
        self.folder, self.max_bytes = Path(folder), max_bytes
        self._patience, self._num_threads = patience, num_threads
        self._pid = 0
        self._closed = False
        _make_private(self.folder)
        if max_bytes < 1:
            raise ConfigError(f"a shard cache of {max_bytes} bytes holds nothing: give more.")

    def open(self, url: str, num_bytes: int | None = None, sha256: str | None = None) -> int:
        """Return a descriptor of a whole local copy, open for reading; the caller closes it.

        The first process that wants a shard downloads it, the others wait for it.

        Args:
            url: The shard.
            num_bytes: Its length, checked if given.
            sha256: Its hash, checked if given. Without it a copy is known by URL and length, and
                serves even if the object changed since.

        Raises:
            StorageError: If it cannot be read in time, or the disk is full.
            ShardError: If it is not what length and hash say.
            ConfigError: If the cache is too small for it, or its URL is refused.
        """
        return self._open((url, num_bytes, sha256), threading.Event())

    def prefetch(self, shards: Sequence[Wanted]) -> None:
        """Begin to copy shards that will be wanted, in this order, in the background.

        A failure is logged, and met again by :meth:`open`.
        """
        if self._closed:
            return
        if self._pid != os.getpid():  # threads do not survive a fork
            self._pid, self._stop = os.getpid(), threading.Event()
            self._queue: queue.SimpleQueue[Wanted | None] = queue.SimpleQueue()
            self._coming: set[Wanted] = set()
            self._threads = [
                threading.Thread(target=self._read_ahead, name="fastclr-prefetch", daemon=True)
                for _ in range(self._num_threads)
            ]
            for thread in self._threads:
                thread.start()
        for shard in shards:
            if shard not in self._coming:
                self._coming.add(shard)
                self._queue.put(shard)

    def rename(self, known: Wanted, better: Wanted) -> None:
        """Keep a copy under the length and hash that were found; do nothing if it has gone."""
        old, new = _Copy(self.folder, known), _Copy(self.folder, better)
        if (descriptor := old.open()) is None:
            return
        try:
            new.seal(descriptor)  # in no process's eyes the old one any more
            with self.locked(), contextlib.suppress(FileNotFoundError):
                old.whole.replace(new.whole)
        finally:
            os.close(descriptor)

    def close(self) -> None:
        """Stop reading ahead; a download in progress ends within seconds and leaves nothing."""
        self._closed = True
        if self._pid == os.getpid():
            self._stop.set()
            for _ in self._threads:
                self._queue.put(None)
            for thread in self._threads:
                if thread is not threading.current_thread():  # garbage may be collected in one
                    thread.join(1.0)

    def _read_ahead(self) -> None:
        """Copy shards until told to stop."""
        while (shard := self._queue.get()) is not None and not self._stop.is_set():
            try:
                os.close(self._open(shard, self._stop))
            except (OSError, ShardError, ConfigError) as error:
                if not self._stop.is_set():
                    logger.warning("reading ahead failed, it will be tried again: %s", error)
            finally:
                self._coming.discard(shard)

    def _open(self, shard: Wanted, stop: threading.Event) -> int:
        url, num_bytes, sha256 = shard
        if num_bytes is not None and num_bytes > self.max_bytes:
            raise self._too_small(url, num_bytes)
        copy = _Copy(self.folder, shard)
        deadline = self._patience.deadline(num_bytes, stop)
        while (descriptor := copy.open()) is None:
            with copy.claimed() as claim:
                if claim is None:
                    self._wait(url, deadline)
                elif (descriptor := copy.open()) is None:
                    room = _Room(self, copy, claim, deadline)
                    download(
                        url,
                        room,
                        num_bytes=num_bytes,
                        sha256=sha256,
                        patience=self._patience,
                        deadline=deadline,
                    )
                    descriptor = room.publish()
            if descriptor is not None:
                break
        return descriptor

    def _wait(self, url: str, deadline: Deadline) -> None:
        """Wait a moment for a process, or a thread reading ahead, that downloads the same shard."""
        if deadline.left <= 0:
            raise StorageError(
                f"{redacted(url)} cannot be read: this process, reading ahead, or another one on "
                f"this node has been downloading it for {deadline.elapsed:.0f} s, the deadline. "
                "Look at their messages, check the address, the network and the credentials, stop "
                "a process that hangs (its place will be taken), and start again: a run goes on "
                "where it stopped."
            )
        deadline.sleep(0.02)

    def make_room(self, num_bytes: int, copy: _Copy) -> bool:
        """Remove what was used longest ago until a copy fits beside the rest; whether it does."""
        total = num_bytes
        copies = []
        for used, name, size in self._entries():
            if name.endswith(".shard"):
                copies.append((used, name, size))
            elif name == copy.partial.name or _removed_as_stale(self.folder / name):
                continue
            total += size
        for _, name, size in sorted(copies):
            if total <= self.max_bytes:
                break
            (self.folder / name).unlink(missing_ok=True)
            total -= size
        return total <= self.max_bytes

    def _entries(self) -> list[tuple[int, str, int]]:
        """List time of last use (0 for temporary files), name and bytes of the files."""
        found = []
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if not _OURS.fullmatch(entry.name):
                    continue
                with contextlib.suppress(FileNotFoundError):
                    stat = entry.stat(follow_symlinks=False)
                    used = stat.st_atime_ns if entry.name.endswith(".shard") else 0
                    found.append((used, entry.name, stat.st_size))
        return found

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from making room at the same time."""
        descriptor = os.open(self.folder / "lock", _CREATE, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            _unlock(descriptor)

    def _too_small(self, url: str, num_bytes: int) -> ConfigError:
        return ConfigError(
            f"the shard cache {self.folder} holds {self.max_bytes} bytes, {redacted(url)} alone "
            f"has {num_bytes}: give the cache more, best room for two windows of shards."
        )


class _Copy:
    """The two names of a shard in the cache, and what may be found there."""

    def __init__(self, folder: Path, shard: Wanted) -> None:
        url, self.num_bytes, sha256 = shard
        identity = f"{sha256}" if sha256 else f"{url}\n{self.num_bytes}"
        name = hashlib.sha256(identity.encode()).hexdigest()
        self.whole, self.partial = folder / f"{name}.shard", folder / f"{name}.partial"
        # Whole seconds between 2001 and 2033: every file system keeps them.
        self._seal = (1_000_000_000 + int(name[:7], 16) * 3) * 10**9

    def open(self) -> int | None:
        """Return a descriptor of the whole copy and note its use; None if there is none."""
        try:
            descriptor = os.open(self.whole, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        stat = os.fstat(descriptor)
        if stat.st_mtime_ns != self._seal or self.num_bytes not in (None, stat.st_size):
            os.close(descriptor)
            return None
        self.seal(descriptor)
        return descriptor

    def seal(self, descriptor: int) -> None:
        """Set the times: used now, written as it should be."""
        os.utime(descriptor, ns=(time.time_ns(), self._seal))

    @contextlib.contextmanager
    def claimed(self) -> Iterator[int | None]:
        """Hold the temporary file as the only one; None if another process or thread does.

        What is not renamed by the end is removed.
        """
        descriptor = _try_lock(self.partial, _CREATE)
        try:
            yield descriptor
        finally:
            if descriptor is not None:
                if _is_same(descriptor, self.partial):
                    self.partial.unlink()
                _unlock(descriptor)


class _Room:
    """The sink of a download: a temporary file in the cache, its space reserved beforehand."""

    def __init__(self, cache: ShardCache, copy: _Copy, descriptor: int, deadline: Deadline) -> None:
        self._cache, self._copy, self._descriptor = cache, copy, descriptor
        self._deadline = deadline
        self._written = self._reserved = 0

    def begin(self, num_bytes: int | None) -> None:
        """Reserve room for the whole, where its length is known, and go to the first byte."""
        self._written = 0
        os.lseek(self._descriptor, 0, os.SEEK_SET)
        self._reserve(min(_STEP, self._cache.max_bytes) if num_bytes is None else num_bytes)

    def write(self, block: bytes) -> None:
        """Append to the file."""
        if self._written + len(block) > self._reserved:
            self._reserve(self._written + max(len(block), _STEP))
        with self._naming_the_disk():
            rest = memoryview(block)
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
        self._written += len(block)

    def publish(self) -> int:
        """Put the file, complete and on the disk, where it is looked for; return it opened."""
        with self._naming_the_disk():
            os.ftruncate(self._descriptor, self._written)
            self._copy.seal(self._descriptor)
            os.fsync(self._descriptor)
            # Opened before it can be removed again.
            descriptor = os.open(self._copy.partial, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            with self._cache.locked():  # else who adds up the folder might see neither name
                self._copy.partial.replace(self._copy.whole)
        return descriptor

    def _reserve(self, num_bytes: int) -> None:
        """Grow the file to a length that fits into the cache, waiting for others to finish."""
        if num_bytes > self._cache.max_bytes:
            raise ConfigError(
                f"the shard cache {self._cache.folder} holds {self._cache.max_bytes} bytes, one "
                f"shard alone has {num_bytes} or more: give the cache more."
            )
        while True:
            with self._cache.locked(), self._naming_the_disk():
                if self._cache.make_room(num_bytes, self._copy):
                    os.ftruncate(self._descriptor, num_bytes)
                    self._reserved = num_bytes
                    return
            if self._deadline.left <= 0:
                raise StorageError(
                    f"the shard cache {self._cache.folder} of {self._cache.max_bytes} bytes is "
                    "full of shards that are being downloaded: give it more, best room for two "
                    "windows of shards."
                )
            self._deadline.sleep(0.05)

    @contextlib.contextmanager
    def _naming_the_disk(self) -> Iterator[None]:
        """Say which disk an error is about, and what to do."""
        try:
            yield
        except StorageError:
            raise
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            what = (
                "lower the cache's size or free space on its disk" if full else "look at its disk"
            )
            raise StorageError(
                f"the shard cache {self._cache.folder} cannot be written after {self._written} "
                f"bytes of a shard ({error.strerror}): {what}."
            ) from error


def _make_private(folder: Path) -> None:
    """Make the folder, or check that only this user can put files into it."""
    try:
        folder.mkdir(parents=True, mode=0o700, exist_ok=True)
        stat = folder.stat()
    except OSError as error:
        raise ConfigError(
            f"the shard cache {folder} cannot be made ({error.strerror}): name another folder."
        ) from error
    if stat.st_uid != os.geteuid() or stat.st_mode & 0o022:
        raise ConfigError(
            f"the shard cache {folder} belongs to user {stat.st_uid} with mode "
            f"{stat.st_mode & 0o777:o}: others could put shards into it. Name a folder of your own "
            "(chmod go-w)."
        )


def _try_lock(file: Path, flags: int) -> int | None:
    """Open and lock a file unless it is locked, or removed meanwhile; return its descriptor."""
    try:
        descriptor = os.open(file, flags, 0o600)
    except OSError as error:
        if error.errno == errno.ENOENT:
            return None
        raise StorageError(
            f"{file} cannot be opened ({error.strerror}): look at its disk."
        ) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_same(descriptor, file):
            return descriptor
    except BlockingIOError:
        os.close(descriptor)
        return None
    _unlock(descriptor)
    return None


def _is_same(descriptor: int, file: Path) -> bool:
    """Whether a name still stands for an open file."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), file.lstat())
    return False


def _removed_as_stale(partial: Path) -> bool:
    """Remove a temporary file if its writer is gone; whether it was."""
    descriptor = _try_lock(partial, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    if descriptor is None:
        return False
    partial.unlink()
    _unlock(descriptor)
    return True


def _unlock(descriptor: int) -> None:
    """Unlock and close; closing alone would leave the lock to a child forked meanwhile."""
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)
