"""Batches of views from a shard set: pure order, threads ahead of the step, exact position."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from PIL import Image

from fastclr.batch import Batch
from fastclr.config import ConfigError
from fastclr.world import World
from pipelines.decode import Pixels
from pipelines.order import Int64, order
from pipelines.policy import SimCLRPolicy, ViewParams
from pipelines.shards import ShardSet

NUM_VIEWS = 2

Augment = Callable[[list[Pixels], ViewParams, SimCLRPolicy, torch.device], torch.Tensor]


def _kornia() -> Augment:
    from pipelines.augment_kornia import augment

    return augment


def _reference() -> Augment:
    from pipelines.augment_reference import augment

    return augment


# Loaded on choice: a back-end's packages need not be installed to use another.
BACKENDS: dict[str, Callable[[], Augment]] = {"kornia": _kornia, "reference": _reference}


class Loader:
    """An endless iterator of :class:`~fastclr.batch.Batch` that knows its exact position.

    Args:
        shard_set: Images.
        policy: Augmentation.
        backend: Key of :data:`BACKENDS`.
        micro_batch_size: Images B of this rank in a batch.
        seed: Seed of order and views.
        world: Which rank of how many.
        device: Where the views lie.
        num_threads: Threads that prepare batches.
        prefetch: Batches prepared ahead.

    Attributes:
        batches_per_epoch: Global batches in an epoch; the incomplete last one is dropped.
        dropped_per_epoch: Samples in that incomplete one.
        wait_seconds: Time spent waiting for batches so far.
    """

    def __init__(
        self,
        shard_set: ShardSet,
        policy: SimCLRPolicy,
        *,
        backend: str,
        micro_batch_size: int,
        seed: int,
        world: World,
        device: torch.device,
        num_threads: int,
        prefetch: int,
    ) -> None:
        if micro_batch_size < 1:
            raise ConfigError(f"micro_batch_size is {micro_batch_size}: give 1 or more.")
        if backend not in BACKENDS:
            raise ConfigError(f"backend {backend!r} is unknown: choose from {', '.join(BACKENDS)}.")
        self.shard_set, self.policy, self.seed = shard_set, policy, seed
        self.micro_batch_size, self.world, self.device = micro_batch_size, world, device
        self._augment, self._num_threads, self._prefetch = (
            BACKENDS[backend](),
            num_threads,
            prefetch,
        )
        self._epoch, self._position = 0, 0
        self.wait_seconds = 0.0
        self.batches_per_epoch = len(self._order(epoch=0, start=0)[0])
        used = self.batches_per_epoch * micro_batch_size * world.num_ranks
        self.dropped_per_epoch = len(shard_set) - used

    @property
    def digest(self) -> str:
        """sha256 of the data set's manifest."""
        return self.shard_set.digest

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the last batch handed out; the same on every rank."""
        return {
            "epoch": self._epoch,
            "position": self._position,
            "seed": self.seed,
            "digest": self.digest,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after a position, also on another number of ranks.

        Raises:
            ConfigError: If it belongs to another data set or seed.
        """
        for key, mine in {"seed": self.seed, "digest": self.digest}.items():
            if state[key] != mine:
                raise ConfigError(
                    f"the checkpoint's data {key} is {state[key]}, this run's {mine}: its "
                    "position means nothing here. Use the same data and seed, or a new --run-dir."
                )
        self._epoch, self._position = state["epoch"], state["position"]

    def __iter__(self) -> Iterator[Batch]:
        """Yield batches from the current position on, epoch after epoch, without end."""
        pool = ThreadPoolExecutor(self._num_threads, thread_name_prefix="fastclr-loader")
        pending: deque[tuple[int, int, Future[Batch]]] = deque()
        work = self._work()
        try:
            while True:
                while len(pending) <= self._prefetch:
                    epoch, position, sample_ids, positions = next(work)
                    task = pool.submit(self._make, epoch, sample_ids, positions)
                    pending.append((epoch, position, task))
                epoch, position, task = pending.popleft()
                started = time.perf_counter()
                batch = task.result()
                self.wait_seconds += time.perf_counter() - started
                self._epoch, self._position = epoch, position
                yield batch
        finally:
            # Without waiting: a thread may hang in a read, and the run is to stop.
            pool.shutdown(wait=False, cancel_futures=True)

    def _work(self) -> Iterator[tuple[int, int, Int64, Int64]]:
        """Yield (epoch, position after the batch, sample ids, positions) for ever."""
        epoch, start = self._epoch, self._position
        global_batch_size = self.micro_batch_size * self.world.num_ranks
        while True:
            for sample_ids, positions in zip(*self._order(epoch, start), strict=True):
                start += global_batch_size
                yield epoch, start, sample_ids, positions
            epoch, start = epoch + 1, 0

    def _order(self, epoch: int, start: int) -> tuple[Int64, Int64]:
        """This rank's part of an epoch."""
        return order(
            len(self.shard_set),
            self.micro_batch_size,
            seed=self.seed,
            epoch=epoch,
            world=self.world,
            start=start,
        )

    def _make(self, epoch: int, sample_ids: Int64, positions: Int64) -> Batch:
        """Read, decode and augment one batch."""
        images = [self.shard_set[int(i)] for i in sample_ids]
        sizes_N2 = self.shard_set.size_N2[sample_ids]
        views = []
        for view in range(NUM_VIEWS):
            params = self.policy.draw(
                seed=self.seed, epoch=epoch, positions=positions, view=view, sizes_N2=sizes_N2
            )
            views.append(self._augment(images, params, self.policy, self.device))
        return Batch(
            views_VBCHW=torch.stack(views).permute(0, 1, 4, 2, 3),
            label_B=torch.from_numpy(self.shard_set.label_N[sample_ids]),
            sample_id_B=torch.from_numpy(sample_ids),
        ).check()


