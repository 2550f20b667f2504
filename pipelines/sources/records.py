"""Data sets of raw pixels as torchvision keeps them on disk: CIFAR binary, STL10, IDX; Food101.

Nothing is unpickled: what exists only as pickle or .mat is refused with what to do instead.
Formats: www.cs.toronto.edu/~kriz/cifar.html (binary version), cs.stanford.edu/~acoates/stl10,
yann.lecun.com/exdb/mnist (IDX), the README of Food101.
"""

from __future__ import annotations

import gzip
import io
import json
import math
import struct
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from fastclr.config import ConfigError
from pipelines.sources.images import Listing, SourceImage, SourceOptions, not_empty
from pipelines.sources.spool import local_identity, spooled_images
from pipelines.sources.tables import class_from

_MAX_TEXT = 1 << 26  # bytes of a file of names


@dataclass(frozen=True)
class _Records:
    """Pixels in a file of records of one length, and where their labels are.

    Attributes:
        file: File of records.
        shape: Planes, rows and columns, or rows and columns.
        columns_first: Whether columns of pixels follow each other, as in STL10, not rows.
        label_byte: Place of the label in ``label_bytes`` bytes before the pixels; None without.
        label_bytes: Bytes before the pixels.
        labels: File of one byte a label; None without.
        header: Bytes before the first record.
        labels_header: Bytes before the first label.
        first_label: Number of the first class.
    """

    file: Path
    shape: tuple[int, ...]
    columns_first: bool = False
    label_byte: int | None = None
    label_bytes: int = 0
    labels: Path | None = None
    header: int = 0
    labels_header: int = 0
    first_label: int = 0


def list_cifar(folder: Path, options: SourceOptions, spool: Path) -> Listing:
    """List the binary version of CIFAR10 or CIFAR100 (its fine classes)."""
    hundred = (folder / "train.bin").is_file()
    names = folder / ("fine_label_names.txt" if hundred else "batches.meta.txt")
    parts = {
        "train": ["train.bin"] if hundred else [f"data_batch_{k}.bin" for k in range(1, 6)],
        "test": ["test.bin" if hundred else "test_batch.bin"],
    }
    label_bytes = 2 if hundred else 1
    records = [
        _Records(folder / f, (3, 32, 32), label_byte=label_bytes - 1, label_bytes=label_bytes)
        for f in _part(parts, options, folder)
    ]
    return _listing(records, _names(names), options, spool)


def list_stl10(folder: Path, options: SourceOptions, spool: Path) -> Listing:
    """List a split of STL10's binary version: train, test or unlabeled."""
    parts = {"train": ["train"], "test": ["test"], "unlabeled": ["unlabeled"]}
    (part,) = _part(parts, options, folder)
    labels = None if part == "unlabeled" else folder / f"{part}_y.bin"
    pixels = folder / f"{part}_X.bin"
    records = [_Records(pixels, (3, 96, 96), True, labels=labels, first_label=1)]
    return _listing(records, _names(folder / "class_names.txt"), options, spool)


def list_idx(folder: Path, options: SourceOptions, spool: Path) -> Listing:
    """List a split of MNIST, FashionMNIST or KMNIST; its classes are numbers."""
    (part,) = _part({"train": ["train"], "test": ["t10k"]}, options, folder)
    pixels = _plain_or_gz(folder / f"{part}-images-idx3-ubyte")
    labels = _plain_or_gz(folder / f"{part}-labels-idx1-ubyte")
    _, rows, columns = _idx_shape(pixels, 3)
    _idx_shape(labels, 1)
    records = [_Records(pixels, (rows, columns), labels=labels, header=16, labels_header=8)]
    return _listing(records, None, options, spool)


