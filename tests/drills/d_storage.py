"""D: object stores and http that fail. On loopback, by a server that makes faults when told to."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from drill import Cells, Drill

from pipelines.remote import fetch
from pipelines.shards import ShardSet
from pipelines.writer import write_shards
from tests.pipelines.flaky import flaky, flaky_s3
from tests.pipelines.test_remote_sets import BATCH, QUICK, batches, loader_of, same

REMOTE = "tests/pipelines/test_remote.py"
CACHE = "tests/pipelines/test_cache.py"
# What the first requests for an object get.
FAULTS: dict[str, list[str]] = {
    "500": ["500"], "503 and Retry-After": ["503 in 1 s"], "429": ["429"], "a reset": ["reset"],
    "a reset in the body": ["reset in body"], "an early end": ["cut"],
    "an early end without length": ["cut without length"], "a wrong length": ["wrong length"],
    "all for a range": ["cut", "full for range"], "a wrong range": ["cut", "wrong range"],
    "a page with status 200": ["html"], "a loop of redirects": ["loop"] * 6,
}  # fmt: skip


def one_fault(cells: Cells) -> None:
    """D1: each fault, once, at the first, a middle and the last shard: the epoch of the disk."""
    images = (cells.folder / "train").resolve().parent / "images/train"
    local = write_shards(images, cells.folder / "set/train", samples_per_shard=8)
    count = len(local) // BATCH
    expected = batches(loader_of(local), count)
    files = {f"/train/{f.name}": f.read_bytes() for f in Path(local.path).iterdir()}
    tars = sorted(name for name in files if name.endswith(".tar"))
    places = {"first": tars[0], "middle": tars[len(tars) // 2], "last": tars[-1]}
    most = 0
    for name, plan in FAULTS.items():
        for where, path in places.items():
            with cells.cell(f"{name}, {where}"), flaky() as server:
                server.objects.update(files)
                server.plans[path] = list(plan)
                cache = cells.folder / f"{name}{where}"
                found = ShardSet.open(server.url("/train"), cache_dir=cache, patience=QUICK)
                assert same(batches(loader_of(found), count), expected)
                hits = len(server.hits(path))
                assert len(plan) <= hits <= len(plan) + 2, hits
                most = max(most, hits)
    for name, failing in {"no such host": _no_host, "refused": _refused}.items():
        for where, number in {"first": 1, "middle": len(tars), "last": 2 * len(tars)}.items():
            with cells.cell(f"{name}, {where}"), flaky() as server, failing(number) as calls:
                server.objects.update(files)
                cache = cells.folder / f"{name}{where}"
                found = ShardSet.open(server.url("/train"), cache_dir=cache, patience=QUICK)
                assert same(batches(loader_of(found), count), expected)
                assert len(calls) > number
    cells.notes.append(f"{most} requests for an object at most")


@contextmanager
def _no_host(number: int) -> Iterator[list[int]]:
    """Let the n-th look-up of a name fail."""
    calls: list[int] = []
    look_up = socket.getaddrinfo

    def failing(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == number:
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        return look_up(*args, **options)

    with mock.patch.object(socket, "getaddrinfo", failing):
        yield calls


@contextmanager
def _refused(number: int) -> Iterator[list[int]]:
    """Let the n-th connection be refused."""
    calls: list[int] = []
    connect = socket.create_connection

    def failing(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == number:
            raise ConnectionRefusedError(111, "Connection refused")
        return connect(*args, **options)

    with mock.patch.object(socket, "create_connection", failing):
        yield calls


def lasting_faults(cells: Cells) -> None:
    """D2: faults that stay: an error within the deadline; a refusal is asked once."""
    cells.tests(
        f"{REMOTE}::test_a_dead_source_is_an_error_within_the_deadline",
        f"{REMOTE}::test_a_refusal_is_final_at_once",
        f"{REMOTE}::test_wrong_content_that_stays_names_expected_and_found",
        "tests/pipelines/test_remote_sets.py::test_storage_that_dies_ends_the_epoch_in_time",
    )


def slow_storage(cells: Cells) -> None:
    """D3: stalled and trickling servers: gone on with by range, or cut at the deadline."""
    cells.tests(
        f"{REMOTE}::test_a_cut_body_is_gone_on_with_where_it_was_cut",
        f"{REMOTE}::test_the_deadline_ends_a_read_whose_own_time_out_is_longer",
        f"{REMOTE}::test_a_large_object_has_more_time",
        f"{CACHE}::test_who_waits_too_long_says_so",
    )


def changing_objects(cells: Cells) -> None:
    """D4: an object replaced while it is read: never a mixture."""
    cells.tests(
        f"{REMOTE}::test_two_objects_are_never_mixed",
        f"{REMOTE}::test_an_object_of_another_etag_in_a_part_is_not_mixed_either",
        f"{REMOTE}::test_without_etag_only_a_hash_allows_going_on",
        f"{REMOTE}::test_a_file_that_changes_between_two_blocks_is_read_anew",
    )


def many_readers(cells: Cells) -> None:
    """D5: 8 readers of a server that is overloaded for a while: few tries, spread out."""
    most_tries, readers = 6, 8
    for name, fault, seconds, least in (
        ("503 for 5 s", "503", 5.0, 0.0), ("503 and Retry-After for 5 s", "503 in 1 s", 5.0, 1.0),
    ):  # fmt: skip
        with cells.cell(name), flaky() as server:
            ends = time.monotonic() + seconds
            server.draw = lambda _, __, f=fault, e=ends: f if time.monotonic() < e else None
            server.objects |= {f"/{k}": bytes([k]) * 1000 for k in range(readers)}
            children = [_reader(server.url(f"/{k}"), bytes([k]) * 1000) for k in range(readers)]
            assert [os.waitpid(child, 0)[1] for child in children] == [0] * readers
            tries = [server.hits(f"/{k}") for k in range(readers)]
            counts = [len(hits) for hits in tries]
            assert min(counts) >= 2 and max(counts) <= most_tries, counts
            again = sorted(hit.time for hits in tries for hit in hits[1:])
            crowd = max(sum(t <= u < t + 0.1 for u in again) for t in again)
            assert crowd <= 0.3 * len(again), f"{crowd} of {len(again)} within 100 ms"
            pauses = [b.time - a.time for hits in tries for a, b in pairwise(hits)]
            assert min(pauses) >= least, f"asked again after {min(pauses):.2f} s"
            cells.notes.append(
                f"{name}: {sum(counts)} requests, at most {crowd} of {len(again)} more in 100 ms"
            )


def _reader(url: str, expected: bytes) -> int:
    """Begin to read an object in a process of its own, which ends with 0 if it is right."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = int(fetch(url) != expected)
        finally:
            os._exit(code)
    return child


