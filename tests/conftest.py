"""What several test modules share."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# Triton's interpreter is how its kernels run on a CPU; it is chosen when they are first imported.
os.environ.setdefault("TRITON_INTERPRET", "1")

ROOT = Path(__file__).parents[1]
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(scope="module", autouse=True)
def leaves_no_group() -> Iterator[None]:
    """End the process group that training in this process made: the next module wants its own."""
    before = {name: os.environ.get(name) for name in LAUNCHER}
    yield
    if "deepspeed" in sys.modules and sys.modules["torch"].distributed.is_initialized():
        sys.modules["deepspeed"].comm.destroy_process_group()  # torch's and DeepSpeed's own
    assert {name: os.environ.get(name) for name in LAUNCHER} == before


@pytest.fixture(scope="session")
def run_ranks(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict]:
    """Return a function that runs a script on R gloo ranks and returns the JSON of rank 0.

    The script gets two arguments: a file for the rendezvous, and the file that rank 0 writes. A
    rank that fails or hangs fails the test with its own traceback.
    """

    def run(script: Path, num_ranks: int, timeout_seconds: float = 100) -> dict:
        folder = tmp_path_factory.mktemp("ranks")
        result, ranks, logs = folder / "result.json", [], []
        for rank in range(num_ranks):
            logs.append(folder / f"rank{rank}.txt")
            environ = {
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "OMP_NUM_THREADS": "1",
                "RANK": str(rank),
                "WORLD_SIZE": str(num_ranks),
            }
            with logs[-1].open("w") as log:
                command = [sys.executable, str(script), str(folder / "rendezvous"), str(result)]
                ranks.append(subprocess.Popen(command, env=environ, stdout=log, stderr=log))
        deadline = time.monotonic() + timeout_seconds
        try:
            # One failed rank leaves the others waiting for it: it is not waited for them.
            while None in (codes := [p.poll() for p in ranks]) and not any(codes):
                assert time.monotonic() < deadline, f"ranks hang: {[p.read_text() for p in logs]}"
                time.sleep(0.05)
        finally:
            for process in ranks:
                process.kill()
                process.wait()
        texts = [log.read_text() for log in logs]
        assert not any(codes), "\n".join(t for c, t in zip(codes, texts, strict=True) if c)
        return json.loads(result.read_text())

    return run
