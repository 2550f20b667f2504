"""Batches of views from a shard set: pure order, threads ahead of the step, exact position."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch

from fastclr.batch import Batch
from fastclr.config import ConfigError
from fastclr.facts import num_cores
from fastclr.world import World
from pipelines.backends import BACKENDS, resolve_backend
from pipelines.damage import MOST_DAMAGED, Damage, GoodSamples, OnDamage
from pipelines.decode import DamagedImage
from pipelines.image_set import ImageSet
from pipelines.order import Int64, batches_per_epoch, next_window, places
from pipelines.policy import SimCLRPolicy, ViewParams
from pipelines.shards import DamagedSample, ShardError

STATE_VERSION = 1


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
        policy: Augmentation of both views, or one policy a view, for two views or more.
        backend: Key of :data:`~pipelines.backends.BACKENDS`, or ``auto``.
        micro_batch_size: Images B of this rank in a batch.
        seed: Seed of order and views.
        world: Which rank of how many.
        device: Where the views lie.
        num_threads: Threads that prepare batches; 0 for :func:`default_threads`.
        prefetch: Batches prepared ahead; with the one in use they are all the memory it takes.
        on_damage: What is done about a damaged sample: ``raise``, or ``replace`` it by the next
            good one of the epoch's order. The numbers of a view stay those of its position.
        most_damaged: Damaged samples this rank replaces before it is an error after all.

    Attributes:
        backend: The back-end's name, resolved.
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
        on_damage: OnDamage = "raise",
        most_damaged: int = MOST_DAMAGED,
    ) -> None:
        if micro_batch_size < 1:
            raise ConfigError(f"micro_batch_size is {micro_batch_size}: give 1 or more.")
        self.policies = (policy, policy) if isinstance(policy, SimCLRPolicy) else tuple(policy)
        if len({p.size for p in self.policies}) != 1 or len(self.policies) < 2:
            raise ConfigError(
                f"the policies make views of {[p.size for p in self.policies]} pixels: give two or "
                "more of one size."
            )
        self.shard_set, self.seed = shard_set, seed
        self.micro_batch_size, self.world, self.device = micro_batch_size, world, device
        self.backend = resolve_backend(backend, device, policies=self.policies)
        self._num_threads, self._prefetch = num_threads or default_threads(world), prefetch
        self._backend = BACKENDS[self.backend](self.policies, device, self._num_threads)
        self._order = shard_set.order(seed)
        self._damage = Damage(on_damage, most_damaged)
        self._samples = GoodSamples(shard_set, self._order, self._damage, self._backend.takes_bytes)
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
    def num_views(self) -> int:
        """Views V of each image."""
        return len(self.policies)

    @property
    def damaged(self) -> dict[int, str]:
        """Damaged samples that this rank has replaced since it began, and what is wrong with each.

        Ids in the order they were met, which threads may change.
        """
        return dict(self._damage.found)

    @property
    def num_damaged(self) -> int:
        """Number of :attr:`damaged`."""
        return len(self._damage.found)

    @property
    def _global_batch_size(self) -> int:
        return self.micro_batch_size * self.world.num_ranks

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the last batch handed out; the same on every rank."""
        return {
            "version": STATE_VERSION,
            "epoch": self._epoch,
            "position": self._position,
            "seed": self.seed,
            "digest": self.digest,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after a position, also on another number of ranks.

        Raises:
            ConfigError: If it belongs to another data set, seed or version of fastclr.
        """
        if state.get("version", 1) != STATE_VERSION:
            raise ConfigError(
                f"the checkpoint's loader state has version {state['version']}, this fastclr reads "
                f"{STATE_VERSION}: go on with the version that wrote it."
            )
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
        """Yield this rank's batches for ever; hint which shards come after those in use."""
        epoch, start = self._epoch, self._position
        hinted = start  # where the window begins that the set was told of last
        tolerant = self._damage.on_damage == "replace"
        self.shard_set.prefetch(self._order.shards(epoch, start, start + 1), tolerant)
        while True:
            left = self._order.num_positions - start
            stop = start + left // self._global_batch_size * self._global_batch_size
            while start < stop:
                mine = places(start, self.micro_batch_size, self.world)
                sample_ids = self._order.ids(epoch, int(mine[0]), int(mine[-1]) + 1)
                start += self._global_batch_size
                while hinted < start:
                    hinted, shards = next_window(self._order, epoch, hinted, stop)
                    self.shard_set.prefetch(shards, tolerant)
                yield _Work(epoch, start, sample_ids, mine)
            epoch, start, hinted = epoch + 1, 0, 0

    def draw(self, epoch: int, positions: Int64, sample_ids: Int64) -> list[ViewParams]:
        """Draw the numbers of some images' views, one block a view."""
        sizes_N2 = self.shard_set.sizes(sample_ids)
        return [
            policy.draw(
                seed=self.seed, epoch=epoch, positions=positions, view=view, sizes_N2=sizes_N2
            )
            for view, policy in enumerate(self.policies)
        ]

    def make_views(
        self, epoch: int, positions: Int64, sample_ids: Int64
    ) -> tuple[torch.Tensor, Int64]:
        """Read, decode and augment some images.

        Args:
            epoch: Epoch from 0.
            positions: int64 (n,), places in the epoch's order.
            sample_ids: int64 (n,), what the order has there.

        Returns:
            uint8 (V, n, size, size, 3), and the ids of the images that were taken: others where
            damaged ones were replaced.
        """
        taken = self._samples.take_all(epoch, positions, sample_ids)
        wanted = list(zip(positions.tolist(), sample_ids.tolist(), strict=True))
        while True:
            sample_ids = np.array([sample_id for sample_id, _ in taken], np.int64)
            images: list[Any] = [image for _, image in taken]
            params = self.draw(epoch, positions, sample_ids)
            try:
                return self._backend(images, params), sample_ids
            except DamagedImage as error:
                self._note_damage(images, params, sample_ids, error)
            taken = [
                self._samples.take(epoch, *place) if old[0] in self._damage.found else old
                for old, place in zip(taken, wanted, strict=True)
            ]

    def _note_damage(
        self, images: list[Any], params: list[ViewParams], sample_ids: Int64, error: DamagedImage
    ) -> None:
        """Find the images that made the back-end refuse a batch, and note them.

        Each is tried alone: what counts as damaged then depends on no other image of the batch.
        """
        refused = False
        for row, sample_id in enumerate(sample_ids.tolist()):
            one = slice(row, row + 1)
            try:
                self._backend(images[one], [p[one] for p in params])
            except DamagedImage as reason:
                refused = True
                place = self.shard_set.place(sample_id)
                self._damage.note(sample_id, DamagedSample(place, reason))
        if not refused:
            raise ShardError(
                f"back-end {self.backend} refuses the samples {sample_ids.tolist()} together and "
                f"none of them alone: {error}. Use another data.backend, and report this."
            ) from error

    @property
    def chunk(self) -> int:
        """Images of a batch that one thread makes.

        What the back-end likes, or less where the batches ahead would be less than two chunks a
        thread; all of the batch where the back-end makes it as a whole.
        """
        if self._backend.chunk is None:
            return self.micro_batch_size
        ahead = self.micro_batch_size * (self._prefetch + 1)
        share = -(-ahead // (2 * self._num_threads))
        return min(self._backend.chunk, self.micro_batch_size, share)


class _Coming:
    """A batch in the making: its chunks, each in a thread, fill one tensor."""

    def __init__(self, loader: Loader, work: _Work, pool: ThreadPoolExecutor) -> None:
        self.work, self._loader = work, loader
        size, num_images = loader.policies[0].size, len(work.sample_ids)
        self._sample_ids = work.sample_ids.copy()
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
        made, self._sample_ids[rows] = self._loader.make_views(
            work.epoch, work.positions[rows], work.sample_ids[rows]
        )
        if self._views is None:
            self._views = made
        else:
            self._views[:, rows] = made

    def result(self) -> Batch:
        """Wait for the chunks; return the batch."""
        for chunk in self._chunks:
            chunk.result()
        assert self._views is not None
        sample_ids = self._sample_ids
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
    backend: str = "auto",
    world: World | None = None,
    device: torch.device | str = "cpu",
    num_threads: int = 0,
    prefetch: int = 4,
    on_damage: OnDamage = "raise",
    most_damaged: int = MOST_DAMAGED,
) -> Loader:
    """Make a :class:`Loader`.

    Args:
        shard_set: Images.
        policy: Augmentation of both views, or one policy a view, for two views or more.
        micro_batch_size: Images B of this rank in a batch.
        seed: Seed of order and views.
        backend: Key of :data:`~pipelines.backends.BACKENDS`, or ``auto``.
        world: Which rank of how many; None for what the launcher says.
        device: Where the views lie.
        num_threads: Threads that prepare batches; 0 for this rank's part of the cores.
        prefetch: Batches prepared ahead.
        on_damage: What is done about a damaged sample, ``raise`` or ``replace``.
        most_damaged: Damaged samples this rank replaces before it is an error after all.

    Raises:
        ConfigError: If sizes, policies or the back-end do not fit.
    """
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
        on_damage=on_damage,
        most_damaged=most_damaged,
    )


def default_threads(world: World) -> int:
    """Return how many threads prepare a rank's batches: its part of this machine's cores."""
    return max(1, num_cores() // world.num_local_ranks)
