"""Zips: stored members are read where they lie, deflated ones are unpacked to the spool.

The central directory is read entry by entry: Python's own reader keeps about a kilobyte a member.
Format: PKWARE's APPNOTE 6.3, sections 4.3.7, 4.3.12 and 4.3.14-4.3.16.
"""

from __future__ import annotations

import os
import stat
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from fastclr.config import ConfigError
from pipelines.sources.images import (
    MAX_IMAGE_BYTES,
    Listing,
    SourceImage,
    SourceOptions,
    check_classes,
    class_of,
    is_hidden,
)
from pipelines.sources.spool import check_ratio, local_identity, sorted_by_name, spooled_images
from pipelines.sources.tars import check_name, once_each

_END = struct.Struct("<4s4H2LH")
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR64 = struct.Struct("<4sLQL")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_STORED, _DEFLATED = 0, 8
_BLOCK = 1 << 18


class _Damaged(Exception):
    """What in the zip contradicts the format."""


class _Entry(NamedTuple):
    """A file of the central directory."""

    name: str
    method: int
    crc: int
    packed_bytes: int
    num_bytes: int
    header_at: int


def list_zip(file: Path, source: str, options: SourceOptions, spool: Path) -> Listing:
    """List the files of a zip of class folders, or of files, in the order of their names."""
    folders: set[str] = set()

    def unpack(target: BinaryIO) -> Iterator[SourceImage]:
        try:
            with file.open("rb") as stream:
                for entry in _entries(stream, source, set()):
                    yield _image(stream, entry, target, str(file.absolute()), source)
        except (_Damaged, struct.error, zlib.error, OSError) as error:
            raise _not_whole(source, error) from error

    try:
        with file.open("rb") as stream:  # all names first: what is refused costs no unpacking
            for _ in _entries(stream, source, folders):
                pass
    except (_Damaged, struct.error, OSError) as error:
        raise _not_whole(source, error) from error
    unpacked = spooled_images(spool, f"zip {local_identity(file)}", unpack)
    images = (
        SourceImage(i.name, class_of(i.name, options), i.url, i.offset, i.num_bytes)
        for i in unpacked
    )
    ordered = once_each(source, sorted_by_name(images, spool))
    return Listing(check_classes(source, ordered, lambda: folders, options))


def _not_whole(source: str, error: Exception) -> ConfigError:
    return ConfigError(
        f"{source} is no whole zip ({error}): it is cut or damaged, or the disk is full. Get it "
        "anew, or unpack it into a folder and pack that."
    )


def _entries(stream: BinaryIO, source: str, folders: set[str]) -> Iterator[_Entry]:
    """Yield the files of the central directory; put the first folders of names in ``folders``."""
    count, start, num_bytes, base = _directory(stream)
    stream.seek(start)
    end = start + num_bytes
    at = start
    for _ in range(count):
        raw = _exactly(stream, _ENTRY.size, at)
        fields = _ENTRY.unpack(raw)
        signature, made_by, _, flags, method, _, _, crc, packed, size = fields[:10]
        name_len, extra_len, comment_len, _, _, attributes, header_at = fields[10:]
        if signature != b"PK\1\2":
            raise _Damaged(f"no entry at byte {at} of its directory")
        raw_name = _exactly(stream, name_len, at)
        extra = _exactly(stream, extra_len, at)
        _exactly(stream, comment_len, at)
        at += _ENTRY.size + name_len + extra_len + comment_len
        size, packed, header_at = _wide(extra, size, packed, header_at)
        text = raw_name.decode("utf-8" if flags & 0x800 else "cp437", "surrogateescape")
        name = check_name(source, text.replace("\\", "/") if made_by >> 8 == 0 else text)
        if text.endswith("/"):
            if not is_hidden(name) and name != ".":
                folders.add(name.partition("/")[0])
        elif not is_hidden(name):
            _check_entry(source, name, flags, method, attributes >> 16 if made_by >> 8 == 3 else 0)
            yield _Entry(name, method, crc, packed, size, header_at + base)
            stream.seek(at)
    if at != end:
        raise _Damaged(f"its directory ends at byte {at}, not at {end}")


def _directory(stream: BinaryIO) -> tuple[int, int, int, int]:
    """Find the central directory: entries, first byte, length, and what precedes the zip."""
    length = stream.seek(0, os.SEEK_END)
    tail_at = max(0, length - (1 << 16) - _END.size)
    stream.seek(tail_at)
    tail = stream.read()
    found = tail.rfind(b"PK\5\6")
    if found < 0 or found + _END.size > len(tail):
        raise _Damaged("there is no directory at its end")
    _, disk, _, _, count, num_bytes, start, comment_len = _END.unpack_from(tail, found)
    if found + _END.size + comment_len != len(tail):
        raise _Damaged("its directory is not at its end")
    end = tail_at + found
    if disk not in (0, 0xFFFF):
        raise _Damaged("it is one part of several")
    if wide := _wide_directory(stream, end):
        count, num_bytes, start, end = wide
    base = end - num_bytes - start  # bytes before the zip, as in self-extracting ones
    if base < 0:
        raise _Damaged("its directory does not fit in it")
    return count, start + base, num_bytes, base


