"""The sections of the report, each from the rows of one file or two."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from peer_parts import page as peers

from fastclr.report.curves import bar_chart, curve_chart
from report_parts.rows import (
    NO_GPU,
    Row,
    devices,
    facts_of,
    named,
    on_gpu,
    size_that_varies,
)
from report_parts.section import Picture, Section, Table

Series = dict[str, tuple[list[float], list[float]]]


class File(NamedTuple):
    """Rows that a benchmark writes.

    Attributes:
        command: What writes them.
        what: What they are about.
    """

    command: str
    what: str


FILES = {
    "throughput.jsonl": File("python benchmarks/throughput.py", "where a step's time goes; tuning"),
    "scaling.jsonl": File("python benchmarks/scaling.py", "more ranks"),
    "peers.jsonl": File("python benchmarks/peers.py", "beside others"),
    "curves.jsonl": File("python benchmarks/curves.py", "cost by batch, shards and samples"),
    "nt_xent_cpu.jsonl": File("python benchmarks/nt_xent.py", "the loss on CPUs"),
    "nt_xent_cuda.jsonl": File("python benchmarks/nt_xent.py --device cuda", "the loss on a GPU"),
    "lars.jsonl": File("python benchmarks/lars.py", "a step of LARS"),
    "trainer.jsonl": File("python benchmarks/trainer.py", "the trainer beside a bare loop"),
    "data_plane.jsonl": File("python benchmarks/data_plane.py", "views by every back-end"),
}

# Columns that have a place of their own in a table, or none.
_KNOWN = {
    "name", "variant", "sizes", "dtype", "p20_seconds", "p50_seconds", "p80_seconds", "repeats",
    "warm_ups", "images_per_second", "peak_bytes", "measured", "hardware", "threads", "versions",
    "driver", "commit", "dirty", "command",
}  # fmt: skip


def overview(files: Mapping[str, Sequence[Row]], pages: Mapping[str, str]) -> Section:
    """Say what was measured, when, and on what; what is missing, and what no GPU has run.

    Args:
        files: Rows by the name of their file.
        pages: Titles of other pages beside the rows, by their names.
    """
    lines = []
    for name, rows in files.items():
        file = FILES.get(name, File("", "other rows"))
        link = f"[{name}]({name})" if rows else name
        if not rows:
            lines.append((link, file.what, "**not measured yet**", NO_GPU, "", f"`{file.command}`"))
            continue
        cpus = {processor_of(row) for row in rows if facts_of(row)} - {None}
        days = sorted({str(facts_of(row)["measured"])[:10] for row in rows if facts_of(row)})
        dates = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}" if days else ""
        own = sorted({row["command"] for row in rows if row.get("command")}) or [file.command]
        commands = ", ".join(f"`{command}`" for command in own)
        lines.append(
            (link, file.what, "; ".join(sorted(map(str, cpus))), on_gpu(rows), dates, commands)
        )
    header = ("rows", "about", "processor", "GPU", "measured", "command")
    text = [
        "Every number below was measured, on the machine and day of its row, but for what is called "
        "a forecast. Ratios are taken within one run, with everyone in turn.",
    ]
    tables = [("", Table(header, lines))]
    if pages:
        links = [(f"[{name}]({name})", title) for name, title in pages.items()]
        tables.append(("Pages of their own", Table(("page", "about"), links)))
    return Section("What was measured", text, tables=tables)


def processor_of(row: Row) -> str | None:
    """Return a row's processor and its cores."""
    hardware = facts_of(row).get("hardware", {})
    return f"{hardware['cores']} cores of {hardware['processor']}" if hardware else None


def throughput(files: Mapping[str, Sequence[Row]]) -> Section:
    """Where the time of a step goes, and what tuning gave."""
    rows = files["throughput.jsonl"]
    pictures = []
    stages = [row for row in rows if row.get("name") == "stage"]
    keys = ("alone_images_per_second", "images_per_second")
    alone = {row["variant"]: next((row[k] for k in keys if row.get(k)), None) for row in stages}
    if speeds := {variant: speed for variant, speed in alone.items() if speed}:
        svg = bar_chart("stages", speeds, label="images/s")
        pictures.append(Picture("stages", svg, "Each stage alone at its own maximum, images/s."))
    if stages and all(row.get("exposed_seconds") is not None for row in stages):
        exposed = {row["variant"]: 1e3 * row["exposed_seconds"] for row in stages}
        work = {row["variant"]: 1e3 * row["work_seconds"] for row in stages}
        svg = bar_chart("stage-times", exposed, label="ms a step: exposed of all", whole=work)
        caption = "Inside the whole run: what the step waits for, of what each stage takes."
        pictures.append(Picture("stage-times", svg, caption))
    return _section("Where the time goes", "throughput.jsonl", rows, pictures)


def scaling(files: Mapping[str, Sequence[Row]]) -> Section:
    """Images a second by number of ranks, and what a model says of more of them."""
    rows = files["scaling.jsonl"]
    drawn = [*weak_and_strong(rows), *(row for row in rows if row.get("name") != "scaling")]
    return _section("More ranks", "scaling.jsonl", rows, drawings(drawn, "images_per_second"))


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
    return _section("What growth costs", "curves.jsonl", rows, pictures)


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


