"""How speed and cost grow with ranks, batch, shards and samples."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from fastclr.report.curves import curve_chart
from report_parts.rows import Row, named, size_that_varies
from report_parts.section import Picture, Section
from report_parts.sections import section_of

Series = dict[str, tuple[list[float], list[float]]]


def scaling(files: Mapping[str, Sequence[Row]]) -> Section:
    """Images a second by number of ranks, and what a model says of more of them."""
    rows = files["scaling.jsonl"]
    drawn = [*weak_and_strong(rows), *(row for row in rows if row.get("name") != "scaling")]
    return section_of("More ranks", "scaling.jsonl", rows, drawings(drawn, "images_per_second"))


def weak_and_strong(rows: Sequence[Row]) -> list[Row]:
    """Return measured worlds as weak and strong scaling, each with the model's beside it.

    Worlds that are only there for the model, and other ZeRO stages and exchanges, are left out.
    """
    plain = {"stage": 0, "exchange": "gather", "worlds": 1}
    worlds = [
        row for row in named(rows, "scaling")
        if all(row["sizes"].get(key, value) == value for key, value in plain.items())
    ]  # fmt: skip
    found: list[Row] = []
    for one in (row for row in worlds if row["sizes"]["ranks"] == 1):
        images = one["sizes"]["images"]
        weak = [row for row in worlds if row["sizes"]["images"] == images]
        strong = [row for row in worlds if row["sizes"]["images"] * row["sizes"]["ranks"] == images]
        for kind, group in (("weak", weak), ("strong", strong)):
            if len(group) > 1:
                found += [row | {"variant": kind} for row in group]
                found += [
                    _by_model(row, f"{kind}, model") for row in group if "model_seconds" in row
                ]
    return found


def _by_model(row: Row, variant: str) -> Row:
    images = row["sizes"]["images"] * row["sizes"]["ranks"]
    return row | {"variant": variant, "images_per_second": images / row["model_seconds"]}


def costs(files: Mapping[str, Sequence[Row]]) -> Section:
    """What a step, a read and a start cost as everything grows."""
    rows = files["curves.jsonl"]
    pictures = drawings(rows, "p50_seconds") + drawings(rows, "peak_bytes")
    return section_of("What growth costs", "curves.jsonl", rows, pictures)


# What curves are drawn over; for other names, the size that most distinguishes their rows.
OVER = {
    "scaling": "ranks", "collective": "num_bytes", "step": "batch", "read": "shards",
    "start-up": "samples",
}  # fmt: skip
UNITS = {"images_per_second": "images/s", "p50_seconds": "seconds", "peak_bytes": "peak bytes"}


def drawings(rows: Sequence[Row], wanted: str) -> list[Picture]:
    """Draw each name's rows over their size.

    Args:
        rows: Of one file.
        wanted: Key of :data:`UNITS` that is drawn; seconds where rows have no images a second.
    """
    found = []
    for name in dict.fromkeys(row["name"] for row in rows if "name" in row):
        of_name = [row for row in rows if row["name"] == name]
        has_rate = any(row.get("images_per_second") for row in of_name)
        key = "p50_seconds" if wanted == "images_per_second" and not has_rate else wanted
        size = OVER.get(name) or size_that_varies(of_name)
        if size and (series := curves(of_name, key, size)):
            slug = re.sub(r"\W+", "-", f"{name} {UNITS[key]}")
            x_label = size.replace("_", " ")
            svg = curve_chart(slug, series, x_label=x_label, y_label=UNITS[key])
            found.append(Picture(slug, svg, f"{name.capitalize()}: {UNITS[key]} by {x_label}."))
    return found


def curves(rows: Sequence[Row], key: str, size: str) -> Series:
    """Return a curve for each variant of rows that have a value, over a size; {} for one place."""
    rows = [row for row in rows if row.get(key) and row["sizes"].get(size)]
    found: Series = {}
    for row in sorted(rows, key=lambda row: row["sizes"][size]):
        x_N, y_N = found.setdefault(row["variant"], ([], []))
        x_N.append(row["sizes"][size])
        y_N.append(row[key])
    return found if len({row["sizes"][size] for row in rows}) > 1 else {}
