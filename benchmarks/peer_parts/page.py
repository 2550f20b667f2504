"""Tables of what others and we take for the same work, from the rows of ``peers.jsonl``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from report_parts.rows import Row, named
from report_parts.section import Section, Table

from peer_parts.names import LIGHTLY

PARTS = {
    "step": "Whole steps, files to weights",
    "views": "Read, decode, two views",
    "model": "Encoder and head, forward and backward",
    "loss": "NT-Xent, forward and backward",
    "optimizer": "A step of the optimizer",
    "memory": "Peak memory of a training above what the process held before",
}
NOTE = (
    "One run, everyone in turn on the same images, encoder, batch and cores; ratios are medians of "
    "those within a round, ours 1. Each is set up as its own documentation advises, without "
    "ImageNet's normalisation for anyone. `python benchmarks/peers.py`."
)
ENCODER = (
    "The encoder is small, as two cores are: the larger it is, the more of a step is the same "
    "convolutions for all, and the nearer is the ratio of whole steps to that of `model`."
)


class Target(NamedTuple):
    """What was asked of the ratio to lightly.

    Attributes:
        part: Of which part.
        side: Side of a view in pixels.
        least: Least ratio.
        what: In words.
    """

    part: str
    side: int
    least: float
    what: str


TARGETS = (
    Target("step", 32, 1.5, "images/s, files to weights, 32 px, over lightly's"),
    Target("step", 224, 1.5, "images/s, files to weights, 224 px, over lightly's"),
    Target("memory", 32, 4.0, "lightly's peak memory over ours at batch 4,096"),
)


def found(rows: Sequence[Row], target: Target) -> float | None:
    """Return the ratio a target is about; None if it was not measured."""
    for row in rows:
        is_it = row["name"] == f"peers {target.part}" and row["variant"] == LIGHTLY
        if is_it and row["sizes"].get("side") == target.side:
            return row["ratio"]
    return None


def missed(rows: Sequence[Row]) -> list[Target]:
    """Return the targets that were measured and missed."""
    ratios = [(target, found(rows, target)) for target in TARGETS]
    return [target for target, ratio in ratios if ratio is not None and ratio < target.least]


def section(rows: Sequence[Row]) -> Section:
    """Return the targets and a table for each part."""
    tables = [("Asked", _targets(rows))]
    for part, title in PARTS.items():
        of_part = named(rows, f"peers {part}")
        for size in dict.fromkeys(map(_size, of_part)):
            of_size = [row for row in of_part if _size(row) == size]
            table = _memory(of_size) if part == "memory" else _times(of_size)
            tables.append((f"{title}: {size}", table))
    return Section("Beside others", [NOTE, ENCODER], tables=tables)


def _targets(rows: Sequence[Row]) -> Table:
    lines = []
    for target in TARGETS:
        ratio = found(rows, target)
        verdict = (
            "not measured" if ratio is None else "met" if ratio >= target.least else "**missed**"
        )
        measured = "" if ratio is None else f"{ratio:.2f}"
        lines.append((target.what, f">= {target.least:g}", measured, verdict))
    return Table(("", "asked", "measured", ""), lines)


def _times(rows: Sequence[Row]) -> Table:
    header = ("", "ms a batch (20 to 80 %)", "images/s", "x ours", "set up")
    lines = []
    for row in rows:
        rate = f"{row['images_per_second']:,.0f}" if _is_rate(row) else ""
        ratio, set_up = f"{row['ratio']:.2f}", row["configuration"]
        lines.append((row["variant"], _time(row), rate, ratio, set_up))
    return Table(header, lines)


def _time(row: Row) -> str:
    middle, low, high = (_ms(row[f"p{p}_seconds"]) for p in (50, 20, 80))
    return f"{middle} ({low} to {high})" if row["repeats"] > 1 else middle


def _memory(rows: Sequence[Row]) -> Table:
    lines = []
    for row in rows:
        peak = row["peak_bytes"]
        mib = "not known" if peak is None else f"{peak / 2**20:,.0f}"
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
        lines.append((row["variant"], mib, ratio, row["configuration"]))
    return Table(("", "MiB", "x ours", "set up"), lines)


def _is_rate(row: Row) -> bool:
    """Tell whether images a second say something: not of an optimizer, whose cost has none."""
    return row["name"] != "peers optimizer"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.3g}" if seconds < 1 else f"{1e3 * seconds:,.0f}"


def _size(row: Row) -> str:
    sizes = row["sizes"]
    names = {"side": "{} px", "batch": "batch {:,}", "dim": "D = {}"}
    return ", ".join(text.format(sizes[key]) for key, text in names.items() if key in sizes)
