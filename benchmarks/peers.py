"""The same SimCLR step by others and by us: the whole of it, and each part, side by side.

python benchmarks/peers.py [--sides 32 224] [--parts views loss] [--only lightly] [--rounds 3]

lightly on Lightning, torchvision's second transforms, webdataset's pipeline and
pytorch-metric-learning, each set up as its own documentation advises, on the same images, encoder,
batch and cores, in turn in one run; then the peak memory of a training at batch 4,096. About 12
minutes on 2 cores. Parts that are not run keep their rows. ``benchmarks/report.py`` makes the page.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import tyro
from harness import write_rows
from peer_parts import contenders, page, parts
from report_parts.rows import read_rows
from report_parts.section import markdown

OUT = Path(__file__).with_name("results") / "peers.jsonl"
PARTS = ("views", "model", "loss", "optimizer", "step", "memory")


def measure(
    settings: parts.Settings, sides: tuple[int, ...], chosen: tuple[str, ...], folder: Path
) -> Iterator[list[dict[str, Any]]]:
    """Yield the rows of each part at each size, as they are measured.

    Args:
        settings: How much.
        sides: Keys of ``WORKS``: sides of a view in pixels.
        chosen: Of :data:`PARTS`.
        folder: Empty folder for images and runs.
    """
    run = {
        "views": parts.views, "model": parts.model, "loss": parts.loss,
        "optimizer": parts.optimizer,
        "step": lambda work, settings: parts.step(work, settings, folder),
    }  # fmt: skip
    for side in sides:
        work = contenders.make_work(side, folder / str(side))
        for part in [part for part in run if part in chosen]:
            print(f"{side} px, {part} ...", flush=True)
            before = time.perf_counter()
            yield run[part](work, settings)
            print(f"{side} px, {part}: {time.perf_counter() - before:.0f} s", flush=True)
    if "memory" in chosen:
        print("memory ...", flush=True)
        yield parts.peak_memory(folder / "memory")


def key_of(row: dict[str, Any]) -> tuple[str, str]:
    """Return what a row was measured of, whoever was measured: one run replaces it whole."""
    return row["name"], json.dumps(row["sizes"], sort_keys=True)


def merge(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return old and new rows; comparisons that were measured anew replace the old ones."""
    measured = {key_of(row) for row in new}
    return [row for row in old if key_of(row) not in measured] + new


def main(
    settings: tyro.conf.OmitArgPrefixes[parts.Settings],
    sides: tuple[int, ...] = tuple(contenders.WORKS),
    parts_: Annotated[tuple[str, ...], tyro.conf.arg(name="parts")] = PARTS,
    out: Path = OUT,
) -> None:
    """Measure, print the tables, write the rows. Exits with 1 where a target is missed.

    Args:
        settings: How much is measured.
        sides: Sides of a view in pixels.
        parts_: Parts to measure.
        out: Rows, JSON lines; comparisons that are not run keep theirs.
    """
    if unknown := {*parts_} - {*PARTS} or {*sides} - {*contenders.WORKS}:
        raise SystemExit(
            f"error: {unknown} is unknown: parts are {', '.join(PARTS)}, sides "
            f"{', '.join(map(str, contenders.WORKS))}."
        )
    rows = read_rows(out)
    with tempfile.TemporaryDirectory() as folder:
        for found in measure(settings, sides, parts_, Path(folder)):
            rows = merge(rows, found)
            write_rows(out, rows)
    section = page.section(rows)
    print("\n" + markdown(section))
    raise SystemExit(1 if page.missed(rows) else 0)


if __name__ == "__main__":
    tyro.cli(main)
