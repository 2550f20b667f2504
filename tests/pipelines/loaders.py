"""Loaders of a small packed set and of one in memory, and what their tests look at."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fastclr.batch import Batch
from fastclr.world import World
from pipelines.backends import BACKENDS
from pipelines.loader import Loader, make_loader
from pipelines.policy import SimCLRPolicy
from pipelines.shards import ShardSet
from tests.pipelines.fakes import FakeSet, ParamsBackend

POLICY = SimCLRPolicy(size=20, color_strength=0.5)
SMALL = SimCLRPolicy(size=12)
THREADS = "fastclr-loader"


def make(shard_set: ShardSet, micro: int = 4, ranks: int = 1, rank: int = 0, **more: Any) -> Loader:
    world = World(rank, ranks, rank, ranks)
    settings = {"seed": 3, "num_threads": 2, "prefetch": 2, "world": world, "backend": "kornia"}
    return make_loader(shard_set, POLICY, micro_batch_size=micro, **settings | more)


def make_many(images: FakeSet, micro: int, ranks: int = 1, rank: int = 0, **more: Any) -> Loader:
    settings = {"backend": "pixels", "seed": 3, "num_threads": 2, "prefetch": 2}
    settings |= {"world": World(rank, ranks, rank, ranks)} | more
    return make_loader(images, SMALL, micro_batch_size=micro, **settings)


def take(loader: Loader, n: int) -> list[Batch]:
    return list(itertools.islice(loader, n))


def ids(batches: list[Batch]) -> list[int]:
    return torch.cat([b.sample_id_B for b in batches]).tolist()


def same(a: list[Batch], b: list[Batch]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x.views_VBCHW, y.views_VBCHW)
        and torch.equal(x.label_B, y.label_B)
        and torch.equal(x.sample_id_B, y.sample_id_B)
        for x, y in zip(a, b, strict=True)
    )


def wait_for_no_threads() -> None:
    deadline = time.monotonic() + 10
    while any(t.name.startswith(THREADS) for t in threading.enumerate()):
        assert time.monotonic() < deadline, "loader threads leak"
        time.sleep(0.01)


@pytest.fixture
def no_thread_leaks() -> Iterator[None]:
    yield
    wait_for_no_threads()


@pytest.fixture
def chunked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Back-ends that take two images at a time and write down the numbers they got."""
    for name, takes_bytes in {"pixels": False, "bytes": True}.items():
        monkeypatch.setitem(
            BACKENDS, name, lambda p, d, n, takes=takes_bytes: ParamsBackend(p, 2, takes)
        )
