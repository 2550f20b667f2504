"""Tars made by others (img2dataset, WebDataset, torchvision): indexed once, read like our own.

The index of ``x.tar`` is ``.x.tar.fastclr-index`` beside it, or in the cache folder where its own
is read-only: a line of JSON that says what was indexed, then the lines of a shard's index. It is
made anew when the tar's length, time, or first or last bytes have changed.
"""

from __future__ import annotations

import glob
import hashlib
import itertools
import json
import logging
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from fastclr.files import write_shared
from pipelines.errors import ShardError
from pipelines.index import Index, parse_index
from pipelines.packed import MANIFEST
from pipelines.tar_scan import MOST_CLASSES, scan

log = logging.getLogger(__name__)

_FORMAT = "fastclr-foreign-index 1"
_EDGE = 64 * 1024  # bytes at each end of a tar that are hashed to know it again
_NAMED = 5  # samples left out that a warning names
_MOST_NAMES = 1_000_000  # a pattern makes
_LONGEST_HEAD = 1 << 20
_DAMAGED = (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError)
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


def is_foreign(text: str) -> bool:
    """Whether a path means tars without a manifest: a pattern, a tar, or a folder of tars."""
    path = Path(text)
    if path.is_dir():
        return bool(_tars(path)) and not (path / MANIFEST).exists() and not _is_unfinished(path)
    if path.exists():
        return path.suffix == ".tar"
    return bool(_RANGE.search(text)) or glob.has_magic(text)


def _tars(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("*.tar") if not p.name.startswith("."))


def _is_unfinished(folder: Path) -> bool:
    """Whether a folder is what a killed packing left: reading that would lose samples silently."""
    ours = any(folder.glob("*.index.jsonl")) or (folder / "rejected.jsonl").exists()
    return ours or ".partial" in folder.name


def list_tars(text: str) -> list[Path]:
    """Return the tars that a folder, a glob pattern or ``{000000..000099}`` means, in order.

    Raises:
        ShardError: If there are none, or one that a range names is missing.
    """
    path = Path(text)
    if path.exists():
        return _tars(path) if path.is_dir() else [path]
    found: list[Path] = []
    for name in _expand(text):
        if glob.has_magic(name):
            found += sorted(map(Path, glob.glob(name)))  # noqa: PTH207 - the pattern may be absolute
        elif Path(name).exists():
            found.append(Path(name))
        else:
            raise ShardError(f"{name} of {text} does not exist: correct the range or restore it.")
    if not found:
        raise ShardError(f"{text} matches no file: correct the pattern.")
    return found


def _expand(text: str) -> list[str]:
    """Write out every ``{first..last}``, with the zeros that ``first`` begins with."""
    parts = _RANGE.split(text)
    choices: list[list[str]] = [[parts[0]]]
    for first, last, tail in zip(parts[1::3], parts[2::3], parts[3::3], strict=True):
        if not 0 <= int(last) - int(first) < _MOST_NAMES:
            raise ShardError(f"{{{first}..{last}}} of {text} is no range: give {{first..last}}.")
        numbers = range(int(first), int(last) + 1)
        choices += [[f"{n:0{len(first)}d}" for n in numbers], [tail]]
    if np.prod([len(choice) for choice in choices], dtype=float) > _MOST_NAMES:
        raise ShardError(f"{text} means more than {_MOST_NAMES} files: give a smaller range.")
    return ["".join(parts) for parts in itertools.product(*choices)]


