"""Tars, read by their headers alone: what is in them, where, and that nothing of it is lost."""

from __future__ import annotations

import bz2
import gzip
import lzma
import re
import tarfile
import zlib
from collections.abc import Callable, Generator, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

from fastclr.config import ConfigError
from pipelines.sources.images import (
    Listing,
    SourceImage,
    SourceOptions,
    check_classes,
    class_of,
    is_hidden,
)
from pipelines.sources.spool import (
    copy_limited,
    local_identity,
    sorted_by_name,
    spooled_file,
)

_UNPLAIN = re.compile(r"^/|^$|\0|//|/$|(^|/)\.{1,2}(/|$)")


class Member(NamedTuple):
    """A file in an archive: its name, and the place and length of its bytes."""

    name: str
    offset: int
    num_bytes: int


def members_of(
    file: Path, source: str, on_folder: Callable[[str], None]
) -> Generator[Member, None, None]:
    """Yield the files of a plain tar in its order.

    Args:
        file: The tar.
        source: Its name, for messages.
        on_folder: Called with the name of each folder that is a member.

    Raises:
        ConfigError: If it is damaged, cut, has something behind its end mark, or a member that is
            a link, a device or a sparse file or leaves its folder.
    """
    try:
        with file.open("rb") as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
            end = -1
            while (member := tar.next()) is not None:
                if tar.offset <= end or member.size < 0:
                    raise tarfile.ReadError(f"the header before byte {tar.offset} leads backwards")
                end = tar.offset
                tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue] - memory
                name = check_name(source, member.name)
                if member.isdir():
                    on_folder(name)
                elif not is_hidden(name):
                    _check_kind(source, member)
                    yield Member(name, member.offset_data, member.size)
            _check_end(stream, tar.offset)
    except (tarfile.TarError, ValueError, OverflowError, RecursionError, OSError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"{source} is no plain tar or is damaged ({error}): give a folder or a whole "
            "uncompressed tar; name a compressed one .tar.gz, .tar.bz2, .tar.xz or .tar.zst, or "
            "decompress it first."
        ) from error


def check_name(source: str, name: str) -> str:
    """Return an archive's name of a member in its plain form; refuse one that leaves its folder.

    Raises:
        ConfigError: If so.
    """
    if not _UNPLAIN.search(name):  # most: a path object costs more than the rest
        return name
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\0" in name:
        raise ConfigError(
            f"{source} has a member {name!r} that leaves its folder: this is no archive of "
            "class/name.ext; do not trust it."
        )
    return str(path)


def _check_kind(source: str, member: tarfile.TarInfo) -> None:
    """Refuse what is no file with its bytes in one piece."""
    if member.issym() or member.islnk():
        raise ConfigError(
            f"{source} has a link {member.name!r} instead of the file: write the tar with "
            "`tar --dereference --hard-dereference`."
        )
    if member.issparse():
        raise ConfigError(
            f"{source} has {member.name!r} as a sparse file, whose bytes lie in pieces: write the "
            "tar without --sparse."
        )
    if not member.isfile():
        raise ConfigError(
            f"{source} has {member.name!r}, which is a device, a FIFO or something unknown (type "
            f"{member.type!r}): write the tar without it."
        )


def _check_end(stream: BinaryIO, offset: int) -> None:
    """Refuse a tar without end mark or with more behind it, which tarfile would lose silently."""
    stream.seek(offset)
    num_zeros = 0
    while block := stream.read(1 << 20):
        if block.count(0) != len(block):
            what = (
                "behind its end mark more follows; are these several tars in one file?"
                if num_zeros >= tarfile.BLOCKSIZE or not any(block[: tarfile.BLOCKSIZE])
                else "there is no header there"
            )
            raise tarfile.ReadError(f"at byte {offset} {what}")
        num_zeros += len(block)
    if num_zeros < tarfile.BLOCKSIZE:
        raise tarfile.ReadError(f"at byte {offset} it ends without its end mark: it was cut")


def list_tar(file: Path, source: str, options: SourceOptions, spool: Path) -> Listing:
    """List the files of a tar of class folders, or of files, in the order of their names."""
    folders: set[str] = set()

    def on_folder(name: str) -> None:
        if not is_hidden(name) and name != ".":
            folders.add(name.partition("/")[0])

    url = str(file.absolute())
    images = (
        SourceImage(m.name, class_of(m.name, options), url, m.offset, m.num_bytes)
        for m in members_of(file, source, on_folder)
    )
    ordered = once_each(source, sorted_by_name(images, spool))
    return Listing(check_classes(source, ordered, lambda: folders, options))


def once_each(source: str, images: Iterator[SourceImage]) -> Iterator[SourceImage]:
    """Pass on images in the order of names; refuse a name that comes twice.

    Raises:
        ConfigError: If so.
    """
    before = None
    for image in images:
        if image.name == before:
            raise ConfigError(
                f"{source} has {image.name!r} twice, and which of them is meant is unknown: write "
                "the archive anew from a folder."
            )
        before = image.name
        yield image


def _open_zstd(file: Path) -> Any:
    try:
        from pipelines.sources.parquet import open_zstd
    except ImportError as error:
        raise ConfigError(
            f"{file} needs pyarrow, which reads zstd: `pip install 'fastclr[parquet]'`, or "
            "decompress it first with `zstd -d`."
        ) from error
    return open_zstd(file)


# By the end of the name, what reads the compressed bytes.
COMPRESSIONS: dict[str, Callable[[Path], Any]] = {
    ".tar.gz": gzip.open,
    ".tgz": gzip.open,
    ".tar.bz2": bz2.open,
    ".tbz2": bz2.open,
    ".tar.xz": lzma.open,
    ".txz": lzma.open,
    ".tar.zst": _open_zstd,
    ".tzst": _open_zstd,
}


def decompressed(file: Path, source: str, spool: Path, suffix: str) -> Path:
    """Return a plain copy of a compressed file, in the spool.

    Args:
        file: The file.
        source: Its name, for messages.
        spool: Folder of copies.
        suffix: Key of :data:`COMPRESSIONS`.

    Raises:
        ConfigError: If it is damaged, cut, or unpacks to far more than images can have shrunk to.
    """

    def write(stream: BinaryIO) -> None:
        with COMPRESSIONS[suffix](file) as packed:
            copy_limited(packed, stream, source, file.stat().st_size)

    try:
        return spooled_file(spool, f"plain {local_identity(file)}", ".plain", write)
    except ConfigError:
        raise
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
        raise ConfigError(
            f"{source} cannot be decompressed to {spool} ({error or type(error).__name__}): it is "
            f"cut, damaged or no {suffix} file, or the disk is full. Get it anew."
        ) from error
