"""The index as arrays, tar headers, and what is kept of what was read."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from pipelines.index import Kept, Sample, header_problem, parse_index

SAMPLES = [
    Sample("000000003", "jpg", 512, 100, 5, 7, 2, "a/ü.jpg"),
    Sample("000000007", "png", 2048, 513, 1, 1, None, "b\udcff.png"),
]
RAW = "".join(sample.line() for sample in SAMPLES).encode()


def test_columns_and_rows_are_the_same() -> None:
    index = parse_index(RAW, tar_bytes=4096, num_classes=3)
    assert [index.sample(row) for row in range(len(index))] == SAMPLES
    assert index.offset_N.dtype == index.num_bytes_N.dtype == index.label_N.dtype == np.int64
    assert index.size_N2.dtype == np.int32 and index.size_N2.tolist() == [[5, 7], [1, 1]]
    assert index.label_N.tolist() == [2, -1]
    assert len(parse_index(b"", tar_bytes=0, num_classes=0)) == 0


def test_an_image_ends_where_the_tar_does_at_the_latest() -> None:
    parse_index(RAW, tar_bytes=2048 + 513, num_classes=3)
    with pytest.raises(ValueError, match="does not lie in its tar"):
        parse_index(RAW, tar_bytes=2048 + 512, num_classes=3)


def test_two_objects_in_a_line_and_fields_twice() -> None:
    first, second = RAW.splitlines()
    with pytest.raises(ValueError):
        parse_index(first + b" " + second, tar_bytes=4096, num_classes=3)
    with pytest.raises((ValueError, TypeError)):
        parse_index(b'{"key": "a", ' * 3 + first[1:], tar_bytes=4096, num_classes=3)
    nan = json.dumps({**json.loads(first), "height": float("nan")}).encode()
    with pytest.raises(TypeError, match="height"):
        parse_index(nan, tar_bytes=4096, num_classes=3)


def header(name: str, size: int, form: int = tarfile.USTAR_FORMAT) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(form)[-512:]


def test_headers() -> None:
    assert header_problem(header("a.jpg", 5), "a.jpg", 5) == ""
    assert "'a.jpg'" in header_problem(header("a.jpg", 5), "b.jpg", 5)
    assert "says 5" in header_problem(header("a.jpg", 5), "a.jpg", 6)
    for wrong in (b"", bytes(512), b"x" * 512, header("a.jpg", 5)[:-1] + b"x"):
        assert "no tar header" in header_problem(wrong, "a.jpg", 5)
    long = "x" * 300 + ".jpg"
    assert header_problem(header(long, 5, tarfile.GNU_FORMAT), long, 5) == ""
    assert header_problem(header(long, 6, tarfile.PAX_FORMAT), long, 5) != ""
    huge = header("a.jpg", 2**40, tarfile.GNU_FORMAT)  # in base 256
    assert header_problem(huge, "a.jpg", 5) != ""


def test_gnu_tar_writes_such_headers(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"hello")
    packed = subprocess.run(["tar", "c", "a.jpg"], cwd=tmp_path, capture_output=True, check=True)
    assert header_problem(packed.stdout[:512], "a.jpg", 5) == ""
    with tarfile.open(fileobj=io.BytesIO(packed.stdout)) as tar:
        assert tar.getnames() == ["a.jpg"]


def test_the_least_used_is_forgotten() -> None:
    made: list[int] = []
    kept: Kept[int] = Kept(lambda key: made.append(key) or key, most=10, weight=lambda value: value)
    for key in (3, 4, 3, 5, 3, 4):
        assert kept[key] == key
    assert made == [3, 4, 5, 4]  # 3 was used after 4
    assert kept[100] == kept[100] == 100 and made[-2:] == [4, 100]  # too large, kept alone
    assert kept[3] == 3 and made[-1] == 3


def test_what_fails_is_tried_again() -> None:
    tries: list[int] = []

    def make(key: int) -> int:
        tries.append(key)
        if len(tries) < 3:
            raise OSError("no")
        return key

    kept: Kept[int] = Kept(make, most=1)
    for _ in range(2):
        with pytest.raises(OSError, match="no"):
            kept[1]
    assert kept[1] == kept[1] == 1 and len(tries) == 3


def test_many_threads_make_a_value_once_and_do_not_wait_for_others() -> None:
    made: list[int] = []
    hold = threading.Event()

    def make(key: int) -> int:
        made.append(key)
        if key == 0:
            assert hold.wait(10)
        return key

    kept: Kept[int] = Kept(make, most=2)
    with ThreadPoolExecutor(8) as pool:
        waiting = [pool.submit(kept.__getitem__, 0) for _ in range(4)]
        while not made:
            time.sleep(0.001)
        assert [kept[k] for k in (1, 2, 3)] == [1, 2, 3]  # while 0 is being made
        hold.set()
        assert [future.result(10) for future in waiting] == [0] * 4
    assert made.count(0) == 1


def test_threads_that_push_each_other_out() -> None:
    kept: Kept[int] = Kept(lambda key: key, most=3)
    with ThreadPoolExecutor(4) as pool:
        keys = np.random.default_rng(0).integers(0, 9, 4000).tolist()
        assert list(pool.map(kept.__getitem__, keys)) == keys
    assert kept._total == len(kept._values) <= 3


def test_reading_needs_no_heavy_package() -> None:
    program = (
        "import sys, pipelines.mixture, pipelines.foreign\n"
        "print([m for m in ('torch', 'fsspec', 'numba', 'webdataset') if m in sys.modules])"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert run.stdout.strip() == "[]", run.stderr
