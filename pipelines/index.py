"""A shard's index: one line a sample, checked as a whole and kept as arrays."""

from __future__ import annotations

import json
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from operator import itemgetter
from threading import Lock
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from pipelines.decode import MAX_PIXELS
from pipelines.order import Int64

BLOCK = 512  # bytes of a tar's header, and what it rounds to

T = TypeVar("T")


@dataclass(frozen=True)
class Sample:
    """One row of a shard's index, a line of JSON.

    Attributes:
        key: WebDataset key; the tar holds ``key.extension`` and, with a label, ``key.cls``.
        extension: ``jpg``, ``png`` or ``webp``.
        offset: Place of the image's first byte in the tar.
        num_bytes: Length of the image in bytes.
        height: Height in pixels.
        width: Width in pixels.
        label: Class index, or None.
        source: Where the image came from, relative to the packed source.
    """

    key: str
    extension: str
    offset: int
    num_bytes: int
    height: int
    width: int
    label: int | None
    source: str

    def line(self) -> str:
        """Return its line of the index."""
        return json.dumps(asdict(self)) + "\n"


_FIELDS = tuple(Sample.__dataclass_fields__)
_row = itemgetter(*_FIELDS)


@dataclass(frozen=True)
class Index:
    """The samples of one shard, column by column.

    Attributes:
        keys: WebDataset keys.
        extensions: What follows the key in the tar.
        sources: Where the images came from.
        offset_N: int64, places of the first bytes in the tar.
        num_bytes_N: int64, lengths in bytes.
        size_N2: int32, heights and widths in pixels.
        label_N: int64, -1 where there is none.
    """

    keys: tuple[str, ...]
    extensions: tuple[str, ...]
    sources: tuple[str, ...]
    offset_N: Int64
    num_bytes_N: Int64
    size_N2: npt.NDArray[np.int32]
    label_N: Int64

    def __len__(self) -> int:
        return len(self.keys)

    def name(self, row: int) -> str:
        """Return the name that a row's image has in the tar."""
        return f"{self.keys[row]}.{self.extensions[row]}"

    def sample(self, row: int) -> Sample:
        """Return one row."""
        height, width = self.size_N2[row].tolist()
        label = int(self.label_N[row])
        return Sample(
            self.keys[row],
            self.extensions[row],
            int(self.offset_N[row]),
            int(self.num_bytes_N[row]),
            height,
            width,
            None if label < 0 else label,
            self.sources[row],
        )


def parse_index(raw: bytes, *, tar_bytes: int, num_classes: int) -> Index:
    """Parse JSON lines, all at once, and check every value.

    Args:
        raw: The index file.
        tar_bytes: Length of its tar.
        num_classes: Labels are below this.

    Raises:
        ValueError, TypeError, KeyError, OverflowError, RecursionError: If anything is not as
            :class:`Sample` says, or lies outside the tar; the message says what.
    """
    lines = json.loads(b"[" + b",".join(raw.splitlines()) + b"]")
    if not all(type(line) is dict and len(line) == len(_FIELDS) for line in lines):
        raise ValueError(f"a line is no object with the fields {', '.join(_FIELDS)}")
    columns = list(zip(*map(_row, lines), strict=True)) or [()] * len(_FIELDS)
    column = dict(zip(_FIELDS, columns, strict=True))
    for name in ("key", "extension", "source"):
        if not set(map(type, column[name])) <= {str}:
            raise TypeError(f"a {name} is no text")
    column["label"] = tuple(-1 if label is None else label for label in column["label"])
    offset = _integers(column, "offset", BLOCK, tar_bytes)
    num_bytes = _integers(column, "num_bytes", 1, tar_bytes)
    height = _integers(column, "height", 1, MAX_PIXELS)
    width = _integers(column, "width", 1, MAX_PIXELS)
    label = _integers(column, "label", -1, num_classes - 1, f"; there are {num_classes} classes")
    if (offset % BLOCK).any() or (num_bytes > tar_bytes - offset).any():
        raise ValueError(f"a sample does not lie in its tar of {tar_bytes} bytes")
    if (height * width > MAX_PIXELS).any():
        raise ValueError(f"an image has more than {MAX_PIXELS} pixels")
    size = np.stack([height, width], 1).astype(np.int32)
    return Index(
        column["key"], column["extension"], column["source"], offset, num_bytes, size, label
    )


