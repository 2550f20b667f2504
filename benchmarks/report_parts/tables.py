"""Rows of the one format as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from report_parts.rows import Row
from report_parts.section import Table

# Columns that have a place of their own in a table, or none.
_KNOWN = {
    "name", "variant", "sizes", "dtype", "p20_seconds", "p50_seconds", "p80_seconds", "repeats",
    "warm_ups", "images_per_second", "peak_bytes", "measured", "hardware", "threads", "versions",
    "driver", "commit", "dirty", "command",
}  # fmt: skip


def heading(rows: Sequence[Row]) -> str:
    """Return the name of rows and the sizes that all of them share."""
    constant = [f"{key} {_cell(rows[0]['sizes'][key])}" for key in _sizes(rows, varying=False)]
    return ", ".join([rows[0]["name"].capitalize(), *constant])


def _sizes(rows: Sequence[Row], *, varying: bool) -> list[str]:
    """Return the sizes that vary over rows, or those that do not."""
    keys = dict.fromkeys(key for row in rows for key in row["sizes"])
    values = {key: {str(row["sizes"].get(key)) for row in rows} for key in keys}
    return [key for key in keys if (len(values[key]) > 1) is varying]


def table(rows: Sequence[Row]) -> Table:
    """Return rows of one name as a table: sizes, times, and every other plain value they carry.

    What is nested stays in the rows: pages of their own break it down.
    """
    sizes = _sizes(rows, varying=True)
    extras = [_plain({k: v for k, v in row.items() if k not in _KNOWN}) for row in rows]
    columns: dict[str, list[Any]] = {key: [row["sizes"].get(key) for row in rows] for key in sizes}
    columns["ms (20 to 80 %)"] = [_milliseconds(row) for row in rows]
    columns["images/s"] = [row.get("images_per_second") for row in rows]
    peaks = [row.get("peak_bytes") for row in rows]
    columns["peak MiB"] = [peak / 2**20 if peak else None for peak in peaks]
    for key in dict.fromkeys(key for extra in extras for key in extra):
        columns[key] = [extra.get(key) for extra in extras]
    shown = {head: cells for head, cells in columns.items() if any(c is not None for c in cells)}
    lines = zip(*([_cell(cell) for cell in cells] for cells in shown.values()), strict=True)
    named_lines = [(row["variant"], *line) for row, line in zip(rows, lines, strict=True)]
    return Table(("", *shown), named_lines)


def _plain(values: Mapping[str, Any]) -> Row:
    """Return the plain values under names for people, seconds as milliseconds."""
    found: Row = {}
    for key, value in values.items():
        if key.endswith("_seconds") and isinstance(value, int | float):
            found[f"{key.removesuffix('_seconds').replace('_', ' ')}, ms"] = 1e3 * value
        elif isinstance(value, bool | int | float | str):
            found[key.replace("_", " ")] = value
    return found


def _milliseconds(row: Row) -> str | None:
    """Return a row's time; None for what was tried and failed."""
    if row.get("p50_seconds") is None:
        return None
    middle, low, high = (_cell(1e3 * row[f"p{p}_seconds"]) for p in (50, 20, 80))
    return f"{middle} ({low} to {high})" if row["repeats"] > 1 else middle


def _cell(value: Any) -> str:
    """Return a value for people: four digits of what is small, no fraction of what is large."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)
