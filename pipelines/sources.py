"""Where images to be packed come from, listed one by one."""

from __future__ import annotations

import os
import stat
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from fastclr.config import ConfigError

MAX_BYTES = 1 << 30  # of one encoded image


@dataclass(frozen=True)
class SourceOptions:
    """How a source is read."""


@dataclass(frozen=True)
class SourceImage:
    """One image to be packed.

    Attributes:
        name: Path relative to the source.
        class_name: First folder of it; None for a source without class folders.
        url: File that holds the bytes.
        offset: Place of the first byte in it.
        num_bytes: Length in bytes; -1 for all.
    """

    name: str
    class_name: str | None
    url: str
    offset: int = 0
    num_bytes: int = -1

    def read(self) -> bytes:
        """Return the encoded image.

        Raises:
            OSError: If it cannot be read, is no regular file, larger than MAX_BYTES or ends early.
        """
        # O_NONBLOCK: opening a pipe that nobody writes would wait for ever.
        descriptor = os.open(self.url, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise OSError(f"{self.url} is no regular file: it cannot hold an image")
            size = status.st_size - self.offset if self.num_bytes < 0 else self.num_bytes
            if size > MAX_BYTES:
                raise OSError(f"has {size} bytes, more than the limit of {MAX_BYTES}")
            data = os.pread(descriptor, size, self.offset) if size > 0 else b""
        finally:
            os.close(descriptor)
        if len(data) != max(size, 0):
            raise OSError(f"has {len(data)} of its {size} bytes")
        return data


class Listing(Iterator[SourceImage]):
    """The images of a source, once, in an order that depends on the source alone.

    Attributes:
        class_names: The classes in the order of their numbers where the source states them; None
            where they are what the images say.
    """

    def __init__(self, images: Iterable[SourceImage], class_names: list[str] | None = None) -> None:
        self._images = iter(images)
        self.class_names = class_names

    def __next__(self) -> SourceImage:
        return next(self._images)


def sort_class_names(names: Iterable[str]) -> list[str]:
    """Order classes that no source has numbered."""
    return sorted(names)


def list_source(source: str, options: SourceOptions, spool: Path) -> Listing:
    """List the images of a folder of class folders, a flat folder, or a plain tar of one of these.

    Files whose name begins with a dot are left out; every other file has to be an image.

    Raises:
        ConfigError: If the source is missing, mixes both layouts, has no image or an empty class.
    """
    del options, spool
    return Listing(_list_local(Path(source)))


def _list_local(source: Path) -> list[SourceImage]:
    if source.is_dir():
        files = [p for p in source.rglob("*") if not p.is_dir()]
        images = [_source_image(p.relative_to(source).as_posix(), p) for p in files]
        classes = {p.name for p in source.iterdir() if p.is_dir() and p.name[0] != "."}
    elif source.is_file():
        images = list(_list_tar(source))
        classes = set()
    else:
        raise ConfigError(
            f"source {source} does not exist: give a folder of class folders, a folder of images, "
            "or a plain tar of one of these."
        )
    images = [i for i in images if not any(p.startswith(".") for p in i.name.split("/"))]
    images.sort(key=lambda image: image.name)  # a folder and its tar give the same order
    _check_classes(source, images, classes)
    return images


def _source_image(name: str, file: Path, offset: int = 0, num_bytes: int = -1) -> SourceImage:
    """Take the first folder of a name as its class."""
    parts = name.split("/")
    return SourceImage(name, parts[0] if len(parts) > 1 else None, str(file), offset, num_bytes)


def _list_tar(source: Path) -> Iterator[SourceImage]:
    """List a tar's files without extracting any."""
    try:
        with tarfile.open(source, "r:") as tar:
            for member in tar:
                path = PurePosixPath(member.name)
                if path.is_absolute() or ".." in path.parts:
                    raise ConfigError(
                        f"{source} has a member {member.name!r} that leaves its folder: this is "
                        "no tar of class/name.ext; do not trust it."
                    )
                if member.issym() or member.islnk():
                    raise ConfigError(
                        f"{source} has a link {member.name!r} instead of the file: write the tar "
                        "with `tar --dereference --hard-dereference`."
                    )
                if member.isfile():
                    yield _source_image(str(path), source, member.offset_data, member.size)
    except tarfile.TarError as error:
        raise ConfigError(
            f"{source} is no plain tar ({error}): give a folder or an uncompressed tar; "
            "decompress a .tar.gz first."
        ) from error


def _check_classes(source: Path, images: list[SourceImage], folders: set[str]) -> None:
    """Refuse what would give labels nobody meant."""
    if not images:
        raise ConfigError(f"source {source} has no files: there is nothing to pack.")
    classes = {image.class_name for image in images}
    if None in classes and len(classes) > 1:
        loose = next(image.name for image in images if image.class_name is None)
        raise ConfigError(
            f"source {source} has class folders and files beside them ({loose}): its label is "
            "unknown. Move it into a class folder or out of the source."
        )
    if empty := sorted(folders - {c for c in classes if c}):
        raise ConfigError(
            f"class folder {source / empty[0]} is empty: a class without images would shift "
            "every score. Remove the folder or add images."
        )
