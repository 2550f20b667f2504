"""Forks behave as scripts that were started: words, environment, output, exit code, end."""

from __future__ import annotations

import time

import pytest

from tests.starts import Started, environments_of_ranks

SCRIPT = """
import atexit, os, sys, time
atexit.register(lambda: print("at the end", flush=True))
rank = os.environ.get("RANK")
print(sys.argv[1:], __name__, rank, "deepspeed" in sys.modules, flush=True)
print("said", file=sys.stderr)
if sys.argv[1] == "hang" or (sys.argv[1] == "fail" and rank == "0"):
    time.sleep(600)
sys.exit(7 * (sys.argv[1] == "fail"))
"""


@pytest.fixture
def script(tmp_path):
    file = tmp_path / "script.py"
    file.write_text(SCRIPT)
    return file


def test_a_script(script, tmp_path):
    done = Started([script, "a b"], tmp_path).ended(200)
    assert done.returncode == 0
    assert done.stdout == "['a b'] __main__ None True\nat the end\n" and done.stderr == "said\n"


def test_a_rank_that_fails_ends_those_that_wait_for_it(script, tmp_path):
    found = Started([script, "fail"], tmp_path, environments_of_ranks(2))
    assert found.wait(200) == 7
    assert found.said("out", 1).startswith("['fail'] __main__ 1")
    assert found.poll() and "at the end" not in found.said("out", 0)


def test_what_hangs_is_killed_and_told(script, tmp_path):
    found = Started([script, "hang"], tmp_path)
    while not found.said("err"):
        assert found.poll() is None
        time.sleep(0.05)
    with pytest.raises(TimeoutError, match=r"hangs: said"):
        found.wait(0.2)
    assert found.poll() == -9


def test_a_module(tmp_path):
    done = Started(["-m", "fastclr", "--version"], tmp_path).ended(200)
    assert done.returncode == 0 and done.stdout.startswith("fastclr ")
