"""Who takes part in which comparison, set up as its own documentation advises."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from data_plane_parts import speed
from data_plane_parts.speed import Batches, Case
from torch import nn
from torch.utils.data import default_collate
from torchvision.datasets import ImageFolder

from fastclr.config import Config, EncoderConfig, ViewsConfig
from fastclr.facts import num_cores
from fastclr.recipes import RECIPES
from peer_parts import simclr
from peer_parts.names import (
    BOTH,
    LIGHTLY,
    METRIC_LEARNING,
    OURS,
    SGD,
    TORCH_OPTIMIZER,
    TORCHVISION,
    WEBDATASET,
)
from peer_parts.nt_xent import IMPLEMENTATIONS, Loss


class Work(NamedTuple):
    """The same work for all.

    Attributes:
        config: Encoder, head, views, temperature and batch.
        case: Images, in folders and packed.
        num_workers: Threads of our loader, processes of the others'.
    """

    config: Config
    case: Case
    num_workers: int

    @property
    def batch_size(self) -> int:
        """Images in a batch."""
        assert self.config.global_batch_size
        return self.config.global_batch_size


def small_images() -> Config:
    """Return the recipe for CIFAR-10 on a CPU."""
    return replace(RECIPES["cifar10-cpu"](), global_batch_size=256)


def large_images() -> Config:
    """Return its encoder for ImageNet's images: small beside ResNet-50, as these cores are."""
    encoder, views = EncoderConfig("resnet10", width=0.5), ViewsConfig()
    return replace(small_images(), encoder=encoder, views=views, global_batch_size=32)


# By the side of a view in pixels.
WORKS: dict[int, tuple[Callable[[], Config], Callable[[Path], Case]]] = {
    32: (small_images, speed.png_32),
    224: (large_images, speed.jpeg_224),
}


def make_work(side: int, folder: Path) -> Work:
    """Write the images of a work and return it."""
    config_of, case_of = WORKS[side]
    return Work(config_of(), case_of(folder), num_cores())


def webdataset_loader(folder: str | Path, transform: Any, batch_size: int, num_workers: int) -> Any:
    """Return webdataset's pipeline over our shards: resampled, shuffled, batched in the workers."""
    import webdataset as wds

    tars = [str(tar) for tar in sorted(Path(folder).glob("*.tar"))]
    data = (
        wds.WebDataset(tars, resampled=True, shardshuffle=False)
        .shuffle(1000)
        .decode("pil")
        .to_tuple("jpg;jpeg;png;webp", "cls")
        .map_tuple(transform, _same)
        .batched(batch_size, collation_fn=default_collate)
    )
    return wds.WebLoader(data, batch_size=None, num_workers=num_workers)


def _same(label: Any) -> Any:
    return label


