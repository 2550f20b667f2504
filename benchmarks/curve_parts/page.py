"""The page and the plot of curves.py, from its rows alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import linear_regression
from typing import Any

import plots
import verdicts

Row = dict[str, Any]

MOST_POWER = 0.9  # of samples, in the time of a start: below 1 is below linear
MOST_MEMORY = 1.5  # times that of the smallest set, at 10,000 times the samples
MOST_READ = 1.5  # times the fastest number of shards, where no sample is read twice
MOST_STEP_POWER = 1.25  # of the batch, in the time of a step


def power(rows: Sequence[Row], size: str, key: str, least: float = 0) -> float | None:
    """Return the exponent in a size of a column, fitted from ``least`` up; None for one size."""
    logs = [
        (math.log(row["sizes"][size]), math.log(row[key]))
        for row in rows
        if row["sizes"][size] >= least
    ]
    return linear_regression(*zip(*logs, strict=True)).slope if len(logs) > 1 else None


def named(rows: Sequence[Row], name: str) -> list[Row]:
    """Return the rows of one curve."""
    return [row for row in rows if row["name"] == name]


def set_size(row: Row) -> int:
    """Return the samples of the set that a row of reading is about."""
    return row["sizes"]["shards"] * row["sizes"]["samples_per_shard"]


def _target(what: str, limit: float, found: float | None) -> str:
    measured, met = ("", None) if found is None else (f"{found:.2f}", found <= limit)
    return verdicts.row(what, f"<= {limit:g}", measured, met)


def targets(rows: Sequence[Row]) -> list[str]:
    """Return the table of what has to be shown."""
    lines = verdicts.head()
    if steps := named(rows, "step"):
        cached = [row for row in steps if row["variant"] == "gradient caching"]
        found = power(cached, "batch", "p50_seconds")
        lines.append(_target("a step: power of the contrastive batch", MOST_STEP_POWER, found))
    if reads := named(rows, "read"):
        times = [row["p50_seconds"] for row in reads if set_size(row) >= row["sizes"]["read"]]
        worst = max(times) / min(times) if len(times) > 1 else None
        lines.append(_target("reading: slowest over fastest number of shards", MOST_READ, worst))
    starts = named(rows, "start-up")
    for variant in dict.fromkeys(row["variant"] for row in starts):
        mine = [row for row in starts if row["variant"] == variant]
        found = power(mine, "samples", "p50_seconds")
        memory = mine[-1]["peak_bytes"] / mine[0]["peak_bytes"]
        lines.append(_target(f"start-up, {variant}: power of the samples", MOST_POWER, found))
        what = f"start-up, {variant}: memory, largest set over smallest"
        lines.append(_target(what, MOST_MEMORY, memory))
    return lines


def step_table(rows: Sequence[Row]) -> list[str]:
    """Return steps by batch."""
    lines = [
        "| contrastive batch | chunks | step, s | ms an image | images/s | the loss alone, s | "
        "peak less that before, MB | of it the views, MB |",
        f"|{'--:|' * 8}",
    ]
    for row in rows:
        batch, chunk = row["sizes"]["batch"], row["sizes"]["chunk"]
        lines.append(
            f"| {batch:,} | {batch // chunk} | {row['p50_seconds']:.2f} | "
            f"{1e3 * row['p50_seconds'] / batch:.2f} | {row['images_per_second']:,.0f} | "
            f"{row['loss_seconds']:.3f} | {row['peak_bytes'] / 1e6:,.0f} | "
            f"{row['views_bytes'] / 1e6:,.0f} |"
        )
    return lines


def read_table(rows: Sequence[Row]) -> list[str]:
    """Return reading by number of shards."""
    lines = [
        "| shards | samples in the set | opened in, s | read, us a sample | samples/s |",
        f"|{'--:|' * 5}",
    ]
    for row in rows:
        sizes = row["sizes"]
        lines.append(
            f"| {sizes['shards']:,} | {set_size(row):,} | "
            f"{row['open_seconds']:.3f} | {1e6 * row['p50_seconds'] / sizes['read']:.1f} | "
            f"{row['images_per_second']:,.0f} |"
        )
    return lines


def start_table(rows: Sequence[Row]) -> list[str]:
    """Return start-up by number of samples."""
    lines = [
        "| samples | shards | from manifest to the ids of a batch, s | whole process, s | peak "
        "memory, MB |",
        f"|{'--:|' * 5}",
    ]
    lines += [
        f"| {row['sizes']['samples']:,} | {row['sizes']['shards']:,} | "
        f"{row['p50_seconds']:.3f} | {row['process_seconds']:.2f} | "
        f"{row['peak_bytes'] / 1e6:.0f} |"
        for row in rows
    ]
    return lines


TABLES = {
    "step": ("A step, by contrastive batch", step_table),
    "read": ("Reading, by number of shards", read_table),
    "start-up": ("Start-up, by samples in the manifest", start_table),
}


def text(rows: Sequence[Row], about: str) -> str:
    """Return what stands below "Measured"."""
    first = rows[0]
    told = (
        f"{first['measured'][:10]}, `{first['command']}`, {first['hardware']['processor']}, "
        f"{first['hardware']['cores']} cores, torch {first['versions']['torch']}, "
        f"{first['threads']} threads, fp32. {about}"
    )
    parts = [told, "", "![curves](curves.svg)", "", *targets(rows), ""]
    for name, (title, table) in TABLES.items():
        if mine := named(rows, name):
            parts += [f"### {title}", "", *table(mine), ""]
    return "\n".join(parts)


def plot(path: Path, rows: Sequence[Row]) -> None:
    """Draw the three curves."""
    steps, reads, starts = (named(rows, name) for name in TABLES)
    panels = {
        ("A step, seconds", "contrastive batch"): {
            "step": [(r["sizes"]["batch"], r["p50_seconds"]) for r in steps],
            "the loss alone": [(r["sizes"]["batch"], r["loss_seconds"]) for r in steps],
        },
        ("Reading, us a sample", "shards"): {
            "read": [(r["sizes"]["shards"], 1e6 * r["p50_seconds"] / r["sizes"]["read"])
                     for r in reads],
        },
        ("Start-up, seconds", "samples in the manifest"): {
            variant: [(r["sizes"]["samples"], r["p50_seconds"])
                      for r in starts if r["variant"] == variant]
            for variant in dict.fromkeys(r["variant"] for r in starts)
        },
        ("Memory of a start, MB", "samples in the manifest"): {
            variant: [(r["sizes"]["samples"], r["peak_bytes"] / 1e6)
                      for r in starts if r["variant"] == variant]
            for variant in dict.fromkeys(r["variant"] for r in starts)
        },
    }  # fmt: skip

    def panel(heads: tuple[str, str], series: dict[str, Any]):
        flat = heads[0].startswith(("Reading", "Memory"))
        return lambda axes: plots.lines(
            axes, series, title=heads[0], x_label=heads[1], log_y=not flat
        )

    drawn = {heads: {k: v for k, v in series.items() if v} for heads, series in panels.items()}
    plots.save(path, [panel(heads, series) for heads, series in drawn.items() if series])
