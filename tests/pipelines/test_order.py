"""Sample order: a permutation an epoch, the same global batches on any number of ranks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastclr.config import ConfigError
from fastclr.world import World
from pipelines.order import Order, hash64, order, permutation, uniforms

seeds = st.integers(0, 2**63 - 1)
epochs = st.integers(0, 10_000)


def all_ranks(n: int, micro: int, ranks: int, seed: int, epoch: int, start: int = 0) -> list[Order]:
    worlds = [World(rank, ranks, rank, ranks) for rank in range(ranks)]
    return [order(n, micro, seed=seed, epoch=epoch, world=w, start=start) for w in worlds]


def global_batches(orders: list[Order]) -> tuple[np.ndarray, np.ndarray]:
    """Put the ranks' slices side by side: (batches, G) ids and positions."""
    ids, positions = zip(*orders, strict=True)
    return np.concatenate(ids, 1), np.concatenate(positions, 1)


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


@given(
    n=st.integers(1, 300),
    micro=st.integers(1, 8),
    ranks=st.integers(1, 6),
    seed=seeds,
    epoch=epochs,
)
def test_all_ranks_together_see_each_sample_once(
    n: int, micro: int, ranks: int, seed: int, epoch: int
) -> None:
    batch = micro * ranks
    if n < batch:
        with pytest.raises(ConfigError, match=f"{n} samples and a global batch {batch}"):
            all_ranks(n, micro, ranks, seed, epoch)
        return
    ids, positions = global_batches(all_ranks(n, micro, ranks, seed, epoch))
    assert ids.dtype == positions.dtype == np.int64
    assert ids.shape == (n // batch, batch)
    assert np.array_equal(ids.ravel(), permutation(n, seed, epoch)[: n - n % batch])
    assert np.array_equal(positions.ravel(), np.arange(n - n % batch))


@given(n=st.integers(16, 200), seed=seeds, epoch=epochs)
@settings(max_examples=30)
def test_global_batches_are_the_same_on_1_2_and_4_ranks(n: int, seed: int, epoch: int) -> None:
    one, two, four = (global_batches(all_ranks(n, 16 // r, r, seed, epoch)) for r in (1, 2, 4))
    for other in (two, four):
        assert np.array_equal(one[0], other[0]) and np.array_equal(one[1], other[1])


@given(data=st.data(), n=st.integers(12, 200), ranks=st.sampled_from([1, 2, 3]), seed=seeds)
def test_a_start_gives_the_rest_of_the_epoch(
    data: st.DataObject, n: int, ranks: int, seed: int
) -> None:
    start = data.draw(st.integers(0, n))  # another number of ranks may have stopped anywhere
    ids, positions = global_batches(all_ranks(n, 4, ranks, seed, 1, start))
    end = start + (n - start) // (4 * ranks) * 4 * ranks
    assert np.array_equal(positions.ravel(), np.arange(start, end))
    assert np.array_equal(ids.ravel(), permutation(n, seed, 1)[start:end])
