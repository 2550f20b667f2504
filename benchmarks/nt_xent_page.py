"""The page and the plot of what benchmarks/nt_xent.py measured, from its rows alone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import verdicts
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

Row = dict[str, Any]

COLORS = {
    "blocked": "#0b6e99", "triton": "#5b3a8e", "reference": "#6f7782", "lightly": "#c2571a",
    "metric-learning": "#a8326b", "inf-cl": "#4d7c2f",
}  # fmt: skip
GROWTH_FROM = 2048  # images; below, constant costs show
LABEL_POINTS = 12  # height of a label in the plot
NOTE = """\
Forward and backward, float32, one rank, random projections. Times are medians of rounds that call
everything once in turn, lowest and highest in brackets; ratios are medians of those within a round.
Memory is the peak during one call in a fresh process less that before the call, the highest of 3
processes (of 1 where one call was timed). The floor is what `blocked` cannot do without: its own
matrix products and exponentials, each alone, in its own tiles. Loss and gradient of each were
first compared with the dense reference's."""


class Target(NamedTuple):
    """What a number must be.

    Attributes:
        what: Of what.
        limit: The bound.
        at_least: Whether it is a lower bound.
        measured: The number; None if it was not measured.
    """

    what: str
    limit: float
    at_least: bool
    measured: float | None

    def line(self) -> str:
        """Return a row of a table, with the verdict."""
        bound = f"at {'least' if self.at_least else 'most'} {self.limit:g}"
        if self.measured is None:
            return verdicts.row(self.what, bound, "", None)
        met = self.measured >= self.limit if self.at_least else self.measured <= self.limit
        return verdicts.row(self.what, bound, f"{self.measured:.2f}", met)


def write_page(rows: Sequence[Row], dim: int, jsonl: Path, flags: str) -> Path:
    """Write the page and the plot beside the rows.

    Args:
        rows: All rows.
        dim: Width that the targets and the plot are about.
        jsonl: File that the rows are in.
        flags: Command line after the script.

    Returns:
        The page, Markdown.
    """
    by_size = sorted(rows, key=lambda row: row["num_images"])
    done = [row for row in by_size if "error" not in row]
    parts = [
        f"# NT-Xent: time and memory on {rows[0]['device']}",
        f"{_facts(rows)}. Made by:",
        f"```\n{f'python benchmarks/nt_xent.py {flags}'.rstrip()}\n```",
        NOTE,
        f"![time and memory by number of images]({jsonl.stem}.svg)",
    ]
    if rows[0]["device"] == "cpu":
        parts += [f"## Targets, D = {dim}", targets([row for row in done if row["dim"] == dim])]
    for width in dict.fromkeys(row["dim"] for row in rows if "error" not in row):
        at_width = [row for row in done if row["dim"] == width]
        parts += [f"## D = {width}: milliseconds", times(at_width)]
        parts += [f"## D = {width}: extra memory, MiB", table(at_width, _mib)]
    if refused := [row for row in rows if "error" in row]:
        parts += ["## What did not run", "\n".join(map(_refusal, refused))]
    plot([row for row in done if row["dim"] == dim], jsonl.with_suffix(".svg"))
    page = jsonl.with_suffix(".md")
    page.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return page


def targets(rows: Sequence[Row]) -> str:
    """Return the table of targets with their verdicts, from rows of one width."""
    at = {(row["implementation"], row["num_images"]): row for row in rows}
    floors = [
        row["floor_ratio"]
        for row in rows
        if row["implementation"] == "blocked" and "floor_ratio" in row
        and row["num_images"] >= GROWTH_FROM
    ]  # fmt: skip
    memory = at.get(("blocked", 8192), {}).get("extra_mib")
    worst = max(floors, default=None)
    found = [
        Target("lightly / blocked, time, N = 2,048", 3, True, faster(at, 2048)),
        Target("lightly / blocked, time, N = 8,192", 4, True, faster(at, 8192)),
        Target("extra memory of blocked, MiB, N = 8,192", 64, False, memory),
        Target(f"blocked / floor, worst from N = {GROWTH_FROM:,}", 1.6, False, worst),
        Target("time of blocked: power of N", 2.1, False, growth(rows, "median_ms")),
        Target("memory of blocked: power of N", 1.1, False, growth(rows, "extra_mib")),
    ]
    head = "| what | target | measured | verdict |\n|:--|:--|--:|:--|"
    return "\n".join([head, *(target.line() for target in found)])


