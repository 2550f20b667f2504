"""The loader's back-ends and threads: right batches, errors that surface once, no leaks."""

from __future__ import annotations

import gc
import itertools
import threading
import time
import weakref
from typing import Any

import numpy as np
import pytest
import torch

from fastclr.config import ConfigError
from fastclr.world import World
from pipelines.augment_kornia import augment as kornia
from pipelines.backends import BACKENDS, ViewByView
from pipelines.loader import default_threads, make_loader
from pipelines.policy import SimCLRPolicy
from pipelines.shards import ShardSet
from tests.pipelines.fakes import FakeSet, ParamsBackend
from tests.pipelines.loaders import (
    POLICY,
    THREADS,
    chunked,  # noqa: F401
    make,
    make_many,
    no_thread_leaks,  # noqa: F401
    take,
    wait_for_no_threads,
)

pytestmark = pytest.mark.usefixtures("no_thread_leaks")


@pytest.mark.parametrize("backend", BACKENDS)
def test_batches_keep_the_contract(shard_set: ShardSet, backend: str) -> None:
    (batch,) = take(make(shard_set, backend=backend), 1)
    views = batch.check().views_VBCHW
    assert views.shape == (2, 4, 3, 20, 20) and views.dtype == torch.uint8
    for view in views:
        assert view.is_contiguous(memory_format=torch.channels_last)
    assert views.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
    assert not torch.equal(views[0], views[1]), "both views are the same"
    assert not views.is_inference(), "autograd could not use them"
    assert batch.label_B.tolist() == shard_set.label_N[batch.sample_id_B].tolist()


def test_each_view_may_have_its_own_policy(shard_set: ShardSet) -> None:
    still = SimCLRPolicy(size=20, flip_prob=0, jitter_prob=0, grayscale_prob=0, blur_prob=0)
    policies = [POLICY, still, POLICY]
    world = World()
    loader = make_loader(
        shard_set, policies, micro_batch_size=4, seed=3, world=world, backend="kornia"
    )
    assert loader.num_views == 3 and make(shard_set).num_views == 2
    (batch,) = take(loader, 1)
    assert batch.check().views_VBCHW.shape == (3, 4, 3, 20, 20)
    sample_ids = batch.sample_id_B.numpy()
    images = [shard_set[i] for i in sample_ids]
    for view, policy in enumerate(policies):
        params = policy.draw(
            seed=3,
            epoch=0,
            positions=np.arange(4),
            view=view,
            sizes_N2=shard_set.size_N2[sample_ids],
        )
        expected = kornia(images, params, policy, torch.device("cpu"))
        assert torch.equal(batch.views_VBCHW[view], expected.permute(0, 3, 1, 2))
    assert not torch.equal(batch.views_VBCHW[0], batch.views_VBCHW[2])


@pytest.mark.parametrize(
    "policies", [[POLICY], [], [POLICY, SimCLRPolicy(size=24)]], ids=["one", "none", "two sizes"]
)
def test_policies_that_make_no_batch_are_refused(shard_set: ShardSet, policies: Any) -> None:
    with pytest.raises(ConfigError, match="give two or more of one size"):
        make_loader(shard_set, policies, micro_batch_size=4, world=World())


def test_an_unknown_backend_is_refused(shard_set: ShardSet) -> None:
    with pytest.raises(
        ConfigError, match="backend 'dahli' is unknown: choose from threads, kornia"
    ):
        make(shard_set, backend="dahli")


def test_threads_default_to_this_ranks_part_of_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.loader.num_cores", lambda: 8)
    for local_ranks, expected in {1: 8, 3: 2, 16: 1}.items():
        assert default_threads(World(0, local_ranks, 0, local_ranks)) == expected


@pytest.mark.parametrize(
    ("threads", "prefetch", "chunk"), [(1, 0, 11), (2, 4, 21), (4, 1, 6), (64, 0, 1)]
)
def test_a_chunk_leaves_work_for_every_thread(
    shard_set: ShardSet, threads: int, prefetch: int, chunk: int
) -> None:
    """Two chunks a thread are ahead, whatever the back-end would like; 21 images are in the set."""
    loader = make_loader(
        shard_set, [SimCLRPolicy(size=16)] * 2, micro_batch_size=21, backend="threads",
        num_threads=threads, prefetch=prefetch, world=World(),
    )  # fmt: skip
    assert loader.chunk == chunk


