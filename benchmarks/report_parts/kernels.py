"""Loss and optimizer in the report: time and memory by size, and how near they are to the roof."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from fastclr.report.curves import Kernel, curve_chart, roofline_chart
from report_parts.growth import Series
from report_parts.rows import NO_GPU, Row, facts_of, named
from report_parts.section import Picture, Section, Table
from report_parts.sections import FILES, processor_of, where

LARS, TRIAD = "fastclr", "floor: memory, by a triad"
# Of a weight in a step of LARS: w and g for the norms, then w, g and v read, w and v written; and
# the decayed gradient, two squares and their sums, then decay, ratio, rate, momentum and step.
LARS_BYTES, LARS_FLOP = 7 * 4, 13
SHOWN = ("blocked", "triton")  # our kernels of the loss


def loss(files: Mapping[str, Sequence[Row]]) -> Section:
    """Time and memory of NT-Xent by N, for each device that it was measured on."""
    pictures, tables, text = [], [], []
    for device in ("cpu", "cuda"):
        name = f"nt_xent_{device}.jsonl"
        rows = [row for row in files[name] if "error" not in row]
        if not rows:
            command = f"`{FILES[name].command}`"
            text.append(
                f"On {device}: {NO_GPU if device == 'cuda' else 'not measured yet'}; {command}."
            )
            continue
        dim, page = rows[0]["dim"], name.replace(".jsonl", ".md")
        rows = sorted((row for row in rows if row["dim"] == dim), key=lambda row: row["num_images"])
        text.append(
            f"On {device}: forward and backward, fp32, D = {dim}, {processor_of(rows[0])}, "
            f"{rows[0]['measured'][:10]}; more in [{page}]({page})."
        )
        for key, label in (("median_ms", "ms"), ("extra_mib", "MiB above what was held")):
            slug = f"loss-{device}-{key.replace('_', '-')}"
            svg = curve_chart(slug, _by_size(rows, key), x_label="images N", y_label=label)
            what = "Time" if key == "median_ms" else "Peak memory"
            pictures.append(Picture(slug, svg, f"{what} of NT-Xent by N, {device}."))
        tables.append((f"NT-Xent on {device}", _loss_table(rows)))
    return Section("The loss", text, pictures, tables)


def _by_size(rows: Sequence[Row], key: str) -> Series:
    found: Series = {}
    for row in rows:
        if row[key]:
            x_N, y_N = found.setdefault(_who(row), ([], []))
            x_N.append(row["num_images"])
            y_N.append(row[key])
    return found


def _who(row: Row) -> str:
    ours = row["library"] == "fastclr"
    return f"fastclr {row['implementation']}" if ours else row["library"]


def _loss_table(rows: Sequence[Row]) -> Table:
    names = list(dict.fromkeys(map(_who, rows)))
    lines = []
    for num_images in dict.fromkeys(row["num_images"] for row in rows):
        at = {_who(row): row for row in rows if row["num_images"] == num_images}
        lines.append((f"{num_images:,}", *(_time_and_memory(at.get(name)) for name in names)))
    return Table(("N", *(f"{name}, ms / MiB" for name in names)), lines)


def _time_and_memory(row: Row | None) -> str:
    if row is None:
        return ""
    memory = "?" if row["extra_mib"] is None else f"{row['extra_mib']:,.0f}"
    return f"{row['median_ms']:,.1f} / {memory}"


def optimizer(files: Mapping[str, Sequence[Row]]) -> Section:
    """A step of LARS beside others' and the floors, for each device that it was measured on."""
    text, tables = [], []
    for device, name in (("cpu", "lars.jsonl"), ("cuda", "lars_cuda.jsonl")):
        rows = named(files[name], "optimizer step")
        if not rows:
            missing = NO_GPU if device == "cuda" else "**Not measured yet**"
            text.append(f"On {device}: {missing}; `{FILES[name].command}`.")
            continue
        page = name.replace(".jsonl", ".md")
        text.append(
            f"On {device}: milliseconds of a step, medians. {where(rows)} More in [{page}]({page})."
        )
        tables.append((f"A step of LARS on {device}", _steps_table(rows)))
    return Section("The optimizer", text, tables=tables)


