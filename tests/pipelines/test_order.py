"""Sample order: a permutation an epoch, the same global batches on any number of ranks."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastclr.config import ConfigError
from fastclr.world import World
from pipelines.order import (
    BlockOrder,
    batches_per_epoch,
    hash64,
    next_window,
    permutation,
    places,
    uniforms,
)

seeds = st.integers(0, 2**63 - 1)
epochs = st.integers(0, 10_000)


def test_the_hash_is_splitmix64() -> None:
    # First outputs of the published generator from state 0 and from state golden.
    assert hash64(0).tolist() == [0xE220A8397B1DCDAF]
    assert hash64(1).tolist() == [0x6E789E6AA1B965F4]


def test_golden_numbers() -> None:
    """Runs resume across versions only while these stay."""
    assert hash64(1, 2, 3).tolist() == [2869315087210772132]
    assert hash64(2**63 - 1, np.arange(3)).tolist() == [
        7568450554649527987,
        17779962496008418809,
        3271039822617886016,
    ]
    assert uniforms(0, np.arange(3)).tolist() == [
        0.6524484863740322,
        0.7012121095215252,
        0.3871241409757855,
    ]
    assert permutation(10, 0, 0).tolist() == [0, 7, 8, 2, 5, 9, 4, 6, 3, 1]
    assert permutation(10, 7, 3).tolist() == [9, 0, 8, 2, 5, 1, 3, 4, 7, 6]


def test_uniforms_are_uniform_and_uncorrelated() -> None:
    u = uniforms(5, 1, 0, 0, np.arange(20_000)[:, None], np.arange(50))
    assert u.min() >= 0 and u.max() < 1
    # Five standard errors: 1/sqrt(12 n) of a mean, sqrt(4/5/n) of 12 var, 1/sqrt(n) of a
    # correlation.
    assert abs(u.mean(0) - 0.5).max() < 5 / np.sqrt(12 * 20_000)
    assert abs(12 * u.var(0) - 1).max() < 5 * np.sqrt(0.8 / 20_000)
    assert abs(np.corrcoef(u.T) - np.eye(50)).max() < 5 / np.sqrt(20_000)
    counts = np.histogram(u, 64, (0, 1))[0]
    assert ((counts - u.size / 64) ** 2 / (u.size / 64)).sum() < 63 + 5 * np.sqrt(2 * 63)


@given(a=st.lists(st.integers(0, 2**63 - 1), min_size=2, max_size=4), data=st.data())
def test_every_coordinate_and_their_order_count(a: list[int], data: st.DataObject) -> None:
    b = data.draw(st.permutations(a) | st.just([*a[:-1], a[-1] ^ 1]) | st.just(a[:-1]))
    assert (hash64(*a) == hash64(*b))[0] == (a == list(b))


@given(n=st.integers(1, 500), seed=seeds, epoch=epochs)
def test_an_epoch_is_a_permutation(n: int, seed: int, epoch: int) -> None:
    assert np.array_equal(np.sort(permutation(n, seed, epoch)), np.arange(n))


@given(seed=seeds, epoch=epochs)
def test_epochs_and_seeds_differ(seed: int, epoch: int) -> None:
    here = permutation(50, seed, epoch)
    assert not np.array_equal(here, permutation(50, seed, epoch + 1))
    assert not np.array_equal(here, permutation(50, seed ^ 1, epoch))


def test_each_place_holds_each_sample_equally_often() -> None:
    counts = np.zeros((5, 5))
    for epoch in range(4000):
        counts[np.arange(5), permutation(5, 3, epoch)] += 1
    assert abs(counts - 800).max() < 5 * np.sqrt(4000 * 0.2 * 0.8)


def sizes(data: st.DataObject, least: int = 1) -> np.ndarray:
    found = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=40))
    return np.array([*found, least], np.int64)


@given(data=st.data(), window=st.integers(1, 50), seed=seeds, epoch=epochs)
def test_an_epoch_of_blocks_holds_each_id_once(
    data: st.DataObject, window: int, seed: int, epoch: int
) -> None:
    shard_sizes = sizes(data)
    order = BlockOrder(shard_sizes, seed=seed, window=window)
    n = order.num_positions
    assert n == shard_sizes.sum()
    ids = order.ids(epoch, 0, n)
    assert ids.dtype == np.int64 and np.array_equal(np.sort(ids), np.arange(n))
    cuts = sorted(data.draw(st.lists(st.integers(0, n), max_size=5)))
    parts = [order.ids(epoch, a, b) for a, b in zip([0, *cuts], [*cuts, n], strict=True)]
    assert np.array_equal(np.concatenate(parts), ids), "parts are not the whole"
    if window >= len(shard_sizes):
        assert np.array_equal(ids, permutation(n, seed, epoch))


@given(data=st.data(), window=st.integers(1, 8), seed=seeds, epoch=epochs)
def test_samples_stay_in_their_window_of_shards(
    data: st.DataObject, window: int, seed: int, epoch: int
) -> None:
    shard_sizes = sizes(data)
    order = BlockOrder(shard_sizes, seed=seed, window=window)
    shard_of = np.repeat(np.arange(len(shard_sizes)), shard_sizes)
    start = 0
    shards = order.shards(epoch, 0, order.num_positions)
    assert sorted(set(shards)) == sorted(shards), "a shard is needed twice"
    for first in range(0, len(shard_sizes), window):
        here = shards[first : first + window]
        stop = start + int(shard_sizes[here].sum())
        ids = order.ids(epoch, start, stop)
        assert set(shard_of[ids]) <= set(here)
        if stop > start:
            assert set(here) <= set(order.shards(epoch, start, stop))
        start = stop
    assert start == order.num_positions


def test_shards_and_samples_change_with_the_epoch() -> None:
    order = BlockOrder(np.full(40, 10), seed=0, window=4)
    assert order.shards(0, 0, 400) != order.shards(1, 0, 400)
    firsts = np.array([order.shards(epoch, 0, 400)[0] for epoch in range(2000)])
    counts = np.bincount(firsts, minlength=40)
    assert abs(counts - 50).max() < 5 * np.sqrt(50)


def test_a_billion_samples_are_arithmetic() -> None:
    started = time.process_time()
    order = BlockOrder(np.full(100_000, 10_000), seed=1)
    assert order.num_positions == 10**9
    ids = order.ids(3, 777_777_777, 777_777_777 + 512)
    assert len(np.unique(ids)) == 512
    assert time.process_time() - started < 1


def test_golden_blocks() -> None:
    order = BlockOrder(np.array([3, 2, 4, 1]), seed=7, window=2)
    assert order.ids(3, 0, 10).tolist() == [8, 5, 3, 4, 7, 6, 9, 0, 2, 1]


@given(micro=st.integers(1, 8), ranks=st.integers(1, 6), start=st.integers(0, 99))
def test_the_ranks_take_slices_of_the_global_batch(micro: int, ranks: int, start: int) -> None:
    mine = [places(start, micro, World(rank, ranks, rank, ranks)) for rank in range(ranks)]
    assert np.concatenate(mine).tolist() == list(range(start, start + micro * ranks))


def test_an_epoch_drops_its_incomplete_batch() -> None:
    assert batches_per_epoch(21, 4) == 5
    with pytest.raises(ConfigError, match="has 3 samples and a global batch 4"):
        batches_per_epoch(3, 4)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_the_next_window_is_where_new_shards_begin(data: st.DataObject) -> None:
    shard_sizes = np.maximum(sizes(data), 1)
    window = data.draw(st.integers(1, 5))
    order = BlockOrder(shard_sizes, seed=1, window=window)
    stop = data.draw(st.integers(1, order.num_positions))
    start = data.draw(st.integers(0, stop - 1))
    here = set(order.shards(2, start, start + 1))
    expected = (stop, order.shards(3, 0, 1))
    for position in range(start + 1, stop):
        if new := [s for s in order.shards(2, position, position + 1) if s not in here]:
            expected = (position, new)
            break
    assert next_window(order, 2, start, stop) == expected


def test_the_next_window_is_found_in_a_billion_samples() -> None:
    order = BlockOrder(np.full(100_000, 10_000), seed=1)
    started = time.process_time()
    assert next_window(order, 0, 5, 10**9)[0] == 160_000
    assert next_window(order, 0, 10**9 - 160_000, 10**9) == (10**9, order.shards(1, 0, 1))
    assert time.process_time() - started < 0.5
