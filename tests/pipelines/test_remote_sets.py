"""Whole shard sets behind URLs whose storage fails: every sample once, in order, or a clear end."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from fastclr.world import World
from pipelines import ShardSet, SimCLRPolicy, make_loader
from pipelines.errors import ShardError
from pipelines.loader import Loader
from pipelines.remote import Patience, StorageError
from pipelines.writer import write_shards
from tests.pipelines.flaky import Flaky, drawn, flaky, flaky_s3

QUICK = Patience(2.0, 0.6, 20.0, 0.01, 0.05)
POLICY = SimCLRPolicy(size=16)
SEED, BATCH = 3, 12
FAULTS = ("500", "503", "429", "reset", "reset in body", "cut", "hang", "stall", "wrong bytes")
HTTP_FAULTS = (*FAULTS, "cut without length", "cut chunked", "wrong length", "no http", "html")
_BUCKETS = itertools.count()
Views = list[tuple[list[int], torch.Tensor]]


@pytest.fixture(scope="module")
def local(picture: Any, encode: Any, tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """120 images in 30 shards: more than a window of the order."""
    source = tmp_path_factory.mktemp("many")
    for number in range(120):
        folder = source / f"c{number % 3}"
        folder.mkdir(exist_ok=True)
        (folder / f"{number:03d}.jpg").write_bytes(encode(picture(20, 24, number), "JPEG"))
    return write_shards(source, source.parent / "set" / "train", samples_per_shard=4)


@dataclass
class Far:
    """A set behind a URL, and the server that makes faults.

    ``path`` is what the server calls the folder.
    """

    server: Flaky
    url: str
    path: str
    faults: tuple[str, ...]


@pytest.fixture(params=["http", "s3"])
def far(request: pytest.FixtureRequest, local: ShardSet, tmp_path: Path) -> Iterator[Far]:
    bucket = f"sets{next(_BUCKETS)}"  # moto keeps them from test to test
    folder = f"/{bucket}/train"
    files = {f"{folder}/{f.name}": f.read_bytes() for f in Path(local.path).iterdir()}
    if request.param == "http":
        with flaky() as server:
            server.objects.update(files)
            yield Far(server, server.url(folder), folder, HTTP_FAULTS)
        return
    with flaky_s3(bucket) as server:
        for path, data in files.items():
            server.put(path, data)
        # s3fs and its client are imported before any clock runs.
        ShardSet.open(f"s3:/{folder}", cache_dir=tmp_path / "first")
        server.requests.clear()
        yield Far(server, f"s3:/{folder}", folder, FAULTS)


def opened(far: Far, folder: Path, patience: Patience = QUICK, **options: Any) -> ShardSet:
    return ShardSet.open(far.url, cache_dir=folder, patience=patience, **options)


def loader_of(data: ShardSet, ranks: int = 1, rank: int = 0) -> Loader:
    world = World(rank=rank, num_ranks=ranks, local_rank=rank, num_local_ranks=ranks)
    return make_loader(
        data, POLICY, micro_batch_size=BATCH // ranks, seed=SEED, backend="reference",
        world=world, num_threads=2, prefetch=2,
    )  # fmt: skip


def batches(loader: Loader, count: int) -> Views:
    found = []
    iterator = iter(loader)
    for _ in range(count):
        batch = next(iterator)
        found.append((batch.sample_id_B.tolist(), batch.views_VBCHW))
    iterator.close()
    return found


def joined(ranks: list[Views]) -> Views:
    """Put the ranks' parts of each batch together."""
    return [
        ([i for ids, _ in parts for i in ids], torch.cat([views for _, views in parts], 1))
        for parts in zip(*ranks, strict=True)
    ]


def same(found: Views, expected: Views) -> bool:
    return [ids for ids, _ in found] == [ids for ids, _ in expected] and all(
        torch.equal(a, b) for (_, a), (_, b) in zip(found, expected, strict=True)
    )


