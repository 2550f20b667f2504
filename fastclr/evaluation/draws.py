"""Random orders and choices of the protocols: a hash of coordinates, the same everywhere."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Int64: TypeAlias = npt.NDArray[np.int64]

# A stream a purpose: the choice of one says nothing of another.
SUBSET, EPOCH, SPLIT = range(3)


def keys(num_rows: int, *coordinates: int) -> npt.NDArray[np.uint64]:
    """Return a random-looking uint64 for each row; a pure function of its place and coordinates.

    SplitMix64's finaliser (Steele et al. 2014), once a coordinate.
    """
    key_X = np.arange(num_rows, dtype=np.uint64)
    for coordinate in (*coordinates, 0):
        key_X = _mix(key_X + np.uint64(coordinate * 0xD1B54A32D192ED03 % 2**64))
    return key_X


def order(num_rows: int, *coordinates: int) -> Int64:
    """Return a random order of rows."""
    return np.argsort(keys(num_rows, *coordinates), kind="stable")


def epoch_batches(num_rows: int, batch_size: int, seed: int, epoch: int) -> list[Int64]:
    """Return the rows of an epoch's batches: each row once, sizes that differ by one at most.

    No batch is a rest of a row or two: BatchNorm could not be trained on it.
    """
    num_batches = -(-num_rows // batch_size)
    return np.array_split(order(num_rows, seed, EPOCH, epoch), num_batches)


def place_in_class(label_X: Int64, *coordinates: int) -> Int64:
    """Return each row's place, from 0, in a random order of its class."""
    rows = order(len(label_X), *coordinates)
    by_class = rows[np.argsort(label_X[rows], kind="stable")]
    _, first, counts = np.unique(label_X[by_class], return_index=True, return_counts=True)
    place_X = np.empty(len(rows), np.int64)
    place_X[by_class] = np.arange(len(rows)) - np.repeat(first, counts)
    return place_X


def balanced_split(label_X: Int64, seed: int, every: int = 5) -> tuple[Int64, Int64]:
    """Split rows into those to fit and those to choose by: one in ``every`` of each class.

    Args:
        label_X: Labels.
        seed: Seed of the choice.
        every: Share of the second part; a class of fewer rows is in the first part only.

    Returns:
        Rows of both parts, rising.
    """
    held_out_X = place_in_class(label_X, seed, SPLIT) % every == every - 1
    return np.flatnonzero(~held_out_X), np.flatnonzero(held_out_X)


def _mix(key: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Mix the bits; overflow is meant."""
    key = key + np.uint64(0x9E3779B97F4A7C15)
    key = (key ^ (key >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    key = (key ^ (key >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return key ^ (key >> np.uint64(31))
