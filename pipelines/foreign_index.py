"""The index of a tar made by others: made once, kept beside it, and made anew when it changes.

The index of ``x.tar`` is ``.x.tar.fastclr-index`` beside it, or in the cache folder where its own
is read-only: a line of JSON that says what was indexed, then the lines of a shard's index. It is
made anew when the tar's length, time, or first or last bytes have changed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from fastclr.files import write_shared
from pipelines.errors import ShardError
from pipelines.index import Index, parse_index
from pipelines.tar_scan import MOST_CLASSES, scan

log = logging.getLogger(__name__)

NAMED = 5  # samples left out that are named
FORMAT = "fastclr-foreign-index 1"
_EDGE = 64 * 1024  # bytes at each end of a tar that are hashed to know it again
LONGEST_HEAD = 1 << 20
DAMAGED = (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError)
_LITTLE = 256 << 20  # bytes of tars that are indexed sooner than processes start


@dataclass(frozen=True)
class Indexed:
    """What the first line of an index says: which tar was indexed, and what was found.

    Attributes:
        format: Of the index.
        num_bytes: Length of the tar.
        mtime_ns: When it was last written; 0 behind a URL.
        known_by: sha256 of its first and last bytes; of all where it lies behind a URL.
        label_field: Field of ``.json`` that labels were taken from.
        num_samples: Usable samples.
        num_left_out: Others.
        left_out: Key and reason of the first ones.
        num_pickled: Members that were ignored.
        num_classes: Largest label + 1.
        sha256: Of the lines that follow.
    """

    format: str
    num_bytes: int
    mtime_ns: int
    known_by: str
    label_field: str | None
    num_samples: int
    num_left_out: int
    left_out: list[str]
    num_pickled: int
    num_classes: int
    sha256: str

    @classmethod
    def parse(cls, head: bytes) -> Indexed:
        """Parse the first line; raise ValueError or TypeError if a field cannot be."""
        indexed = cls(**json.loads(head))
        counts = (indexed.num_samples, indexed.num_left_out, indexed.num_pickled)
        if not all(type(n) is int and n >= 0 for n in (*counts, indexed.num_classes)):
            raise TypeError("a count is none")
        if not all(isinstance(text, str) for text in indexed.left_out):
            raise TypeError("left_out is no text")
        if indexed.num_classes > MOST_CLASSES:
            raise ValueError("too many classes")
        return indexed

    def line(self) -> bytes:
        """Return the first line."""
        return json.dumps(asdict(self)).encode() + b"\n"

    def is_of(self, other: tuple[int, int, str], label_field: str | None) -> bool:
        """Whether this describes a tar with such a length, time and edges."""
        mine = (self.num_bytes, self.mtime_ns, self.known_by)
        return self.format == FORMAT and mine == other and self.label_field == label_field


@dataclass(frozen=True)
class Indexer:
    """Finds or makes the indexes of tars.

    Attributes:
        cache: Folder for indexes that cannot lie beside their tar.
        label_field: See :func:`~pipelines.tar_scan.scan`.
    """

    cache: Path
    label_field: str | None

    def describe_all(self, files: Sequence[Path]) -> list[Indexed]:
        """Say what is in some tars, in their order; index those that were not yet.

        Raises:
            ShardError: If one cannot be read.
        """
        with ThreadPoolExecutor(min(32, 4 * (os.cpu_count() or 1))) as pool:
            known = list(pool.map(self.known, files))
        new = [file for file, one in zip(files, known, strict=True) if one is None]
        if sum(file.stat().st_size for file in new) > _LITTLE:
            log.warning("%d tars are indexed, once: the first is %s", len(new), new[0])
            self._make_in_processes(new)
        pairs = zip(files, known, strict=True)
        return [one or self.known(file) or self.make(file)[0] for file, one in pairs]

    def _make_in_processes(self, files: Sequence[Path]) -> None:
        """Index tars in a process a core. What fails there is tried again, and told, here."""
        # Started anew, not forked: this process may have threads and devices.
        program = (
            "import json, sys; job = json.load(sys.stdin); sys.path[:] = job['sys_path']\n"
            "from pipelines.foreign_index import make_indexes; make_indexes(job)"
        )
        num_processes = min(os.cpu_count() or 1, len(files))

        def work(number: int) -> None:
            job = {
                "sys_path": sys.path,
                "files": [str(file.absolute()) for file in files[number::num_processes]],
                "cache": str(self.cache.absolute()),
                "label_field": self.label_field,
            }
            command = [sys.executable, "-I", "-c", program]
            subprocess.run(command, input=json.dumps(job).encode(), check=False)

        with ThreadPoolExecutor(num_processes) as pool:
            list(pool.map(work, range(num_processes)))

    def known(self, file: Path) -> Indexed | None:
        """Say what is in a tar; None if it was not indexed yet. The lines stay unread."""
        tar = _identity(file)
        for place in self._places(file):
            try:
                with place.open("rb") as stream:
                    indexed = Indexed.parse(stream.readline(LONGEST_HEAD))
            except DAMAGED:
                continue  # the caller makes it again
            if indexed.is_of(tar, self.label_field):
                return indexed
        return None

    def _places(self, file: Path) -> tuple[Path, Path]:
        """Return where a tar's index may lie, the preferred place first."""
        name = f".{file.name}.fastclr-index"
        whole = hashlib.sha256(os.fsencode(file.absolute())).hexdigest()
        return file.with_name(name), self.cache / "foreign" / f"{whole}.fastclr-index"

    def read(self, file: Path) -> tuple[Indexed, Index] | None:
        """Read a tar's index; None if there is none, or it is damaged or of an older tar."""
        tar = _identity(file)
        for place in self._places(file):
            try:
                head, _, lines = place.read_bytes().partition(b"\n")
                indexed = Indexed.parse(head)
                if indexed.is_of(tar, self.label_field):
                    return indexed, parse_lines(indexed, lines)
            except DAMAGED:
                continue  # the caller makes it again
        return None

    def make(self, file: Path) -> tuple[Indexed, bytes]:
        """Index a tar and keep the index."""
        before = _identity(file)
        try:
            with file.open("rb") as stream:
                indexed, lines = index_tar(stream, str(file), before, self.label_field)
        except OSError as error:
            raise ShardError(f"{file} cannot be read: {error}.") from error
        if _identity(file) != before:
            raise ShardError(f"{file} changed while it was indexed: wait until it is written.")
        raw = indexed.line() + lines
        beside, cached = self._places(file)
        try:
            write_shared(beside, raw)
        except OSError:  # read-only
            cached.parent.mkdir(parents=True, exist_ok=True)
            write_shared(cached, raw)
        return indexed, lines


