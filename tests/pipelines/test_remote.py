"""Objects over http, S3 and other storage that fails: all of it, or a clear error in time."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
import traceback
import urllib.parse
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest

from fastclr.config import ConfigError
from pipelines.errors import ShardError
from pipelines.remote import Patience, StorageError, fetch, objects, redacted
from pipelines.remote.retries import Again, Final, pause, refusal
from tests.pipelines.flaky import Flaky, flaky_s3
from tests.pipelines.transfers import CANARY, DATA, HASH, QUICK, SHORT

# One fault, then none


@pytest.mark.parametrize(
    "faults",
    [
        *("500", "503", "503 in 1 s", "429", "reset", "reset in body", "cut", "hang", "stall"),
        *("cut without length", "without length", "chunked", "cut chunked", "wrong bytes"),
        *("wrong length", "too long", "changes", "no http", "html"),
        *("cut+full for range", "cut+wrong range", "cut+cut+cut+500+cut", "cut+wrong bytes"),
        "+".join(6 * ["loop"]),
    ],
)
def test_a_fault_that_passes_leaves_no_trace(server, faults):
    if "changes" in faults:
        server.objects["/a.bin"] = DATA[::-1]
    server.plans["/a.bin"] = plan = faults.split("+")
    assert fetch(server.url("/a.bin"), num_bytes=len(DATA), sha256=HASH, patience=QUICK) == DATA
    assert len(server.requests) <= len(plan) + 2


@pytest.mark.parametrize("fault", ["cut", "cut chunked", "stall", "reset in body"])
def test_a_cut_body_is_gone_on_with_where_it_was_cut(server, fault):
    server.plans["/a.bin"] = [fault]
    assert fetch(server.url("/a.bin"), patience=QUICK) == DATA
    first, second = server.requests
    assert "Range" not in first.headers
    start = int(second.headers["Range"].removeprefix("bytes=").rstrip("-"))
    assert 0 < start <= len(DATA) // 2
    assert second.headers["If-Match"].startswith('"')


def test_without_etag_only_a_hash_allows_going_on(server):
    server.etags = False
    server.plans["/a.bin"] = ["cut", None, "cut"]
    assert fetch(server.url("/a.bin"), patience=QUICK) == DATA
    assert "Range" not in server.requests[1].headers
    assert fetch(server.url("/a.bin"), sha256=HASH, patience=QUICK) == DATA
    assert "Range" in server.requests[3].headers


@pytest.mark.parametrize("etags", [True, False])
def test_two_objects_are_never_mixed(server, etags):
    server.etags = etags
    server.plans["/a.bin"] = ["changes"]
    assert fetch(server.url("/a.bin"), patience=QUICK) == DATA[::-1]


def test_an_object_of_another_etag_in_a_part_is_not_mixed_either(server, monkeypatch):
    # A server that ignores If-Match: only the ETag of the part tells.
    server.plans["/a.bin"] = ["changes"]
    right = server.answer
    monkeypatch.setattr(
        server, "answer", lambda m, p, h: right(m, p, {k: h[k] for k in h if k != "If-Match"})
    )
    assert fetch(server.url("/a.bin"), patience=QUICK) == DATA[::-1]
    assert "Range" in server.requests[1].headers


def test_no_truncation_is_silent(server):
    """478 cuts of a body without length, with what a manifest knows, then with a hash alone."""
    wanted: list[tuple[str, dict]] = []
    for k in range(478):
        cut = DATA[: k * 251]
        server.objects[f"/{k}"] = cut
        server.always[f"/{k}"] = ("without length", "chunked")[k % 2]
        known = ({"num_bytes": len(DATA), "sha256": HASH}, {"sha256": HASH})[k % 3 == 0]
        wanted.append((server.url(f"/{k}"), known))
    patience = Patience(2.0, 2.0, 5.0, 20.0, 20.0)  # a single try each

    def lost(item: tuple[str, dict]) -> bool:
        try:
            return fetch(item[0], **item[1], patience=patience) != DATA
        except (StorageError, ShardError):
            return False

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(lost, wanted)) == 0


def test_a_body_without_length_needs_something_to_check_it(server):
    server.always["/a.bin"] = "without length"
    with pytest.raises(StorageError, match="states no length"):
        fetch(server.url("/a.bin"), patience=QUICK)
    assert fetch(server.url("/a.bin"), num_bytes=len(DATA), patience=QUICK) == DATA


# Faults that stay


@pytest.mark.parametrize("status", ["400", "401", "403", "404", "410"])
def test_a_refusal_is_final_at_once(server, status):
    server.always["/a.bin"] = status
    with pytest.raises(StorageError, match=f"a.bin cannot be read: status {status}.*1 tries"):
        fetch(server.url("/a.bin"), patience=QUICK)
    assert len(server.requests) == 1


def test_a_dead_source_is_an_error_within_the_deadline(server, monkeypatch):
    look_up = socket.getaddrinfo

    def without_traffic(host, *args, **options):
        if host.endswith(".invalid"):
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return look_up(host, *args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", without_traffic)
    faults = ("500", "503", "429", "reset", "hang", "stall", "trickle", "trickle head", "loop")
    faults += ("no http", "cut without length", "503 in 100 s")
    with socket.create_server(("127.0.0.1", 0)) as unused:
        refused = f"http://127.0.0.1:{unused.getsockname()[1]}/a"
    for name in faults:
        server.objects[f"/{name.replace(' ', '-')}"] = DATA
        server.always[f"/{name.replace(' ', '-')}"] = name
    urls = [server.url(f"/{name.replace(' ', '-')}") for name in faults]
    urls += [refused, "http://no-such-host.invalid/a"]

    def seconds(url: str) -> float:
        started = time.monotonic()
        with pytest.raises(StorageError) as caught:
            fetch(url, num_bytes=len(DATA), patience=SHORT)
        assert redacted(url) in str(caught.value)
        assert "tries in" in str(caught.value)
        return time.monotonic() - started

    with ThreadPoolExecutor(len(urls)) as pool:
        took = dict(zip(urls, pool.map(seconds, urls), strict=True))
    limit = SHORT.deadline_seconds + 2  # fourteen at once, on a machine with other work
    assert {url: t for url, t in took.items() if t > limit} == {}
    assert seconds(server.url("/503-in-100-s")) < 0.5  # alone: it is given up at once


@pytest.mark.parametrize("fault", ["hang", "stall"])
def test_the_deadline_ends_a_read_whose_own_time_out_is_longer(server, fault):
    server.always["/a.bin"] = fault
    started = time.monotonic()
    with pytest.raises(StorageError, match="time was up"):
        fetch(server.url("/a.bin"), patience=Patience(60.0, 60.0, 0.5))
    assert time.monotonic() - started < 2


def test_wrong_content_that_stays_names_expected_and_found(server):
    server.always["/a.bin"] = "wrong bytes"
    with pytest.raises(ShardError, match=f"a.bin: it has sha256 [0-9a-f]{{64}}, {HASH} is exp"):
        fetch(server.url("/a.bin"), sha256=HASH, patience=QUICK)
    assert len(server.requests) == 3
    with pytest.raises(ShardError, match=f"it has {len(DATA)} bytes, 5 are expected"):
        fetch(server.url("/a.bin"), num_bytes=5, patience=QUICK)
    with pytest.raises(ShardError, match="at most 1000 are read into memory"):
        fetch(server.url("/a.bin"), 1000, patience=QUICK)


def test_retry_after_is_honoured_within_the_deadline(server):
    server.plans["/a.bin"] = ["503 in 1 s"]
    assert fetch(server.url("/a.bin"), patience=QUICK) == DATA
    first, second = server.requests
    assert second.time - first.time >= 1.0


def test_meaning_of_statuses():
    assert all(isinstance(refusal(s, None), Again) for s in (408, 425, 429, 500, 502, 503, 504))
    assert all(
        isinstance(refusal(s, None), Final) for s in (300, 304, 400, 401, 403, 404, 410, 451)
    )
    date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 100))
    for header, seconds in ((date, 100), ("7", 7), ("soon", 0), ("-5", 0), ("9" * 400, 999999999)):
        answer = refusal(503, header)
        assert isinstance(answer, Again)
        assert answer.retry_after == pytest.approx(seconds, abs=2)


def test_pauses_grow_and_differ_between_processes(monkeypatch):
    patience = Patience(first_wait_seconds=0.5, longest_wait_seconds=20)
    pauses = [pause("u", failures, patience) for failures in range(1, 40)]
    assert all(0.25 * 2**k <= pauses[k] <= 0.5 * 2**k for k in range(5))
    assert max(pauses) <= 20
    assert pauses == [pause("u", failures, patience) for failures in range(1, 40)]
    of_ranks = set()
    for pid in range(100, 164):
        monkeypatch.setattr(os, "getpid", lambda pid=pid: pid)
        of_ranks.add(pause("u", 3, patience, retry_after=5))
    assert len(of_ranks) == 64
    assert min(of_ranks) >= 5
    assert max(of_ranks) - min(of_ranks) > 1


def test_a_large_object_has_more_time(server):
    patience = Patience(deadline_seconds=0.2, slowest_bytes_per_second=1e6)
    assert patience.deadline(None).seconds == pytest.approx(0.2)
    assert patience.deadline(3_000_000).seconds == pytest.approx(3.2)


# Other storage


def test_files_and_memory(tmp_path):
    file = tmp_path / "a b.bin"
    file.write_bytes(DATA)
    memory = fsspec.filesystem("memory")
    memory.pipe("/remote-test/a.bin", DATA)
    try:
        for url in (str(file), file.as_uri().replace("%20", " "), "memory://remote-test/a.bin"):
            assert fetch(url, num_bytes=len(DATA), sha256=HASH) == DATA
            with pytest.raises(ShardError, match="sha256"):
                fetch(url, sha256="0" * 64, patience=QUICK)
            with pytest.raises(StorageError, match=r"FileNotFoundError.*1 tries"):
                fetch(url + "x")
    finally:
        memory.rm("/remote-test", recursive=True)
    with pytest.raises(StorageError, match="folder"):
        fetch(str(tmp_path))


@pytest.mark.parametrize("known", [{}, {"num_bytes": len(DATA), "sha256": HASH}])
def test_a_file_that_changes_between_two_blocks_is_read_anew(tmp_path, monkeypatch, known):
    monkeypatch.setattr(objects, "BLOCK", 50_000)
    file, newer = tmp_path / "a.bin", tmp_path / "b.bin"
    file.write_bytes(DATA[::-1])
    newer.write_bytes(DATA)
    calls = []
    call = objects._call

    def replacing(fs, name, path, seconds, options):
        calls.append(name)
        if len(calls) == 3:
            newer.replace(file)
        return call(fs, name, path, seconds, options)

    monkeypatch.setattr(objects, "_call", replacing)
    assert fetch(str(file), **known, patience=QUICK) == DATA
    assert len(calls) > 6


@pytest.fixture(scope="module")
def s3() -> Iterator[Flaky]:
    with flaky_s3("bucket", CANARY) as proxy:
        proxy.put("/bucket/a.bin", DATA)
        fetch("s3://bucket/a.bin")  # the slow first import of the library
        yield proxy


@pytest.mark.parametrize("fault", ["500", "503", "reset", "cut", "hang", "stall", "429"])
def test_s3_with_a_fault_that_passes(s3, fault):
    s3.requests.clear()
    s3.draw = lambda path, number: fault if len(s3.requests) in (0, 2) else None
    patience = Patience(1.0, 0.4, 8.0, 0.01, 0.05)
    assert fetch("s3://bucket/a.bin", patience=patience) == DATA
    assert [r.fault for r in s3.requests].count(fault) == 2


def test_s3_that_stays_dead_or_refuses(s3):
    patience = Patience(0.5, 0.3, 1.0, 0.05, 0.2)
    for fault in ("503", "hang"):
        s3.draw = lambda path, number, fault=fault: fault
        started = time.monotonic()
        with pytest.raises(StorageError, match=r"s3://bucket/a.bin cannot be read.*tries"):
            fetch("s3://bucket/a.bin", patience=patience)
        assert time.monotonic() - started < 2
    s3.draw = lambda path, number: None
    with pytest.raises(StorageError, match=r"FileNotFound|status 404"):
        fetch("s3://bucket/none.bin", patience=patience)
    s3.draw = lambda path, number: "403"
    with pytest.raises(StorageError, match=r"PermissionError|status 403.*1 tries"):
        fetch("s3://bucket/a.bin", patience=patience)


def test_s3_libraries_do_not_retry_behind_our_back(s3):
    one_try = Patience(1.0, 1.0, 3.0, 30.0, 30.0)
    # Its client is made beforehand: on a busy machine that alone may take a second.
    objects._file_system("s3", one_try, os.getpid(), objects._environment()).connect()
    # A HEAD is never cut. (After a reset aiohttp repeats a GET, once.)
    for fault, methods in (("500", "HEAD"), ("hang", "HEAD"), ("cut", "HEAD GET")):
        s3.requests.clear()
        s3.draw = lambda path, number, fault=fault: fault
        with pytest.raises(StorageError, match="1 tries"):
            fetch("s3://bucket/a.bin", patience=one_try)
        assert [request.method for request in s3.requests] == methods.split()


def test_s3_after_a_fork(s3):
    s3.draw = lambda path, number: None
    assert fetch("s3://bucket/a.bin") == DATA
    child = os.fork()
    if child == 0:
        os._exit(fetch("s3://bucket/a.bin", patience=QUICK) != DATA)
    ended: list[int] = []
    waiter = threading.Thread(target=lambda: ended.append(os.waitpid(child, 0)[1]), daemon=True)
    waiter.start()
    waiter.join(10)
    assert ended == [0]


# Messages


def test_no_secret_is_in_any_message(server, s3, caplog):
    caplog.set_level(logging.DEBUG, logger="pipelines")
    said = []
    s3.draw = lambda path, number: ("500", "403", "cut", "reset")[number % 4]
    for name in ("500", "403", "404", "reset", "cut", "loop", "no-http", "wrong-bytes", "hang"):
        server.always[f"/{name}?sig={CANARY}"] = name.replace("-", " ")
        server.objects[f"/{name}?sig={CANARY}"] = DATA
    urls = [
        f"http://me:{CANARY}@127.0.0.1:{server.port}{path}"
        for path in server.objects
        if "?" in path
    ]
    server.redirects["/r"] = f"http://me:{CANARY}@169.254.169.254/?token={CANARY}"
    urls += [server.url("/r"), f"https://me:{CANARY}@127.0.0.1:{server.port}/a.bin?{CANARY}"]
    urls += ["s3://bucket/a.bin", "s3://bucket/none", f"pipe:{CANARY}@", f"http://{CANARY}@[::1/"]

    def failing(url: str) -> str:
        with pytest.raises((StorageError, ShardError, ConfigError)) as caught:
            fetch(url, sha256=HASH[::-1], patience=Patience(0.5, 0.2, 0.5, 0.01, 0.05))
        return "".join(traceback.format_exception(caught.value))

    with ThreadPoolExecutor(8) as pool:
        said = list(pool.map(failing, urls))
    assert len(said) == len(urls)
    text = "\n".join(said + [record.getMessage() for record in caplog.records])
    assert "try 2 in" in text
    # The traceback quotes this file's lines, which hold the name but not the value.
    assert CANARY not in text
    assert urllib.parse.quote(CANARY) not in text


def test_the_error_is_one_of_storage():
    # fastclr.cli gives OSError the exit code 74.
    with pytest.raises(OSError, match="cannot be read"):
        fetch(str(Path("/nowhere/at/all")))
