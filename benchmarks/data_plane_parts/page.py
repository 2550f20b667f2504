"""The page of results and the rows beside it; a part that is not measured anew keeps its rows."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from harness import write_rows

from fastclr.files import write_durably

HEADING = "## Measured\n"  # what stands below is replaced

Rows = list[dict[str, Any]]


class Table(NamedTuple):
    """A part of the page.

    Attributes:
        title: Heading.
        module: Module of this package that makes the table.
        function: Its function, from rows to lines.
    """

    title: str
    module: str
    function: str

    def lines(self, rows: Rows) -> list[str]:
        """Return the table; its module is imported here, with the packages it compares."""
        make: Callable[[Rows], list[str]] = getattr(
            importlib.import_module(f"data_plane_parts.{self.module}"), self.function
        )
        return make(rows)


TABLES = {
    "speed": Table("Two views of an image", "speed", "lines"),
    "loading": Table("Without augmentation", "loading", "lines"),
    "opening": Table("Opening ten million samples", "opening", "lines"),
    "parity": Table("Pixels beside the reference", "parity", "lines"),
    "triton": Table("Pixels of the interpreted Triton kernels", "parity", "lines"),
    "damage": Table("Damaged images", "parity", "damage_lines"),
    "training": Table("Accuracy after training", "training", "lines"),
}


def write(out: Path, part: str, about: dict[str, Any], rows: Rows) -> None:
    """Replace a part's rows, and write the page anew.

    Args:
        out: Page; what is written there by hand, above "Measured", stays. The rows lie beside it.
        part: Key of :data:`TABLES`.
        about: When and on what it was measured.
        rows: Results.
    """
    parts = read(out)
    parts[part] = [{"facts": about}, *rows]
    write_rows(
        out.with_suffix(".jsonl"),
        [{"part": name, **row} for name in TABLES for row in parts.get(name, [])],
    )
    by_hand = out.read_text(encoding="utf-8").split(HEADING)[0] if out.exists() else ""
    sections = [_section(name, parts[name]) for name in TABLES if name in parts]
    write_durably(out, by_hand + HEADING + "\n" + "\n".join(sections))


def read(out: Path) -> dict[str, Rows]:
    """Return the rows of each part, its facts first."""
    parts: dict[str, Rows] = {}
    rows = out.with_suffix(".jsonl")
    for line in rows.read_text(encoding="utf-8").splitlines() if rows.exists() else []:
        row = json.loads(line)
        parts.setdefault(row.pop("part"), []).append(row)
    return parts


def _section(part: str, rows: Rows) -> str:
    """Return a heading, when and on what it was measured, and the table."""
    about, *results = rows
    a = about["facts"]
    hardware = ", ".join(f"{k} {v}" for k, v in a["hardware"].items())
    threads = f"torch's threads {a['torch_threads']}, OMP_NUM_THREADS {a['OMP_NUM_THREADS']}"
    told = f"{a['measured']}; {hardware}; {threads}; {a['seconds']:.0f} s; `{a['command']}`"
    table = TABLES[part]
    return "\n".join([f"### {table.title}", "", told, "", *table.lines(results), ""])
