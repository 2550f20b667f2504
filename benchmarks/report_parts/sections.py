"""The sections of the report, each from the rows of one file or two."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
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
        page: Page of its own beside the rows; empty for none.
    """

    command: str
    what: str
    page: str = ""


FILES = {
    "throughput.jsonl": File("python benchmarks/throughput.py", "where a step's time goes; tuning"),
    "scaling.jsonl": File("python benchmarks/scaling.py", "more ranks"),
    "peers.jsonl": File("python benchmarks/peers.py", "beside others"),
    "curves.jsonl": File("python benchmarks/scaling.py", "cost by batch, shards and samples"),
    "nt_xent_cpu.jsonl": File("python benchmarks/nt_xent.py", "the loss on CPUs", "nt_xent_cpu.md"),
    "nt_xent_cuda.jsonl": File(
        "python benchmarks/nt_xent.py --device cuda", "the loss on a GPU", "nt_xent_cuda.md"
    ),
    "lars.jsonl": File("python benchmarks/lars.py", "a step of LARS", "lars.md"),
    "trainer.jsonl": File(
        "python benchmarks/trainer.py", "the trainer beside a bare loop", "trainer.md"
    ),
    "data_plane.jsonl": File(
        "python benchmarks/data_plane.py", "views by every back-end", "data_plane.md"
    ),
}
PAGES = {
    "kernels_aot.md": "Triton kernels compiled for GPUs, without one: registers, spills",
    "kernels_notes.md": "what did not work with them",
    "nt_xent_gradients.md": "what other losses do to the gradient",
    "trainer_matrix.md": "every engine beside one process",
    "cpu_pilots.md": "pilots behind the recipe for a CPU",
}

# Columns that have a place of their own in a table, or none.
_KNOWN = {
    "name", "variant", "sizes", "dtype", "p20_seconds", "p50_seconds", "p80_seconds", "repeats",
    "warm_ups", "images_per_second", "peak_bytes", "measured", "hardware", "threads", "versions",
    "driver", "commit", "dirty", "command",
}  # fmt: skip


def overview(files: Mapping[str, Sequence[Row]]) -> Section:
    """Say what was measured, when, and on what; what is missing, and what no GPU has run."""
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
        "Every number below was measured, on the machine and day of its row; nothing is estimated "
        "where it does not say so. Ratios are taken within one run, with everyone in turn.",
    ]
    others = [(f"[{page}]({page})", what) for page, what in PAGES.items()]
    pages = [(f"[{f.page}]({f.page})", f.what) for n, f in FILES.items() if f.page and files.get(n)]
    tables = [
        ("", Table(header, lines)),
        ("Pages of their own", Table(("page", "about"), pages + others)),
    ]
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
    """Images a second by number of ranks."""
    rows = files["scaling.jsonl"]
    pictures = []
    for name in ("weak scaling", "strong scaling", "communication"):
        of_name = named(rows, name)
        key = "images_per_second" if all(r["images_per_second"] for r in of_name) else "p50_seconds"
        if series := curves(of_name, key):
            y_label = "images/s" if key == "images_per_second" else "seconds"
            x_label = size_that_varies(of_name) or ""
            slug = name.replace(" ", "-")
            svg = curve_chart(slug, series, x_label=x_label, y_label=y_label)
            pictures.append(Picture(slug, svg, f"{name.capitalize()}: {y_label} by {x_label}."))
    return _section("More ranks", "scaling.jsonl", rows, pictures)


def costs(files: Mapping[str, Sequence[Row]]) -> Section:
    """What a step, a read and a start cost as everything grows."""
    rows = files["curves.jsonl"]
    pictures = []
    for name, key, y_label in (
        ("step", "p50_seconds", "seconds a step"),
        ("read", "p50_seconds", "seconds a read"),
        ("open", "p50_seconds", "seconds to open"),
        ("open", "peak_bytes", "peak bytes"),
    ):
        of_name = named(rows, name)
        if series := curves(of_name, key):
            slug = f"{name}-{key.replace('_', '-')}"
            x_label = size_that_varies(of_name) or ""
            svg = curve_chart(slug, series, x_label=x_label, y_label=y_label)
            pictures.append(Picture(slug, svg, f"{y_label.capitalize()} by {x_label}."))
    return _section("What growth costs", "curves.jsonl", rows, pictures)


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


def curves(rows: Sequence[Row], key: str) -> Series:
    """Return a curve for each variant of rows that have a value, over the size that varies."""
    rows = [row for row in rows if row.get(key)]
    size = size_that_varies(rows)
    if size is None:
        return {}
    found: Series = {}
    for row in sorted(
        (row for row in rows if size in row["sizes"]), key=lambda r: r["sizes"][size]
    ):
        x_N, y_N = found.setdefault(row["variant"], ([], []))
        x_N.append(row["sizes"][size])
        y_N.append(row[key])
    return found


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
    extras = list(dict.fromkeys(
        key for row in rows for key, value in row.items()
        if key not in _KNOWN and isinstance(value, bool | int | float | str)
    ))  # fmt: skip
    columns: list[tuple[str, Callable[[Row], Any]]] = [
        *((key, lambda row, key=key: row["sizes"].get(key)) for key in sizes),
        ("ms (20 to 80 %)", _milliseconds),
        ("images/s", lambda row: row.get("images_per_second")),
        ("peak MiB", lambda row: row["peak_bytes"] / 2**20 if row.get("peak_bytes") else None),
        *((key.replace("_", " "), lambda row, key=key: row.get(key)) for key in extras),
    ]
    columns = [(head, cell) for head, cell in columns if any(cell(row) is not None for row in rows)]
    lines = [(row["variant"], *(_cell(cell(row)) for _, cell in columns)) for row in rows]
    return Table(("", *(head for head, _ in columns)), lines)


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