def make_loader(
    shard_set: ShardSet,
    policy: SimCLRPolicy,
    *,
    micro_batch_size: int,
    seed: int = 0,
    backend: str = "kornia",
    world: World | None = None,
    device: torch.device | str = "cpu",
    num_threads: int = 1,
    prefetch: int = 4,
) -> Loader:
    """Make a :class:`Loader`; see there. ``world`` defaults to what the launcher says."""
    return Loader(
        shard_set,
        policy,
        backend=backend,
        micro_batch_size=micro_batch_size,
        seed=seed,
        world=world or World.detect(),
        device=torch.device(device),
        num_threads=num_threads,
        prefetch=prefetch,
    )


def evaluation_batches(
    shard_set: ShardSet,
    size: int,
    batch_size: int = 256,
    world: World = World(),  # noqa: B008
    limit: int | None = None,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield every image of this rank's part once, in order, without augmentation.

    The authors' evaluation view: above 64 px the shorter side becomes size / 0.875, bicubic, then
    the centre is cropped; smaller images are resized but not cropped further.

    Args:
        shard_set: Images.
        size: Side of the square images in pixels.
        batch_size: Images in a batch; the last may hold fewer.
        world: Whose part: the ranks' parts, one after the other, are the images in order. They
            differ by one image at most, and may be empty.
        limit: Only the first so many images, which are a sample of all where packing shuffled.

    Yields:
        uint8 images (n, 3, size, size), channels-last in memory, and int64 labels (n,).
    """
    num_images = len(shard_set) if limit is None else min(limit, len(shard_set))
    start, stop = (num_images * (world.rank + k) // world.num_ranks for k in (0, 1))
    for first in range(start, stop, batch_size):
        sample_ids = range(first, min(first + batch_size, stop))
        images = np.stack([_centre(shard_set[i], size) for i in sample_ids])
        labels = shard_set.label_N[first : sample_ids.stop]
        yield torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(labels)


def _centre(image: Pixels, size: int) -> Pixels:
    """Resize the shorter side and crop the centre."""
    if image.shape[:2] == (size, size) and size <= 64:
        return image
    height, width = image.shape[:2]
    shorter = round(size / 0.875) if size > 64 else size
    scale = shorter / min(height, width)
    resized = Image.fromarray(image).resize(
        (max(size, round(width * scale)), max(size, round(height * scale))),
        Image.Resampling.BICUBIC,
    )
    left, top = (resized.width - size) // 2, (resized.height - size) // 2
    return np.array(resized.crop((left, top, left + size, top + size)))
