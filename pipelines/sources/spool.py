"""Copies of what has no random access: whole or not there, and taken again if nothing changed."""

from __future__ import annotations

import hashlib
import heapq
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

from fastclr.config import ConfigError
from fastclr.files import sync, write_json
from pipelines.sources.images import SourceImage
from pipelines.sources.opening import fetch_into, identity_of, shown

MAX_RATIO = 100  # unpacked over packed bytes; images hardly shrink, tars of tiny ones some 5 times
FREE_BYTES = 1 << 30  # unpacked bytes below which the ratio does not matter
_BLOCK = 1 << 20
_RUN = 32_768  # images sorted in memory at a time; one open file for each so many

Identity = str | None


def local_identity(file: Path) -> str:
    """Return what changes when a local file does."""
    status = file.stat()
    return f"{file.resolve()} {status.st_size} {status.st_mtime_ns}"


def spooled_file(
    spool: Path, identity: Identity, suffix: str, write: Callable[[BinaryIO], None]
) -> Path:
    """Return a file with what ``write`` writes; an earlier whole one of the same identity.

    Args:
        spool: Folder; made if it is not there.
        identity: What the content depends on; None where that is unknown: then it is written anew.
        suffix: End of its name.
        write: Writes the content; whatever it raises leaves nothing.
    """
    file = _place(spool, identity, suffix)
    if not _is_whole(file):
        _write_whole(file, write)
        _mark_whole(file)
    return file


def _place(spool: Path, identity: Identity, suffix: str) -> Path:
    """Return where the file of an identity belongs."""
    spool.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256((identity or uuid4().hex).encode(errors="surrogateescape"))
    return spool / f"{digest.hexdigest()[:32]}{suffix}"


def _marker(file: Path) -> Path:
    return file.with_name(f"{file.name}.whole.json")


def _mark_whole(*files: Path) -> None:
    """Write behind the first of some files that all are finished."""
    write_json(_marker(files[0]), {"num_bytes": [file.stat().st_size for file in files]})


def _is_whole(*files: Path) -> bool:
    """Whether files were finished, and have the lengths they were finished with."""
    try:
        sizes = [file.stat().st_size for file in files]
        return json.loads(_marker(files[0]).read_bytes())["num_bytes"] == sizes
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _write_whole(file: Path, write: Callable[[BinaryIO], None]) -> None:
    """Write a file under a temporary name, then rename it."""
    descriptor, name = tempfile.mkstemp(prefix=f".{file.name}.", suffix=".partial", dir=file.parent)
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb", buffering=_BLOCK) as stream:
            write(stream)
        sync(temporary)
        temporary.replace(file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def spooled_images(
    spool: Path, identity: Identity, unpack: Callable[[BinaryIO], Iterable[SourceImage]]
) -> Iterator[SourceImage]:
    """Yield the images that ``unpack`` writes into a spool file, once or from an earlier time.

    Args:
        spool: Folder.
        identity: See :func:`spooled_file`.
        unpack: Writes bytes to a stream and yields the images; an empty ``url`` means that file.
    """
    file = _place(spool, identity, ".bin")
    listing = file.with_suffix(".jsonl")

    def write_both(stream: BinaryIO) -> None:
        def write_list(lines: BinaryIO) -> None:
            for image in unpack(stream):
                lines.write(f"{json.dumps(vars(image))}\n".encode())

        _write_whole(listing, write_list)

    if not _is_whole(file, listing):
        _write_whole(file, write_both)
        _mark_whole(file, listing)
    with listing.open(encoding="utf-8") as lines:
        for line in lines:
            image = SourceImage(**json.loads(line))
            yield image if image.url else replace(image, url=str(file))


def localised(url: str, spool: Path, suffix: str) -> Path:
    """Return a local file with the content of a URL; a local path is itself.

    Raises:
        ConfigError: If it cannot be fetched whole.
    """
    if "://" not in url:
        return Path(url)

    try:
        return spooled_file(spool, identity_of(url), suffix, lambda file: fetch_into(url, file))
    except OSError as error:
        raise ConfigError(
            f"source {shown(url)} cannot be fetched whole: {error}. Check the URL, the network and "
            "the credentials in the environment; what was fetched was removed."
        ) from error


def copy_limited(source: BinaryIO, target: BinaryIO, name: str, packed_bytes: int | None) -> None:
    """Copy a stream to its end; refuse more than ``packed_bytes`` can honestly have become."""
    copied = 0
    while block := source.read(_BLOCK):
        copied += len(block)
        if packed_bytes is not None:
            check_ratio(name, copied, packed_bytes)
        target.write(block)


def check_ratio(name: str, unpacked_bytes: int, packed_bytes: int) -> None:
    """Refuse a bomb: far more unpacked bytes than images can shrink to.

    Raises:
        ConfigError: If so.
    """
    if unpacked_bytes > max(FREE_BYTES, MAX_RATIO * packed_bytes):
        raise ConfigError(
            f"{name} unpacks to more than {MAX_RATIO} times its {packed_bytes} bytes: images do "
            "not shrink like that, it would fill the disk. Do not trust it; if it is yours, unpack "
            "it into a folder and pack that."
        )


def sorted_by_name(images: Iterable[SourceImage], spool: Path) -> Iterator[SourceImage]:
    """Yield images in the order of their names, in memory that does not grow with them."""
    rest = iter(images)
    spool.mkdir(parents=True, exist_ok=True)
    with ExitStack() as open_files:
        runs: list[Iterable[SourceImage]] = []
        while run := sorted(islice(rest, _RUN), key=_name_key):
            if len(run) < _RUN and not runs:
                runs = [run]
                break
            stream = open_files.enter_context(tempfile.TemporaryFile("w+", dir=spool))
            stream.writelines(json.dumps(list(vars(image).values())) + "\n" for image in run)
            stream.seek(0)
            runs.append(SourceImage(*json.loads(line)) for line in stream)
        yield from heapq.merge(*runs, key=_name_key)


def _name_key(image: SourceImage) -> bytes:
    """Order names as the bytes a file system holds, which is also the order of their letters."""
    return os.fsencode(image.name)
