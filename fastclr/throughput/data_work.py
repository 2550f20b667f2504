"""The loader's stages: what they take in the threads of a run, and how fast each is alone."""

from __future__ import annotations

import itertools
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from pipelines import shards
from pipelines.decode import decode
from pipelines.loader import Loader
from pipelines.memory import InMemory

READ, DECODE, AUGMENT = "read", "decode", "augment"
READ_DECODE = "read and decode"  # of small PNGs, which are both in one call
DECODE_AUGMENT = "decode and augment"  # of a back-end that is given encoded images
MOST_BYTES = 2**28  # kept in memory for a stage alone


class Work:
    """Seconds that the loader's threads spent in each stage, summed over threads.

    Attributes:
        is_on: Whether what begins now counts.
        seconds: By stage.
    """

    def __init__(self) -> None:
        self.is_on = False
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._lock = threading.Lock()

    def timed(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function whose calls count."""

        def call(*args: Any, **kwargs: Any) -> Any:
            if not self.is_on:
                return function(*args, **kwargs)
            before = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                passed = time.perf_counter() - before
                with self._lock:
                    self.seconds[stage] += passed

        return call


class _Timed:
    """A back-end whose calls count; everything else is its own."""

    def __init__(self, backend: Any, call: Callable[..., Any]) -> None:
        self._backend, self._call = backend, call

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def __call__(self, *args: Any) -> torch.Tensor:
        return self._call(*args)


@contextmanager
def watched(loader: Loader, work: Work) -> Iterator[None]:
    """Count the work of a loader's threads in here."""
    backend, read, decode_ = loader._backend, shards.ShardSet._read, shards.decode
    small = shards.ShardSet.images
    stage = DECODE_AUGMENT if backend.takes_bytes else AUGMENT
    timed: Any = _Timed(backend, work.timed(stage, backend))
    loader._backend = timed
    shards.ShardSet._read = work.timed(READ, read)
    shards.decode = work.timed(DECODE, decode_)
    shards.ShardSet.images = work.timed(READ_DECODE, small)
    try:
        yield
    finally:
        loader._backend, shards.ShardSet._read, shards.decode = backend, read, decode_
        shards.ShardSet.images = small


def alone(loader: Loader, seconds: float) -> dict[str, float]:
    """Return images a second of each stage by itself, in as many threads as the loader's.

    Args:
        loader: Not in use.
        seconds: How long each is measured.
    """
    images = loader.shard_set
    ids = _some_ids(loader)
    chunks = [ids[k : k + loader.chunk] for k in range(0, len(ids), loader.chunk)]
    takes_bytes = loader._backend.takes_bytes
    found = {}
    encoded = {} if isinstance(images, InMemory) else {i: images.read(i) for i in ids}
    if encoded and not takes_bytes and _are_small(images, ids):
        found[READ_DECODE] = _rate(
            loader, chunks, lambda c: images.images(np.array(c, np.int64)), seconds
        )
    elif encoded:
        found[READ] = _rate(loader, chunks, lambda c: [images.read(i) for i in c], seconds)
        if not takes_bytes:
            found[DECODE] = _rate(
                loader, chunks, lambda c: [decode(encoded[i]) for i in c], seconds
            )
    sources: dict[int, Any] = encoded if takes_bytes else {i: images[i] for i in ids}

    def augment(chunk: Sequence[int]) -> None:
        rows = np.array(chunk, np.int64)
        loader._backend([sources[i] for i in chunk], loader.draw(0, rows, rows))

    stage = DECODE_AUGMENT if takes_bytes else AUGMENT
    found[stage] = _rate(loader, chunks, augment, seconds)
    return found


def _are_small(images: Any, ids: Sequence[int]) -> bool:
    """Whether most samples are small PNGs, which the loader reads and decodes at once."""
    found = images.images(np.array(ids, np.int64))
    return 2 * sum(image is not None for image in found) > len(found)


def _some_ids(loader: Loader) -> list[int]:
    """Choose samples whose pixels fit in memory: a few chunks for each thread."""
    wanted = 2 * loader._num_threads * loader.chunk
    total = len(loader.shard_set)
    ids = np.linspace(0, total - 1, min(total, wanted)).astype(np.int64)
    num_bytes = 3 * loader.shard_set.sizes(ids).astype(np.int64).prod(1)
    fitting = int(np.searchsorted(num_bytes.cumsum(), MOST_BYTES)) + 1
    return ids[:fitting].tolist()


def _rate(
    loader: Loader,
    chunks: Sequence[Sequence[int]],
    work: Callable[[Sequence[int]], object],
    seconds: float,
) -> float:
    """Return images a second of a function of chunks, in threads."""
    work(chunks[0])  # compiles, fills caches
    turns = itertools.cycle(chunks)
    lock, done = threading.Lock(), 0
    on_cuda = loader.device.type == "cuda"
    started = time.perf_counter()

    def until_the_end(_: int) -> None:
        nonlocal done
        while time.perf_counter() - started < seconds:
            with lock:
                chunk = next(turns)
            work(chunk)
            with lock:
                done += len(chunk)

    with ThreadPoolExecutor(loader._num_threads) as pool:
        list(pool.map(until_the_end, range(loader._num_threads)))
    if on_cuda:
        torch.cuda.synchronize()
    return done / (time.perf_counter() - started)
