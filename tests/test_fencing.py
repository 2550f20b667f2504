"""One writer for a run's folder: refused, taken over, and what a passed-over start may not do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastclr.config import ConfigError
from fastclr.fencing import LOCK, WRITER, refuse_if_taken, taken

ROOT = Path(__file__).parents[1]


def test_starts_are_counted_and_the_run_keeps_its_name(tmp_path):
    runs = []
    for number in (1, 2, 3):
        with taken(tmp_path / "run") as fence:
            fence.check()
            assert (fence.writer.number, fence.is_first) == (number, number == 1)
            assert fence.writer.pid == os.getpid()
            runs.append(fence.writer.run)
    assert len(set(runs)) == 1


def test_a_second_process_is_refused_until_the_first_is_gone(tmp_path):
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom fastclr.fencing import taken\n"
        f"with taken(Path({str(tmp_path)!r})):\n print('taken', flush=True)\n time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout and process.stdout.readline() == "taken\n"
        for refused in (refuse_if_taken, lambda folder: taken(folder).__enter__()):
            with pytest.raises(ConfigError, match=rf"process {process.pid} on .*two writers"):
                refused(tmp_path)
    finally:
        process.kill()
        process.wait()
    refuse_if_taken(tmp_path)
    with taken(tmp_path) as fence:
        assert fence.writer.number == 2


def test_who_was_passed_over_saves_nothing_more(tmp_path):
    with taken(tmp_path) as first:
        (tmp_path / LOCK).unlink()  # its host was thought to be gone
        with taken(tmp_path) as second:
            second.check()
            with pytest.raises(ConfigError, match="taken over from start 1 by start 2"):
                first.check()
        (tmp_path / WRITER).unlink()
        with pytest.raises(ConfigError, match="somebody who removed its file"):
            second.check()


@pytest.mark.parametrize("text", ["", "[" * 100_000, "{}", "null", '{"run": 1}'])
def test_a_damaged_file_is_none(tmp_path, text):
    (tmp_path / WRITER).write_text(text)
    with taken(tmp_path) as fence:
        assert fence.is_first and fence.writer.number == 1
    assert json.loads((tmp_path / WRITER).read_text())["number"] == 1


def test_a_link_in_the_way_is_not_followed(tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK).symlink_to(precious)
    with pytest.raises(OSError, match="symbolic links"), taken(tmp_path / "run"):
        pass
    assert precious.read_text() == "mine"


def test_looking_leaves_nothing(tmp_path):
    refuse_if_taken(tmp_path / "run")
    assert not list(tmp_path.iterdir())
