"""Sort more rows than memory holds."""

from __future__ import annotations

import heapq
import itertools
import json
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

Row = list[Any]  # what JSON can hold; the first places decide the order, so they must compare

_RUN = 65536  # rows in memory
_FAN_IN = 64  # files merged at a time


def sort_rows(rows: Iterable[Row], folder: Path) -> Iterator[Row]:
    """Yield rows in ascending order, with a bounded number of them in memory.

    Rows are compared as lists: their first places have to make them unique, or the rest is compared
    too. Sorted runs lie in ``folder`` in files without a name, which vanish with the process.
    """
    rows = iter(rows)
    run = sorted(itertools.islice(rows, _RUN))
    if len(run) < _RUN:
        yield from run
        return
    files: list[IO[str]] = []
    while run:
        files.append(_write(run, folder))
        if len(files) == _FAN_IN:
            files = [_write(_merge(files), folder)]
        run = sorted(itertools.islice(rows, _RUN))
    yield from _merge(files)


def _write(rows: Iterable[Row], folder: Path) -> IO[str]:
    """Write a sorted run and go back to its beginning."""
    file = tempfile.TemporaryFile("w+", encoding="ascii", dir=folder)  # noqa: SIM115
    rows = iter(rows)
    while part := list(itertools.islice(rows, 256)):
        file.writelines([json.dumps(row) + "\n" for row in part])
    file.seek(0)
    return file


def _merge(files: list[IO[str]]) -> Iterator[Row]:
    """Merge sorted runs and close them."""
    yield from heapq.merge(*(map(json.loads, file) for file in files))
    for file in files:
        file.close()
