"""The loader's place in the data: each id once, exact resume on any number of ranks, hints."""

from __future__ import annotations

import itertools
import json
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from fastclr.batch import Batch
from fastclr.config import ConfigError
from fastclr.world import World
from pipelines.augment_kornia import augment as kornia
from pipelines.backends import BACKENDS
from pipelines.order import permutation
from pipelines.shards import ShardError, ShardSet
from tests.pipelines.fakes import FakeSet, ParamsBackend
from tests.pipelines.loaders import (
    POLICY,
    chunked,  # noqa: F401
    ids,
    make,
    make_many,
    no_thread_leaks,  # noqa: F401
    same,
    take,
    wait_for_no_threads,
)

pytestmark = pytest.mark.usefixtures("no_thread_leaks")


@pytest.fixture(scope="module")
def uninterrupted(shard_set: ShardSet) -> list[Batch]:
    """Two epochs and a bit: 5 batches of 4 in an epoch of 21."""
    return take(make(shard_set), 12)


def test_views_are_the_policys(shard_set: ShardSet, uninterrupted: list[Batch]) -> None:
    """Batch 7 is positions 8..11 of epoch 1, drawn and augmented by hand."""
    sample_ids = permutation(21, 3, 1)[8:12]
    batch = uninterrupted[7]
    assert batch.sample_id_B.tolist() == sample_ids.tolist()
    images = [shard_set[i] for i in sample_ids]
    for view in range(2):
        params = POLICY.draw(
            seed=3,
            epoch=1,
            positions=np.arange(8, 12),
            view=view,
            sizes_N2=shard_set.size_N2[sample_ids],
        )
        expected = kornia(images, params, POLICY, torch.device("cpu"))
        assert torch.equal(batch.views_VBCHW[view], expected.permute(0, 3, 1, 2))


def test_an_epoch_holds_each_id_once(shard_set: ShardSet, uninterrupted: list[Batch]) -> None:
    loader = make(shard_set)
    assert loader.batches_per_epoch == 5 and loader.dropped_per_epoch == 1
    epochs = [ids(uninterrupted[k : k + 5]) for k in (0, 5)]
    assert all(len(set(epoch)) == 20 for epoch in epochs)
    assert epochs[0] != epochs[1]
    whole = make(shard_set, micro=7)
    assert whole.dropped_per_epoch == 0
    assert sorted(ids(take(whole, 3))) == list(range(21))


def test_the_global_order_is_the_same_on_two_ranks(
    shard_set: ShardSet, uninterrupted: list[Batch]
) -> None:
    ranks = [take(make(shard_set, micro=2, ranks=2, rank=r), 7) for r in range(2)]
    for one, parts in zip(uninterrupted[:7], zip(*ranks, strict=True), strict=True):
        assert torch.equal(one.sample_id_B, torch.cat([p.sample_id_B for p in parts]))
        assert torch.equal(one.views_VBCHW, torch.cat([p.views_VBCHW for p in parts], 1))


@pytest.mark.parametrize("stop", [0, 1, 4, 5, 6, 10])
def test_resume_equals_uninterrupted(
    shard_set: ShardSet, uninterrupted: list[Batch], stop: int
) -> None:
    first = make(shard_set)
    assert same(take(first, stop), uninterrupted[:stop])
    second = make(shard_set)
    second.load_state_dict(first.state_dict())
    assert same(take(second, 12 - stop), uninterrupted[stop:])


def test_the_position_counts_what_was_handed_out_not_what_was_prepared(
    shard_set: ShardSet,
) -> None:
    loader = make(shard_set, prefetch=4)
    batches = iter(loader)
    positions = [loader.state_dict()] + [loader.state_dict() for _ in itertools.islice(batches, 6)]
    batches.close()  # type: ignore[attr-defined]
    assert [(p["epoch"], p["position"]) for p in positions] == [
        (0, 0),
        (0, 4),
        (0, 8),
        (0, 12),
        (0, 16),
        (0, 20),
        (1, 4),
    ]


def test_an_iterator_goes_on_where_the_last_one_stopped(
    shard_set: ShardSet, uninterrupted: list[Batch]
) -> None:
    loader = make(shard_set)
    assert same(take(loader, 3) + take(loader, 4), uninterrupted[:7])


