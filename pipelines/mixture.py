"""Several sets as one, mixed by weight; which sample stands where is arithmetic."""

from __future__ import annotations

import hashlib
import json
import math
import operator
import re
from collections.abc import Iterator, Sequence
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastclr.config import ConfigError
from pipelines.decode import Pixels
from pipelines.order import BlockOrder, Int64, hash64
from pipelines.shards import ShardSet

_LONGEST = 2**15  # positions of a pattern; weights that need more are rounded to its reciprocal
_WEIGHTED = re.compile(r"(.+):([0-9.eE+-]+)", re.DOTALL)


class Pattern:
    """Which set stands at which place, for ever: the same counts in every ``length`` places.

    The counts at any place are within 1 of the weights' share. Inside this bound neighbours change
    places by the hash, so that no set keeps to places of its own.

    Args:
        weights: Positive; only their ratios count. Ratios of small integers and decimals are kept
            exactly, others to 1/32768.
        seed: Seed of the run.

    Attributes:
        counts: int64 (n,), places of each set in ``length``.
        length: Places after which the counts repeat.
    """

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        self._seed = seed
        self.counts = _counts(weights)
        self.length = int(self.counts.sum())
        self._set_L = _even_sequence(self.counts)
        taken = np.zeros((self.length + 1, len(weights)), np.int64)
        np.cumsum(self._set_L[:, None] == np.arange(len(weights)), 0, out=taken[1:])
        self._taken = taken
        self._may_swap = self._find_swaps()

    def _find_swaps(self) -> npt.NDArray[np.bool_]:
        """Return for each pair of places 2j, 2j + 1 whether exchanging them keeps the bound."""
        first, second = self._set_L[0::2], self._set_L[1::2]
        pairs, middle = np.arange(len(first)), np.arange(1, self.length, 2)
        swapped = self._taken[middle].copy()
        swapped[pairs, first] -= 1
        swapped[pairs, second] += 1
        off = abs(swapped * self.length - middle[:, None] * self.counts)
        return (off <= self.length).all(1)

    def at(self, place: Int64) -> Int64:
        """Return the sets at some places, int64."""
        return self._set_L[self._source(place)]

    def taken(self, place: int) -> Int64:
        """Return how often each set stands before a place, int64 (n,)."""
        blocks, rest = divmod(place, self.length)
        before = blocks * self.counts + self._taken[rest - rest % 2]
        if rest % 2:
            before[self.at(np.array([place - 1]))] += 1
        return before

    def _source(self, place: Int64) -> Int64:
        """Return the places in the pattern that stand at some places of the run."""
        in_block = place % self.length
        # 5 keeps the hash apart from those of samples, shards and views.
        heads = (hash64(self._seed, 5, place // 2) >> np.uint64(63)).astype(bool)
        return np.where(heads & self._may_swap[in_block // 2], in_block ^ 1, in_block)


def _counts(weights: Sequence[float]) -> Int64:
    """Return integers in the ratio of the weights, with an even sum of at most _LONGEST."""
    if any(not math.isfinite(w) or w <= 0 for w in weights):
        raise ConfigError(f"weights {list(weights)}: give positive numbers.")
    exact = [Fraction(repr(float(w))) for w in weights]
    shares = [w / sum(exact) for w in exact]
    length = math.lcm(*(share.denominator for share in shares))
    length *= 1 + length % 2
    if length > _LONGEST:
        length = _LONGEST
        shares = _rounded(shares, length)
    return np.array([int(share * length) for share in shares], np.int64)


def _rounded(shares: list[Fraction], length: int) -> list[Fraction]:
    """Round shares to multiples of 1/length, at least one each; their sum stays 1."""
    if len(shares) > length // 2:
        raise ConfigError(f"{len(shares)} sets are more than can be mixed; pack some together.")
    counts = [max(1, math.floor(share * length)) for share in shares]
    lost = sorted(range(len(shares)), key=lambda i: counts[i] - shares[i] * length)
    for i in lost[: max(0, length - sum(counts))]:
        counts[i] += 1
    counts[counts.index(max(counts))] += length - sum(counts)
    return [Fraction(count, length) for count in counts]


def _even_sequence(counts: Int64) -> Int64:
    """Spread the sets evenly: Tijdeman's rule for the chairman assignment problem (1980).

    Of the sets that are behind enough, the one takes the next place that would soonest be behind
    too far. No count is ever further than 1 - 1/(2n - 2) from its share.
    """
    num_sets, length = len(counts), int(counts.sum())
    sequence = np.zeros(length, np.int64)
    if num_sets == 1:
        return sequence
    behind = np.zeros(num_sets, np.int64)  # in 1 / length
    scale = 2 * num_sets - 2
    for place in range(length):
        behind += counts
        may = behind * scale >= length
        until = np.where(may, ((scale - 1) * length - scale * behind) / counts, np.inf)
        sequence[place] = chosen = int(np.argmin(until))
        behind[chosen] -= length
    return sequence


class MixedOrder:
    """Which sample of which set stands at which position; see :class:`Mixture`.

    Args:
        orders: Order of each set.
        pattern: Which set stands where.

    Attributes:
        num_positions: Positions in an epoch: as many as all sets have together.
    """

    def __init__(self, orders: Sequence[BlockOrder], num_shards: Sequence[int], pattern: Pattern):
        self._orders, self._pattern = orders, pattern
        sizes = np.array([order.num_positions for order in orders], np.int64)
        self.num_positions = int(sizes.sum())
        self._first_ids = np.cumsum(sizes) - sizes
        self._first_shards = np.cumsum(num_shards) - np.asarray(num_shards)

    def ids(self, epoch: int, start: int, stop: int) -> Int64:
        """Return the sample ids at positions [start, stop) of an epoch, int64."""
        start, stop = self._places(epoch, start, stop)
        set_P = self._pattern.at(np.arange(start, stop, dtype=np.int64))
        ids = np.empty(len(set_P), np.int64)
        for number, (order, visits) in enumerate(self._visits(start, stop)):
            parts = [order.ids(*span) for span in _epochs(visits, order.num_positions)]
            if parts:
                ids[set_P == number] = np.concatenate(parts) + self._first_ids[number]
        return ids

    def shards(self, epoch: int, start: int, stop: int) -> list[int]:
        """Return the shards those samples lie in, each once, counted through the sets."""
        start, stop = self._places(epoch, start, stop)
        found: dict[int, None] = {}
        for number, (order, visits) in enumerate(self._visits(start, stop)):
            for span in _epochs(visits, order.num_positions):
                first = int(self._first_shards[number])
                found.update(dict.fromkeys(first + shard for shard in order.shards(*span)))
        return list(found)

    def _places(self, epoch: int, start: int, stop: int) -> tuple[int, int]:
        """Count positions through all epochs."""
        stop = min(stop, self.num_positions)
        return epoch * self.num_positions + start, epoch * self.num_positions + max(start, stop)

    def _visits(self, start: int, stop: int) -> Iterator[tuple[BlockOrder, range]]:
        """Yield each set's order, and which of its visits lie in [start, stop)."""
        firsts, lasts = self._pattern.taken(start).tolist(), self._pattern.taken(stop).tolist()
        for order, first, last in zip(self._orders, firsts, lasts, strict=True):
            yield order, range(first, last)


def _epochs(visits: range, num_positions: int) -> Iterator[tuple[int, int, int]]:
    """Cut visits into spans of a set's own epochs: epoch, start, stop."""
    first = visits.start
    while first < visits.stop:
        epoch, start = divmod(first, num_positions)
        stop = min(num_positions, start + visits.stop - first)
        yield epoch, start, stop
        first += stop - start


class Mixture:
    """Several sets as one :class:`~pipelines.loader.ImageSet`.

    An epoch has as many positions as the sets have samples. Position p belongs to a set by a fixed
    pattern whose counts are within 1 of the weights everywhere; a set's k-th visit takes sample k
    of the set's own endless order. So a set with a large weight is seen more than once in an epoch
    and one with a small weight in parts, but each of its samples once in each of its own epochs.

    Args:
        parts: Sets and their positive weights; ids count through the sets in this order.

    Attributes:
        path: The sets' paths and weights.
        digest: Changes when a set or a weight does.
        class_names: Those of the sets if all have the same; else empty, and labels are -1.
    """

    def __init__(self, parts: Sequence[tuple[ShardSet, float]]) -> None:
        if not parts:
            raise ConfigError("a mixture of no sets: give at least one.")
        self.sets = [one for one, _ in parts]
        self._weights = [float(weight) for _, weight in parts]
        _counts(self._weights)  # refuse wrong ones now
        lengths = np.array([len(one) for one in self.sets], np.int64)
        self._ends: Int64 = np.cumsum(lengths)
        self._firsts: Int64 = self._ends - lengths
        self._num_shards = [one.num_shards for one in self.sets]
        self.path = ",".join(f"{one.path}:{weight:g}" for one, weight in parts)
        facts = [[one.digest, weight] for one, weight in parts]
        self.digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
        same = all(one.class_names == self.sets[0].class_names for one in self.sets)
        self.class_names = self.sets[0].class_names if same else []

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 without labels, or where the sets have different ones."""
        return len(self.class_names)

    @property
    def num_shards(self) -> int:
        """Number of shards of all sets."""
        return sum(self._num_shards)

    @cached_property
    def label_N(self) -> Int64:  # noqa: N802
        """int64 labels of all samples, -1 where there is none; reads every index."""
        if not self.class_names:
            return np.full(len(self), -1, np.int64)
        return np.concatenate([one.label_N for one in self.sets])

    @cached_property
    def size_N2(self) -> npt.NDArray[np.int32]:  # noqa: N802
        """int32 heights and widths of all samples in pixels; reads every index."""
        return np.concatenate([one.size_N2 for one in self.sets])

    def __getitem__(self, sample_id: int) -> Pixels:
        """Return a decoded image, uint8 (H, W, 3); see :class:`~pipelines.shards.ShardSet`."""
        one, own_id = self._find(sample_id)
        return one[own_id]

    def images(self, sample_ids: Int64) -> list[Pixels | None]:
        """Return images; None for each to be asked for by itself."""
        out: list[Pixels | None] = [None] * len(sample_ids)
        for one, at, own_ids in self._by_set(sample_ids):
            for place, image in zip(at.tolist(), one.images(own_ids), strict=True):
                out[place] = image
        return out

    def read(self, sample_id: int) -> bytes:
        """Return an encoded image."""
        one, own_id = self._find(sample_id)
        return one.read(own_id)

    def place(self, sample_id: int) -> str:
        """Name a sample for an error: its shard and key."""
        one, own_id = self._find(sample_id)
        return one.place(own_id)

    def source_of(self, sample_id: int) -> str:
        """Return where a sample came from."""
        one, own_id = self._find(sample_id)
        return one.source_of(own_id)

    def sizes(self, sample_ids: Int64) -> npt.NDArray[np.int32]:
        """Return heights and widths in pixels, int32 (n, 2)."""
        out = np.empty((len(sample_ids), 2), np.int32)
        for one, at, own_ids in self._by_set(sample_ids):
            out[at] = one.sizes(own_ids)
        return out

    def labels(self, sample_ids: Int64) -> Int64:
        """Return labels, int64 (n,); -1 where there is none."""
        out = np.full(len(sample_ids), -1, np.int64)
        for one, at, own_ids in self._by_set(sample_ids) if self.class_names else ():
            out[at] = one.labels(own_ids)
        return out

    def order(self, seed: int) -> MixedOrder:
        """Return which sample stands where in each epoch."""
        # 6 keeps the hash apart; a set that is there twice gets two orders.
        seeds = (hash64(seed, 6, np.arange(len(self.sets))) >> np.uint64(1)).tolist()
        orders = [one.order(own) for one, own in zip(self.sets, seeds, strict=True)]
        return MixedOrder(orders, self._num_shards, Pattern(self._weights, seed))

    def prefetch(self, shards: Sequence[int], tolerant: bool = False) -> None:
        """Begin to fetch shards that will be needed; they count through the sets."""
        for one, own in self._own_shards(shards):
            one.prefetch(own, tolerant)

    def compare(self, shards: Sequence[int], tolerant: bool = False) -> None:
        """Begin to compare local tars; see :meth:`~pipelines.shards.ShardSet.compare`."""
        for one, own in self._own_shards(shards):
            one.compare(own, tolerant)

    def _own_shards(self, shards: Sequence[int]) -> Iterator[tuple[ShardSet, list[int]]]:
        first = 0
        for one, count in zip(self.sets, self._num_shards, strict=True):
            if own := [shard - first for shard in shards if first <= shard < first + count]:
                yield one, own
            first += count

    def verify(self, *progress: Any) -> None:
        """Compare every tar with its manifest; see :meth:`~pipelines.shards.ShardSet.verify`."""
        for one in self.sets:
            one.verify(*progress)

    def _find(self, sample_id: int) -> tuple[ShardSet, int]:
        """Return a sample's set and its id there."""
        i = operator.index(sample_id)
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        number = int(np.searchsorted(self._ends, i, "right"))
        return self.sets[number], i - int(self._firsts[number])

    def _by_set(self, sample_ids: Int64) -> Iterator[tuple[ShardSet, Int64, Int64]]:
        """Yield, for each set of some samples: the set, their places here, their ids there."""
        ids = np.asarray(sample_ids, np.int64)
        if len(ids) and not 0 <= ids.min() <= ids.max() < len(self):
            raise IndexError(f"samples {ids.min()} to {ids.max()} of {len(self)}")
        number_n = np.searchsorted(self._ends, ids, "right")
        for number in np.unique(number_n).tolist():
            at = np.flatnonzero(number_n == number)
            yield self.sets[number], at, ids[at] - self._firsts[number]


def open_sets(text: str, **options: Any) -> ShardSet | Mixture:
    """Open what ``--data.train`` says: one set, or several as ``a:0.7,b:0.3``.

    Args:
        text: Path, pattern or URL; several with a weight each, separated by commas.
        options: Passed to :meth:`~pipelines.shards.ShardSet.open`.

    Raises:
        ConfigError: If one of several has no weight, or a weight is not positive.
        ShardError: If a set cannot be opened.
    """
    parts = text.split(",")
    if len(parts) == 1 or Path(text).exists():
        return ShardSet.open(text, **options)
    weighted: list[tuple[str, float]] = []
    for part in parts:
        try:
            match = _WEIGHTED.fullmatch(part.strip())
            weighted.append((match[1], float(match[2])) if match else ("", math.nan))
        except ValueError:
            weighted.append(("", math.nan))
        if not (math.isfinite(weighted[-1][1]) and weighted[-1][1] > 0):
            raise ConfigError(
                f"{part!r} of {text!r} has no positive weight: write several sets as a:0.7,b:0.3."
            )
    return Mixture([(ShardSet.open(path, **options), weight) for path, weight in weighted])
