"""Damaged samples: raised, or replaced the same way on any ranks, batches and threads."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastclr.config import ConfigError
from fastclr.world import World
from pipelines.backends import BACKENDS
from pipelines.damage import Damage
from pipelines.loader import Loader, make_loader
from pipelines.policy import SimCLRPolicy
from pipelines.shards import DamagedSample, ShardError
from tests.pipelines.fakes import FakeSet, ParamsBackend

POLICY = SimCLRPolicy(size=12)
SIZES = (7, 3, 9, 1, 4, 6)  # 30 samples
KINDS = ("cut", "inside", "another size")


@pytest.fixture(autouse=True)
def _backends(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Back-ends whose views tell the numbers that were drawn; no thread outlives its test."""
    for name, takes_bytes in {"pixels": False, "bytes": True}.items():
        monkeypatch.setitem(
            BACKENDS, name, lambda p, d, n, takes=takes_bytes: ParamsBackend(p, 2, takes)
        )
    yield
    deadline = time.monotonic() + 10
    while any(t.name.startswith("fastclr-loader") for t in threading.enumerate()):
        assert time.monotonic() < deadline, "loader threads leak"
        time.sleep(0.01)


def make(images: FakeSet, micro: int = 5, ranks: int = 1, rank: int = 0, **more: Any) -> Loader:
    settings = {"seed": 3, "num_threads": 2, "prefetch": 2, "backend": "pixels"}
    settings |= {"on_damage": "replace", "world": World(rank, ranks, rank, ranks)} | more
    return make_loader(images, POLICY, micro_batch_size=micro, **settings)


def epochs(
    images: FakeSet, num: int, micro: int, ranks: int, **more: Any
) -> tuple[list[int], torch.Tensor]:
    """Ids and views of whole epochs over all ranks, in the order of the positions."""
    loaders = [make(images, micro, ranks, r, **more) for r in range(ranks)]
    count = num * loaders[0].batches_per_epoch
    parts = zip(*(itertools.islice(loader, count) for loader in loaders), strict=True)
    batches = [batch for part in parts for batch in part]
    ids = torch.cat([b.sample_id_B for b in batches])
    for batch in batches:
        assert batch.label_B.tolist() == (batch.sample_id_B % 7).tolist()
    return ids.tolist(), torch.cat([b.views_VBCHW for b in batches], 1)


def expected_ids(images: FakeSet, epoch: int) -> list[int]:
    """The rule, written out: the next whole sample after a position, wrapping in the epoch."""
    order = images.order(3).ids(epoch, 0, len(images)).tolist()
    return [
        next(i for i in order[p:] + order[:p] if i not in images.damage) for p in range(len(order))
    ]


@pytest.mark.parametrize("backend", ["pixels", "bytes"])
def test_the_next_good_sample_takes_the_place(backend: str) -> None:
    order = FakeSet(SIZES, 2).order(3).ids(0, 0, 30).tolist()
    # Two in a row, the last of the epoch, and the first sample of the epoch after it.
    bad = {order[4]: "cut", order[5]: "inside", order[29]: "another size", order[11]: "inside"}
    images = FakeSet(SIZES, 2, bad)
    found, views = epochs(images, 2, 5, 1, backend=backend)
    assert found[:30] == expected_ids(images, 0) and found[30:] == expected_ids(images, 1)
    assert (found[4], found[5], found[29]) == (order[6], order[6], order[0])
    for position, sample_id in enumerate(found[:30]):  # its numbers, drawn for the size of that
        size_N2 = images.sizes(np.array([sample_id]))
        place = {"seed": 3, "epoch": 0, "positions": np.array([position])}
        params = [POLICY.draw(**place, view=v, sizes_N2=size_N2) for v in (0, 1)]
        one = ParamsBackend([POLICY])([images.pixels(sample_id)], params)
        assert torch.equal(views[:, position], one[:, 0].permute(0, 3, 1, 2))
    assert not torch.equal(views[:, 4], views[:, 6])