def list_food101(folder: Path, options: SourceOptions, spool: Path) -> Listing:
    """List a split of Food101: names from ``meta/SPLIT.json``, files from ``images``."""
    (part,) = _part({"train": ["train"], "test": ["test"]}, options, folder)
    file = folder / "meta" / f"{part}.json"
    try:
        classes = json.loads(_text(file))
        pairs = [(name, image) for name in sorted(classes) for image in sorted(classes[name])]
    except (ValueError, TypeError, RecursionError) as error:
        raise ConfigError(f"{file} is damaged ({error}): get the data set anew.") from error
    for name, image in pairs:
        if (
            not isinstance(image, str)
            or image.partition("/")[0] != name
            or ".." in image.split("/")
        ):
            raise ConfigError(f"{file} lists {image!r:.100} for {name!r:.100}: do not trust it.")
    root = str((folder / "images").absolute())
    images = (
        SourceImage(f"{image}.jpg", name if options.labels else None, f"{root}/{image}.jpg")
        for name, image in pairs
    )
    return Listing(not_empty(str(folder), images), sorted(classes) if options.labels else None)


# By a file that only such a data set has, relative to the folder or one below it.
RECORDS = {
    "data_batch_1.bin": list_cifar,
    "fine_label_names.txt": list_cifar,
    "train_X.bin": list_stl10,
    "unlabeled_X.bin": list_stl10,
    "train-images-idx3-ubyte": list_idx,
    "train-images-idx3-ubyte.gz": list_idx,
    "t10k-images-idx3-ubyte": list_idx,
    "t10k-images-idx3-ubyte.gz": list_idx,
    "meta/train.json": list_food101,
}

_CIFAR_PICKLES = (
    "holds CIFAR's python version, which is pickled: reading it would run code from the file. Get "
    "the binary version (cifar-10-binary.tar.gz, cifar-100-binary.tar.gz)"
)
REFUSED = {
    "data_batch_1": _CIFAR_PICKLES,
    "meta": _CIFAR_PICKLES,
    "imagelabels.mat": "holds Flowers102, whose labels are a MATLAB file. Sort its jpg files into "
    "class folders, or write a CSV with columns path and label",
    "train_32x32.mat": "holds SVHN's MATLAB files. Get its PNG version or its Parquet files",
    "dataset_info.json": "was written by save_to_disk as Arrow files. Write it with to_parquet",
    "data.mdb": "is an LMDB. Write its images into class folders or a tar",
}
# Single names like these would be nothing special: only where all of them are there.
_TOGETHER = {"meta": ("train", "test", "meta"), "data_batch_1": ("data_batch_1", "test_batch")}
_SUBFOLDERS = (
    ".", "cifar-10-batches-bin", "cifar-100-binary", "stl10_binary", "raw", "food-101",
    "cifar-10-batches-py", "cifar-100-python", "flowers-102",
    "MNIST/raw", "FashionMNIST/raw", "KMNIST/raw",
)  # fmt: skip


def find_records(folder: Path) -> tuple[Path, Any] | None:
    """Return folder and lister of a known data set here or in the folder torchvision makes.

    Raises:
        ConfigError: For one that cannot be read without running its code, or that are several.
    """
    found = {}
    for below in _SUBFOLDERS:
        here = folder / below
        for mark, lister in RECORDS.items():
            if (here / mark).is_file() and (mark[:4] != "meta" or (here / "images").is_dir()):
                found[below] = here, lister
        for mark, why in REFUSED.items():
            together = _TOGETHER.get(mark, (mark,))
            if all((here / name).is_file() for name in together):
                raise ConfigError(f"source {here} {why}.")
    if len(found) > 1:
        raise ConfigError(f"source {folder} has several data sets: give one of {', '.join(found)}.")
    return next(iter(found.values()), None)


def _part(parts: dict[str, list[str]], options: SourceOptions, folder: Path) -> list[str]:
    if options.split not in parts:
        raise ConfigError(
            f"{folder} has no split {options.split!r}: choose from {', '.join(parts)} (--split)."
        )
    return parts[options.split]


def _text(file: Path) -> str:
    """Read a small file of names."""
    try:
        if file.stat().st_size > _MAX_TEXT:
            raise ConfigError(f"{file} has {file.stat().st_size} bytes: this is no list of names.")
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} cannot be read ({error}): get the data set anew.") from error


def _names(file: Path) -> list[str] | None:
    """Read class names, one a line; None without the file."""
    if not file.is_file():
        return None
    names = [line.strip() for line in _text(file).splitlines() if line.strip()]
    if len(set(names)) != len(names):
        raise ConfigError(f"{file} has a class twice: get the data set anew.")
    return names


