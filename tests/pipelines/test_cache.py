"""Whole copies of shards, shared by processes, over storage that fails: no sample is lost."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest

from fastclr.config import ConfigError
from pipelines.errors import ShardError
from pipelines.remote import Patience, ShardCache, StorageError
from pipelines.remote import cache as cache_module
from tests.pipelines.flaky import Flaky, flaky

ROOT = Path(__file__).parents[2]
QUICK = Patience(1.0, 0.3, 8.0, 0.01, 0.05)
SIZE = 60_000
PASSING = ("500", "503", "429", "reset", "reset in body", "cut", "cut without length", "hang")
PASSING += ("stall", "wrong bytes", "wrong length", "cut chunked", "no http", "html")

Shard = tuple[str, int, str]


@pytest.fixture
def server() -> Iterator[Flaky]:
    with flaky() as server:
        yield server


def put(server: Flaky, number: int, size: int = SIZE) -> Shard:
    data = np.random.default_rng(number).bytes(size)
    server.objects[f"/s{number}.tar"] = data
    return server.url(f"/s{number}.tar"), size, sha256(data).hexdigest()


def read(descriptor: int) -> bytes:
    try:
        return os.pread(descriptor, 1 << 24, 0)
    finally:
        os.close(descriptor)


def is_right(shard: Shard, descriptor: int) -> bool:
    return sha256(read(descriptor)).hexdigest() == shard[2]


def files(cache: ShardCache) -> dict[str, int]:
    return {f.name: f.stat().st_size for f in cache.folder.iterdir() if f.name != "lock"}


def until(true: Callable[[], bool], seconds: float = 8) -> None:
    ends = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < ends
        time.sleep(0.01)


def test_a_copy_is_whole_private_and_read_once(server, tmp_path):
    shard = put(server, 0)
    cache = ShardCache(tmp_path / "a" / "cache", 10 * SIZE, patience=QUICK)
    for _ in range(3):
        assert is_right(shard, cache.open(*shard))
    assert len(server.requests) == 1
    (name,) = files(cache)
    assert name.endswith(".shard")
    assert cache.folder.stat().st_mode & 0o077 == 0
    # The same content at another address is the same copy; another URL without a hash is not.
    server.objects["/other.tar"] = server.objects["/s0.tar"]
    assert is_right(shard, cache.open(server.url("/other.tar"), SIZE, shard[2]))
    assert len(server.requests) == 1
    os.close(cache.open(server.url("/other.tar")))
    assert len(server.requests) == 2


@pytest.mark.parametrize("damage", ["flip", "cut", "grow", "empty"])
def test_a_damaged_copy_is_read_anew(server, tmp_path, damage):
    shard = put(server, 0)
    cache = ShardCache(tmp_path / "c", 10 * SIZE, patience=QUICK)
    for known in (shard, (shard[0], None, None)):
        os.close(cache.open(*known))
    for name in files(cache):
        with (cache.folder / name).open("r+b") as stream:
            if damage == "flip":
                stream.seek(SIZE // 2)
                stream.write(b"\0\1\2")
            else:
                stream.truncate({"cut": SIZE // 2, "grow": SIZE + 1, "empty": 0}[damage])
    before = len(server.requests)
    for known in (shard, (shard[0], None, None)):
        assert is_right(shard, cache.open(*known))
    assert len(server.requests) == before + 2


def test_wrong_content_leaves_nothing(server, tmp_path):
    shard = put(server, 0)
    server.always["/s0.tar"] = "wrong bytes"
    cache = ShardCache(tmp_path / "c", 10 * SIZE, patience=QUICK)
    with pytest.raises(ShardError, match=shard[2]):
        cache.open(*shard)
    assert files(cache) == {}
    server.always.clear()
    assert is_right(shard, cache.open(*shard))


def test_four_forked_processes_download_each_shard_once(server, tmp_path):
    shards = [put(server, k) for k in range(5)]
    for k in range(5):
        server.plans[f"/s{k}.tar"] = ["cut"]
    cache = ShardCache(tmp_path / "c", 10 * SIZE, patience=QUICK)
    cache.prefetch([put(server, 9)])  # threads and locks exist before the fork
    until(lambda: len(files(cache)) == 1 and not any("partial" in n for n in files(cache)))
    children = []
    for rank in range(4):
        child = os.fork()
        if child == 0:
            code = 1
            with contextlib.suppress(BaseException):
                cache.prefetch(shards[::-1])
                mine = [shards[(rank + k) % 5] for k in range(5)]
                code = 0 if all(is_right(s, cache.open(*s)) for s in mine) else 2
            os._exit(code)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0, 0]
    for k in range(5):
        asked = [request.headers.get("Range") for request in server.hits(f"/s{k}.tar")]
        assert len(asked) == 2, asked  # the cut one, and its rest
        assert asked[0] is None
        assert asked[1] is not None
    assert len(files(cache)) == 6


def test_threads_of_one_process_share_a_download(server, tmp_path):
    shard = put(server, 0)
    server.plans["/s0.tar"] = ["stall"]
    cache = ShardCache(tmp_path / "c", 10 * SIZE, patience=QUICK)
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(lambda _: is_right(shard, cache.open(*shard)), range(8)))
    assert len(server.requests) == 2


def script(cache: ShardCache, shard: Shard, limit: str = "") -> subprocess.Popen[str]:
    """Start a process that opens a shard and prints what became of it."""
    code = (
        "import resource, os\n"
        "from pipelines.remote import *\n"
        f"{limit}\n"
        f"cache = ShardCache({str(cache.folder)!r}, {cache.max_bytes}, patience={QUICK!r})\n"
        f"try: print('opened', os.fstat(cache.open{shard!r}).st_size)\n"
        "except OSError as error: print(error)\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, text=True, stdout=subprocess.PIPE
    )


def test_a_killed_downloader_leaves_nothing_that_looks_whole(server, tmp_path):
    shard, other = put(server, 0), put(server, 1)
    server.plans["/s0.tar"], server.plans["/s1.tar"] = ["trickle"], ["trickle"]
    cache = ShardCache(tmp_path / "c", 10 * SIZE, patience=QUICK)
    processes = [script(cache, shard), script(cache, other)]
    until(lambda: len(server.requests) == 2 and len(files(cache)) == 2)
    assert all(name.endswith(".partial") for name in files(cache))
    opened: list[bool] = []
    waiting = threading.Thread(target=lambda: opened.append(is_right(shard, cache.open(*shard))))
    waiting.start()
    time.sleep(0.1)
    assert len(server.hits("/s0.tar")) == 1  # it waits for the one that downloads
    for process in reversed(processes):  # the first one's death lets the thread go on
        process.send_signal(signal.SIGKILL)
        process.communicate()
    waiting.join(8)
    assert opened == [True]
    # The other one's temporary file was rubbish and went when room was made.
    assert [name.endswith(".shard") for name in files(cache)] == [True]


def test_who_waits_too_long_says_so(server, tmp_path):
    shard = put(server, 0)
    server.always["/s0.tar"] = "trickle"
    cache = ShardCache(tmp_path / "c", 10 * SIZE, patience=QUICK)
    process = script(cache, shard)
    until(lambda: len(server.requests) == 1)
    hasty = ShardCache(cache.folder, cache.max_bytes, patience=Patience(deadline_seconds=0.3))
    with pytest.raises(StorageError, match="another one on this node"):
        hasty.open(*shard)
    process.kill()
    process.communicate()


def test_least_recently_used_goes_and_open_ones_stay_readable(server, tmp_path):
    shards = [put(server, k) for k in range(4)]
    cache = ShardCache(tmp_path / "c", 3 * SIZE + 5, patience=QUICK)
    held = [cache.open(*shard) for shard in shards[:3]]
    os.close(cache.open(*shards[0]))  # used again: now the second is the oldest
    os.close(cache.open(*shards[3]))
    assert sum(files(cache).values()) == 3 * SIZE
    before = len(server.requests)
    for k in (0, 2, 3):
        os.close(cache.open(*shards[k]))
    assert len(server.requests) == before
    assert all(is_right(s, fd) for s, fd in zip(shards[:3], held, strict=True))
    assert is_right(shards[1], cache.open(*shards[1]))
    assert len(server.requests) == before + 1


def test_readers_under_pressure_read_what_is_right(server, tmp_path):
    """Six threads in a cache with room for three of nine shards."""
    shards = [put(server, k) for k in range(9)]
    cache = ShardCache(tmp_path / "c", 3 * SIZE, patience=QUICK)
    most = 0

    def reader(number: int) -> bool:
        nonlocal most
        right = True
        for k in range(18):
            shard = shards[(k * (number + 1) + number) % 9]
            right &= is_right(shard, cache.open(*shard))
            most = max(most, sum(size for name, size in files_now(cache)))
        return right

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(reader, range(6)))
    assert most <= 3 * SIZE
    assert not [name for name in files(cache) if name.endswith("partial")]


def files_now(cache: ShardCache) -> list[tuple[str, int]]:
    with cache.locked():
        return [(name, size) for _, name, size in cache._entries()]


def test_a_cache_too_small_says_so(server, tmp_path):
    shard = put(server, 0)
    cache = ShardCache(tmp_path / "c", SIZE - 1, patience=QUICK)
    for known in (shard, (shard[0], None, shard[2])):
        with pytest.raises(ConfigError, match=rf"holds {SIZE - 1} bytes.*{SIZE}.*give"):
            cache.open(*known)
    server.always["/s0.tar"] = "chunked"  # a length that shows only as it comes
    with pytest.raises(ConfigError, match=rf"holds {SIZE - 1} bytes"):
        cache.open(shard[0])
    assert files(cache) == {}
    with pytest.raises(ConfigError, match="0 bytes holds nothing"):
        ShardCache(tmp_path / "d", 0)


def test_unknown_lengths_are_measured_as_they_come(server, tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "_STEP", SIZE // 4)
    shard, old = put(server, 0), put(server, 1)
    server.always["/s0.tar"] = "chunked"
    cache = ShardCache(tmp_path / "c", 2 * SIZE, patience=QUICK)
    os.close(cache.open(*old))
    assert is_right(shard, cache.open(shard[0]))
    assert sorted(files(cache).values()) == [SIZE, SIZE]


def test_a_full_disk_is_named_and_nothing_stays(server, tmp_path, monkeypatch):
    shard = put(server, 0)
    cache = ShardCache(tmp_path / "c", 10 * SIZE, patience=QUICK)
    write, calls = os.write, []

    def full(descriptor: int, data: bytes) -> int:
        calls.append(len(data))
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data[: len(data) // 2])  # as a nearly full disk does

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(StorageError, match=r"cannot be written.*No space left.*free space"):
        cache.open(*shard)
    monkeypatch.undo()
    assert files(cache) == {}
    assert len(server.requests) == 1  # not taken for a fault of the network
    limit = f"resource.setrlimit(resource.RLIMIT_FSIZE, ({SIZE // 2}, resource.RLIM_INFINITY))"
    said, _ = script(cache, shard, limit).communicate()
    assert "cannot be written" in said
    assert os.strerror(errno.EFBIG) in said
    assert files(cache) == {}
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    assert is_right(shard, cache.open(*shard))


def test_a_folder_others_can_write_to_is_refused(server, tmp_path):
    shard = put(server, 0)
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    with pytest.raises(ConfigError, match="others could put shards into it"):
        ShardCache(shared, SIZE)
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(ConfigError, match="cannot be made"):
        ShardCache(file, SIZE)
    # A link in the way is not followed, whoever put it there; other files are not touched.
    cache = ShardCache(tmp_path / "c", 2 * SIZE, patience=QUICK)
    precious = cache.folder / "precious.txt"
    precious.write_text("mine")
    os.close(cache.open(*shard))
    (name,) = [name for name in files(cache) if name.endswith(".shard")]
    (cache.folder / name).unlink()
    (cache.folder / name).with_suffix(".partial").symlink_to(precious)
    with pytest.raises(StorageError, match="cannot be opened"):
        cache.open(*shard)
    assert precious.read_text() == "mine"


def test_reading_ahead_and_closing(server, tmp_path):
    shards = [put(server, k) for k in range(6)]
    cache = ShardCache(tmp_path / "c", 10 * SIZE, patience=QUICK, num_threads=2)
    cache.prefetch(shards[:4])
    cache.prefetch(shards[:4])
    until(lambda: [name.endswith(".shard") for name in files(cache)] == [True] * 4)
    before = len(server.requests)
    assert before == 4
    assert all(is_right(shard, cache.open(*shard)) for shard in shards[:4])
    assert len(server.requests) == before
    server.always["/s4.tar"] = "500"
    server.always["/s5.tar"] = "trickle"
    cache.prefetch(shards[4:])
    until(lambda: len(server.hits("/s4.tar")) > 1 and bool(server.hits("/s5.tar")))
    started = time.monotonic()
    cache.close()
    cache.prefetch(shards[4:])
    assert time.monotonic() - started < 1.5
    until(lambda: not [name for name in files(cache) if name.endswith("partial")], 2)
    server.always.clear()
    assert is_right(shards[4], cache.open(*shards[4]))


def test_a_hint_is_taken_once(server, tmp_path):
    shards = [put(server, k) for k in range(4)]
    server.always["/s0.tar"] = "hang"
    cache = ShardCache(tmp_path / "c", 10 * SIZE, patience=QUICK, num_threads=1)
    for _ in range(5):
        cache.prefetch(shards)
    until(lambda: bool(server.requests))
    assert cache._queue.qsize() == 3
    cache.close()


def test_what_failed_ahead_is_told_and_met_again(server, tmp_path, caplog):
    shard = put(server, 0)
    server.always["/s0.tar"] = "403"
    cache = ShardCache(tmp_path / "c", 10 * SIZE, patience=QUICK)
    cache.prefetch([shard])
    until(lambda: "reading ahead failed" in caplog.text)
    with pytest.raises(StorageError, match="403"):
        cache.open(*shard)
    server.always.clear()
    cache.prefetch([shard])
    until(lambda: len(files(cache)) == 1 and "partial" not in str(files(cache)))
    cache.close()