def index_tar(
    stream: BinaryIO, name: str, known_as: tuple[int, int, str], label_field: str | None
) -> tuple[Indexed, bytes]:
    """Index a tar.

    Args:
        stream: The tar.
        name: Its path or URL, for errors.
        known_as: Its length, time and sha256; see :class:`Indexed`.
        label_field: See :func:`~pipelines.tar_scan.scan`.

    Returns:
        What is in it, and the lines of its index.

    Raises:
        ShardError: If it cannot be read.
    """
    found = scan(stream, name, label_field)
    lines = "".join(sample.line() for sample in found.samples).encode()
    labels = [-1 if s.label is None else s.label for s in found.samples]
    indexed = Indexed(
        FORMAT,
        *known_as,
        label_field,
        len(found.samples),
        len(found.left_out),
        [f"{name}, {text}" for text in found.left_out[:NAMED]],
        found.num_pickled,
        max(labels, default=-1) + 1,
        hashlib.sha256(lines).hexdigest(),
    )
    return indexed, lines


def make_indexes(job: dict[str, Any]) -> None:
    """Index tars in a process of its own; see :meth:`Indexer.describe_all`.

    Several ranks begin at different tars, and leave out what another has indexed meanwhile.
    """
    indexer = Indexer(Path(job["cache"]), job["label_field"])
    files = [Path(file) for file in job["files"]]
    first = os.getpid() % len(files)
    for file in files[first:] + files[:first]:
        try:
            if indexer.known(file) is None:
                indexer.make(file)
        except (ShardError, OSError):  # the parent meets it too
            continue


def parse_lines(indexed: Indexed, lines: bytes) -> Index:
    """Parse an index's lines; raise ValueError if they are not those its first line means."""
    if hashlib.sha256(lines).hexdigest() != indexed.sha256:
        raise ValueError("damaged")
    index = parse_index(lines, tar_bytes=indexed.num_bytes, num_classes=indexed.num_classes)
    if len(index) != indexed.num_samples:
        raise ValueError("the first line does not fit the others")
    return index


def _identity(file: Path) -> tuple[int, int, str]:
    """Return a file's length, time, and the sha256 of its first and last bytes."""
    try:
        with file.open("rb") as stream:
            status = os.fstat(stream.fileno())
            edges = hashlib.sha256(stream.read(_EDGE))
            stream.seek(max(0, status.st_size - _EDGE))
            edges.update(stream.read(_EDGE))
    except OSError as error:
        raise ShardError(f"{file} cannot be read: {error}.") from error
    return status.st_size, status.st_mtime_ns, edges.hexdigest()