def views(work: Work) -> dict[str, Batches]:
    """Return what reads, decodes and makes two views, as streams of batch sizes.

    The others' batches are a quarter of ours, so that one is not waited for too long; their speed
    does not depend on it.
    """
    case, workers = work.case, work.num_workers
    lightly = simclr.lightly_transform(work.config.views)

    def webdataset() -> Iterator[int]:
        loader = webdataset_loader(case.shards.path, lightly, case.batch // 4, workers)
        for both, _ in loader:
            yield len(both[0])

    return {
        OURS: speed.ours(case, workers, "threads"),
        LIGHTLY: speed.data_loader(case, workers, lightly),
        TORCHVISION: speed.data_loader(case, workers, speed.torchvision_transform(case.policy)),
        WEBDATASET: webdataset,
    }


LOSSES = {OURS: "blocked", LIGHTLY: "lightly", METRIC_LEARNING: "metric-learning"}
OPTIMIZERS = {
    OURS: "fastclr",
    LIGHTLY: "lightly",
    TORCH_OPTIMIZER: "torch-optimizer",
    SGD: "SGD, foreach",
}


class Stack(NamedTuple):
    """A whole step of other libraries, on Lightning.

    Attributes:
        loader: Gives the views.
        loss: Key of ``IMPLEMENTATIONS``.
        optimizer_of: Makes the optimizer.
    """

    loader: Callable[[Work], Iterable[Any]]
    loss: str
    optimizer_of: Callable[[nn.Module], torch.optim.Optimizer]

    def seconds(self, work: Work, *, warm_up: int, steps: int, limit_seconds: float) -> float:
        """Return the mean seconds of a step; see :func:`simclr.seconds_per_step`."""
        loss: Loss = IMPLEMENTATIONS[self.loss].build(work.config.loss.temperature)
        workers = max(1, work.num_workers)
        return simclr.seconds_per_step(
            work.config, self.loader(work), loss, self.optimizer_of, warm_up=warm_up, steps=steps,
            at_once=workers, limit_seconds=limit_seconds,
        )  # fmt: skip


def _lightly_views(work: Work) -> Iterable[Any]:
    return simclr.lightly_loader(
        work.case.folder, work.config.views, work.batch_size, work.num_workers
    )


def _webdataset_views(work: Work) -> Iterable[Any]:
    transform = simclr.lightly_transform(work.config.views)
    return webdataset_loader(work.case.shards.path, transform, work.batch_size, work.num_workers)


def _torchvision_views(work: Work) -> Iterable[Any]:
    transform = speed.torchvision_transform(work.case.policy)
    images = ImageFolder(work.case.folder, transform)
    return simclr.endless(images, work.batch_size, work.num_workers)


def _sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.06, momentum=0.9)


STACKS = {
    LIGHTLY: Stack(_lightly_views, "lightly", simclr.lightly_lars),
    WEBDATASET: Stack(_webdataset_views, "lightly", simclr.lightly_lars),
    BOTH: Stack(_torchvision_views, "metric-learning", _sgd),
}

_TWO_WORKERS = "a worker process a core"
# What each one is, for the tables: part and contender.
CONFIGURATIONS = {
    ("views", OURS): "shards, back-end `threads`, a thread a core",
    ("views", LIGHTLY): f"SimCLRTransform on Pillow's images, DataLoader, {_TWO_WORKERS}",
    ("views", TORCHVISION): f"v2 on 8-bit tensors, DataLoader, {_TWO_WORKERS}",
    ("views", WEBDATASET): (
        f"our shards resampled, shuffle(1000), decode(pil), lightly's SimCLRTransform, batched in "
        f"the worker, WebLoader, {_TWO_WORKERS}"
    ),
    ("model", OURS): "both views in one batch of bytes, channels last",
    ("model", LIGHTLY): "a view after the other, floats, as its example has it",
    ("loss", OURS): "NTXent, `blocked`: no similarity matrix",
    ("loss", LIGHTLY): "NTXentLoss",
    ("loss", METRIC_LEARNING): "NTXentLoss, image numbers as labels",
    ("optimizer", OURS): "LARS, numba",
    ("optimizer", LIGHTLY): "LARS, norms and biases apart",
    ("optimizer", TORCH_OPTIMIZER): "LARS, norms and biases apart",
    ("optimizer", SGD): "no norms: less than LARS has to do",
    ("step", OURS): "shards, loader, Trainer on DeepSpeed, LARS; empty JSON",
    ("step", LIGHTLY): (
        f"LightlyDataset, SimCLRTransform, NTXentLoss, its LARS, Lightning; {_TWO_WORKERS}"
    ),
    ("step", WEBDATASET): "its loader as above; loss, LARS and loop as lightly's",
    ("step", BOTH): (
        f"its NTXentLoss; torchvision v2 in a DataLoader, {_TWO_WORKERS}; torch's SGD; Lightning"
    ),
    ("memory", OURS): "gradient caching: 16 micro-batches of 256 by the DeepSpeed JSON",
    ("memory", LIGHTLY): "the whole batch at once, which its loss needs; main process alone",
}
