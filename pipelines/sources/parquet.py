"""Parquet tables, Hugging Face's among them: bytes to the spool, paths and URLs as they are."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.types as kinds

from fastclr.config import ConfigError
from pipelines.sources import tables
from pipelines.sources.images import (
    MAX_IMAGE_BYTES,
    Listing,
    SourceImage,
    SourceOptions,
    not_empty,
)
from pipelines.sources.opening import shown
from pipelines.sources.spool import check_ratio, local_identity, spooled_images

_BATCH = 64  # rows decoded at a time


class _Layout(NamedTuple):
    """What a file's columns are."""

    image: str
    label: str | None
    class_names: list[str] | None
    holds_bytes: bool


def open_zstd(file: Path) -> Any:
    """Open a zstd file for reading its plain bytes."""
    return pa.CompressedInputStream(pa.OSFile(str(file)), "zstd")


def list_parquet(files: Sequence[tuple[str, Path]], options: SourceOptions, spool: Path) -> Listing:
    """List the rows of Parquet files, file after file.

    Args:
        files: What each was given by, and where it lies on local disk.
        options: Columns, and what cells with paths or URLs may name.
        spool: Folder for the bytes.

    Returns:
        Images named ``file.parquet#row``, with the class names of the Hugging Face schema if there
        is one. A row without image is an image of 0 bytes.

    Raises:
        ConfigError: If a column is missing or of another type, a file damaged, or two files differ
            in their class names.
    """
    layouts = [_layout(file, shown(given), options) for given, file in files]
    class_names = layouts[0].class_names if layouts else None
    for (given, _), layout in zip(files, layouts, strict=True):
        if layout.class_names != class_names:
            raise ConfigError(
                f"{shown(given)} has other class names than {shown(files[0][0])}: the same number "
                "would mean two classes. Pack them separately."
            )

    def images() -> Iterator[SourceImage]:
        for (given, file), layout in zip(files, layouts, strict=True):
            yield from _images(given, file, layout, options, spool)

    source = ", ".join(shown(given) for given, _ in files[:3])
    return Listing(not_empty(source, images()), class_names)


def _layout(file: Path, source: str, options: SourceOptions) -> _Layout:
    """Find the columns of a file by option, Hugging Face type, or usual name."""
    try:
        schema = pq.read_schema(file)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise _damaged(source, error) from error
    features = _features(schema)
    names = list(schema.names)
    image = options.image_column or _only(features, "Image", source, "image")
    if image not in names:
        image = tables.image_column(names, source, options)
    label = options.label_column or (
        _only(features, "ClassLabel", source, "label") if options.labels else ""
    )
    if not options.labels:
        label = None
    elif label not in names:
        label = tables.label_column(names, source, options)
    class_names = _class_names(features.get(label or ""), source)
    return _Layout(image, label, class_names, _holds_bytes(schema.field(image).type, image, source))


def _features(schema: pa.Schema) -> dict[str, Any]:
    """Return the columns' Hugging Face types; empty without."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, ValueError, TypeError, RecursionError):
        return {}
    return features if isinstance(features, dict) else {}


def _only(features: dict[str, Any], kind: str, source: str, what: str) -> str:
    """Return the one column of a Hugging Face type; empty if there is none."""
    found = [n for n, f in features.items() if isinstance(f, dict) and f.get("_type") == kind]
    if len(found) > 1:
        raise ConfigError(
            f"{source} has the {kind} columns {', '.join(found)}: choose one with --{what}-column."
        )
    return found[0] if found else ""


def _class_names(feature: Any, source: str) -> list[str] | None:
    """Return the names of a ClassLabel."""
    if not isinstance(feature, dict) or feature.get("_type") != "ClassLabel":
        return None
    names = feature.get("names")
    if isinstance(names, dict):
        names = list(names.values())
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return None
    if len(set(names)) != len(names):
        raise ConfigError(
            f"{source} has a class name twice in its schema: its labels mean nothing."
        )
    return names


def _holds_bytes(kind: pa.DataType, column: str, source: str) -> bool:
    """Whether the image column holds bytes; else paths or URLs.

    Raises:
        ConfigError: If it holds neither.
    """
    if kinds.is_dictionary(kind):
        kind = kind.value_type
    if kinds.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    if kinds.is_binary(kind) or kinds.is_large_binary(kind) or kinds.is_fixed_size_binary(kind):
        return True
    if kinds.is_string(kind) or kinds.is_large_string(kind):
        return False
    raise ConfigError(
        f"{source} has the type {str(kind)[:200]} in column {column!r}: images are binary, a "
        "struct of bytes and path as Hugging Face writes it, or texts with paths or URLs. Choose "
        "another with --image-column."
    )


def _damaged(source: str, error: Exception) -> ConfigError:
    return ConfigError(
        f"{source} is no whole Parquet file ({str(error)[:300]}): it is cut or damaged, or the "
        "disk is full. Get it anew."
    )


def _images(
    given: str, file: Path, layout: _Layout, options: SourceOptions, spool: Path
) -> Iterator[SourceImage]:
    """Yield the rows of one file as images."""
    source = shown(given)
    stem = source.rpartition("/")[2]
    resolve = tables.Resolver(given, options)

    def place(row: int, value: Any, label: Any, stream: BinaryIO | None) -> SourceImage:
        where = f"{source}, row {row},"
        class_name = tables.class_from(label, where, layout.class_names)
        path = None
        if isinstance(value, dict):
            value, path = value.get("bytes"), value.get("path")
        if value is None and path is not None:
            value = path
        if isinstance(value, str):
            return SourceImage(f"{stem}#{row}", class_name, resolve(value, where))
        data: bytes = value or b""
        if len(data) > MAX_IMAGE_BYTES:
            raise ConfigError(f"{where} has {len(data)} bytes, an image at most {MAX_IMAGE_BYTES}.")
        assert stream is not None
        image = SourceImage(f"{stem}#{row}", class_name, "", stream.tell(), len(data))
        stream.write(data)
        check_ratio(source, stream.tell(), file.stat().st_size)
        return image

    def unpack(stream: BinaryIO | None) -> Iterator[SourceImage]:
        columns = [layout.image, *([layout.label] if layout.label else [])]
        row = 0
        try:
            with pq.ParquetFile(file, pre_buffer=False) as table:
                for batch in table.iter_batches(_BATCH, columns=columns, use_threads=False):
                    images = batch.column(layout.image)
                    labels = batch.column(layout.label) if layout.label else [None] * len(images)
                    for value, label in zip(images, labels, strict=True):
                        plain = None if label is None else label.as_py()
                        yield place(row, value.as_py(), plain, stream)
                        row += 1
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise _damaged(source, error) from error

    if not layout.holds_bytes:
        return unpack(None)
    facts = (local_identity(file), given, layout, options)
    return spooled_images(spool, f"parquet {facts}", unpack)
