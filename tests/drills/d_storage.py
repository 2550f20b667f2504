"""D: object stores and http that fail. On loopback, by a server that makes faults when told to."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from drill import Cells, Drill

from pipelines.shards import ShardSet
from pipelines.writer import write_shards
from tests.pipelines.flaky import flaky
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


def after_a_fork(cells: Cells) -> None:
    """D6: a client made before a fork; libraries that would retry behind our back."""
    cells.tests(
        f"{REMOTE}::test_s3_after_a_fork",
        f"{REMOTE}::test_s3_libraries_do_not_retry_behind_our_back",
        f"{REMOTE}::test_pauses_grow_and_differ_between_processes",
        f"{REMOTE}::test_retry_after_is_honoured_within_the_deadline",
    )


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
    "D6": Drill(
        "clients made before a fork; no hidden retries; pauses that differ", after_a_fork, 90
    ),
    "D7": Drill(
        "a shared cache: one download, damaged copies read anew, bounds kept", the_cache, 90
    ),
}
