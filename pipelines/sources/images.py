"""What a source gives: images with a name, a class or none, and the place of their bytes."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from fastclr.config import ConfigError

MAX_IMAGE_BYTES = 1 << 30  # bytes; 64 Mi pixels of 16-bit RGBA, uncompressed, have half of it


@dataclass(frozen=True)
class SourceOptions:
    """How a source is understood.

    Attributes:
        image_column: Column of a table that holds the images, as bytes, paths or URLs; of shards,
            the extension of the image, e.g. ``jpg``. Empty: found by its type or a usual name.
        label_column: Column of a table that holds the class; of shards, a field of each sample's
            ``.json``. Empty: found by its type or a usual name; of shards, ``.cls``.
        labels: Whether images get classes; off, folders and label columns mean nothing.
        split: Which part of a data set that has parts: ``train``, ``test``, ``unlabeled``, ...
        allow_urls: Fetch http(s) and s3 URLs that stand in the cells of a table.
        allow_outside: Follow links and paths that lead out of the folder or the table's folder.
    """

    image_column: str = ""
    label_column: str = ""
    labels: bool = True
    split: str = "train"
    allow_urls: bool = False
    allow_outside: bool = False


@dataclass(frozen=True)
class SourceImage:
    """One image to be packed; its fields are plain enough for JSON.

    Attributes:
        name: Path relative to the source, or file and number of the row.
        class_name: Its class; None without one.
        url: Local path or URL of the file that holds the bytes.
        offset: Place of the first byte in it.
        num_bytes: Length in bytes; -1 for all that follows.
    """

    name: str
    class_name: str | None
    url: str
    offset: int = 0
    num_bytes: int = -1

    def read(self) -> bytes:
        """Return the encoded image.

        Raises:
            OSError: If it cannot be read, is no regular file, has more than
                :data:`MAX_IMAGE_BYTES`, or ends before its range does.
        """
        if self.num_bytes == 0:
            return b""
        if "://" not in self.url:
            return _read_local(self.url, self.offset, self.num_bytes)
        from pipelines.sources.opening import read_url

        return read_url(self.url, self.offset, self.num_bytes, MAX_IMAGE_BYTES)


def _read_local(path: str, offset: int, num_bytes: int) -> bytes:
    """Read a range of a regular file, all of it or an error."""
    # Without O_NONBLOCK a FIFO would be waited for without end.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(f"{path} is no regular file: it cannot hold an image")
        wanted = status.st_size - offset if num_bytes < 0 else num_bytes
        if wanted > MAX_IMAGE_BYTES:
            raise OSError(f"{path} has {wanted} bytes, an image at most {MAX_IMAGE_BYTES}")
        data = os.pread(descriptor, max(wanted, 0), offset)
        while len(data) < wanted and (
            more := os.pread(descriptor, wanted - len(data), offset + len(data))
        ):
            data += more
    finally:
        os.close(descriptor)
    if len(data) != wanted:
        raise OSError(
            f"{path}: {len(data)} of {wanted} bytes are there at {offset}: the file changed after "
            "it was listed"
        )
    return data


class Listing(Iterator[SourceImage]):
    """The images of a source, once, in an order that depends on the source alone.

    Attributes:
        class_names: The classes in the order of their numbers where the source states them, some
            perhaps without images; None where they are what the images say.
    """

    def __init__(
        self, images: Iterable[SourceImage], class_names: Sequence[str] | None = None
    ) -> None:
        self._images = iter(images)
        self.class_names = None if class_names is None else list(class_names)

    def __next__(self) -> SourceImage:
        return next(self._images)


def sort_class_names(names: Iterable[str]) -> list[str]:
    """Order classes that no source has numbered: numbers by value, anything else as text."""
    names = list(names)
    if all(name.isascii() and name.isdigit() for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)


def is_hidden(name: str) -> bool:
    """Whether a file, or a folder above it, has a name that begins with a dot."""
    return any(part.startswith(".") for part in name.split("/"))


def class_of(name: str, options: SourceOptions) -> str | None:
    """Take the first folder of a name as its class."""
    first, slash, _ = name.partition("/")
    return first if slash and options.labels else None


def check_classes(
    source: str,
    images: Iterable[SourceImage],
    folders: Callable[[], set[str]] = set,
    options: SourceOptions = SourceOptions(),
) -> Iterator[SourceImage]:
    """Pass on images with classes from folders; refuse what would give labels nobody meant.

    Args:
        source: Its name, for messages.
        images: Images.
        folders: Gives the class folders that are there; called behind the last image.
        options: Without ``labels`` only emptiness is refused.

    Raises:
        ConfigError: At the first image without class beside one with, at the end for a class
            folder without images, or where there is no image at all.
    """
    classes: set[str] = set()
    loose: str | None = None
    for image in images:
        if image.class_name is not None:
            classes.add(image.class_name)
        elif loose is None:
            loose = image.name
        if classes and loose is not None:
            raise ConfigError(
                f"source {source} has class folders and files beside them ({loose}): its label is "
                "unknown. Move it into a class folder or out of the source."
            )
        yield image
    if not classes and loose is None:
        raise nothing_in(source)
    if options.labels and (empty := sorted(folders() - classes)):
        raise ConfigError(
            f"class folder {source.rstrip('/')}/{empty[0]} is empty: a class without images would "
            "shift every score. Remove the folder or add images."
        )


def nothing_in(source: str) -> ConfigError:
    """Make the error for a source without images."""
    return ConfigError(f"source {source} has no files: there is nothing to pack.")


def not_empty(source: str, images: Iterable[SourceImage]) -> Iterator[SourceImage]:
    """Pass on images; refuse none at all."""
    image = None
    for image in images:
        yield image
    if image is None:
        raise nothing_in(source)