def beside_others(files: Mapping[str, Sequence[Row]]) -> Section:
    """The same work by other libraries."""
    rows = files["peers.jsonl"]
    if not rows:
        return _section("Beside others", "peers.jsonl", rows, [])
    section = peers.section(rows)
    pictures = []
    for side in sorted({row["sizes"]["side"] for row in named(rows, "peers step")}):
        speeds = {
            row["variant"]: row["images_per_second"]
            for row in named(rows, "peers step")
            if row["sizes"]["side"] == side
        }
        svg = bar_chart(f"peers-{side}", speeds, label="images/s")
        caption = f"Files to weights at {side} pixels, images/s."
        pictures.append(Picture(f"peers-{side}", svg, caption))
    return section._replace(text=[*section.text, where(rows)], pictures=pictures)


def trainer(files: Mapping[str, Sequence[Row]]) -> Section:
    """The trainer beside a bare loop."""
    return _section("The trainer", "trainer.jsonl", files["trainer.jsonl"], [])


def curves(rows: Sequence[Row], key: str, size: str) -> Series:
    """Return a curve for each variant of rows that have a value, over a size; {} for one place."""
    rows = [row for row in rows if row.get(key) and row["sizes"].get(size)]
    found: Series = {}
    for row in sorted(rows, key=lambda row: row["sizes"][size]):
        x_N, y_N = found.setdefault(row["variant"], ([], []))
        x_N.append(row["sizes"][size])
        y_N.append(row[key])
    return found if len({row["sizes"][size] for row in rows}) > 1 else {}


def _section(title: str, name: str, rows: Sequence[Row], pictures: Sequence[Picture]) -> Section:
    """Return a section with a table for each name of rows, or what to run where there are none."""
    if not rows:
        missing = (
            f"**Not measured yet**: `{FILES[name].command}` writes `{name}`. On a GPU: {NO_GPU}."
        )
        return Section(title, [missing])
    rows = [row for row in rows if "name" in row and "sizes" in row]
    names = dict.fromkeys(row["name"] for row in rows)
    by_name = [[row for row in rows if row["name"] == of_name] for of_name in names]
    tables = [(heading(group), table(group)) for group in by_name]
    return Section(title, [where(rows)], pictures, tables)


def heading(rows: Sequence[Row]) -> str:
    """Return the name of rows and the sizes that all of them share."""
    constant = [f"{key} {_cell(rows[0]['sizes'][key])}" for key in _sizes(rows, varying=False)]
    return ", ".join([rows[0]["name"].capitalize(), *constant])


def _sizes(rows: Sequence[Row], *, varying: bool) -> list[str]:
    """Return the sizes that vary over rows, or those that do not."""
    keys = dict.fromkeys(key for row in rows for key in row["sizes"])
    values = {key: {str(row["sizes"].get(key)) for row in rows} for key in keys}
    return [key for key in keys if (len(values[key]) > 1) is varying]


def where(rows: Iterable[Row]) -> str:
    """Say where rows were measured, and that no GPU was there, if so."""
    rows = list(rows)
    places = dict.fromkeys(
        f"{processor_of(row)}, {str(facts_of(row).get('measured'))[:10]}"
        for row in rows
        if facts_of(row)
    )
    gpus = on_gpu(rows)
    return f"{'; '.join(places)}. GPU: {gpus if gpus == NO_GPU else ', '.join(devices(rows))}."


def table(rows: Sequence[Row]) -> Table:
    """Return rows of one name as a table: sizes, times, and every other plain value they carry."""
    sizes = _sizes(rows, varying=True)
    extras = [_flat({k: v for k, v in row.items() if k not in _KNOWN}) for row in rows]
    columns: dict[str, list[Any]] = {key: [row["sizes"].get(key) for row in rows] for key in sizes}
    columns["ms (20 to 80 %)"] = [_milliseconds(row) for row in rows]
    columns["images/s"] = [row.get("images_per_second") for row in rows]
    peaks = [row.get("peak_bytes") for row in rows]
    columns["peak MiB"] = [peak / 2**20 if peak else None for peak in peaks]
    for key in dict.fromkeys(key for extra in extras for key in extra):
        columns[key.replace("_", " ")] = [extra.get(key) for extra in extras]
    shown = {head: cells for head, cells in columns.items() if any(c is not None for c in cells)}
    lines = zip(*([_cell(cell) for cell in cells] for cells in shown.values()), strict=True)
    named_lines = [(row["variant"], *line) for row, line in zip(rows, lines, strict=True)]
    return Table(("", *shown), named_lines)


def _flat(values: Mapping[str, Any]) -> Row:
    """Return the plain values, those of nested mappings under both names; lists are left out."""
    found: Row = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= {f"{key}: {name}": inner for name, inner in _flat(value).items()}
        elif isinstance(value, bool | int | float | str):
            found[key] = value
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
