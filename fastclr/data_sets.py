"""The data of a run: what its settings name is opened, decoded, labelled, described, drawn from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from typing import Any, TypeAlias

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress

from fastclr.batch import Batch
from fastclr.config import Config, ConfigError, DataConfig
from fastclr.evaluation.finetune import Batches, LabelledImages
from fastclr.world import World
from pipelines import ShardSet, SimCLRPolicy, make_loader
from pipelines.backends import resolve_backend
from pipelines.image_set import ImageSet
from pipelines.labelled_views import centres, crops_and_flips
from pipelines.loader import Loader, default_threads
from pipelines.memory import InMemory
from pipelines.mixture import Mixture, open_sets
from pipelines.order import Int64

DataSet: TypeAlias = ShardSet | Mixture


def open_data(text: str, data: DataConfig) -> DataSet:
    """Open a folder, a URL, others' tars, or a mixture; remote shards are cached as ``data`` says.

    Raises:
        ConfigError: If it can be no data set, or the cache cannot be used.
        ShardError: If it is missing or damaged.
        StorageError: If its storage does not answer, an OSError.
    """
    if "***" in text:
        raise ConfigError(
            f"the data is kept as {text} only, without the secrets of its URL: name it again, with "
            "--train or --test."
        )
    return open_sets(
        text, cache_dir=data.cache_dir or None, cache_bytes=int(data.cache_gib * 2**30)
    )


def labelled_sets(texts: Iterable[str], data: DataConfig) -> list[DataSet]:
    """Open data sets that have the same classes, and a label for every image.

    Raises:
        ConfigError: If they have not; see :func:`open_data` as well.
    """
    sets = [open_data(text, data) for text in texts]
    for data_set in sets:
        if data_set.label_N.min() < 0:
            raise ConfigError(f"{data_set.path} has images without a label: probes need labels.")
        if data_set.class_names != sets[0].class_names:
            raise ConfigError(
                f"{sets[0].path} has the classes {sets[0].class_names}, {data_set.path} "
                f"{data_set.class_names}: a probe of one says nothing of the other."
            )
    return sets


def labelled_images(
    name: str, image_set: ImageSet, size: int, seed: int, num_threads: int
) -> LabelledImages:
    """Describe labelled images to what trains on them.

    Args:
        name: What messages call them.
        image_set: Images.
        size: Side of the views in pixels.
        seed: Seed of crops and flips.
        num_threads: Threads that decode and crop.
    """

    def views(epoch: int, batches: Sequence[Int64]) -> Batches:
        return crops_and_flips(image_set, size, epoch, batches, seed=seed, num_threads=num_threads)

    return LabelledImages(
        name=name,
        label_X=image_set.labels(np.arange(len(image_set))),
        views=views,
        plain=lambda ids: centres(image_set, size, ids, num_threads=num_threads),
    )


def facts_of(data_set: DataSet) -> dict[str, Any]:
    """Say which data it was; its path is without secrets."""
    return {
        "path": str(data_set.path),
        "num_samples": len(data_set),
        "num_classes": data_set.num_classes,
        "digest": data_set.digest,
    }


def settle_backend(config: Config, device: torch.device) -> Config:
    """Put the back-end that ``auto`` means here into the configuration: it is what the run is."""
    data = config.data
    backend = resolve_backend(data.backend, device, data.in_memory, policies_of(config))
    return replace(config, data=replace(data, backend=backend))


def policies_of(config: Config) -> list[SimCLRPolicy]:
    """Return the augmentation of each of the two views."""
    views = (config.views, config.views_second or config.views)
    return [SimCLRPolicy(**asdict(view)) for view in views]


def training_loader(
    config: Config, data_set: DataSet, micro_batch_size: int, world: World, device: torch.device
) -> Loader:
    """Make the loader of a run, all images decoded before it where that is asked for."""
    return make_loader(
        _decoded(config, data_set, world) if config.data.in_memory else data_set,
        policies_of(config),
        micro_batch_size=micro_batch_size,
        seed=config.seed,
        backend=config.data.backend,
        world=world,
        device=device,
        num_threads=config.data.num_threads,
        prefetch=config.data.prefetch,
        on_damage=config.data.on_damage,
        most_damaged=config.data.most_damaged,
    )


def _decoded(config: Config, data_set: DataSet, world: World) -> InMemory:
    """Decode all images before the run."""
    threads = config.data.num_threads or default_threads(world)
    # Told at the first batch after it is found.
    data_set.compare(range(data_set.num_shards), config.data.on_damage == "replace")
    with Progress(console=Console(stderr=True), disable=not world.is_main) as progress:
        task = progress.add_task("decoding all images", total=len(data_set))
        return InMemory(
            data_set,
            num_threads=threads,
            num_local_ranks=world.num_local_ranks,
            on_damage=config.data.on_damage,
            most_damaged=config.data.most_damaged,
            progress=lambda count: progress.advance(task, count),
        )


def first_batch(
    config: Config, data_set: ImageSet, backend: str, num_images: int, world: World
) -> Batch:
    """Return this rank's part of the first images of epoch 0, as training sees them."""
    loader = make_loader(
        data_set,
        policies_of(config),
        micro_batch_size=max(1, min(num_images, len(data_set)) // world.num_ranks),
        seed=config.seed,
        backend=backend,
        world=world,
        on_damage=config.data.on_damage,
        most_damaged=config.data.most_damaged,
    )
    return next(iter(loader))
