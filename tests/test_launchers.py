"""Which launcher a rank watches."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastclr import launchers

ROOT = Path(__file__).parents[1]
RANK = "import time; from fastclr.launchers import watch; watch(); time.sleep(30)"


def test_a_shell_is_no_launcher():
    assert launchers._chain() == [] or "torchrun" in launchers._words(os.getppid())


def test_parents_are_read():
    assert launchers._parent(os.getpid()) == os.getppid()
    assert launchers._parent(2**22 + 1) == 0 and launchers._words(2**22 + 1) == ""


@pytest.mark.parametrize("name", ["torchrun", "deepspeed.launcher.launch"])
def test_a_rank_leaves_when_its_launcher_is_killed(tmp_path, name):
    script = tmp_path / name
    script.write_text(
        "import subprocess, sys\n"
        f"child = subprocess.Popen([sys.executable, '-c', {RANK!r}])\n"
        "print(child.pid, flush=True)\nchild.wait()\n"
    )
    launcher = subprocess.Popen(
        [sys.executable, str(script)], cwd=ROOT, stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    assert launcher.stdout
    rank = Path("/proc") / launcher.stdout.readline().strip()
    time.sleep(1.5)  # until it watches
    assert rank.exists()
    launcher.kill()
    launcher.wait()
    deadline = time.monotonic() + 8
    while rank.exists() and "Z" not in (rank / "stat").read_text().rpartition(")")[2].split()[0]:
        assert time.monotonic() < deadline, "it lives on"
        time.sleep(0.05)