def _steps_table(rows: Sequence[Row]) -> Table:
    models = {row["sizes"]["model"]: row["sizes"]["parameters"] for row in rows}
    lines = []
    for variant in dict.fromkeys(row["variant"] for row in rows):
        at = {row["sizes"]["model"]: row for row in rows if row["variant"] == variant}
        cells = [f"{1e3 * at[m]['p50_seconds']:.1f}" if m in at else "" for m in models]
        lines.append((variant, *cells))
    return Table(("", *(f"{model}, {n / 1e6:.1f} M" for model, n in models.items())), lines)


def roofline(files: Mapping[str, Sequence[Row]]) -> Section:
    """Draw the kernels under what this memory and these cores do, a chart for each machine."""
    text = [
        "Operations a second against operations for each byte that has to be moved. The roof is "
        "measured too: memory by a triad in the run of LARS, arithmetic by the loss's own matrix "
        "products alone in the run of NT-Xent; where only one was measured on a machine, the other "
        f"is not drawn. A step of LARS moves {LARS_BYTES} bytes a weight for {LARS_FLOP} "
        "operations; NT-Xent does 16 N^2 D, half of the pairs twice, and must move its rows three "
        "times.",
    ]
    kernels, bandwidths, peaks = _points(files)
    pictures, lines = [], []
    for number, (machine, points) in enumerate(kernels.items()):
        bandwidth, peak = bandwidths.get(machine), peaks.get(machine)
        svg = roofline_chart(
            f"roofline-{number}", points, bytes_per_second=bandwidth, operations_per_second=peak
        )
        pictures.append(Picture(f"roofline-{number}", svg, f"Roofline of {machine}."))
        for name, point in points.items():
            roof = min(point.intensity * (bandwidth or math.inf), peak or math.inf)
            intensity = point.intensity
            shown = f"{intensity:,.0f}" if intensity >= 100 else f"{intensity:.2f}"
            speed, share = f"{point.speed / 1e9:,.1f}", f"{point.speed / roof:.0%}"
            lines.append((name, machine, shown, speed, share))
    header = ("kernel", "machine", "FLOP/B", "GFLOP/s", "of the roof")
    text.append(
        "GPUs are left out: the products measured there are of float32, the kernels' of float16."
    )
    return Section("Roofline of the kernels", text, pictures, [("", Table(header, lines))])


Machines = dict[str, dict[str, Kernel]]


def _points(
    files: Mapping[str, Sequence[Row]],
) -> tuple[Machines, dict[str, float], dict[str, float]]:
    """Return kernels, bytes a second and operations a second of each machine."""
    kernels: Machines = {}
    bandwidths: dict[str, float] = {}
    peaks: dict[str, float] = {}
    for row in named(files["lars.jsonl"], "optimizer step"):
        machine = _machine(row)
        moved = LARS_BYTES * row["sizes"]["parameters"] / row["p50_seconds"]
        if row["variant"] == TRIAD:
            bandwidths[machine] = max(moved, bandwidths.get(machine, 0.0))
        elif row["variant"] == LARS:
            intensity = LARS_FLOP / LARS_BYTES
            point = Kernel(intensity, moved * intensity)
            kernels.setdefault(machine, {})[f"LARS, {row['sizes']['model']}"] = point
    measured = [row for row in files["nt_xent_cpu.jsonl"] if row.get("products_ms")]
    for row in measured:
        machine, operations = _machine(row), 16 * row["num_images"] ** 2 * row["dim"]
        peaks[machine] = max(1e3 * operations / row["products_ms"], peaks.get(machine, 0.0))
    largest = max((row["num_images"] for row in measured), default=0)
    for row in measured:
        if row["implementation"] in SHOWN and row["num_images"] in (2048, largest):
            operations = 16 * row["num_images"] ** 2 * row["dim"]
            moved = 3 * 2 * row["num_images"] * row["dim"] * 4
            name = f"NT-Xent {row['implementation']}, N = {row['num_images']:,}, D = {row['dim']}"
            point = Kernel(operations / moved, 1e3 * operations / row["median_ms"])
            kernels.setdefault(_machine(row), {})[name] = point
    return kernels, bandwidths, peaks


def _machine(row: Row) -> str:
    hardware = facts_of(row)["hardware"]
    device = hardware["device"]
    return str(processor_of(row)) if device == "cpu" else device