def after_a_fork(cells: Cells) -> None:
    """D6: a client made before a fork; libraries that would retry behind our back; old tokens."""
    cells.tests(
        f"{REMOTE}::test_s3_after_a_fork",
        f"{REMOTE}::test_s3_libraries_do_not_retry_behind_our_back",
        f"{REMOTE}::test_pauses_grow_and_differ_between_processes",
        f"{REMOTE}::test_retry_after_is_honoured_within_the_deadline",
    )
    missing = [name for name in ("moto", "s3fs") if find_spec(name) is None]
    if missing:
        cells.notes.append(f"no token that expires: {', '.join(missing)} is not installed")
        return
    with cells.cell("a token that expires while it is used"):
        cells.notes.append(_a_token_that_expires(cells))


def _a_token_that_expires(cells: Cells) -> str:
    """Read objects with a token of a role that botocore renews 15 minutes before its end."""
    seconds_left, old, new = 3, "OLDKEY", "NEWKEY"

    def token(key: str, seconds: float) -> bytes:
        ends = datetime.now(timezone.utc) + timedelta(seconds=15 * 60 + seconds)
        facts = {"AccessKeyId": key, "SecretAccessKey": "x", "Token": "y"}
        return json.dumps({**facts, "Expiration": ends.strftime("%Y-%m-%dT%H:%M:%SZ")}).encode()

    objects = {f"/tokens/{k}": cells.generator.randbytes(1000) for k in range(12)}
    with flaky_s3("tokens") as server, flaky() as role, pytest.MonkeyPatch.context() as patch:
        for path, data in objects.items():
            server.put(path, data)
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.delenv(name)
        for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
            patch.setenv(name, str(cells.folder / "none"))
        patch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", role.url("/role"))
        role.objects["/role"] = token(old, seconds_left)
        server.requests.clear()
        for number, (path, data) in enumerate(objects.items()):
            assert fetch(f"s3:/{path}") == data
            if number == len(objects) // 2:
                role.objects["/role"] = token(new, 3600)
                time.sleep(seconds_left + 1)
                renewed = time.monotonic()
        keys = [
            (hit.time > renewed, hit.headers.get("Authorization", "")) for hit in server.requests
        ]
        assert keys and all((new if later else old) in sent for later, sent in keys), keys[:3]
        assert len(role.hits("/role")) == 2, [hit.time for hit in role.requests]
    return f"{len(objects)} objects, the token asked for twice"


def the_cache(cells: Cells) -> None:
    """D7: processes that share a cache, a killed download, a full disk, damaged copies."""
    cells.tests(CACHE)


DRILLS = {
    "D1": Drill(
        "14 faults, once, at three places: the epoch of the disk, few requests", one_fault, 120
    ),
    "D2": Drill(
        "faults that stay: told within the deadline, refusals asked once", lasting_faults, 90
    ),
    "D3": Drill(
        "stalled and trickling servers: gone on by range, or cut in time", slow_storage, 60
    ),
    "D4": Drill("objects replaced while they are read: never a mixture", changing_objects, 60),
    "D5": Drill(
        "8 readers of an overloaded server: few tries, spread out, Retry-After kept",
        many_readers,
        90,
    ),
    "D6": Drill(
        "clients made before a fork; no hidden retries; pauses that differ; a token renewed once",
        after_a_fork,
        150,
    ),
    "D7": Drill(
        "a shared cache: one download, damaged copies read anew, bounds kept", the_cache, 90
    ),
}
