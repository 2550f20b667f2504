"""A set decoded in memory is the same set: pixels, ids, digest, order, batches, damage."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from fastclr.config import ConfigError
from fastclr.world import World
from pipelines import memory
from pipelines.loader import make_loader
from pipelines.memory import InMemory
from pipelines.policy import SimCLRPolicy
from pipelines.shards import DamagedSample, ShardError, ShardSet
from tests.pipelines.fakes import FakeSet

SIZES = (40, 50, 60)


class Even(FakeSet):
    """Images of one size."""

    def sizes(self, sample_ids: np.ndarray) -> np.ndarray:
        return np.full((len(sample_ids), 2), (6, 8), np.int32)


@pytest.fixture(autouse=True)
def _no_thread_leaks() -> Iterator[None]:
    yield
    deadline = time.monotonic() + 10
    while any(
        t.name.startswith(("fastclr-decode", "fastclr-loader")) for t in threading.enumerate()
    ):
        assert time.monotonic() < deadline, "threads leak"
        time.sleep(0.01)


@pytest.mark.parametrize("kind", [FakeSet, Even])
@pytest.mark.parametrize("num_threads", [1, 3])
def test_it_is_the_same_set(kind: type[FakeSet], num_threads: int) -> None:
    images = kind(SIZES, 2)
    done: list[int] = []
    decoded = InMemory(images, num_threads=num_threads, progress=done.append)
    assert len(decoded) == 150 == sum(done) and len(done) == 3
    assert decoded.digest == images.digest and sorted(images.reads) == list(range(150))
    ids_N = np.arange(150)
    for sample_id in ids_N.tolist():
        assert np.array_equal(decoded[sample_id], images.pixels(sample_id))
    assert decoded.num_bytes == sum(decoded[i].nbytes for i in range(150))
    assert np.array_equal(decoded.sizes(ids_N), images.sizes(ids_N))
    assert np.array_equal(decoded.labels(ids_N), images.labels(ids_N))
    assert np.array_equal(decoded.order(3).ids(2, 0, 150), images.order(3).ids(2, 0, 150))
    assert decoded.place(7) == images.place(7)
    decoded.prefetch([0, 1])
    assert images.hints == [] and len(images.reads) == 150, "the images were read again"


def test_batches_and_positions_are_the_same(shard_set: ShardSet) -> None:
    found = []
    for images in (shard_set, InMemory(shard_set)):
        loader = make_loader(
            images, SimCLRPolicy(size=20), micro_batch_size=4, seed=3, world=World()
        )
        found.append([*itertools.islice(loader, 7), loader.state_dict()])
    for one, other in zip(found[0][:-1], found[1][:-1], strict=True):
        assert torch.equal(one.views_VBCHW, other.views_VBCHW)
        assert torch.equal(one.sample_id_B, other.sample_id_B)
    assert found[0][-1] == found[1][-1]


def test_equal_sizes_are_one_array() -> None:
    decoded = InMemory(Even(SIZES))
    assert decoded[3].base is decoded[140].base is not None


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_does_not_fit_is_refused_with_numbers(
    ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = Even(SIZES)
    needed = 150 * 6 * 8 * 3
    monkeypatch.setattr(memory, "free_memory", lambda: 2 * ranks * needed)
    assert InMemory(images, num_local_ranks=ranks).num_bytes == needed
    images.reads.clear()
    monkeypatch.setattr(memory, "free_memory", lambda: 2 * ranks * needed - 1)
    with pytest.raises(ConfigError, match=rf"150 images decoded are .* GiB.* for {ranks} ranks"):
        InMemory(images, num_local_ranks=ranks)
    assert not images.reads


def test_damage_raises_at_the_lowest_id() -> None:
    images = FakeSet(SIZES, damage={130: "cut", 70: "inside", 71: "cut"})
    with pytest.raises(DamagedSample, match="key 000000070 does not decode"):
        InMemory(images, num_threads=3)


@pytest.mark.parametrize("kind", [FakeSet, Even])
def test_damage_is_left_to_the_loader(kind: type[FakeSet]) -> None:
    damage = {130: "cut", 70: "inside"}
    images = kind(SIZES, 2, damage)
    decoded = InMemory(images, on_damage="replace", most_damaged=2)
    with pytest.raises(DamagedSample, match=r"key 000000070 does not decode.*\. It was whole") as e:
        decoded[70]
    assert str(e.value).count("It was whole") == 1
    batches = []
    for one in (images, decoded):
        loader = make_loader(
            one,
            SimCLRPolicy(size=12),
            micro_batch_size=25,
            backend="kornia",
            on_damage="replace",
            world=World(),
        )
        batches.append(list(itertools.islice(loader, 6)))
        assert sorted(loader.damaged) == [70, 130]
    for a, b in zip(*batches, strict=True):
        assert torch.equal(a.views_VBCHW, b.views_VBCHW)
        assert torch.equal(a.sample_id_B, b.sample_id_B)


def test_too_much_damage_is_an_error() -> None:
    images = FakeSet(SIZES, damage={130: "cut", 70: "inside"})
    with pytest.raises(ShardError, match=r"2 images .*data\.most_damaged is 1") as error:
        InMemory(images, on_damage="replace", most_damaged=1)
    assert "key 000000130" in str(error.value)


def test_what_cannot_be_read_raises() -> None:
    with pytest.raises(ShardError, match="the disk is gone"):
        InMemory(FakeSet(SIZES, damage={5: "unreadable"}), on_damage="replace")


def test_bytes_are_refused() -> None:
    with pytest.raises(ConfigError, match="in memory are decoded"):
        InMemory(Even((3,))).read(0)
