"""Mixtures: shares at every place, each set's own epochs, resume by arithmetic."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastclr.config import ConfigError
from fastclr.world import World
from pipelines.loader import make_loader
from pipelines.mixture import Mixture, Pattern, open_sets
from pipelines.order import BlockOrder, places
from pipelines.policy import SimCLRPolicy
from pipelines.shards import ShardError, ShardSet

weight_lists = st.lists(st.integers(1, 40), min_size=1, max_size=6)


class StandIn(SimpleNamespace):
    """As much of a shard set as an order needs."""

    def __len__(self) -> int:
        return sum(self.sizes)

    def order(self, seed: int) -> BlockOrder:
        return BlockOrder(np.array(self.sizes), seed=seed, window=2)


def mixture(*parts: tuple[list[int], float]) -> Mixture:
    sets: list[Any] = []
    for number, (sizes, weight) in enumerate(parts):
        name = f"set{number}"
        one = StandIn(sizes=sizes, path=name, digest=name, class_names=[], num_shards=len(sizes))
        sets.append((one, weight))
    return Mixture(sets)


@settings(max_examples=40, deadline=None)
@given(weights=weight_lists, seed=st.integers(0, 2**63 - 1))
def test_shares_are_kept_at_every_place(weights: list[int], seed: int) -> None:
    pattern = Pattern(weights, seed)
    num_places = 3 * pattern.length + 7
    chosen = pattern.at(np.arange(num_places))
    counts = np.cumsum(chosen[:, None] == np.arange(len(weights)), 0)
    shares = np.arange(1, num_places + 1)[:, None] * (np.array(weights) / sum(weights))
    assert abs(counts - shares).max() <= 1 + 1e-9
    for place in (0, 1, 2, 3, pattern.length - 1, pattern.length, num_places // 2, num_places):
        expected = counts[place - 1] if place else np.zeros(len(weights))
        assert pattern.taken(place).tolist() == expected.tolist()


def test_decimals_are_kept_exactly_and_others_nearly() -> None:
    assert Pattern([0.7, 0.3], 0).counts.tolist() == [7, 3]
    assert Pattern([0.1, 0.2, 0.3], 0).counts.tolist() == [1, 2, 3]
    assert Pattern([5.0], 0).counts.tolist() == [2]
    odd = Pattern([np.pi, 1e-9, 1.0], 0)
    assert odd.length == 2**15 and odd.counts.min() == 1
    assert abs(odd.counts[0] / odd.length - np.pi / (np.pi + 1)) < 2 / odd.length


def test_neighbours_change_places_by_the_seed() -> None:
    place = np.arange(4000)
    chosen = [Pattern([1, 1], seed).at(place) for seed in (0, 0, 1)]
    assert np.array_equal(chosen[0], chosen[1]) and not np.array_equal(chosen[0], chosen[2])
    assert abs(chosen[0][::2].mean() - 0.5) < 0.05  # set 0 has no parity of its own


sizes_lists = st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(any)


@settings(max_examples=30, deadline=None)
@given(
    parts=st.lists(st.tuples(sizes_lists, st.integers(1, 9)), min_size=1, max_size=4),
    seed=st.integers(0, 2**62),
)
def test_each_sample_once_in_each_epoch_of_its_set(
    parts: list[tuple[list[int], float]], seed: int
) -> None:
    mixed = mixture(*parts)
    order = mixed.order(seed)
    num_epochs = 5
    stream = np.concatenate([order.ids(e, 0, order.num_positions) for e in range(num_epochs)])
    assert len(stream) == num_epochs * len(mixed)
    first = 0
    for (sizes, _), own_order in zip(parts, order._orders, strict=True):
        size = sum(sizes)
        own = stream[(stream >= first) & (stream < first + size)] - first
        for epoch, start in enumerate(range(0, len(own), size)):
            part = own[start : start + size]
            assert len(set(part.tolist())) == len(part)
            assert np.array_equal(part, own_order.ids(epoch, 0, size)[: len(part)])
        first += size


@settings(max_examples=30, deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**62))
def test_any_part_is_a_slice_of_the_whole(data: st.DataObject, seed: int) -> None:
    order = mixture(([5, 0, 7], 0.7), ([3], 0.2), ([4, 4, 4], 0.1)).order(seed)
    epoch = data.draw(st.integers(0, 10**6))
    start = data.draw(st.integers(0, order.num_positions))
    stop = data.draw(st.integers(start, order.num_positions))
    whole = order.ids(epoch, 0, order.num_positions)
    assert np.array_equal(order.ids(epoch, start, stop), whole[start:stop])


def test_ranks_share_the_global_batch() -> None:
    order = mixture(([40, 40], 2.0), ([30], 1.0)).order(3)
    whole = order.ids(1, 12, 24)
    for num_ranks in (1, 2, 3, 4, 6):
        micro = 12 // num_ranks
        parts = []
        for rank in range(num_ranks):
            mine = places(12, micro, World(rank, num_ranks, rank, num_ranks))
            parts.append(order.ids(1, int(mine[0]), int(mine[-1]) + 1))
        assert np.array_equal(np.concatenate(parts), whole)


def test_shards_are_those_of_the_samples() -> None:
    sizes = ([5, 6, 7, 8, 9], [3, 4, 5])
    order = mixture((sizes[0], 1.0), (sizes[1], 3.0)).order(0)
    shard_of = np.repeat(np.arange(8), [*sizes[0], *sizes[1]])
    for start in range(0, 40, 5):
        needed = set(shard_of[order.ids(2, start, start + 5)].tolist())
        found = order.shards(2, start, start + 5)
        assert needed <= set(found) and len(set(found)) == len(found)


def test_a_set_twice_has_two_orders() -> None:
    order = mixture(([50], 1.0), ([50], 1.0)).order(0)
    ids = order.ids(0, 0, 100)
    assert ids[ids < 50].tolist() != (ids[ids >= 50] - 50).tolist()


def test_resume_far_away_costs_nothing() -> None:
    order = mixture(([4096] * 500, 0.9), ([4096] * 30, 0.1)).order(0)
    assert len(order.ids(10**9, 1000, 1256)) == 256


@pytest.mark.parametrize("weights", [[0.0, 1.0], [-1.0], [float("nan")], [float("inf"), 1.0]])
def test_weights_that_are_none(weights: list[float]) -> None:
    with pytest.raises(ConfigError, match="give positive numbers"):
        mixture(*(([3], weight) for weight in weights))
    with pytest.raises(ConfigError, match="no sets"):
        Mixture([])


def test_a_mixture_of_real_sets_reads_their_samples(shard_set: ShardSet) -> None:
    mixed = Mixture([(shard_set, 1.0), (shard_set, 2.0)])
    assert len(mixed) == 42 and mixed.num_classes == 3
    ids = np.array([0, 20, 21, 41, 30])
    assert np.array_equal(mixed.sizes(ids), shard_set.sizes(ids % 21))
    assert np.array_equal(mixed.labels(ids), shard_set.labels(ids % 21))
    assert np.array_equal(mixed.label_N[ids], shard_set.label_N[ids % 21])
    assert np.array_equal(mixed.size_N2[ids], shard_set.size_N2[ids % 21])
    for i in ids.tolist():
        assert mixed.read(i) == shard_set.read(i % 21)
        assert np.array_equal(mixed[i], shard_set[i % 21])
        assert mixed.place(i) == shard_set.place(i % 21)
        assert mixed.source_of(i) == shard_set.source_of(i % 21)
    for wrong in (42, -1):
        with pytest.raises(IndexError):
            mixed[wrong]
        with pytest.raises(IndexError):
            mixed.sizes(np.array([wrong]))
    assert mixed.digest != Mixture([(shard_set, 1.0), (shard_set, 2.5)]).digest
    mixed.verify()


def test_labels_of_different_classes_are_none(shard_set: ShardSet) -> None:
    other = ShardSet.open(shard_set.path)
    other.class_names = ["a", "b", "c"]
    mixed = Mixture([(shard_set, 1.0), (other, 1.0)])
    assert mixed.num_classes == 0 and mixed.label_N.max() == -1
    assert mixed.labels(np.array([0, 30])).tolist() == [-1, -1]


def test_prefetch_reaches_the_right_set() -> None:
    asked: list[tuple[str, list[int], bool]] = []
    mixed = mixture(([1, 1], 1.0), ([1, 1, 1], 1.0), ([1], 1.0))
    for one in mixed.sets:
        one.prefetch = lambda *what, name=one.path: asked.append((name, *what))  # type: ignore[method-assign]
    mixed.prefetch([4, 0, 2], tolerant=True)
    assert asked == [("set0", [0], True), ("set1", [2, 0], True)]


def test_a_loader_takes_a_mixture(shard_set: ShardSet) -> None:
    mixed = open_sets(f"{shard_set.path}:0.75,{shard_set.path}:0.25")
    settings: dict[str, Any] = {"micro_batch_size": 4, "backend": "reference", "world": World()}
    policy = SimCLRPolicy(size=16)
    batches = iter(make_loader(mixed, policy, **settings))
    whole = [next(batches) for _ in range(12)]
    again = make_loader(mixed, policy, **settings)
    again.load_state_dict({"epoch": 0, "position": 16, "seed": 0, "digest": mixed.digest})
    resumed = next(iter(again))
    assert torch.equal(resumed.sample_id_B, whole[4].sample_id_B)
    assert torch.equal(resumed.views_VBCHW, whole[4].views_VBCHW)


def test_open_sets(shard_set: ShardSet, tmp_path: Path) -> None:
    assert isinstance(open_sets(str(shard_set.path)), ShardSet)
    (tmp_path / "a,b:1").symlink_to(shard_set.path)
    assert isinstance(open_sets(str(tmp_path / "a,b:1")), ShardSet)
    mixed = open_sets(f"{shard_set.path}:7, {shard_set.path}:3")
    assert isinstance(mixed, Mixture) and len(mixed) == 42
    assert mixed.path == f"{shard_set.path}:7,{shard_set.path}:3"
    for text in ("a,b:1", "a:1,b:0", "a:1,b:-2", "a:1,b:1e400", "a:1,b:--", "a:1,", ":1,a:1"):
        with pytest.raises(ConfigError, match=r"a:0\.7,b:0\.3"):
            open_sets(text)
    with pytest.raises(ShardError, match="no shard set"):
        open_sets("nowhere")