def test_two_ranks_go_on_after_one(shard_set: ShardSet, uninterrupted: list[Batch]) -> None:
    one = make(shard_set)
    take(one, 6)
    parts = []
    for rank in range(2):
        loader = make(shard_set, micro=2, ranks=2, rank=rank)
        loader.load_state_dict(one.state_dict())
        parts.append(take(loader, 3))
        assert loader.state_dict() == {**one.state_dict(), "position": 16}
    for whole, a, b in zip(uninterrupted[6:9], *parts, strict=True):
        assert torch.equal(whole.views_VBCHW, torch.cat([a.views_VBCHW, b.views_VBCHW], 1))


def test_three_ranks_go_on_at_a_position_of_another_batch_size(shard_set: ShardSet) -> None:
    one = make(shard_set)
    take(one, 1)
    found = []
    for rank in range(3):
        loader = make(shard_set, micro=2, ranks=3, rank=rank)
        loader.load_state_dict(one.state_dict())
        found.append(take(loader, 3))
    order = permutation(21, 3, 0)
    for t in range(2):  # 17 are left: two batches of 6, then the next epoch
        assert ids([f[t] for f in found]) == order[4 + 6 * t : 10 + 6 * t].tolist()
    assert ids([f[2] for f in found]) == permutation(21, 3, 1)[:6].tolist()


@pytest.mark.parametrize(("key", "value"), [("seed", 4), ("digest", "0" * 64)])
def test_a_position_of_other_data_is_refused(shard_set: ShardSet, key: str, value: object) -> None:
    loader = make(shard_set)
    with pytest.raises(ConfigError, match=f"data {key} is {value}"):
        loader.load_state_dict({**loader.state_dict(), "position": 8, key: value})
    assert loader.state_dict()["position"] == 0


@pytest.mark.parametrize(("num_threads", "prefetch"), [(1, 1), (1, 7), (4, 1), (4, 9)])
def test_threads_and_prefetch_change_nothing(
    shard_set: ShardSet, uninterrupted: list[Batch], num_threads: int, prefetch: int
) -> None:
    loader = make(shard_set, num_threads=num_threads, prefetch=prefetch)
    assert same(take(loader, 7), uninterrupted[:7])


def test_the_seed_changes_order_and_views(shard_set: ShardSet, uninterrupted: list[Batch]) -> None:
    other = take(make(shard_set, seed=4), 5)
    assert ids(other) != ids(uninterrupted[:5])


def test_a_damaged_image_surfaces_and_the_position_stays(
    shard_set: ShardSet, uninterrupted: list[Batch], tmp_path: Path
) -> None:
    packed = ShardSet.open(shutil.copytree(shard_set.path, tmp_path / "train"))
    tar = tmp_path / "train" / "train-000001.tar"
    tar.write_bytes(bytes(tar.stat().st_size))
    good = next(k for k, b in enumerate(uninterrupted) if set(range(8, 16)) & set(ids([b])))
    loader = make(packed)
    batches = iter(loader)
    assert same(list(itertools.islice(batches, good)), uninterrupted[:good])
    with pytest.raises(ShardError, match=r"train-000001\.tar, key 0000000\d\d \(from "):
        next(batches)
    assert loader.state_dict()["position"] == 4 * good
    wait_for_no_threads()
    with pytest.raises(StopIteration):
        next(batches)


def test_more_than_the_data_is_refused(shard_set: ShardSet) -> None:
    with pytest.raises(ConfigError, match="has 21 samples and a global batch 22"):
        make(shard_set, micro=11, ranks=2)