def faster(at: dict[tuple[str, int], Row], num_images: int) -> float | None:
    """Return how many times faster blocked is than lightly, if both were measured."""
    if not {("lightly", num_images), ("blocked", num_images)} <= set(at):
        return None
    pair = (at[name, num_images]["rounds_ms"] for name in ("lightly", "blocked"))
    return statistics.median(slow / fast for slow, fast in zip(*pair, strict=True))


def growth(rows: Sequence[Row], key: str) -> float | None:
    """Return the exponent in N of a column of blocked, fitted from GROWTH_FROM images up."""
    logs = [
        (math.log(row["num_images"]), math.log(row[key]))
        for row in rows
        if row["implementation"] == "blocked" and row["num_images"] >= GROWTH_FROM and row[key]
    ]
    return statistics.linear_regression(*zip(*logs, strict=True)).slope if len(logs) > 1 else None


def times(rows: Sequence[Row]) -> str:
    """Return the table of times, with the floor."""
    lines = table(rows, _ms).split("\n")
    heads = ("products alone", "exponentials alone", "blocked / floor", "lightly / blocked")
    lines[0] += "".join(f" {head} |" for head in heads)
    lines[1] += "--:|" * len(heads)
    at = {(row["implementation"], row["num_images"]): row for row in rows}
    for i, num_images in enumerate(dict.fromkeys(row["num_images"] for row in rows), start=2):
        any_row = next(row for row in rows if row["num_images"] == num_images)
        found = [any_row.get("products_ms"), any_row.get("exponentials_ms")]
        found += [at.get(("blocked", num_images), {}).get("floor_ratio"), faster(at, num_images)]
        lines[i] += "".join(f" {'' if x is None else format(x, ',.2f')} |" for x in found)
    return "\n".join(lines)


def table(rows: Sequence[Row], cell: Callable[[Row], str]) -> str:
    """Return a table of N by implementation."""
    names = list(dict.fromkeys(map(_name, rows)))
    lines = [f"| N | {' | '.join(names)} |", f"|--:|{'--:|' * len(names)}"]
    for num_images, group in groupby(rows, key=lambda row: row["num_images"]):
        cells = {_name(row): cell(row) for row in group}
        lines.append(f"| {num_images:,} | {' | '.join(cells.get(n, '') for n in names)} |")
    return "\n".join(lines)


def _name(row: Row) -> str:
    ours = row["library"] == "fastclr"
    return f"fastclr {row['implementation']}" if ours else row["library"]


def _ms(row: Row) -> str:
    if len(row["rounds_ms"]) == 1:
        return f"{row['median_ms']:,.0f} (once)"
    return f"{row['median_ms']:,.1f} ({row['lowest_ms']:,.1f} to {row['highest_ms']:,.1f})"


def _mib(row: Row) -> str:
    return "not known" if row["extra_mib"] is None else f"{row['extra_mib']:,.1f}"


def _refusal(row: Row) -> str:
    at = f"N = {row['num_images']:,}, D = {row['dim']}"
    return f"- {row['library']}, {at}, so not beyond either: `{row['error']}`"


def _facts(rows: Sequence[Row]) -> str:
    """Return when, where and with what, in a line."""
    hardware = rows[0]["hardware"]
    libraries = {row["library"]: row["version"] or "not installed" for row in rows}
    versions = {name: rows[0]["versions"][name] for name in ("python", "torch")} | libraries
    device = f"{hardware['device']}, " if rows[0]["device"] == "cuda" else ""
    return (
        f"{rows[0]['measured'][:10]}, {device}{hardware['cores']} cores of {hardware['processor']},"
        f" torch threads: {rows[0]['threads']}; "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
    )


