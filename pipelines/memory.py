"""A small data set decoded once and kept in memory."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from fastclr.config import ConfigError
from fastclr.facts import free_memory
from pipelines.damage import MOST_DAMAGED, OnDamage
from pipelines.decode import Pixels
from pipelines.image_set import ImageSet
from pipelines.order import Int64, SampleOrder
from pipelines.shards import DamagedSample, ShardError

_CHUNK = 64  # images a thread decodes before it tells of them


class InMemory:
    """The pixels of all images of another set; ids, digest and order are that set's.

    Args:
        shard_set: Images; each is read and decoded once, here.
        num_threads: Threads that decode.
        num_local_ranks: Processes on this machine that each keep a copy.
        on_damage: ``raise`` at the damaged image of the lowest id; ``replace`` leaves it to the
            loader, which meets it as it would meet it in the set.
        most_damaged: More damaged images are an error after all.
        progress: Called with the number of images of each chunk that is done.

    Attributes:
        digest: That of the set.
        num_bytes: Size of the pixels.

    Raises:
        ConfigError: If the pixels would take more than this rank's part of half the free memory.
        DamagedSample: If an image is damaged and damage is to raise.
        ShardError: If one cannot be read, or too many are damaged.
    """

    def __init__(
        self,
        shard_set: ImageSet,
        *,
        num_threads: int = 1,
        num_local_ranks: int = 1,
        on_damage: OnDamage = "raise",
        most_damaged: int = MOST_DAMAGED,
        progress: Callable[[int], None] = lambda _: None,
    ) -> None:
        self._set, self.digest = shard_set, shard_set.digest
        self._sizes_N2 = shard_set.sizes(np.arange(len(shard_set)))
        self.num_bytes = 3 * int(self._sizes_N2.astype(np.int64).prod(1).sum())
        self._check_room(num_local_ranks)
        self._images = self._room()
        self._damaged: dict[int, str] = {}
        firsts = range(0, len(shard_set), _CHUNK)
        pool = ThreadPoolExecutor(num_threads, thread_name_prefix="fastclr-decode")
        try:
            for first, damaged in zip(firsts, pool.map(self._decode, firsts), strict=True):
                for sample_id, error in damaged:
                    if on_damage == "raise":
                        raise error
                    self._damaged[sample_id] = error.reason
                    self._check_damage(most_damaged)
                progress(min(_CHUNK, len(shard_set) - first))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def __len__(self) -> int:
        return len(self._sizes_N2)

    def __getitem__(self, sample_id: int) -> Pixels:
        """Return an image, uint8 (H, W, 3); it is the copy that is kept, not to be changed.

        Raises:
            DamagedSample: If it was damaged when it was read.
        """
        if sample_id in self._damaged:
            raise DamagedSample(self.place(sample_id), self._damaged[sample_id])
        return self._images[sample_id]

    def images(self, sample_ids: Int64) -> list[Pixels | None]:
        """Return images; None for each that was damaged."""
        return [None if i in self._damaged else self._images[i] for i in sample_ids.tolist()]

    def read(self, sample_id: int) -> bytes:
        """Refuse: what is here is decoded, and decoding it again would be slower for nothing."""
        raise ConfigError(
            "images in memory are decoded, and this back-end takes encoded ones: use another "
            "back-end, or the shard set itself."
        )

    def place(self, sample_id: int) -> str:
        """Name a sample for an error."""
        return self._set.place(sample_id)

    def sizes(self, sample_ids: Int64) -> npt.NDArray[np.int32]:
        """Return heights and widths in pixels, int32 (n, 2)."""
        return self._sizes_N2[sample_ids]

    def labels(self, sample_ids: Int64) -> Int64:
        """Return labels, int64 (n,); -1 where there is none."""
        return self._set.labels(sample_ids)

    def order(self, seed: int) -> SampleOrder:
        """Return which sample stands where in each epoch."""
        return self._set.order(seed)

    def prefetch(self, shards: list[int], tolerant: bool = False) -> None:
        """Take a hint of what is read next; all of it is here."""

    def _check_room(self, num_local_ranks: int) -> None:
        """Refuse what would take too much memory, before any is taken."""
        free = free_memory()
        most = free // 2 // num_local_ranks
        if self.num_bytes > most:
            raise ConfigError(
                f"{len(self)} images decoded are {self.num_bytes / 2**30:.2f} GiB, and this rank "
                f"may take {most / 2**30:.2f} GiB: half of the {free / 2**30:.2f} GiB that are "
                f"free, for {num_local_ranks} ranks on this machine. Leave data.in_memory out, or "
                "pack smaller images."
            )

    def _room(self) -> Pixels | list[Pixels]:
        """Return an array (X, H, W, 3) where all sizes are equal, else a list to be filled."""
        if (self._sizes_N2 == self._sizes_N2[:1]).all():
            height, width = self._sizes_N2[0].tolist()
            return np.zeros((len(self), height, width, 3), np.uint8)
        return [np.empty((0, 0, 3), np.uint8)] * len(self)

    def _decode(self, first: int) -> list[tuple[int, DamagedSample]]:
        """Decode a chunk into its place; return what is damaged."""
        damaged: list[tuple[int, DamagedSample]] = []
        for sample_id in range(first, min(first + _CHUNK, len(self))):
            try:
                self._images[sample_id] = self._set[sample_id]
            except DamagedSample as error:
                damaged.append((sample_id, error))
        return damaged

    def _check_damage(self, most_damaged: int) -> None:
        """Refuse too many damaged images."""
        if len(self._damaged) > most_damaged:
            last = [*self._damaged][-1]
            raise ShardError(
                f"{len(self._damaged)} images are damaged, data.most_damaged is {most_damaged}; "
                f"the last is {self.place(last)}. Restore the data, or allow more."
            )