@dataclass(frozen=True)
class _Indexed:
    """What the first line of an index says: which tar was indexed, and what was found.

    Attributes:
        format: Of the index.
        num_bytes: Length of the tar.
        mtime_ns: When it was last written.
        edges_sha256: Of its first and last bytes.
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
    edges_sha256: str
    label_field: str | None
    num_samples: int
    num_left_out: int
    left_out: list[str]
    num_pickled: int
    num_classes: int
    sha256: str

    @classmethod
    def parse(cls, head: bytes) -> _Indexed:
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

    def is_of(self, other: tuple[int, int, str], label_field: str | None) -> bool:
        """Whether this describes a tar with such a length, time and edges."""
        mine = (self.num_bytes, self.mtime_ns, self.edges_sha256)
        return self.format == _FORMAT and mine == other and self.label_field == label_field


class ForeignShards:
    """Tars without a manifest; see :class:`~pipelines.shards.Storage`.

    Args:
        text: Folder, tar or pattern; see :func:`list_tars`.
        cache: Folder for indexes that cannot lie beside their tar.
        label_field: See :func:`~pipelines.tar_scan.scan`.
        max_damaged: Share of samples that may be left out.

    Raises:
        ShardError: If a tar cannot be read, more is damaged than allowed, or nothing is left.
    """

    def __init__(self, text: str, cache: Path, label_field: str | None, max_damaged: float) -> None:
        self.path: Path | str = text
        self._cache, self._label_field = cache, label_field
        files = list_tars(text)
        with ThreadPoolExecutor(min(32, os.cpu_count() or 1)) as pool:
            found = list(pool.map(self._describe, files))
        self._report(found, max_damaged)
        used = [(file, one) for file, one in zip(files, found, strict=True) if one.num_samples]
        self._files = [file for file, _ in used]
        self._indexed = [one for _, one in used]
        self.samples_of_shards = np.array([one.num_samples for one in self._indexed], np.int64)
        self.class_names = [str(k) for k in range(max(one.num_classes for one in found))]
        facts = [
            (file.name, one.num_bytes, one.edges_sha256, one.num_samples, one.sha256)
            for file, one in used
        ]
        self.digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def _report(self, found: list[_Indexed], max_damaged: float) -> None:
        """Warn of what is left out, or refuse it."""
        kept, left_out = (
            sum(getattr(f, n) for f in found) for n in ("num_samples", "num_left_out")
        )
        first = [text for one in found for text in one.left_out][:_NAMED]
        named = "".join(f"\n  {text}" for text in first) + "\n  ..." * (left_out > len(first))
        if kept == 0:
            raise ShardError(f"{self.path}: {len(found)} tars hold no usable sample.{named}")
        if left_out > max_damaged * (kept + left_out):
            raise ShardError(
                f"{self.path}: {left_out} of {kept + left_out} samples cannot be used, more than "
                f"max_damaged={max_damaged:g} allows:{named}\nRepair the tars, or allow more."
            )
        if left_out:
            log.warning(
                "%s: %d of %d samples cannot be used and are left out:%s",
                self.path, left_out, kept + left_out, named,
            )  # fmt: skip
        if pickled := sum(one.num_pickled for one in found):
            log.warning("%s: %d pickled members are ignored, never loaded", self.path, pickled)

    def file(self, number: int) -> str:
        """Name a tar for an error."""
        return str(self._files[number])

    def open(self, number: int) -> int:
        """Open a tar; return its file descriptor, which the caller closes."""
        return os.open(self._files[number], os.O_RDONLY | os.O_CLOEXEC)

    def index(self, number: int) -> Index:
        """Read a shard's index, or make it again where it has gone.

        Raises:
            ShardError: If the tar has changed since the set was opened.
        """
        file, known = self._files[number], self._indexed[number]
        if found := self._read(file):
            indexed, index = found
        else:
            indexed, lines = self._make(file)
            index = _parse(indexed, lines)
        if indexed.sha256 != known.sha256 or indexed.edges_sha256 != known.edges_sha256:
            raise ShardError(f"{file} changed while it was in use: start again.")
        return index

    def prefetch(self, numbers: Sequence[int]) -> None:
        """Do nothing: the files are here."""

    def verify(self, number: int) -> int:
        """Refuse: nobody wrote down what the bytes should be."""
        raise ShardError(
            f"{self._files[number]} has no manifest that says its sha256: pack it with `python "
            "tools/make_shards.py` to have one."
        )

    def _describe(self, file: Path) -> _Indexed:
        """Say what is in a tar; index it if that was not done yet. The lines stay unread."""
        tar = _identity(file)
        for place in self._places(file):
            try:
                with place.open("rb") as stream:
                    indexed = _Indexed.parse(stream.readline(_LONGEST_HEAD))
            except _DAMAGED:
                continue  # made again below
            if indexed.is_of(tar, self._label_field):
                return indexed
        return self._make(file)[0]

    def _places(self, file: Path) -> tuple[Path, Path]:
        """Return where a tar's index may lie, the preferred place first."""
        name = f".{file.name}.fastclr-index"
        whole = hashlib.sha256(os.fsencode(file.absolute())).hexdigest()
        return file.with_name(name), self._cache / "foreign" / f"{whole}.fastclr-index"

    def _read(self, file: Path) -> tuple[_Indexed, Index] | None:
        """Read a tar's index; None if there is none, or it is damaged or of an older tar."""
        tar = _identity(file)
        for place in self._places(file):
            try:
                head, _, lines = place.read_bytes().partition(b"\n")
                indexed = _Indexed.parse(head)
                if indexed.is_of(tar, self._label_field):
                    return indexed, _parse(indexed, lines)
            except _DAMAGED:
                continue  # the caller makes it again
        return None

    def _make(self, file: Path) -> tuple[_Indexed, bytes]:
        """Index a tar and keep the index."""
        before = _identity(file)
        found = scan(file, self._label_field)
        if _identity(file) != before:
            raise ShardError(f"{file} changed while it was indexed: wait until it is written.")
        lines = "".join(sample.line() for sample in found.samples).encode()
        labels = [-1 if s.label is None else s.label for s in found.samples]
        indexed = _Indexed(
            _FORMAT,
            *before,
            self._label_field,
            len(found.samples),
            len(found.left_out),
            [f"{file}, {text}" for text in found.left_out[:_NAMED]],
            found.num_pickled,
            max(labels, default=-1) + 1,
            hashlib.sha256(lines).hexdigest(),
        )
        raw = json.dumps(asdict(indexed)).encode() + b"\n" + lines
        beside, cached = self._places(file)
        try:
            write_shared(beside, raw)
        except OSError:  # read-only
            cached.parent.mkdir(parents=True, exist_ok=True)
            write_shared(cached, raw)
        return indexed, lines


def _parse(indexed: _Indexed, lines: bytes) -> Index:
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
