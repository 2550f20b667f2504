"""Steps over the contrastive batch: the real trainer, gradients cached chunk by chunk."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from harness import measurement
from torch import multiprocessing

from fastclr import Trainer, losses
from fastclr.batch import Batch
from fastclr.config import Config
from fastclr.optim import LARS
from fastclr.simclr import SimCLR

BATCHES = (256, 512, 1024, 2048, 4096, 8192, 16_384)


class _Views:
    """The same views again and again; notes when each step began, and the memory then."""

    wait_seconds, num_views, num_damaged = 0.0, 2, 0

    def __init__(self, images: int, side: int, steps: int) -> None:
        generator = torch.Generator().manual_seed(0)
        shape = (2, images, side, side, 3)
        views = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        ids = torch.arange(images)
        self._batch = Batch(views.permute(0, 1, 4, 2, 3), ids, ids)
        self.micro_batch_size, self.batches_per_epoch = images, steps
        self.starts: list[float] = []
        self.held: list[int] = []

    def __iter__(self) -> Iterator[Batch]:
        while True:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.held.append(peak_bytes())
            self.starts.append(time.perf_counter())
            yield self._batch

    def state_dict(self) -> dict[str, Any]:
        """Nothing to remember."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to go on from."""


def peak_bytes() -> int:
    """Return the most memory so far: of the GPU, or of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert found
    return int(found[1]) * 1024


def measure(
    root: Path,
    config: Config,
    batches: Sequence[int],
    chunk: int,
    rounds: int,
    tell: Callable[[str], None],
) -> Iterator[dict[str, Any]]:
    """Yield a row for each batch; all take turns, each in a process of its own.

    Args:
        root: For what processes write.
        config: Encoder, head, loss, views.
        batches: Images of the contrastive batch.
        chunk: Images that are in the encoder at once; batches are multiples of it, or smaller.
        rounds: How often each batch has its turn; the first step of a turn is not counted.
        tell: Told of progress.
    """
    found: dict[int, list[dict[str, Any]]] = {images: [] for images in batches}
    for round_ in range(rounds):
        for images in batches:
            folder = root / f"{round_}-{images}"
            folder.mkdir()
            steps = max(1, 8 * chunk // images)
            arguments = (folder, config, images, chunk, steps + 1)
            multiprocessing.start_processes(_be, arguments, 1, start_method="fork")
            row = json.loads((folder / "found.json").read_text(encoding="utf-8"))
            found[images].append(row)
            seconds = sum(row["seconds"]) / len(row["seconds"])
            tell(f"round {round_ + 1} of {rounds}: batch {images:,}: {seconds:.2f} s a step")
    for images, rows in found.items():
        yield {
            **measurement(
                "step", "gradient caching" if images > chunk else "one chunk",
                [s for row in rows for s in row["seconds"]],
                sizes={"batch": images, "chunk": min(chunk, images), "side": config.views.size},
                warm_ups=1, images=images, peak_bytes=max(row["peak_bytes"] for row in rows),
            ),
            "loss_seconds": min(row["loss_seconds"] for row in rows),
            "views_bytes": 2 * images * 3 * config.views.size**2,
        }  # fmt: skip


def _be(_: int, folder: Path, config: Config, images: int, chunk: int, steps: int) -> None:
    """Train in a new process, so that its peak is its own; never returns."""
    log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    chunks = max(1, images // chunk)
    views = _Views(images, config.views.size, steps)
    model = SimCLR.from_config(config)
    trainer = Trainer(
        model,
        loss=losses.from_config(config.loss),
        optimizer=LARS.for_module(model, learning_rate=0.01),
        ds_config={"train_batch_size": images, "gradient_accumulation_steps": chunks},
        run_dir=folder / "run",
        log_every=10**9,
        checkpoint_every=10**9,
    )
    before = peak_bytes()
    trainer.fit(views, epochs=(steps + 1) / steps)  # one more: the last one's end is seen
    found = {
        "seconds": [b - a for a, b in pairwise(views.starts)][1:],
        "peak_bytes": views.held[-1] - before,
        "loss_seconds": _loss_seconds(trainer, config, images),
    }
    (folder / "found.json").write_text(json.dumps(found), encoding="utf-8")
    os._exit(0)  # engines leave hooks that hinder an orderly end


def _loss_seconds(trainer: Trainer, config: Config, images: int) -> float:
    """Time the loss of a batch alone, forward and backward."""
    shape = (2, images, config.head.output_dim)
    z_VBD = torch.randn(shape, device=trainer.device, requires_grad=True)
    before = time.perf_counter()
    trainer.loss(*z_VBD).backward()
    if z_VBD.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - before


def small(config: Config, width: float) -> Config:
    """Return a configuration with a narrower encoder."""
    return replace(config, encoder=replace(config.encoder, width=width))