def _plain_or_gz(file: Path) -> Path:
    return file if file.is_file() else file.with_name(f"{file.name}.gz")


def _open(file: Path) -> BinaryIO:
    return gzip.open(file) if file.suffix == ".gz" else file.open("rb")  # pyright: ignore[reportReturnType]


def _idx_shape(file: Path, num_dims: int) -> tuple[int, ...]:
    """Read the header of an IDX file of bytes."""
    try:
        with _open(file) as stream:
            raw = stream.read(4 + 4 * num_dims)
        shape = struct.unpack(f">{num_dims}I", raw[4:])
    except (OSError, EOFError, zlib.error, struct.error) as error:
        raise ConfigError(f"{file} cannot be read ({error}): get the data set anew.") from error
    if raw[:4] != bytes([0, 0, 8, num_dims]) or math.prod(shape[1:]) not in range(1, 1 << 24):
        raise ConfigError(f"{file} is no IDX file of bytes with {num_dims} dimensions.")
    return shape


def _listing(
    records: list[_Records], names: list[str] | None, options: SourceOptions, spool: Path
) -> Listing:
    """List records, kept as PNG files in the spool."""

    def images() -> Iterator[SourceImage]:
        for part in records:
            try:
                files = [part.file, *([part.labels] if part.labels else [])]
                facts = [local_identity(file) for file in files]
            except OSError as error:
                raise ConfigError(
                    f"{part.file.parent} is not complete: {error.filename} cannot be read "
                    f"({error.strerror}). Get the data set anew."
                ) from error
            identity = f"records {facts} {part} {names} {options.labels}"
            yield from spooled_images(spool, identity, _Unpack(part, names, options))

    source = str(records[0].file.parent)
    return Listing(not_empty(source, images()), names if options.labels else None)


@dataclass(frozen=True)
class _Unpack:
    """Writes records as PNG files."""

    records: _Records
    names: list[str] | None
    options: SourceOptions

    def __call__(self, stream: BinaryIO) -> Iterator[SourceImage]:
        """Write the images of a file of records; yield where they are."""
        part = self.records
        try:
            with ExitStack() as files:
                pixels = files.enter_context(_open(part.file))
                labels = files.enter_context(_open(part.labels)) if part.labels else None
                pixels.read(part.header)
                if labels:
                    labels.read(part.labels_header)
                yield from self._images(pixels, labels, stream)
        except (OSError, EOFError, zlib.error) as error:
            raise ConfigError(
                f"{part.file} is damaged ({error}): get the data set anew."
            ) from error

    def _images(
        self, pixels: BinaryIO, labels: BinaryIO | None, stream: BinaryIO
    ) -> Iterator[SourceImage]:
        part, number = self.records, 0
        length = part.label_bytes + math.prod(part.shape)
        while raw := pixels.read(length):
            where = f"{part.file}, image {number},"
            if len(raw) != length:
                raise ConfigError(f"{where} has {len(raw)} of {length} bytes: the file was cut.")
            label = None if part.label_byte is None else raw[part.label_byte]
            if labels:
                byte = labels.read(1)
                if not byte:
                    raise ConfigError(f"{where} has no label in {part.labels}: it was cut.")
                label = byte[0] - part.first_label
            png = _png(raw[part.label_bytes :], part)
            offset, name = stream.tell(), f"{part.file.name}#{number}"
            stream.write(png)
            class_name = class_from(label if self.options.labels else None, where, self.names)
            yield SourceImage(name, class_name, "", offset, len(png))
            number += 1
        if labels and labels.read(1):
            raise ConfigError(f"{part.labels} has more labels than {part.file} images: it was cut.")


def _png(raw: bytes, part: _Records) -> bytes:
    """Encode one record."""
    pixels = np.frombuffer(raw, np.uint8).reshape(part.shape)
    if len(part.shape) == 3:
        pixels = pixels.transpose((2, 1, 0) if part.columns_first else (1, 2, 0))
    content = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(content, "PNG")
    return content.getvalue()