def _wide_directory(stream: BinaryIO, end: int) -> tuple[int, int, int, int] | None:
    """Read the 64-bit directory's entries, length, first byte and place; None without one."""
    if end < _END64.size + _LOCATOR64.size:
        return None
    stream.seek(end - _LOCATOR64.size)
    signature, _, said, _ = _LOCATOR64.unpack(_exactly(stream, _LOCATOR64.size, end))
    if signature != b"PK\6\7":
        return None
    for at in (end - _LOCATOR64.size - _END64.size, said):  # said is wrong if something precedes
        stream.seek(min(at, end))
        fields = _END64.unpack(_exactly(stream, _END64.size, at))
        if fields[0] == b"PK\6\6":
            return fields[7], fields[8], fields[9], at
    raise _Damaged("its 64-bit directory is not where it says")


def _wide(extra: bytes, size: int, packed: int, header_at: int) -> tuple[int, int, int]:
    """Replace numbers that need more than 32 bits by those of the 64-bit extra field."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        if kind == 1:
            numbers = iter(struct.unpack_from(f"<{length // 8}Q", extra, at + 4))
            try:
                size = next(numbers) if size == 0xFFFFFFFF else size
                packed = next(numbers) if packed == 0xFFFFFFFF else packed
                header_at = next(numbers) if header_at == 0xFFFFFFFF else header_at
            except StopIteration:
                raise _Damaged("a 64-bit field is cut") from None
        at += 4 + length
    return size, packed, header_at


def _check_entry(source: str, name: str, flags: int, method: int, mode: int) -> None:
    """Refuse what cannot be read, or is no file."""
    if flags & 0x1 or flags & 0x2040:
        raise ConfigError(
            f"{source} has {name!r} encrypted: unpack it with its password and pack the folder."
        )
    if stat.S_ISLNK(mode):
        raise ConfigError(
            f"{source} has a link {name!r} instead of the file: write the zip without --symlinks."
        )
    if method not in (_STORED, _DEFLATED):
        raise ConfigError(
            f"{source} has {name!r} compressed by method {method}; stored (0) and deflated (8) "
            "are read. Write the zip with `zip -0`, which is best for images."
        )


def _image(stream: BinaryIO, entry: _Entry, target: BinaryIO, url: str, source: str) -> SourceImage:
    """Find an entry's bytes, and unpack them if they are deflated."""
    stream.seek(entry.header_at)
    header = _LOCAL.unpack(_exactly(stream, _LOCAL.size, entry.header_at))
    if header[0] != b"PK\3\4":
        raise _Damaged(f"{entry.name!r} is not at byte {entry.header_at}")
    start = entry.header_at + _LOCAL.size + header[9] + header[10]
    if start + entry.packed_bytes > os.fstat(stream.fileno()).st_size:
        raise _Damaged(f"{entry.name!r} goes on behind its end")
    if entry.method == _STORED:
        if entry.packed_bytes != entry.num_bytes:
            raise _Damaged(f"{entry.name!r} is stored with two lengths")
        return SourceImage(entry.name, None, url, start, entry.num_bytes)
    offset = target.tell()
    stream.seek(start)
    _inflate(stream, entry, target, source)
    check_ratio(source, target.tell(), os.fstat(stream.fileno()).st_size)
    return SourceImage(entry.name, None, "", offset, entry.num_bytes)


def _inflate(stream: BinaryIO, entry: _Entry, target: BinaryIO, source: str) -> None:
    """Unpack one member; check its length and checksum."""
    if entry.num_bytes > MAX_IMAGE_BYTES:
        raise ConfigError(
            f"{source} has {entry.name!r} with {entry.num_bytes} bytes, an image has at most "
            f"{MAX_IMAGE_BYTES}: take it out."
        )
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    left, written, crc = entry.packed_bytes, 0, 0
    data = b""
    while not inflater.eof and written <= entry.num_bytes:
        if not data and left:
            data = _exactly(stream, min(left, _BLOCK), stream.tell())
            left -= len(data)
        piece = inflater.decompress(data, _BLOCK)
        if not piece and not inflater.unconsumed_tail and not left:
            break
        data = inflater.unconsumed_tail
        crc = zlib.crc32(piece, crc)
        written += len(piece)
        target.write(piece)
    if not inflater.eof or written != entry.num_bytes or crc != entry.crc:
        raise _Damaged(f"{entry.name!r} is not what its length and checksum say")


def _exactly(stream: BinaryIO, num_bytes: int, at: int) -> bytes:
    """Read so many bytes, or say where there are fewer."""
    data = stream.read(num_bytes)
    if len(data) != num_bytes:
        raise _Damaged(f"it ends within what begins at byte {at}")
    return data
