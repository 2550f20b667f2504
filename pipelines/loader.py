"""Batches of views from a shard set: pure order, threads ahead of the step, exact position."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from fastclr.batch import Batch
from fastclr.config import ConfigError
from fastclr.world import World
from pipelines.backends import BACKENDS
from pipelines.decode import Pixels
from pipelines.order import Int64, SampleOrder, batches_per_epoch, places
from pipelines.policy import SimCLRPolicy
from pipelines.shards import ShardSet


class ImageSet(Protocol):
    """What the loader needs of a data set; all of it from any thread."""

    digest: str

    def __len__(self) -> int: ...

    def __getitem__(self, sample_id: int) -> Pixels:
        """Return a decoded image, uint8 (H, W, 3)."""
        ...

    def read(self, sample_id: int) -> bytes:
        """Return an encoded image."""
        ...

    def sizes(self, sample_ids: Int64) -> npt.NDArray[np.int32]:
        """Return heights and widths in pixels, int32 (n, 2)."""
        ...

    def labels(self, sample_ids: Int64) -> Int64:
        """Return labels, int64 (n,); -1 where there is none."""
        ...

    def order(self, seed: int) -> SampleOrder:
        """Return which sample stands where in each epoch."""
        ...


class _Work(NamedTuple):
    """One batch of this rank: what it is, and where the position stands after it."""

    epoch: int
    position: int
    sample_ids: Int64
    positions: Int64


class Loader:
    """An endless iterator of :class:`~fastclr.batch.Batch` that knows its exact position.

    Args:
        shard_set: Images.
        policy: Augmentation of both views, or one policy a view.
        backend: Key of :data:`~pipelines.backends.BACKENDS`.
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
        shard_set: ImageSet,
        policy: SimCLRPolicy | Sequence[SimCLRPolicy],
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
        self.policies = (policy, policy) if isinstance(policy, SimCLRPolicy) else tuple(policy)
        if len({p.size for p in self.policies}) != 1 or len(self.policies) < 2:
            raise ConfigError(
                f"the policies make views of {[p.size for p in self.policies]} pixels: give two or "
                "more of one size."
            )
        self.shard_set, self.seed = shard_set, seed
        self.micro_batch_size, self.world, self.device = micro_batch_size, world, device
        self._backend = BACKENDS[backend](self.policies, device, num_threads)
        self._num_threads, self._prefetch = num_threads, prefetch
        self._order = shard_set.order(seed)
        self._epoch, self._position = 0, 0
        self.wait_seconds = 0.0
        self.batches_per_epoch = batches_per_epoch(
            self._order.num_positions, self._global_batch_size
        )
        used = self.batches_per_epoch * self._global_batch_size
        self.dropped_per_epoch = len(shard_set) - used

    @property
    def digest(self) -> str:
        """sha256 of the data set's manifest."""
        return self.shard_set.digest

    @property
    def _global_batch_size(self) -> int:
        return self.micro_batch_size * self.world.num_ranks

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
        pending: deque[_Coming] = deque()
        work = self._work()
        try:
            while True:
                while len(pending) <= self._prefetch:
                    pending.append(_Coming(self, next(work), pool))
                coming = pending.popleft()
                started = time.perf_counter()
                batch = coming.result()
                self.wait_seconds += time.perf_counter() - started
                self._epoch, self._position = coming.work.epoch, coming.work.position
                yield batch
        finally:
            # Without waiting: a thread may hang in a read, and the run is to stop.
            pool.shutdown(wait=False, cancel_futures=True)

    def _work(self) -> Iterator[_Work]:
        """Yield this rank's batches for ever."""
        epoch, start = self._epoch, self._position
        while True:
            while start + self._global_batch_size <= self._order.num_positions:
                mine = places(start, self.micro_batch_size, self.world)
                sample_ids = self._order.ids(epoch, int(mine[0]), int(mine[-1]) + 1)
                start += self._global_batch_size
                yield _Work(epoch, start, sample_ids, mine)
            epoch, start = epoch + 1, 0

    def make_views(self, epoch: int, sample_ids: Int64, positions: Int64) -> torch.Tensor:
        """Read, decode and augment some images; uint8 (V, n, size, size, 3)."""
        source = self.shard_set.read if self._backend.takes_bytes else self.shard_set.__getitem__
        images: list[Any] = [source(int(i)) for i in sample_ids]
        sizes_N2 = self.shard_set.sizes(sample_ids)
        params = [
            policy.draw(
                seed=self.seed, epoch=epoch, positions=positions, view=view, sizes_N2=sizes_N2
            )
            for view, policy in enumerate(self.policies)
        ]
        return self._backend(images, params)

    @property
    def chunk(self) -> int:
        """Images of a batch that one thread makes."""
        return min(self._backend.chunk or self.micro_batch_size, self.micro_batch_size)


class _Coming:
    """A batch in the making: its chunks, each in a thread, fill one tensor."""

    def __init__(self, loader: Loader, work: _Work, pool: ThreadPoolExecutor) -> None:
        self.work, self._loader = work, loader
        size, num_images = loader.policies[0].size, len(work.sample_ids)
        self._views: torch.Tensor | None = None
        if loader.chunk < num_images:  # on the host; pinned, so that the copy need not wait
            self._views = torch.empty(
                (len(loader.policies), num_images, size, size, 3),
                dtype=torch.uint8,
                pin_memory=loader.device.type == "cuda",
            )
        firsts = range(0, num_images, loader.chunk)
        self._chunks: list[Future[None]] = [pool.submit(self._make, first) for first in firsts]

    def _make(self, first: int) -> None:
        rows = slice(first, first + self._loader.chunk)
        work = self.work
        made = self._loader.make_views(work.epoch, work.sample_ids[rows], work.positions[rows])
        if self._views is None:
            self._views = made
        else:
            self._views[:, rows] = made

    def result(self) -> Batch:
        """Wait for the chunks; return the batch."""
        for chunk in self._chunks:
            chunk.result()
        assert self._views is not None
        sample_ids = self.work.sample_ids
        return Batch(
            views_VBCHW=self._views.permute(0, 1, 4, 2, 3),
            label_B=torch.from_numpy(self._loader.shard_set.labels(sample_ids)),
            sample_id_B=torch.from_numpy(sample_ids),
        ).check()


def make_loader(
    shard_set: ImageSet,
    policy: SimCLRPolicy | Sequence[SimCLRPolicy],
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