@pytest.fixture(scope="module")
def expected(local: ShardSet) -> Views:
    """The first epoch of the local set: 10 batches, every sample once."""
    found = batches(loader_of(local), len(local) // BATCH)
    assert sorted(i for ids, _ in found for i in ids) == list(range(120))
    return found


def test_an_epoch_over_failing_storage_is_that_of_the_local_set(
    far: Far, local: ShardSet, expected: Views, tmp_path: Path
) -> None:
    """One rank reads half, then two ranks that share a cache folder go on."""
    far.server.draw = drawn(0.1, 6, far.faults)
    first = opened(far, tmp_path / "a", cache_bytes=300_000)
    assert (first.digest, first.class_names) == (local.digest, local.class_names)
    loader = loader_of(first)
    assert same(batches(loader, 5), expected[:5])
    state = loader.state_dict()

    def rest(rank: int) -> Views:
        """Go on as one of two ranks; each has a set of its own, as processes have."""
        part = loader_of(opened(far, tmp_path / "b", cache_bytes=300_000), 2, rank)
        part.load_state_dict(state)
        return batches(part, 5)

    with ThreadPoolExecutor(2) as pool:
        ranks = list(pool.map(rest, (0, 1)))
    assert same(joined(ranks), expected[5:])
    kinds = {request.fault for request in far.server.requests if request.fault}
    assert len(kinds) >= 4, kinds
    wanted = far.server.hits(f"{far.path}/train-000000.tar")
    assert wanted, "the storage was never asked"


def test_two_ranks_fetch_each_shard_once(far: Far, expected: Views, tmp_path: Path) -> None:
    def epoch(rank: int) -> Views:
        patient = Patience(20.0, 20.0, 60.0, 0.01, 0.05)  # a busy machine asks nothing twice
        return batches(loader_of(opened(far, tmp_path / "c", patient), 2, rank), 10)

    with ThreadPoolExecutor(2) as pool:
        assert same(joined(list(pool.map(epoch, (0, 1)))), expected)
    for number in range(30):
        for end in ("tar", "index.jsonl"):
            path = f"{far.path}/train-{number:06d}.{end}"
            got = [r for r in far.server.hits(path) if r.method == "GET"]
            assert len(got) == 1, path


def test_a_cache_smaller_than_the_set_keeps_its_bound(
    far: Far, local: ShardSet, expected: Views, tmp_path: Path
) -> None:
    sizes = [f.stat().st_size for f in Path(local.path).glob("*.tar")]
    most = 6 * max(sizes)
    assert sum(sizes) > 3 * most
    data = opened(far, tmp_path / "d", cache_bytes=most)
    assert same(batches(loader_of(data), 10), expected)
    held = sum(f.stat().st_size for f in (tmp_path / "d").rglob("*") if f.is_file())
    assert 0 < held <= most


def test_storage_that_dies_ends_the_epoch_in_time(
    far: Far, expected: Views, tmp_path: Path
) -> None:
    patience = Patience(2.0, 1.0, 3.0, 0.01, 0.1)  # a first S3 client takes a second
    loader = loader_of(opened(far, tmp_path / "e", patience, cache_bytes=300_000))
    iterator = iter(loader)
    assert next(iterator).sample_id_B.tolist() == expected[0][0]
    dead = threading.Event()
    far.server.draw = lambda path, number: "stall" if dead.is_set() else None
    dead.set()
    started = time.monotonic()
    with pytest.raises(
        StorageError, match=r"train-\d{6}\.(tar|index\.jsonl) cannot be read: "
    ) as e:
        for _ in range(40):
            next(iterator)
    assert time.monotonic() - started < 30  # a few objects, one after the other
    assert "goes on where it stopped" in str(e.value)
    # And it does.
    dead.clear()
    again = loader_of(opened(far, tmp_path / "e"))
    again.load_state_dict(loader.state_dict())
    done = loader.state_dict()["position"] // BATCH
    assert same(batches(again, 10 - done), expected[done:])


def test_no_set_dead_storage_and_a_damaged_manifest(far: Far, tmp_path: Path) -> None:
    nowhere = Far(far.server, far.url + "x", "", ())
    with pytest.raises(
        ShardError, match=r"trainx is no shard set: .*no such object.*fastclr shards"
    ):
        opened(nowhere, tmp_path / "f")
    patience = Patience(2.0, 1.0, 3.0, 0.01, 0.1)  # a first S3 client takes a second
    far.server.draw = lambda path, number: "hang"
    started = time.monotonic()
    with pytest.raises(StorageError, match=r"manifest\.json cannot be read"):
        opened(far, tmp_path / "f", patience)
    assert time.monotonic() - started < 20
    far.server.draw = lambda path, number: "403"
    with pytest.raises(StorageError, match="403"):
        opened(far, tmp_path / "f", patience)


def test_wrong_indexes_are_fetched_again_and_then_refused(local: ShardSet, tmp_path: Path) -> None:
    with flaky() as server:
        for file in Path(local.path).iterdir():
            server.objects[f"/t/{file.name}"] = file.read_bytes()
        path = "/t/train-000001.index.jsonl"
        url = server.url("/t").replace("http://", "http://me:hunter1@") + "/?sig=hunter2"
        signed = {f"{p}?sig=hunter2": data for p, data in server.objects.items()}
        server.objects = signed
        path += "?sig=hunter2"

        def labels() -> int:
            data = ShardSet.open(url, cache_dir=tmp_path / "g", patience=QUICK)
            assert (data.label_N == local.label_N).all() and "hunter" not in str(data.path)
            return len(server.hits(path))

        server.plans[path] = ["wrong bytes", "wrong bytes"]
        assert (labels(), labels()) == (3, 3)
        for copy in (tmp_path / "g" / "shards").glob("*.shard"):
            copy.write_bytes(copy.read_bytes()[::-1])  # damaged here
        assert labels() == 4
        server.objects[path] = server.objects[path][:-1]
        with pytest.raises(ShardError, match=r"3 times") as caught:
            ShardSet.open(url, cache_dir=tmp_path / "h", patience=QUICK).label_N  # noqa: B018
        assert "train-000001.index.jsonl" in str(caught.value)
        assert "hunter" not in str(caught.value)


def test_a_whole_set_is_verified(far: Far, local: ShardSet, tmp_path: Path) -> None:
    done: list[int] = []
    opened(far, tmp_path / "i").verify(done.append)
    assert sum(done) == sum(f.stat().st_size for f in Path(local.path).glob("*.tar"))
