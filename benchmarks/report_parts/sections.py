"""The sections of the report, each from the rows of one file or two."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from peer_parts import page as peers

from fastclr.report.curves import bar_chart
from report_parts.rows import (
    NO_GPU,
    Row,
    devices,
    facts_of,
    named,
    on_gpu,
)
from report_parts.section import Picture, Section, Table
from report_parts.tables import heading, table


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
    "lars_cuda.jsonl": File("python benchmarks/lars.py --device cuda", "a step of LARS on a GPU"),
    "trainer.jsonl": File("python benchmarks/trainer.py", "the trainer beside a bare loop"),
    "data_plane.jsonl": File("python benchmarks/data_plane.py", "views by every back-end"),
}


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
        "Every number below was measured, on the machine and day of its row, but for what is "
        "called a forecast. Ratios are taken within one run, with everyone in turn.",
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
    return section_of("Where the time goes", "throughput.jsonl", rows, pictures)


def beside_others(files: Mapping[str, Sequence[Row]]) -> Section:
    """The same work by other libraries."""
    rows = files["peers.jsonl"]
    if not rows:
        return section_of("Beside others", "peers.jsonl", rows, [])
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
    return section_of("The trainer", "trainer.jsonl", files["trainer.jsonl"], [])


def section_of(title: str, name: str, rows: Sequence[Row], pictures: Sequence[Picture]) -> Section:
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
