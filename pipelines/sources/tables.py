"""CSV, TSV and JSON lines: rows that name files or URLs, with a class or none."""

from __future__ import annotations

import csv
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, TextIO

from fastclr.config import ConfigError
from pipelines.sources.images import Listing, SourceImage, SourceOptions, not_empty
from pipelines.sources.opening import beside, scheme_of, shown

IMAGE_COLUMNS = (
    "image", "img", "path", "file", "file_name", "filename", "file_path", "filepath",
    "image_path", "url", "image_url",
)  # fmt: skip
LABEL_COLUMNS = ("label", "labels", "class", "class_name", "category", "target")
_FETCHED = ("http", "https", "s3")
_MAX_LINE = 1 << 24  # characters


def image_column(names: Sequence[str], source: str, options: SourceOptions) -> str:
    """Choose the column of the images: the one asked for, or the first of a usual name.

    Raises:
        ConfigError: If there is none; names the columns there are.
    """
    wanted = (options.image_column,) if options.image_column else IMAGE_COLUMNS
    for name in wanted:
        if name in names:
            return name
    problem = f"no column {wanted[0]!r}" if options.image_column else "no image column by its name"
    raise ConfigError(
        f"{source} has {problem}; its columns are {_listed(names)}. Say which holds paths, URLs or "
        "bytes with --image-column."
    )


def label_column(names: Sequence[str], source: str, options: SourceOptions) -> str | None:
    """Choose the column of the classes, None without one.

    Raises:
        ConfigError: If the one asked for is not there; names the columns there are.
    """
    if not options.labels:
        return None
    if options.label_column:
        if options.label_column not in names:
            raise ConfigError(
                f"{source} has no column {options.label_column!r}; its columns are "
                f"{_listed(names)}. Choose one with --label-column, or switch labels off."
            )
        return options.label_column
    return next((name for name in LABEL_COLUMNS if name in names), None)


def _listed(names: Sequence[str]) -> str:
    few = ", ".join(repr(name[:80]) for name in names[:30])
    return few + f" and {len(names) - 30} more" * (len(names) > 30)


def class_from(value: Any, where: str, class_names: Sequence[str] | None = None) -> str | None:
    """Turn a label of a table into the name of a class.

    Args:
        value: None, NaN, an empty text or -1 for none; a text; a whole number, also as 3.0, which
            tables make of numbers with gaps.
        where: Source and row, for messages.
        class_names: What numbers mean; without, a number is its own name.

    Raises:
        ConfigError: For anything else: fractions, other negative numbers, numbers without name.
    """
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if isinstance(value, float) and math.isfinite(value) and value == int(value):
        value = int(value)
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ConfigError(f"{where} has the label {value!r:.80}: give a text or a whole number.")
    text = str(value)
    if whole := re.fullmatch(r"(-?[0-9]{1,18})(\.0+)?", text):
        text = whole[1]
    if text in ("", "-1", "nan", "NaN"):
        return None
    if re.fullmatch(r"-[0-9.]+|[0-9]+\.[0-9]+", text):
        raise ConfigError(f"{where} has the label {text!r}: a class is a text or a number >= 0.")
    if class_names is not None and not (
        text.isascii() and text.isdigit() and int(text) < len(class_names)
    ):
        raise ConfigError(
            f"{where} has the label {text!r:.80}, and there are {len(class_names)} class names: "
            "the labels or the names belong to something else."
        )
    name = text if class_names is None else class_names[int(text)]
    if not _is_text(name):
        raise ConfigError(f"{where} has the label {name!r:.80}, which is no text: repair it.")
    return name


def _is_text(text: str) -> bool:
    """Whether it can be written as UTF-8 and holds no NUL."""
    try:
        return b"\0" not in text.encode()
    except UnicodeEncodeError:
        return False