@settings(max_examples=8, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("backend", ["pixels", "bytes"])
def test_ranks_batches_and_threads_change_nothing(backend: str, data: st.DataObject) -> None:
    bad = data.draw(st.dictionaries(st.integers(0, 29), st.sampled_from(KINDS), max_size=29))
    ranks, micro = data.draw(st.sampled_from([(1, 1), (1, 30), (2, 3), (3, 5), (5, 2), (6, 1)]))
    images = FakeSet(SIZES, 2, bad)
    threads, prefetch = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    found, views = epochs(
        images, 2, micro, ranks, backend=backend, num_threads=threads, prefetch=prefetch
    )
    assert found == expected_ids(images, 0) + expected_ids(images, 1)
    _, alone = epochs(images, 2, 10, 1)
    assert torch.equal(views, alone)


def test_back_ends_of_bytes_and_of_pixels_agree() -> None:
    bad = dict(zip((1, 8, 9, 20, 28), itertools.cycle(KINDS), strict=False))
    (ids_a, views_a), (ids_b, views_b) = (
        epochs(FakeSet(SIZES, 3, bad), 1, 6, 1, backend=name) for name in ("pixels", "bytes")
    )
    assert ids_a == ids_b and torch.equal(views_a, views_b)


def test_resume_replaces_alike() -> None:
    images = FakeSet(SIZES, 2, dict.fromkeys(range(0, 30, 4), "inside"))
    loader = make(images)
    ids = [b.sample_id_B.tolist() for b in itertools.islice(loader, 9)]
    state = make(images)
    list(itertools.islice(state, 4))
    second = make(images)
    second.load_state_dict(state.state_dict())
    assert [b.sample_id_B.tolist() for b in itertools.islice(second, 5)] == ids[4:]


@pytest.mark.parametrize("backend", ["pixels", "bytes"])
@pytest.mark.parametrize("kind", KINDS)
def test_raise_is_the_default(backend: str, kind: str) -> None:
    order = FakeSet(SIZES).order(3).ids(0, 0, 30)
    images = FakeSet(SIZES, damage={int(order[12]): kind})
    loader = make_loader(
        images, POLICY, micro_batch_size=5, seed=3, backend=backend, world=World(), num_threads=2
    )
    batches = iter(loader)
    assert len([next(batches), next(batches)]) == 2
    with pytest.raises(DamagedSample, match=rf"fake.tar, key {order[12]:09d} .*restore it or pack"):
        next(batches)
    assert loader.state_dict()["position"] == 10 and loader.num_damaged == 0


@pytest.mark.parametrize("backend", ["pixels", "bytes"])
def test_what_cannot_be_read_is_never_replaced(backend: str) -> None:
    images = FakeSet(SIZES, damage={7: "unreadable", 8: "cut"})
    with pytest.raises(ShardError, match="the disk is gone") as caught:
        list(itertools.islice(make(images, backend=backend), 6))
    assert not isinstance(caught.value, DamagedSample)


def test_each_is_counted_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    images = FakeSet(SIZES, 2, {3: "cut", 14: "inside"})
    loader = make(images, backend="bytes")
    with caplog.at_level(logging.WARNING):
        list(itertools.islice(loader, 18))  # three epochs
    assert sorted(loader.damaged) == [3, 14] and loader.num_damaged == 2
    assert len(caplog.records) == 2
    for sample_id in (3, 14):
        assert f"fake.tar, key {sample_id:09d}" in caplog.text
        assert f"key {sample_id:09d}" in loader.damaged[sample_id]
    assert images.reads.count(3) <= 4, "a damaged sample is read again each epoch"


def test_ranks_count_their_own() -> None:
    images = FakeSet(SIZES, 6, {3: "cut", 14: "inside", 21: "cut"})
    loaders = [make(images, 5, 2, r) for r in range(2)]
    for loader in loaders:
        list(itertools.islice(loader, 3))
    found = [set(loader.damaged) for loader in loaders]
    assert found[0] | found[1] == {3, 14, 21} and all(found)


def test_too_many_are_an_error() -> None:
    images = FakeSet(SIZES, damage=dict.fromkeys((2, 11, 23), "cut"))
    assert len(list(itertools.islice(make(images, most_damaged=3), 12))) == 12
    with pytest.raises(ShardError, match=r"3 samples are damaged, data.most_damaged is 2") as error:
        list(itertools.islice(make(images, most_damaged=2), 12))
    assert not isinstance(error.value, DamagedSample)
    with pytest.raises(ShardError, match=r"data\.most_damaged is 0"):
        list(itertools.islice(make(images, most_damaged=0), 12))


def test_nothing_but_damage_is_an_error() -> None:
    images = FakeSet(SIZES, damage=dict.fromkeys(range(30), "cut"))
    with pytest.raises(ShardError, match="all 30 samples are damaged"):
        next(iter(make(images)))


def test_a_back_end_that_refuses_a_batch_without_reason_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Moody(ParamsBackend):
        def __call__(self, images: Any, params: Any) -> torch.Tensor:
            from pipelines.decode import DamagedImage

            if len(images) > 1:
                raise DamagedImage("is in bad company")
            return super().__call__(images, params)

    monkeypatch.setitem(BACKENDS, "moody", lambda p, d, n: Moody(p))
    with pytest.raises(
        ShardError, match=r"back-end moody refuses .* none of them alone: is in bad"
    ):
        next(iter(make(FakeSet(SIZES), backend="moody")))


@pytest.mark.parametrize(("on_damage", "most"), [("skip", 1), ("replace", -1)])
def test_a_policy_that_is_none_is_refused(on_damage: Any, most: int) -> None:
    with pytest.raises(ConfigError, match=f"on_damage is '{on_damage}' and most_damaged {most}"):
        Damage(on_damage, most)


def test_threads_note_a_sample_once(caplog: pytest.LogCaptureFixture) -> None:
    damage = Damage("replace", 5)
    note: Callable[[], None] = lambda: damage.note(1, DamagedSample("x", "is bad"))  # noqa: E731
    threads = [threading.Thread(target=note) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(damage.found) == [1] and len(caplog.records) == 1
