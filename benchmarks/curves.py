"""How costs grow: a step with the contrastive batch, reading with the shards, a start with the set.

python benchmarks/curves.py [--only step read start]

Each point is measured in turn with the others of its curve. Rows of a curve that a run leaves out
stay in the results.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from curve_parts import page, reads, starts, steps
from harness import write_rows

from fastclr.files import write_durably
from fastclr.recipes import RECIPES

RESULTS = Path(__file__).with_name("results") / "curves.md"
HEADING = "## Measured\n"  # what stands below is replaced
WIDTH = 0.25  # of the encoder: the loss is not to drown in it


@dataclass
class Settings:
    """How much is measured.

    Attributes:
        batches: Contrastive batches.
        chunk: Images that are in the encoder at once.
        shards: Numbers of shards.
        samples: Sizes of synthetic manifests.
        read: Samples that are read at each number of shards.
        rounds: Turns of each point; of steps fewer, for they are long.
        step_rounds: Turns of each batch.
    """

    batches: tuple[int, ...] = steps.BATCHES
    chunk: int = 256
    shards: tuple[int, ...] = reads.SHARDS
    samples: tuple[int, ...] = starts.SAMPLES
    read: int = 16_384
    rounds: int = 5
    step_rounds: int = 2


Rows = Iterator[dict[str, Any]]


def step(settings: Settings, root: Path) -> Rows:
    """Measure steps; before anything else here takes threads that a fork would miss."""
    config = steps.small(RECIPES["cifar10-cpu"](), WIDTH)
    return steps.measure(
        root, config, settings.batches, settings.chunk, settings.step_rounds, _tell
    )


def read(settings: Settings, root: Path) -> Rows:
    """Measure reading."""
    return reads.measure(root, settings.shards, settings.rounds, settings.read, _tell)


def start(settings: Settings, root: Path) -> Rows:
    """Measure starts."""
    return starts.measure(root, settings.samples, settings.rounds, _tell)


CURVES: dict[str, Callable[[Settings, Path], Rows]] = {"step": step, "read": read, "start": start}
NAMES = {"step": "step", "read": "read", "start": "start-up"}  # of the rows


def main(
    settings: tyro.conf.OmitArgPrefixes[Settings],
    only: tuple[str, ...] = (),
    out: Path = RESULTS,
) -> None:
    """Measure, and write the page.

    Args:
        settings: How much is measured.
        only: Curves to measure; all if none is named.
        out: Page whose tables are replaced; rows and plot go beside it, as .jsonl and .svg.
    """
    if unknown := set(only) - CURVES.keys():
        raise SystemExit(f"no curve is called {', '.join(unknown)}: choose of {', '.join(CURVES)}")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    file = out.with_suffix(".jsonl")
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    old = [json.loads(line) for line in lines]
    rows: list[dict[str, Any]] = []
    for name, curve in CURVES.items():
        if only and name not in only:
            rows += [row for row in old if row["name"] == NAMES[name]]
            continue
        with tempfile.TemporaryDirectory() as root:
            rows += curve(settings, Path(root))
    write_rows(file, rows)
    about = (
        f"Steps: resnet10, width {WIDTH}, 32 px, chunks of {settings.chunk} images, "
        f"{torch.get_num_threads()} threads."
    )
    before = out.read_text(encoding="utf-8").partition(HEADING)[0] if out.exists() else ""
    text = page.text(rows, about)
    write_durably(out, f"{before}{HEADING}\n{text}")
    page.plot(out.with_suffix(".svg"), rows)
    print(text)


def _tell(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    tyro.cli(main)