@dataclass
class Resolver:
    """Turns cells of a table into places of files, and refuses what the table may not name.

    Attributes:
        table: Local path or URL the table was given by; paths are relative to its folder.
        options: What is allowed.
    """

    table: str
    options: SourceOptions
    _real_folder: Callable[[str], str] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._real_folder = lru_cache(4096)(lambda folder: os.path.realpath(folder))

    def __call__(self, cell: Any, where: str) -> str:
        """Return the local path or URL of an image.

        Args:
            cell: What the table says.
            where: Source and row, for messages.

        Raises:
            ConfigError: If it is no text, empty, a URL that is not allowed, or leads out of the
                table's folder.
        """
        if not isinstance(cell, str) or not cell or "\0" in cell:
            raise ConfigError(f"{where} has {cell!r:.80} for an image: give a path or a URL.")
        if scheme := scheme_of(cell):
            return self._url(cell, scheme, where)
        if "://" in self.table:
            if cell.startswith("/") or ".." in cell.split("/") or not _is_text(cell):
                raise ConfigError(
                    f"{where} names {cell!r:.200}: the paths of a remote table are relative to its "
                    "folder and stay in it."
                )
            return beside(self.table, cell)
        return self._path(cell, where)

    def _url(self, cell: str, scheme: str, where: str) -> str:
        """Check a URL."""
        if scheme not in _FETCHED or not _is_text(cell):
            raise ConfigError(
                f"{where} names {shown(cell)!r:.200}: of a table's URLs only http, https and s3 "
                "are fetched, never a command or a local file. Remove the row."
            )
        if not self.options.allow_urls:
            raise ConfigError(
                f"{where} names {shown(cell)!r:.200}: a table may send requests anywhere, also "
                "into your own network. If you trust it, give --allow-urls."
            )
        return cell

    def _path(self, cell: str, where: str) -> str:
        """Check a path by where it really leads, links and all."""
        folder = os.path.dirname(os.path.abspath(self.table))  # noqa: PTH100, PTH120
        try:
            path = os.path.join(folder, cell)  # noqa: PTH118
            os.fsencode(path)
            parent, name = os.path.split(path)
            real = os.path.join(self._real_folder(parent), name)  # noqa: PTH118
            if name in ("", ".", "..") or os.path.islink(real):  # noqa: PTH114
                real = os.path.realpath(real)
        except (ValueError, OSError) as error:
            raise ConfigError(f"{where} names {cell!r:.80}, which is no path ({error}).") from error
        inside = os.path.join(self._real_folder(folder), "")  # noqa: PTH118
        if not self.options.allow_outside and not real.startswith(inside):
            raise ConfigError(
                f"{where} names {cell!r:.200}, which leads out of {folder}: a table could pack any "
                "file of this machine. If you trust it, give --allow-outside."
            )
        return real


Row = tuple[int, dict[str, Any]]


def list_table(file: Path, table: str, suffix: str, options: SourceOptions) -> Listing:
    """List the rows of a CSV, TSV or JSON-lines table, in their order.

    Args:
        file: The table, on local disk.
        table: What it was given by: its folder is where relative paths begin.
        suffix: ``.csv``, ``.tsv`` or ``.jsonl``.
        options: Columns, and what its cells may name.

    Returns:
        Images named as in the table; a row twice is an image twice.
    """
    read = _json_rows if suffix == ".jsonl" else _csv_rows
    return Listing(not_empty(shown(table), _images(file, table, read, options)))


Reader = Callable[[TextIO, str], Iterator[Row]]


def _images(file: Path, table: str, read: Reader, options: SourceOptions) -> Iterator[SourceImage]:
    """Yield the rows of a table as images."""
    source, resolve = shown(table), Resolver(table, options)
    number = 0
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            for number, row in read(stream, source):
                where = f"{source}, line {number},"
                names = list(row)  # of each row: lines of JSON differ
                image = image_column(names, source, options)
                label = label_column(names, source, options)
                url = resolve(row[image], where)
                class_name = class_from(row[label], where) if label else None
                yield SourceImage(shown(row[image]), class_name, url)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(
            f"{source} is damaged behind line {number} or no table in UTF-8 ({error}): save it as "
            "UTF-8 text."
        ) from error


def _lines(stream: TextIO, source: str) -> Iterator[str]:
    """Yield lines of a sane length without NUL bytes."""
    number = 0
    while line := stream.readline(_MAX_LINE):
        number += 1
        if "\0" in line or len(line) == _MAX_LINE:
            problem = "a NUL byte" if "\0" in line else f"more than {_MAX_LINE} characters"
            raise ConfigError(
                f"{source}, line {number}, has {problem}: this is no text table, or it is damaged."
            )
        yield line


def _csv_rows(stream: TextIO, source: str) -> Iterator[Row]:
    """Yield line number and row of a CSV with a header."""
    header = next(csv.reader([stream.readline(_MAX_LINE)]), [])
    stream.seek(0)
    only = header[0] if len(header) == 1 else ""
    delimiter = next((mark for mark in "\t;" if mark in only), ",")
    reader = csv.reader(_lines(stream, source), delimiter=delimiter, strict=True)
    names = [name.strip() for name in next(reader, [])]
    if len(set(names)) != len(names):
        raise ConfigError(f"{source} has a column twice: {_listed(names)}. Rename one.")
    for row in reader:
        if row and len(row) != len(names):
            raise ConfigError(
                f"{source}, line {reader.line_num}, has {len(row)} cells, its header "
                f"{len(names)}: quote cells that hold a {delimiter!r}."
            )
        if row:
            yield reader.line_num, dict(zip(names, row, strict=True))


def _json_rows(stream: TextIO, source: str) -> Iterator[Row]:
    """Yield line number and row of JSON lines."""
    for number, line in enumerate(_lines(stream, source), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{source}, line {number}, is no JSON ({error}).") from error
        if not isinstance(row, dict):
            raise ConfigError(f"{source}, line {number}, is no JSON object: give one a line.")
        yield number, row
