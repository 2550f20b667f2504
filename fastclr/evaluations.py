"""What the evaluation commands compose of shard sets, models and protocols."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from fastclr import collectives, rendezvous
from fastclr.data_sets import DataSet
from fastclr.evaluation.features import Features
from fastclr.evaluation.forgetting import VIEWS, Forgotten, forgetting_scores
from fastclr.evaluation.layers import Layers, LayerScore, layer_scores
from fastclr.evaluation.store import Images, Progress, cached_features
from fastclr.simclr import SimCLR
from fastclr.world import World
from pipelines.distortions import DISTORTIONS, NOISE_STD
from pipelines.evaluation_views import evaluation_range
from pipelines.labelled_views import crops_and_flips
from pipelines.loader import default_threads

Say = Callable[[str], None]

FORGETTING_IMAGES = 10_000  # of each set, each in seven views

_CPU = torch.device("cpu")
_TIMEOUT = timedelta(hours=12)  # the rank that waits longest has the fewest images


@contextmanager
def joined() -> Iterator[World]:
    """Join the ranks that a launcher started, for as long as features are taken together.

    Raises:
        ConfigError: If the environment describes no world.
    """
    world = World.detect()
    starts = world.num_ranks > 1 and not dist.is_initialized()
    if starts:
        rendezvous.init_process_group("gloo", _TIMEOUT)
    try:
        yield world
    finally:
        if starts:
            dist.destroy_process_group()


@contextmanager
def sharing_cores() -> Iterator[None]:
    """Give each rank of this node its part of the cores; none is given more than it had."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, before // World.detect().num_local_ranks))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def images_of(
    shard_set: DataSet, size: int, *, view: str = "original", most: int | None = None
) -> Images:
    """Describe how a shard set is evaluated to the store of features.

    Args:
        shard_set: Images.
        size: Side of the square images in pixels.
        view: Key of :data:`pipelines.distortions.DISTORTIONS`, applied to the evaluation view.
        most: Only the first so many images, which are a sample of all where packing shuffled.
    """
    num_threads = default_threads(World.detect())

    def read(start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        images_NCHW, label_N = evaluation_range(shard_set, size, start, stop, num_threads)
        return DISTORTIONS[view](images_NCHW, np.arange(start, stop)), label_N

    noise = f" {NOISE_STD}" if view == "noise" else ""
    return Images(
        digest=shard_set.digest,
        view=f"centre {size}, {view}{noise}",
        num_images=min(len(shard_set), most or len(shard_set)),
        read=read,
        place=shard_set.place,
    )


def crops_of(shard_set: DataSet, size: int, epoch: int, seed: int) -> Images:
    """Describe a shard set in random crops and flips to the store of features.

    Args:
        shard_set: Images.
        size: Side of the views in pixels.
        epoch: Epoch from 0; each has crops of its own.
        seed: Seed of the crops.
    """
    num_threads = default_threads(World.detect())

    def read(start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        rows = [np.arange(start, stop)]
        crops = crops_and_flips(shard_set, size, epoch, rows, seed=seed, num_threads=num_threads)
        return next(iter(crops))

    return Images(
        digest=shard_set.digest,
        view=f"crops and flips {size}, epoch {epoch}, seed {seed}",
        num_images=len(shard_set),
        read=read,
        place=shard_set.place,
    )


def features_of(
    model: SimCLR,
    shard_set: DataSet,
    size: int,
    cache: Path,
    *,
    layers: Sequence[str] | None = None,
    view: str = "original",
    most: int | None = None,
    device: torch.device = _CPU,
    progress: Progress = lambda _: None,
) -> dict[str, Features]:
    """Return the features of a shard set at layers of a model; every rank calls this.

    See :func:`~fastclr.evaluation.store.cached_features`, also for what it raises.

    Args:
        model: Encoder and head, on ``device``.
        shard_set: Images.
        size: Side of the square images in pixels.
        cache: Folder where features are kept.
        layers: Names as in :class:`~fastclr.evaluation.layers.Layers`, such as ``("h",)``; None for
            all.
        view: Key of :data:`pipelines.distortions.DISTORTIONS`.
        most: Only the first so many images.
        device: Where the model is.
        progress: Told numbers of images that are done.
    """
    images = images_of(shard_set, size, view=view, most=most)
    seen = Layers(model.encoder, model.projection_head, layers)
    return cached_features(cache, seen, images, device, progress=progress)


def layers_table(
    model: SimCLR,
    train: DataSet,
    test: DataSet,
    size: int,
    cache: Path,
    *,
    most: int | None = None,
    device: torch.device = _CPU,
    say: Say = lambda _: None,
    progress: Progress = lambda _: None,
) -> list[LayerScore]:
    """Score every stage of the encoder, h, and the head with its modules discarded from the top.

    Every rank calls this; the scores are rank 0's, the other ranks return an empty list.

    Args:
        model: Encoder and head, on ``device``.
        train: Labelled images the probes are fitted on.
        test: Labelled images of the same classes they are scored on.
        size: Side of the square images in pixels.
        cache: Folder where features are kept.
        most: Only the first so many images of each set.
        device: Where the model is.
        say: Told what is being done.
        progress: Told numbers of images that are done.

    Raises:
        ConfigError: If labels are missing or too few.
        FloatingPointError: If a feature is not finite; it names the first such image.
        ShardError: If data is damaged.
    """
    features = []
    for shard_set in (train, test):
        say(f"features of all layers of {shard_set.path}")
        found = features_of(
            model, shard_set, size, cache, most=most, device=device, progress=progress
        )
        features.append(found)
    if collectives.rank() > 0:
        return []
    num_discarded = Layers(model.encoder, model.projection_head).num_discarded
    return layer_scores(*features, num_discarded=num_discarded, say=say)


def forgetting_table(
    model: SimCLR,
    train: DataSet,
    test: DataSet,
    size: int,
    cache: Path,
    *,
    layers: Sequence[str] | None = None,
    most: int | None = FORGETTING_IMAGES,
    device: torch.device = _CPU,
    say: Say = lambda _: None,
    progress: Progress = lambda _: None,
) -> list[Forgotten]:
    """Tell how images were changed, from h and from what the head makes of it.

    Every rank calls this; the scores are rank 0's, the other ranks return an empty list.

    Args:
        model: Encoder and head, on ``device``.
        train: Images the probes are trained on; their labels do not matter.
        test: Other images they are scored on.
        size: Side of the square images in pixels.
        cache: Folder where features are kept.
        layers: Layers that are compared; None for h and z.
        most: Only the first so many images of each set, each in seven views.
        device: Where the model is.
        say: Told what is being done.
        progress: Told numbers of images that are done.

    Raises:
        ConfigError: If a layer is unknown.
        FloatingPointError: If a feature is not finite; it names the first such image.
        ShardError: If data is damaged.
    """
    of_head = [n for n in Layers(model.encoder, model.projection_head).names if "encoder." not in n]
    layers = layers or [*dict.fromkeys((of_head[0], of_head[-1]))]
    sets = []
    for shard_set in (train, test):
        views = {}
        for view in VIEWS:
            say(f"features of {shard_set.path}, {view}")
            views[view] = features_of(
                model,
                shard_set,
                size,
                cache,
                layers=layers,
                view=view,
                most=most,
                device=device,
                progress=progress,
            )
        sets.append(views)
    return [] if collectives.rank() > 0 else forgetting_scores(*sets, device=device, say=say)
