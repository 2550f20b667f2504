"""Reading the headers of tars that others wrote; nothing is extracted, no pickle is loaded."""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import PurePosixPath
from typing import BinaryIO

from PIL import Image

from pipelines.decode import FORMATS, MAX_PIXELS
from pipelines.errors import ShardError
from pipelines.index import BLOCK, Sample, header_problem

IMAGES = ("jpg", "jpeg", "png", "webp")
PICKLED = ("pyd", "pickle", "pkl", "pt", "pth", "npy", "npz", "ten")
MOST_CLASSES = 1_000_000  # a label beyond is no class

_HEAD = 32 * 1024  # bytes that mostly hold an image's header
_MOST_JSON = 1 << 20
_MOST_HEADER = 1 << 20  # names and attributes
_KEY = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]*)", re.DOTALL)  # WebDataset's rule


@dataclass(frozen=True)
class Member:
    """A file in a tar.

    Attributes:
        key: Its path up to the first dot of the base name.
        extension: What follows that dot, as it is written.
        offset: Place of its first byte in the tar.
        num_bytes: Its length.
        problem: Why it cannot be read by place, or "".
    """

    key: str
    extension: str
    offset: int
    num_bytes: int
    problem: str = ""

    @property
    def name(self) -> str:
        """Its path in the tar."""
        return f"{self.key}.{self.extension}"


@dataclass
class Scan:
    """What was found in one tar.

    Attributes:
        samples: Usable samples.
        left_out: Key and reason of the others.
        num_pickled: Members that would have to be unpickled; they are ignored.
    """

    samples: list[Sample] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    num_pickled: int = 0


def members(stream: BinaryIO, problems: list[str]) -> Iterator[Member]:
    """Yield the files of a plain tar that have a WebDataset name, in order.

    Args:
        stream: The tar, which is left anywhere.
        problems: Gets a line where the tar ends before it should.

    Raises:
        tarfile.ReadError: If it is no plain tar.
    """
    length = stream.seek(0, io.SEEK_END)
    stream.seek(0)
    if length == 0:
        return
    with tarfile.open(fileobj=_Wary(stream), mode="r:") as tar:  # pyright: ignore[reportArgumentType, reportCallIssue]
        try:
            for info in tar:
                tar.members = []  # pyright: ignore[reportAttributeAccessIssue] - else all stay
                if (match := _KEY.fullmatch(info.name)) and info.isreg():
                    yield _member(stream, info, match[1], match[2], length)
                # tarfile would seek back for ever at a negative size, and too far at a huge one.
                if not info.offset_data <= tar.offset <= length + BLOCK:
                    raise tarfile.ReadError(f"{info.name!r} has {info.size} bytes")
        except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
            problems.append(f"the tar cannot be read beyond byte {tar.offset}: {error}")
            return
        stream.seek(tar.offset)
        mark = stream.read(BLOCK)
    if mark.strip(b"\0") or len(mark) < BLOCK:  # also where it ends behind a whole member
        problems.append(f"the tar is damaged or cut at byte {tar.offset} of {length}")


class _Wary:
    """A file for tarfile, which reads headers only, but of any size they state."""

    def __init__(self, stream: BinaryIO) -> None:
        self.seek, self.tell, self._stream = stream.seek, stream.tell, stream

    def read(self, size: int) -> bytes:
        """Read a header."""
        if not 0 <= size <= _MOST_HEADER:
            raise tarfile.ReadError(f"a header says that it has {size} bytes")
        return self._stream.read(size)


def _member(
    stream: BinaryIO, info: tarfile.TarInfo, key: str, extension: str, length: int
) -> Member:
    """Describe a file, and whether the header before its bytes is its own."""
    stream.seek(info.offset_data - BLOCK)
    problem = header_problem(stream.read(BLOCK), info.name, info.size)
    if info.issparse():
        problem = "is sparse"
    elif info.offset_data + info.size > length:
        problem = "is cut"
    return Member(key, extension, info.offset_data, info.size, problem)


def scan(stream: BinaryIO, name: str, label_field: str | None) -> Scan:
    """Index a tar by its headers and those of its images.

    Args:
        stream: A plain tar; neighbours with one key make a sample. Its image is the first member
            with the extension of one.
        name: Path or URL, for samples' sources and errors.
        label_field: Field of the sample's ``.json`` that is its label; None to take ``.cls``.

    Raises:
        ShardError: If it cannot be read or is no plain tar.
    """
    found = Scan()
    try:
        problems: list[str] = []
        for key, group in groupby(members(stream, problems), key=lambda member: member.key):
            _add_sample(found, stream, PurePosixPath(name).name, key, list(group), label_field)
        found.left_out += problems
    except tarfile.TarError as error:
        raise ShardError(
            f"{name} is no plain tar ({error}): decompress it, or pack it with `fastclr shards`."
        ) from error
    except OSError as error:
        raise ShardError(f"{name} cannot be read: {error}.") from error
    return found


def _add_sample(
    found: Scan,
    stream: BinaryIO,
    tar: str,
    key: str,
    group: list[Member],
    label_field: str | None,
) -> None:
    """Add a sample to what was found, or the reason why it is none."""
    found.num_pickled += sum(m.extension.lower().split(".")[-1] in PICKLED for m in group)
    image = next((m for m in group if m.extension.lower() in IMAGES), None)
    try:
        if image is None:
            raise ValueError(f"has no image, only {', '.join(m.extension for m in group)[:100]}")
        if image.problem:
            raise ValueError(image.problem)
        height, width = image_size(stream, image.offset, image.num_bytes)
        label = _label(stream, group, label_field)
    except (ValueError, RecursionError) as error:
        found.left_out.append(f"{key}: {error}")
    else:
        source = f"{tar}/{image.name}"
        offset, num_bytes, extension = image.offset, image.num_bytes, image.extension
        sample = Sample(key, extension, offset, num_bytes, height, width, label, source)
        found.samples.append(sample)


def _label(stream: BinaryIO, group: Iterable[Member], label_field: str | None) -> int | None:
    """Return the label of a sample, None if it states no integer that can be a class."""
    wanted = "cls" if label_field is None else "json"
    member = next((m for m in group if m.extension.lower() == wanted and not m.problem), None)
    if member is None or member.num_bytes > _MOST_JSON:
        return None
    stream.seek(member.offset)
    try:
        value = json.loads(stream.read(member.num_bytes))
        if label_field is not None:
            value = value[label_field]
    except (ValueError, KeyError, TypeError, IndexError):
        return None
    return value if type(value) is int and 0 <= value < MOST_CLASSES else None


def image_size(stream: BinaryIO, offset: int, num_bytes: int) -> tuple[int, int]:
    """Return height and width in pixels that an image's header states.

    Raises:
        ValueError: If it is no JPEG, PNG or WebP image, or too large.
    """
    error: Exception = ValueError("is empty (0 bytes)")
    for length in sorted({min(_HEAD, num_bytes), num_bytes} - {0}):
        stream.seek(offset)
        try:
            with Image.open(io.BytesIO(stream.read(length)), formats=FORMATS) as image:
                width, height = image.size
        except Exception as problem:  # Pillow raises anything on hostile bytes
            error = problem
            continue
        if not 0 < width * height <= MAX_PIXELS:
            raise ValueError(f"has {width} x {height} pixels, more than {MAX_PIXELS}, or none")
        return height, width
    raise ValueError("is no JPEG, PNG or WebP image") from error