def test_waiting_is_counted(shard_set: ShardSet, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(*arguments: Any) -> torch.Tensor:
        time.sleep(0.1)
        return kornia(*arguments)

    monkeypatch.setitem(
        BACKENDS, "slow", lambda policies, device, _: ViewByView(slow, policies, device)
    )
    loader = make(shard_set, backend="slow", num_threads=1, prefetch=1)
    assert loader.wait_seconds == 0
    take(loader, 2)
    assert loader.wait_seconds > 0.35  # two batches of two views
    before = loader.wait_seconds
    for _ in itertools.islice(loader, 1):
        pass
    assert loader.wait_seconds > before


@pytest.mark.usefixtures("chunked")
def test_memory_is_bounded_by_the_prefetched_batches() -> None:
    images = FakeSet([300])
    batches = iter(make_many(images, 5, num_threads=3, prefetch=4))
    next(batches)
    time.sleep(0.3)
    assert len(images.reads) == 25, "more than four batches ahead"
    batches.close()  # type: ignore[attr-defined]


# Stopped, or failing.


@pytest.mark.parametrize("how", ["close", "drop", "raise"])
def test_an_abandoned_iterator_stops_its_threads(shard_set: ShardSet, how: str) -> None:
    batches = iter(make(shard_set, num_threads=3))
    next(batches)
    assert any(t.name.startswith(THREADS) for t in threading.enumerate())
    if how == "close":
        batches.close()  # type: ignore[attr-defined]
    elif how == "raise":
        with pytest.raises(KeyboardInterrupt):
            batches.throw(KeyboardInterrupt)  # type: ignore[attr-defined]
    del batches
    wait_for_no_threads()


class Failing(ParamsBackend):
    """Fails, or hangs, at one call."""

    def __init__(self, policies: Any, at: int, event: threading.Event | None = None) -> None:
        super().__init__(policies)
        self.at, self.event = at, event
        self.numbers = itertools.count()

    def __call__(self, images: Any, params: Any) -> torch.Tensor:
        if next(self.numbers) == self.at:
            if self.event is None:
                raise FloatingPointError("a chunk breaks")
            self.event.wait(30)
        return super().__call__(images, params)


@pytest.mark.parametrize("num_threads", [1, 3])
def test_an_exception_in_one_chunk_surfaces_once(
    monkeypatch: pytest.MonkeyPatch, num_threads: int
) -> None:
    monkeypatch.setitem(BACKENDS, "failing", lambda p, d, n: Failing(p, 7))
    # Batches of 5 are 3 chunks: the 8th call is of the third batch, give or take a chunk.
    loader = make_many(FakeSet([30]), 5, backend="failing", num_threads=num_threads, prefetch=1)
    batches = iter(loader)
    done = 0
    with pytest.raises(FloatingPointError, match="a chunk breaks"):
        for _ in batches:
            done += 1
    assert done in ((2,) if num_threads == 1 else (1, 2, 3))
    assert loader.state_dict()["position"] == 5 * done
    assert list(batches) == [], "it surfaces again"
    wait_for_no_threads()
    assert take(loader, 1)[0].sample_id_B.tolist() == (
        FakeSet([30]).order(3).ids(0, 5 * done, 5 * done + 5).tolist()
    )


def test_a_chunk_that_hangs_does_not_block_the_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()
    monkeypatch.setitem(BACKENDS, "hanging", lambda p, d, n: Failing(p, 7, released))
    loader = make_many(FakeSet([30]), 5, backend="hanging", num_threads=2, prefetch=2)
    batches = iter(loader)
    next(batches)
    started = time.perf_counter()
    batches.close()  # type: ignore[attr-defined]
    assert time.perf_counter() - started < 1
    released.set()
    wait_for_no_threads()


@pytest.mark.usefixtures("chunked")
def test_a_loader_dropped_with_its_iterator_is_freed() -> None:
    loader = make_many(FakeSet([30]), 5, num_threads=3)
    batches = iter(loader)
    next(batches)
    gone = weakref.ref(loader)
    del batches, loader
    wait_for_no_threads()
    gc.collect()
    assert gone() is None
