"""Others' tars behind URLs: fetched and indexed once, then as their local copies, or an error."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastclr.config import ConfigError
from pipelines.check import check_set
from pipelines.errors import ShardError
from pipelines.mixture import open_sets
from pipelines.remote import Patience, StorageError
from pipelines.shards import ShardSet
from tests.pipelines.flaky import Flaky, drawn, flaky, flaky_s3
from tests.pipelines.tars import open_quietly, write

QUICK = Patience(2.0, 0.6, 20.0, 0.01, 0.05)
RANGE = "/laion/{00000..00001}.tar"


@pytest.fixture
def server(laion: Path) -> Iterator[Flaky]:
    with flaky() as server:
        server.objects.update({f"/laion/{f.name}": f.read_bytes() for f in laion.glob("*.tar")})
        yield server


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def opened(server: Flaky, cache: Path, path: str = RANGE, **options: Any) -> ShardSet:
    return ShardSet.open(server.url(path), cache_dir=cache, patience=QUICK, **options)


def gets(server: Flaky, path: str) -> int:
    return sum(request.method == "GET" for request in server.hits(path))


def test_they_are_the_local_ones_and_are_fetched_once(
    server: Flaky, laion: Path, cache: Path, encoded: list[bytes], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        found = opened(server, cache)
    assert "2 tars are fetched and indexed, once" in caplog.text
    local = ShardSet.open(laion)
    assert [found.read(i) for i in range(8)] == encoded[:8]
    assert found.label_N.tolist() == local.label_N.tolist()
    assert found.size_N2.tolist() == local.size_N2.tolist()
    assert found.class_names == local.class_names
    assert found.source_of(5) == local.source_of(5)
    assert np.array_equal(found.order(0).ids(0, 0, 8), local.order(0).ids(0, 0, 8))
    again = open_quietly(server.url(RANGE), caplog, cache_dir=cache, patience=QUICK)
    assert again.digest == found.digest and again[3].shape == found[3].shape
    assert [gets(server, f"/laion/0000{n}.tar") for n in (0, 1)] == [1, 1]


def test_labels_of_another_field_are_another_index(server: Flaky, cache: Path) -> None:
    assert opened(server, cache).label_N.tolist() == [0, 1, 2, 3] * 2
    assert opened(server, cache, label_field="class").label_N.tolist() == [0] * 4 + [1] * 4


def test_a_query_may_say_which_tar_and_is_never_shown(
    server: Flaky, cache: Path, encoded: list[bytes]
) -> None:
    """Two tars that are alike but for the query are two; a range may be in it."""
    for number in range(2):
        path = f"/get.tar?secret=one&file={number}"
        server.objects[path] = server.objects[f"/laion/0000{number}.tar"]
    found = opened(server, cache, "/get.tar?secret=one&file={0..1}")
    assert [found.read(i) for i in range(8)] == encoded[:8]
    assert "secret" not in str(found.path) + found.source_of(0) + found.place(0)
    kept = [file.read_bytes() for file in (cache / "foreign").iterdir()]
    assert not any(b"secret" in data for data in kept)
    server.objects["/get.tar?secret=two&file=0"] = server.objects["/laion/00000.tar"]
    signed = opened(server, cache, "/get.tar?secret=two&file=0")
    assert signed.digest == opened(server, cache, "/get.tar?secret=one&file=0").digest


def test_a_tar_that_changed_is_noticed(
    server: Flaky, cache: Path, tmp_path: Path, encoded: list[bytes]
) -> None:
    before, unused = opened(server, cache), opened(server, cache)
    assert before.read(4) == encoded[4]
    write(tmp_path / "new.tar", [("z.png", encoded[1])])
    server.objects["/laion/00001.tar"] = (tmp_path / "new.tar").read_bytes()
    assert before.read(4) == encoded[4], "its copy is open"
    for copy in (cache / "shards").glob("*.shard"):
        copy.unlink()
    with pytest.raises(ShardError, match="remove that file if the new tar is meant") as caught:
        unused.read(4)
    assert unused.read(0) == encoded[0]
    index = str(caught.value).partition("indexed as ")[2].partition(": remove")[0]
    Path(index).unlink()
    after = opened(server, cache)
    assert len(after) == 5 and after.digest != before.digest and after.read(4) == encoded[1]


@pytest.mark.parametrize("damage", [b"", b"no json\n", b"[" * 100_000, "lines"])
def test_a_damaged_index_is_made_again(
    server: Flaky, cache: Path, encoded: list[bytes], damage: bytes | str
) -> None:
    digest = opened(server, cache).digest
    for file in (cache / "foreign").glob("*.fastclr-index"):
        raw = file.read_bytes()
        file.write_bytes(raw[:-40] if isinstance(damage, str) else damage)
    found = opened(server, cache)
    assert found.digest == digest and [found.read(i) for i in range(8)] == encoded[:8]


def test_a_cache_of_one_tar(server: Flaky, cache: Path, encoded: list[bytes]) -> None:
    most = max(len(data) for data in server.objects.values())
    found = opened(server, cache, cache_bytes=most)
    assert [found.read(i) for i in (0, 4, 1, 5)] == [encoded[i] for i in (0, 4, 1, 5)]
    sizes = [copy.stat().st_size for copy in (cache / "shards").glob("*.shard")]
    assert sum(sizes) <= most
    with pytest.raises(ConfigError, match="give the cache more"):
        opened(server, cache.with_name("small"), cache_bytes=most // 4)


def test_processes_share_the_work(server: Flaky, cache: Path) -> None:
    with ThreadPoolExecutor(3) as pool:
        digests = {found.digest for found in pool.map(lambda _: opened(server, cache), range(3))}
    assert len(digests) == 1
    assert [gets(server, f"/laion/0000{n}.tar") for n in (0, 1)] == [1, 1]


def test_failing_storage_and_a_dead_one(server: Flaky, cache: Path, encoded: list[bytes]) -> None:
    server.draw = drawn(0.5, 1, ("500", "reset in body", "cut", "stall"))
    assert [opened(server, cache).read(i) for i in (0, 7)] == [encoded[0], encoded[7]]
    server.draw = lambda path, number: "503"
    url, short = server.url(RANGE), Patience(2.0, 0.6, 1.0, 0.01, 0.05)
    with pytest.raises(StorageError, match=r"00000\.tar cannot be read"):
        ShardSet.open(url, cache_dir=cache.with_name("dead"), patience=short)


def test_what_is_refused(server: Flaky, cache: Path) -> None:
    with pytest.raises(ConfigError, match=r"storage is not listed. Give a range"):
        opened(server, cache, "/laion/*.tar{0..1}")
    server.objects["/laion/00009.tar"] = b"<html>" * 1000
    with pytest.raises(ShardError, match="no plain tar"):
        opened(server, cache, "/laion/00009.tar")
    with pytest.raises(StorageError, match=r"00002\.tar"):
        opened(server, cache, "/laion/{00000..00002}.tar")


def test_s3_check_and_mixtures(laion: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    with flaky_s3("others") as server:
        for file in laion.glob("*.tar"):
            server.put(f"/others/{file.name}", file.read_bytes())
        report = check_set("s3://others/{00000..00001}.tar", share=1)
        assert (report.problems, report.num_samples, report.num_decoded) == ([], 8, 8)
        mixed = open_sets(f"{laion}:0.5,s3://others/00000.tar:0.5")
        assert len(mixed) == 12