def test_the_launcher_says_which_rank(shard_set: ShardSet, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert make(shard_set, world=None).world == World(1, 2, 1, 2)


def test_1000_places_are_the_same_on_any_ranks_and_after_resume_on_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """420 samples in 60 shards, windows of 7 shards: 840 places are two whole epochs, 160 more."""
    images = FakeSet([7] * 60, window=7)
    monkeypatch.setitem(BACKENDS, "pixels", lambda p, d, n: ParamsBackend(p, 16))
    micro_of = {1: 84, 2: 42, 3: 28, 4: 21, 7: 12}  # batches of 84

    def batches(ranks: int, first: int, last: int) -> tuple[torch.Tensor, torch.Tensor]:
        loaders = [make_many(images, micro_of[ranks], ranks, r) for r in range(ranks)]
        for loader in loaders:
            start = {"epoch": first // 5, "position": first % 5 * 84}
            loader.load_state_dict({**loader.state_dict(), **start})
        parts = list(zip(*(take(loader, last - first) for loader in loaders), strict=True))
        flat = [batch for part in parts for batch in part]
        state = loaders[0].state_dict()
        assert all(loader.state_dict() == state for loader in loaders)
        assert (state["epoch"] * 5 + state["position"] // 84) == last
        return torch.cat([b.sample_id_B for b in flat]), torch.cat([b.views_VBCHW for b in flat], 1)

    num_batches = -(-1000 // 84)
    ids_X, views_X = batches(1, 0, num_batches)
    assert len(ids_X) >= 1000
    order = images.order(3)
    expected = [order.ids(epoch, 0, 420) for epoch in range(3)]
    assert ids_X.tolist() == np.concatenate(expected)[: len(ids_X)].tolist()
    for ranks in (2, 3, 4, 7):
        found_X, found_views_X = batches(ranks, 0, num_batches)
        assert torch.equal(found_X, ids_X) and torch.equal(found_views_X, views_X)
    for before, after, stop in [(1, 7, 3), (7, 2, 5), (3, 4, 11)]:
        parts = [batches(before, 0, stop), batches(after, stop, num_batches)]
        assert torch.equal(torch.cat([ids for ids, _ in parts]), ids_X)
        assert torch.equal(torch.cat([views for _, views in parts], 1), views_X)


class Huge(FakeSet):
    """10^9 samples in 10^5 shards."""

    def __init__(self) -> None:
        super().__init__(np.full(100_000, 10_000).tolist())

    def __len__(self) -> int:
        return 10**9


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("position", [0, 123_456_789, 10**9 - 3])
def test_resume_in_a_billion_samples_is_instant(position: int) -> None:
    images = Huge()
    started = time.perf_counter()
    loader = make_many(images, 4, 2, 1)
    loader.load_state_dict({**loader.state_dict(), "epoch": 70, "position": position})
    (batch,) = take(loader, 1)
    assert time.perf_counter() - started < 1
    state = loader.state_dict()
    assert len(json.dumps(state)) < 200 and json.loads(json.dumps(state)) == state
    place = (70, position) if position + 8 <= 10**9 else (71, 0)
    expected = images.order(3).ids(place[0], place[1] + 4, place[1] + 8)
    assert batch.sample_id_B.tolist() == expected.tolist()
    assert (state["epoch"], state["position"]) == (place[0], place[1] + 8)


@pytest.mark.usefixtures("chunked")
def test_a_state_of_another_version_is_refused() -> None:
    loader = make_many(FakeSet((9,)), 3)
    state = {**loader.state_dict(), "position": 3}
    with pytest.raises(ConfigError, match="loader state has version 2, this fastclr reads 1"):
        loader.load_state_dict({**state, "version": 2})
    del state["version"]  # as the first ones were written
    loader.load_state_dict(state)
    assert loader.state_dict()["position"] == 3


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("micro", [1, 5, 17, 30])
def test_the_set_is_told_of_every_window_before_it_is_read(micro: int) -> None:
    class Watched(FakeSet):
        def pixels(self, sample_id: int) -> np.ndarray:
            shard = int(np.searchsorted(np.cumsum(self.shard_sizes), sample_id, "right"))
            with lock:
                early.append(any(shard in hint for hint in self.hints))
            return super().pixels(sample_id)

    early: list[bool] = []
    lock = threading.Lock()
    images = Watched([3] * 40, window=4)  # ten windows of 12 samples
    loader = make_many(images, micro)
    count = 2 * loader.batches_per_epoch
    take(loader, count)
    assert len(early) >= count * micro and all(early)
    order = images.order(3)
    windows = [order.shards(e, p, p + 1) for e in range(3) for p in range(0, 120, 12)]
    told = len(images.hints)
    assert images.hints == windows[:told], "each once, in order, on into the next epoch"
    assert told > 20


@pytest.mark.usefixtures("chunked")
def test_hints_come_one_window_ahead_also_after_resume() -> None:
    images = FakeSet([3] * 40, window=4)
    loader = make_many(images, 6, num_threads=1, prefetch=1)
    loader.load_state_dict({**loader.state_dict(), "epoch": 1, "position": 102})
    batches = iter(loader)
    next(batches)  # 102..107 is in window 8; 108..113, prepared ahead, in the last one
    order = images.order(3)
    windows = [order.shards(1, p, p + 1) for p in (96, 108)] + [order.shards(2, 0, 1)]
    assert images.hints == windows
    batches.close()  # type: ignore[attr-defined]