def plot(rows: Sequence[Row], path: Path) -> None:
    """Draw time and memory by N, logarithmic, a line per implementation labelled at its end."""
    style: dict[Any, Any] = {
        "svg.hashsalt": path.stem,
        "font.size": 10,
        "axes.titlelocation": "left",
    }
    with mpl.rc_context(style):
        figure = Figure(figsize=(11, 4.8), layout="constrained", facecolor="white")
        left, right = figure.subplots(1, 2)
        panel(left, rows, "median_ms", "Time, forward and backward")
        panel(right, rows, "extra_mib", "Extra memory at the peak")
        floors = {row["num_images"]: row["floor_ms"] for row in rows if "floor_ms" in row}
        if floors:
            left.plot(*zip(*floors.items(), strict=True), "--", color="#1f2328", linewidth=1)
            end = max(floors)
            left.annotate(
                "floor: products and\nexponentials alone", (end, floors[end]), (8, -6),
                textcoords="offset points", va="top", color="#1f2328", fontsize=9,
            )  # fmt: skip
        ticks(left, [10**k for k in range(-2, 7)], lambda ms: _unit(ms, 1000, "ms", "s"))
        decades = [0.1, 1, 10, 100, 1024, 10240, 102400]
        ticks(right, decades, lambda mib: _unit(mib, 1024, "MiB", "GiB"))
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(path, metadata=nothing if path.suffix == ".svg" else None)


def panel(axes: Axes, rows: Sequence[Row], key: str, title: str) -> None:
    """Draw one column of the rows."""
    axes.set(title=title, xlabel="images N (two rows each)", xscale="log", yscale="log")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e6e8eb", linewidth=0.7)
    axes.margins(x=0.04, y=0.1)
    ends: list[tuple[float, float, Row]] = []
    for name in dict.fromkeys(row["implementation"] for row in rows):
        line = [row for row in rows if row["implementation"] == name and row[key]]
        if line:
            x_N, y_N = [row["num_images"] for row in line], [row[key] for row in line]
            bold = 2.4 if line[0]["library"] == "fastclr" and name != "reference" else 1.4
            axes.plot(x_N, y_N, "o-", color=COLORS[name], linewidth=bold, markersize=4)
            ends.append((x_N[-1], y_N[-1], line[-1]))
    label(axes, ends)


def label(axes: Axes, ends: Iterable[tuple[float, float, Row]]) -> None:
    """Write names to the upper left of where lines end, one above the other where they meet.

    Lines rise steeply, so that this is the free side; the first N is an end with no room there.
    """
    points_per_pixel, lowest = 72 / axes.figure.dpi, min(axes.get_xlim())
    floor_of: dict[float, float] = {}
    for x, y, row in sorted(ends, key=lambda end: end[:2]):
        height = axes.transData.transform((x, y))[1] * points_per_pixel
        shift = max(2.0, floor_of.get(x, -math.inf) - height)
        floor_of[x] = height + shift + LABEL_POINTS
        alone = x < 2 * lowest
        axes.annotate(
            _name(row), (x, y), (8, -8) if alone else (-8, shift), textcoords="offset points",
            ha="left" if alone else "right", va="center" if alone else "bottom", fontsize=10,
            color=COLORS[row["implementation"]],
        )  # fmt: skip


def ticks(axes: Axes, places: Sequence[float], text: Callable[[float], str]) -> None:
    """Label both axes with round numbers."""
    axes.xaxis.set_major_locator(FixedLocator([4**k for k in range(3, 12)]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda n, _: f"{n:,.0f}"))
    axes.yaxis.set_major_locator(FixedLocator(places))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: text(y)))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())


def _unit(value: float, factor: int, small: str, large: str) -> str:
    return f"{value / factor:g} {large}" if value >= factor else f"{value:g} {small}"
