"""Packing for tests: four images a shard unless told otherwise; the files that come of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipelines.plan import Settings
from pipelines.writer import Packing

ROOT = Path(__file__).parents[2]


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def packing(source: Path, out: Path, run: bool = True, **options: Any) -> Packing:
    kinds = {k: options.pop(k) for k in ("max_rejected", "executor", "workers") if k in options}
    options = {"samples_per_shard": 4, **options}
    made = Packing(Settings(str(source), out.name, **options), out, **kinds)
    if run:
        made.run()
    return made
