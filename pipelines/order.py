"""Random numbers and sample order as pure functions; numpy alone.

Everything random in a run is a hash of its coordinates (seed, epoch, position, ...), so there is no
generator state to save: resuming, also on another number of ranks, is arithmetic.
"""

from __future__ import annotations

import functools
from typing import Protocol

import numpy as np
import numpy.typing as npt

from fastclr.config import ConfigError
from fastclr.world import World

Uint64 = npt.NDArray[np.uint64]
Int64 = npt.NDArray[np.int64]

WINDOW = 16  # shards shuffled together

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix(x: Uint64) -> Uint64:
    """Scramble 64-bit words: the finaliser of SplitMix64 (Steele et al. 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def hash64(*coordinates: int | Int64 | Uint64) -> Uint64:
    """Hash integer coordinates, which broadcast against each other, to 64-bit words.

    Args:
        coordinates: Non-negative integers or arrays of them; their order counts.
    """
    with np.errstate(over="ignore"):
        word: Uint64 = np.zeros(1, np.uint64)
        for coordinate in coordinates:
            word = mix(word + np.asarray(coordinate).astype(np.uint64) * _GOLDEN + _GOLDEN)
        return word


def uniforms(*coordinates: int | Int64 | Uint64) -> npt.NDArray[np.float64]:
    """Return numbers in [0, 1), one for each broadcast coordinate; 53 random bits each."""
    return (hash64(*coordinates) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permutation(num_samples: int, seed: int, epoch: int) -> Int64:
    """Return the order of all sample ids in an epoch, int64 (num_samples,)."""
    return np.argsort(hash64(seed, epoch, np.arange(num_samples)), kind="stable")


class SampleOrder(Protocol):
    """Which sample stands at which position of an epoch; pure, with no state to save."""

    num_positions: int

    def ids(self, epoch: int, start: int, stop: int) -> Int64:
        """Return the sample ids at positions [start, stop) of an epoch, int64."""
        ...

    def shards(self, epoch: int, start: int, stop: int) -> list[int]:
        """Return the shards those samples lie in, each once, as they will be needed."""
        ...


class BlockOrder:
    """Shards in a random order, samples in a random order inside a window of shards.

    Reading stays inside a window of shards, so that a cache of two windows serves any data set.
    With no more shards than the window holds, the order is a permutation of all samples. Nothing is
    kept but the windows in use: 10^9 samples are a few numbers a shard.

    Args:
        shard_sizes: int64 (S,), samples of each shard; ids count through the shards in order.
        seed: Seed of the run.
        window: Shards W whose samples are shuffled together.

    Attributes:
        num_positions: Samples in an epoch; each has one position.
    """

    def __init__(self, shard_sizes: Int64, *, seed: int, window: int = WINDOW) -> None:
        self.seed, self.window = seed, window
        self._sizes = np.asarray(shard_sizes, np.int64)
        self._first_ids = np.cumsum(self._sizes) - self._sizes
        self.num_positions = int(self._sizes.sum())
        self._epoch = functools.lru_cache(maxsize=2)(self._shards_of_epoch)
        self._window = functools.lru_cache(maxsize=2)(self._ids_of_window)

    def ids(self, epoch: int, start: int, stop: int) -> Int64:
        """Return the sample ids at positions [start, stop) of an epoch, int64."""
        _, ends = self._epoch(epoch)
        parts = [np.empty(0, np.int64)]
        for number in self._windows(epoch, start, stop):
            first = 0 if number == 0 else int(ends[number - 1])
            parts.append(self._window(epoch, number)[max(0, start - first) : stop - first])
        return np.concatenate(parts)

    def shards(self, epoch: int, start: int, stop: int) -> list[int]:
        """Return the shards of the windows that positions [start, stop) lie in."""
        shards, _ = self._epoch(epoch)
        found = [self._slice(n, shards) for n in self._windows(epoch, start, stop)]
        return [int(shard) for part in found for shard in part]

    def _windows(self, epoch: int, start: int, stop: int) -> range:
        """Number the windows that positions lie in."""
        _, ends = self._epoch(epoch)
        first = int(np.searchsorted(ends, start, "right"))
        return range(first, int(np.searchsorted(ends, stop, "left")) + 1 if stop > start else first)

    def _slice(self, number: int, shards: Int64) -> Int64:
        return shards[number * self.window : (number + 1) * self.window]

    def _shards_of_epoch(self, epoch: int) -> tuple[Int64, Int64]:
        """Return the shards in order, and the position after the last sample of each window."""
        num_shards = len(self._sizes)
        # 2 keeps the hash apart from those of samples and views.
        shards = np.argsort(hash64(self.seed, 2, epoch, np.arange(num_shards)), kind="stable")
        ends = np.cumsum(self._sizes[shards])
        last = np.minimum(np.arange(self.window, num_shards + self.window, self.window), num_shards)
        return shards, ends[last - 1]

    def _ids_of_window(self, epoch: int, number: int) -> Int64:
        """Return the sample ids of a window in their order."""
        shards = np.sort(self._slice(number, self._epoch(epoch)[0]))
        spans = zip(self._first_ids[shards].tolist(), self._sizes[shards].tolist(), strict=True)
        ranges = [np.arange(first, first + size, dtype=np.int64) for first, size in spans]
        ids = np.concatenate(ranges)
        return ids[np.argsort(hash64(self.seed, epoch, ids), kind="stable")]


def next_window(order: SampleOrder, epoch: int, start: int, stop: int) -> tuple[int, list[int]]:
    """Return where other shards begin to be needed after a position, and which.

    Args:
        order: Any.
        epoch: Epoch from 0.
        start: Position the reading has reached.
        stop: Position after the last that is read in this epoch.

    Returns:
        The first position after ``start`` that needs a shard which ``start`` does not, and the new
        shards; ``stop`` and those of the next epoch's first position where there is none.
    """
    here = set(order.shards(epoch, start, start + 1))

    def new(position: int) -> list[int]:
        return [s for s in order.shards(epoch, start, position + 1) if s not in here]

    known, step = start, 1  # nothing new up to here; doubled, then halved
    while known + step < stop and not new(known + step):
        known, step = known + step, 2 * step
    beyond = min(known + step, stop)
    while beyond - known > 1:
        middle = (known + beyond) // 2
        known, beyond = (known, middle) if new(middle) else (middle, beyond)
    return (beyond, new(beyond)) if beyond < stop else (stop, order.shards(epoch + 1, 0, 1))


def batches_per_epoch(num_positions: int, global_batch_size: int) -> int:
    """Return the global batches in an epoch; the last incomplete one is dropped.

    Raises:
        ConfigError: If not one fits.
    """
    if num_positions < global_batch_size:
        raise ConfigError(
            f"the data set has {num_positions} samples and a global batch {global_batch_size}: not "
            "one batch fits in an epoch. Lower --global-batch-size or add data."
        )
    return num_positions // global_batch_size


def places(start: int, micro_batch_size: int, world: World) -> Int64:
    """Return the positions of this rank in the global batch that begins at ``start``, int64 (B,).

    The global batch is the same samples in the same order on any number of ranks: rank r takes the
    r-th slice of it.
    """
    return start + world.rank * micro_batch_size + np.arange(micro_batch_size, dtype=np.int64)
