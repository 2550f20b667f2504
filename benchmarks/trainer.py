"""What the trainer costs beside its mathematics, and how it does against lightly on Lightning.

python benchmarks/trainer.py [--blocks 12] [--steps 30] [--rounds 2]

First the trainer, on DeepSpeed, against a bare loop of forward, loss, backward and optimizer on an
equal model and the same batches, step by step in turn in one process; blocks of ten such steps are
compared. Then images per second from files to weights: our shards, loader and trainer, and
lightly's transform, loss and Lightning loop with torch's DataLoader, on the same images, encoder,
batch and cores, in turn.
"""

from __future__ import annotations

import logging
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import tyro
import verdicts
from harness import facts, measurement, write_rows
from peer_parts import ours, simclr

from fastclr import losses
from fastclr.batch import Batch
from fastclr.config import Config
from fastclr.facts import now
from fastclr.files import write_durably
from fastclr.optim import LARS
from fastclr.recipes import RECIPES
from fastclr.simclr import SimCLR
from pipelines import SimCLRPolicy
from pipelines.photos import write_photo_tiles
from pipelines.writer import write_shards

BLOCK = 10  # steps; the trainer logs once in each
RESULTS = Path(__file__).with_name("results") / "trainer.md"
HEADING = "## Measured\n"  # what stands below is replaced
TARGETS = {"overhead": 0.03, "lightly": 1.3}


class BareLoop:
    """Forward, loss, backward, optimizer: nothing else."""

    def __init__(self, config: Config) -> None:
        self.model = SimCLR.from_config(config).to(memory_format=torch.channels_last)
        self.loss = losses.from_config(config.loss)
        self.optimizer = LARS.for_module(self.model, learning_rate=0.1)

    def step(self, batch: Batch) -> float:
        """Take a step; return the seconds."""
        before = time.perf_counter()
        loss = self.loss(*self.model(batch.views_VBCHW).z_ND.chunk(2))
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - before


class Alternating:
    """A loader whose batch is there already, and that takes the bare loop's step before each."""

    def __init__(self, config: Config, blocks: int) -> None:
        batch_size, size = config.global_batch_size or 0, config.views.size
        generator = torch.Generator().manual_seed(0)
        views = torch.randint(0, 256, (2, batch_size, size, size, 3), generator=generator)
        views_VBCHW = views.to(torch.uint8).permute(0, 1, 4, 2, 3)
        ids = torch.arange(batch_size)
        self._batch = Batch(views_VBCHW, ids, ids)
        self._bare = BareLoop(config)
        self.micro_batch_size, self.num_views = batch_size, 2
        self.num_damaged, self.wait_seconds = 0, 0.0
        self.batches_per_epoch = (blocks + 1) * BLOCK
        self.seconds: list[tuple[float, float]] = []

    def __iter__(self) -> Iterator[Batch]:
        while True:
            ours = bare = 0.0
            for _ in range(BLOCK):
                bare += self._bare.step(self._batch)
                before = time.perf_counter()
                yield self._batch
                ours += time.perf_counter() - before
            self.seconds.append((ours, bare))

    def state_dict(self) -> dict[str, Any]:
        """Nothing to remember."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to go on from."""


def overhead(config: Config, blocks: int, folder: Path) -> list[tuple[float, float]]:
    """Return seconds of trainer and bare loop, a pair for each block; the first is a warm-up."""
    source = Alternating(config, blocks)
    # A step more, so that the last one's end is seen; an epoch is exactly the blocks.
    epochs = (source.batches_per_epoch + 1) / source.batches_per_epoch
    ours.trainer_of(config, folder / "overhead").fit(source, epochs=epochs)
    return source.seconds[1:]


