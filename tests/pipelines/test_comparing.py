"""A local tar that is not the one of its manifest ends the reading soon after it began."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fastclr.world import World
from pipelines.comparing import Comparison
from pipelines.errors import ShardError
from pipelines.loader import make_loader
from pipelines.memory import InMemory
from pipelines.mixture import open_sets
from pipelines.policy import SimCLRPolicy
from pipelines.shards import ShardSet


@pytest.fixture
def damaged(shard_set: ShardSet, tmp_path: Path) -> Path:
    """A copy of the set with one bit flipped in the last tar, where no image is: after its end."""
    packed = shutil.copytree(shard_set.path, tmp_path / "packed")
    tar = max(packed.glob("*.tar"))
    data = bytearray(tar.read_bytes())
    data[-1] ^= 1
    tar.write_bytes(data)
    return packed


def raises_within(seconds: float, call: Callable[[], object]) -> str:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            call()
        except ShardError as error:
            return str(error)
        time.sleep(0.01)
    raise AssertionError("nothing was noticed")


def test_a_loader_ends_with_the_tars_name(damaged: Path) -> None:
    images = ShardSet.open(damaged)
    assert [len(images.read(i)) > 0 for i in range(len(images))] == [True] * len(images)
    batches = iter(make_loader(images, SimCLRPolicy(size=16), micro_batch_size=4))
    said = raises_within(20, lambda: next(batches))
    assert "train-000002.tar" in said and "sha256" in said
    with pytest.raises(ShardError, match="000002"):
        images.read(0)


def test_where_damage_is_replaced_it_is_told_and_the_run_goes_on(
    damaged: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images = ShardSet.open(damaged)
    loader = make_loader(images, SimCLRPolicy(size=16), micro_batch_size=4, on_damage="replace")
    batches = iter(loader)
    deadline = time.monotonic() + 20
    while not caplog.records:
        next(batches)
        assert time.monotonic() < deadline, "nothing was noticed"
    next(batches)
    (record,) = caplog.records
    assert "train-000002.tar" in record.message and record.message.endswith("is read as it is.")


@pytest.mark.parametrize("wrap", [InMemory, lambda images: images])
def test_sets_in_memory_and_mixtures_too(
    damaged: Path, shard_set: ShardSet, wrap: Callable
) -> None:
    mixed = open_sets(f"{shard_set.path}:0.5,{damaged}:0.5")
    mixed.compare(range(mixed.num_shards))
    images = wrap(mixed)
    everything = np.arange(len(images))
    assert "000002" in raises_within(20, lambda: images.labels(everything))


def test_a_whole_set_is_read_through_and_its_tars_once(
    shard_set: ShardSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = ShardSet.open(shard_set.path)
    storage, verified = images._storage, []
    verify = storage.verify
    storage._comparison._verify = lambda n: (verified.append(n), verify(n))  # type: ignore[attr-defined]
    loader = make_loader(images, SimCLRPolicy(size=16), micro_batch_size=4)
    for _, _ in zip(range(3 * loader.batches_per_epoch), loader, strict=False):
        pass
    deadline = time.monotonic() + 10
    while len(verified) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert sorted(verified) == [0, 1, 2]


def test_the_ranks_of_a_machine_share_the_tars(
    damaged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for rank in range(2):
        images = ShardSet.open(damaged)
        monkeypatch.setattr(World, "detect", lambda rank=rank: World(rank, 2, rank, 2))
        images._storage._comparison._verify = lambda n, rank=rank: found.append((rank, n))  # type: ignore[attr-defined]
        images.compare(range(3))
        images.compare(range(3))
    deadline = time.monotonic() + 10
    while len(found) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert sorted(found) == [(0, 0), (0, 2), (1, 1)]


def test_one_thread_that_ends_and_begins_again() -> None:
    running, seen = threading.Semaphore(0), []

    def verify(number: int) -> None:
        running.acquire()
        seen.append((number, threading.current_thread().name))
        if number == 5:
            raise ShardError("five")

    comparison = Comparison(verify)
    for numbers in ([1, 2], [2, 3], [5, 6]):
        comparison.begin(numbers)
    assert sum(t.name == "fastclr-compare" for t in threading.enumerate()) == 1
    comparison.check()
    running.release(3)
    while len(seen) < 3:
        time.sleep(0.01)
    comparison.check()
    running.release(9)
    while not comparison.problem:
        time.sleep(0.01)
    with pytest.raises(ShardError, match="five"):
        comparison.check()
    comparison.begin([7])
    time.sleep(0.1)
    assert [number for number, _ in seen] == [1, 2, 3, 5]
