"""Our own trainer as the benchmarks run it, from shards to weights."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastclr import Trainer, losses
from fastclr.batch import Batch
from fastclr.config import Config
from fastclr.ds_config import JSON
from fastclr.optim import LARS
from fastclr.simclr import SimCLR
from pipelines import SimCLRPolicy, make_loader
from pipelines.image_set import ImageSet


def trainer_of(config: Config, run_dir: Path, ds_config: JSON | None = None) -> Trainer:
    """Return a trainer that saves at the end alone.

    Args:
        config: Encoder, head and loss.
        run_dir: Folder of the run, new.
        ds_config: DeepSpeed JSON; None for an empty one.
    """
    model = SimCLR.from_config(config)
    return Trainer(
        model,
        loss=losses.from_config(config.loss),
        optimizer=LARS.for_module(model, learning_rate=0.1),
        ds_config=ds_config or {},
        run_dir=run_dir,
        checkpoint_every=10**9,
    )


def seconds_per_step(
    images: ImageSet,
    policy: SimCLRPolicy,
    config: Config,
    run_dir: Path,
    *,
    warm_up: int,
    steps: int,
    ds_config: JSON | None = None,
) -> float:
    """Train from a shard set; return the mean seconds of a step after some steps.

    Args:
        images: Shard set.
        policy: Augmentation.
        config: Encoder, head, loss and batch.
        run_dir: Folder of the run, new.
        warm_up: Steps not measured.
        steps: Steps measured.
        ds_config: DeepSpeed JSON; None for an empty one.
    """
    loader = make_loader(images, policy, micro_batch_size=config.global_batch_size or 0)
    asked: list[float] = []

    class Timed:
        """The loader, and when each batch was asked for: when the step before was done."""

        def __getattr__(self, name: str) -> Any:
            return getattr(loader, name)

        def __iter__(self) -> Iterator[Batch]:
            for batch in loader:
                asked.append(time.perf_counter())
                yield batch

    epochs = (warm_up + steps + 1) / loader.batches_per_epoch
    trainer_of(config, run_dir, ds_config).fit(Timed(), epochs=epochs)
    return (asked[warm_up + steps] - asked[warm_up]) / steps