def _integers(
    column: dict[str, tuple[Any, ...]], name: str, least: int, most: int, why: str = ""
) -> Int64:
    """Return a column of integers in [least, most]; JSON's true and 1.0 are none."""
    if not set(map(type, column[name])) <= {int}:
        raise TypeError(f"a {name} is no integer")
    values = np.array(column[name], np.int64)
    if ((values < least) | (values > most)).any():
        wrong = values[(values < least) | (values > most)][0]
        raise ValueError(f"a {name} is {wrong}, not in {least}..{most}{why}")
    return values


def header_problem(header: bytes, name: str, num_bytes: int) -> str:
    """Say what is wrong with the tar header that stands before an image; "" if nothing is.

    Args:
        header: The 512 bytes before the image.
        name: The member's name.
        num_bytes: Its length.
    """
    encoded = name.encode("utf-8", "surrogateescape")
    found, size, checksum = header[:100].rstrip(b"\0"), header[124:136], header[148:156]
    if _octal(checksum) != _sum(header) - sum(checksum) + 8 * ord(" "):
        return "no tar header stands before it"
    # Longer and non-ASCII names stand in a header of their own, in forms that differ.
    if len(encoded) <= 100 and encoded.isascii() and found != encoded:
        return f"the tar has {found.decode('utf-8', 'backslashreplace')!r} in its place"
    if _octal(size) != num_bytes:
        return f"it has {num_bytes} bytes, the tar says {_octal(size)}"
    return ""


def _sum(header: bytes) -> int:
    """Add up the bytes of a header; Adler-32's lower half does it in a tenth of the time of sum."""
    halves = header[: BLOCK // 2], header[BLOCK // 2 :]  # below its modulus, whatever their bytes
    return sum((zlib.adler32(half) & 0xFFFF) - 1 for half in halves)


def _octal(digits: bytes) -> int | None:
    """Read a number of a tar header; None if it is written otherwise."""
    try:
        return int(digits.strip(b" \0"), 8)
    except ValueError:
        return None


class Kept(Generic[T]):
    """The values last used, each made once however many threads ask for it at the same time.

    Args:
        make: Makes the value of a key.
        most: Bound of the sum of their weights; the one asked for is kept in any case.
        weight: Weight of a value.
    """

    def __init__(
        self, make: Callable[[int], T], most: int, weight: Callable[[T], int] = lambda _: 1
    ) -> None:
        self._make, self._most, self._weight = make, most, weight
        self._lock = Lock()
        self._values: OrderedDict[int, Future[T]] = OrderedDict()
        self._total = 0

    def __getitem__(self, key: int) -> T:
        with self._lock:
            if future := self._values.get(key):
                self._values.move_to_end(key)
            else:
                self._values[key] = Future()
        return future.result() if future else self._fill(key, self._values[key])

    def _fill(self, key: int, mine: Future[T]) -> T:
        """Make a value that others may be waiting for; forget the ones not used for longest."""
        try:
            value = self._make(key)
        except BaseException as error:
            with self._lock:
                del self._values[key]
            mine.set_exception(error)
            raise
        with self._lock:
            mine.set_result(value)
            self._total += self._weight(value)
            for old in list(self._values):
                if self._total <= self._most:
                    break
                if old != key and self._values[old].done():
                    self._total -= self._weight(self._values.pop(old).result())
        return value


def dali_index(members: Iterable[Iterable[tuple[str, int, int, str]]]) -> str:
    """Return DALI's index of a tar, as its ``wds2idx`` writes it.

    Args:
        members: For each sample its members: extension, offset, length in bytes, name.
    """
    lines = [" ".join(f"{e} {o} {n} {name}" for e, o, n, name in sample) for sample in members]
    return "".join(f"{line}\n" for line in (f"v1.2 {len(lines)}", *lines))


def packed_members(sample: Sample) -> list[tuple[str, int, int, str]]:
    """Return the members that our own tars hold of a sample, as :func:`dali_index` takes them."""
    image = (sample.extension, sample.offset, sample.num_bytes, f"{sample.key}.{sample.extension}")
    if sample.label is None:
        return [image]
    behind = sample.offset + -(-sample.num_bytes // BLOCK) * BLOCK
    return [image, ("cls", behind + BLOCK, len(str(sample.label)), f"{sample.key}.cls")]
