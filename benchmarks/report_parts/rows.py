"""Rows of measurements as they lie in JSON lines."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]

NO_GPU = "not run on a GPU"


def read_rows(path: Path) -> list[Row]:
    """Return a file's rows; none where it is missing.

    Raises:
        ValueError: If a line is no JSON object; names it.
    """
    rows: list[Row] = []
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError(f"a {type(row).__name__}, no object")
        except ValueError as error:
            raise ValueError(
                f"{path}, line {number} is no row of a measurement ({error}): the tables would "
                "have a hole. Run the benchmark that writes it again."
            ) from error
        rows.append(row)
    return rows


def named(rows: Iterable[Row], name: str) -> list[Row]:
    """Return the rows of one name, which have a time."""
    return [row for row in rows if row.get("name") == name and row.get("p50_seconds")]


def facts_of(row: Row) -> Row:
    """Return when, where and with what a row was measured; older files keep it in rows apart."""
    return row if "hardware" in row else row.get("facts", {})


def devices(rows: Iterable[Row]) -> list[str]:
    """Return the devices that rows were measured on: "cpu", names of GPUs."""
    found = [facts_of(row).get("hardware", {}).get("device") for row in rows]
    return list(dict.fromkeys(device for device in found if device))


def on_gpu(rows: Iterable[Row]) -> str:
    """Return the GPUs that rows were measured on, or that there is none."""
    return ", ".join(d for d in devices(rows) if d != "cpu") or NO_GPU


def size_that_varies(rows: Sequence[Row]) -> str | None:
    """Return the size, a number, that most distinguishes rows; None if none does."""
    values: dict[str, set[float]] = {}
    for row in rows:
        for key, value in row["sizes"].items():
            if isinstance(value, int | float) and not isinstance(value, bool) and value > 0:
                values.setdefault(key, set()).add(value)
    most = max(values, key=lambda key: len(values[key]), default=None)
    return most if most and len(values[most]) > 1 else None
