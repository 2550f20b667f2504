"""Random numbers and sample order as pure functions; numpy alone.

Everything random in a run is a hash of its coordinates (seed, epoch, position, ...), so there is no
generator state to save: resuming, also on another number of ranks, is arithmetic.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fastclr.config import ConfigError
from fastclr.world import World

Uint64 = npt.NDArray[np.uint64]
Int64 = npt.NDArray[np.int64]

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


class Order(NamedTuple):
    """What one rank loads in one epoch.

    Attributes:
        sample_ids: int64 (batches, B).
        positions: int64 (batches, B); places in the epoch's global order, from which every random
            number of a view is drawn.
    """

    sample_ids: Int64
    positions: Int64


def order(
    num_samples: int,
    micro_batch_size: int,
    *,
    seed: int,
    epoch: int,
    world: World,
    start: int = 0,
) -> Order:
    """Return this rank's part of an epoch, from a position on.

    The global batch t is the same set of samples in the same order on any number of ranks: rank r
    takes the r-th slice of it. The last incomplete global batch is dropped.

    Args:
        num_samples: Samples in the data set.
        micro_batch_size: B, images of one rank and batch.
        seed: Seed of the run.
        epoch: Epoch from 0.
        world: Which rank of how many.
        start: Samples of this epoch that all ranks together have already used.

    Raises:
        ConfigError: If the data set is smaller than one global batch.
    """
    global_batch_size = micro_batch_size * world.num_ranks
    if num_samples < global_batch_size:
        raise ConfigError(
            f"the data set has {num_samples} samples and a global batch {global_batch_size}: not "
            "one batch fits in an epoch. Lower --global-batch-size or add data."
        )
    num_batches = max(0, num_samples - start) // global_batch_size
    places = start + np.arange(num_batches * global_batch_size, dtype=np.int64)
    mine = places.reshape((num_batches, world.num_ranks, micro_batch_size))[:, world.rank]
    return Order(permutation(num_samples, seed, epoch)[mine], mine)