def end_to_end(config: Config, rounds: int, steps: int, folder: Path) -> list[dict[str, Any]]:
    """Return a row for each of ours and lightly's, with the speeds of every round."""
    batch_size = config.global_batch_size or 0
    how = {"warm_up": 2 * max(1, steps // 6), "steps": steps}
    write_photo_tiles(folder / "images", train_per_photo=-(-batch_size // 4), test_per_photo=1)
    images = write_shards(folder / "images" / "train", folder / "shards")
    policy = SimCLRPolicy(**asdict(config.views))
    speeds: dict[str, list[float]] = {"fastclr": []}
    for round_ in range(rounds):
        seconds = ours.seconds_per_step(images, policy, config, folder / f"run{round_}", **how)
        speeds["fastclr"].append(batch_size / seconds)
        for workers in (1, 2):
            seconds = simclr.lightly_seconds_per_step(
                folder / "images" / "train", config, workers, **how
            )
            name = f"lightly on Lightning, {workers} workers"
            speeds.setdefault(name, []).append(batch_size / seconds)
    return [{"what": name, "images_per_second": values} for name, values in speeds.items()]


def measurements(
    blocks: list[tuple[float, float]], rows: list[dict[str, Any]], config: Config
) -> list[dict[str, Any]]:
    """Return the results as rows, with the seconds of every block or round."""
    batch_size = config.global_batch_size or 0
    sizes = {"batch": batch_size, "side": config.views.size, "encoder": config.encoder.name}
    of_blocks = {"trainer": [ours for ours, _ in blocks], "bare loop": [bare for _, bare in blocks]}
    found = [
        {**measurement("ten steps", variant, seconds, sizes=sizes, images=BLOCK * batch_size,
                       warm_ups=1), "seconds": seconds}
        for variant, seconds in of_blocks.items()
    ]  # fmt: skip
    for row in rows:
        seconds = [batch_size / speed for speed in row["images_per_second"]]
        one = measurement("files to weights", row["what"], seconds, sizes=sizes, images=batch_size)
        found.append({**one, "seconds": seconds})
    return found


def page(blocks: list[tuple[float, float]], rows: list[dict[str, Any]], config: Config) -> str:
    """Return the results as Markdown."""
    about = facts()
    ratios = [ours / bare for ours, bare in blocks]
    cost = statistics.median(ratios) - 1
    best = max(statistics.median(row["images_per_second"]) for row in rows[1:])
    factor = statistics.median(rows[0]["images_per_second"]) / best
    lines = [
        f"{now()[:10]}, `python benchmarks/trainer.py`, {about['hardware']['processor']}, "
        f"{about['threads']} threads, torch {about['versions']['torch']}, fp32: "
        f"{config.encoder.name}, width {config.encoder.width}, {config.views.size} px, batch "
        f"{config.global_batch_size}.",
        "",
        *verdicts.head(),
        verdicts.row(
            f"trainer over bare loop, median of {len(blocks)} blocks of {BLOCK} steps",
            f"<= {TARGETS['overhead']:.0%}",
            f"{cost:.1%}",
            cost <= TARGETS["overhead"],
        ),
        verdicts.row(
            "images/s over the best of lightly's",
            f">= {TARGETS['lightly']}",
            f"{factor:.2f}",
            factor >= TARGETS["lightly"],
        ),
        "",
        f"Step: trainer {1e3 * statistics.median(o for o, _ in blocks) / BLOCK:.1f} ms, bare loop "
        f"{1e3 * statistics.median(b for _, b in blocks) / BLOCK:.1f} ms; block by block "
        f"{', '.join(f'{ratio - 1:+.1%}' for ratio in ratios)}.",
        "",
        "| images/s, from files to weights | median | lowest | highest |",
        "|---|--:|--:|--:|",
    ]
    for row in rows:
        low, middle, high = (f(row["images_per_second"]) for f in (min, statistics.median, max))
        lines.append(f"| {row['what']} | {middle:.0f} | {low:.0f} | {high:.0f} |")
    return "\n".join(lines) + "\n"


def main(
    blocks: int = 12,
    steps: int = 30,
    rounds: int = 2,
    batch: int = 256,
    out: Path = RESULTS,
) -> None:
    """Measure, and write the page.

    Args:
        blocks: Blocks of ten steps, of trainer and bare loop each.
        steps: Steps of each end-to-end measurement.
        rounds: End-to-end measurements of each.
        batch: Images in a batch.
        out: Page whose tables are replaced; the rows go beside it, as .jsonl.
    """
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    config = replace(RECIPES["cifar10-cpu"](), global_batch_size=batch)
    with tempfile.TemporaryDirectory() as name:
        pairs = overhead(config, blocks, Path(name))
        rows = end_to_end(config, rounds, steps, Path(name))
    text = page(pairs, rows, config)
    before = out.read_text(encoding="utf-8").partition(HEADING)[0] if out.exists() else ""
    write_durably(out, f"{before}{HEADING}\n{text}")
    write_rows(out.with_suffix(".jsonl"), measurements(pairs, rows, config))
    print(text)


if __name__ == "__main__":
    tyro.cli(main)
