"""What several test modules share."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.starts import LAUNCHER, ROOT, Started

# Triton's interpreter is how its kernels run on a CPU; it is chosen when they are first imported.
os.environ.setdefault("TRITON_INTERPRET", "1")
# A script's `make test &` has interrupts ignored, and so would what tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
# `make test` has a worker a core; threads of one would only take turns with another's.
IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ
if IS_WORKER:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# What takes longest, longest first: workers begin with it, so that none is left with it in the end.
LONGEST = (
    "test_readme.py", "matrix/test_matrix.py", "studies/test_studies.py",
    "end_to_end/test_resume.py", "drills/test_drills.py", "pipelines/test_augment.py",
    "verify/test_verify.py", "end_to_end/test_module.py", "commands/test_evaluate_ranks.py",
    "test_wheel.py", "commands/test_study.py", "benchmarks/test_scaling.py",
    "benchmarks/test_curves.py", "kernels/test_nt_xent_triton.py", "kernels/test_augment_triton.py",
    "end_to_end/test_engines.py", "optim/test_zero.py", "evaluation/test_projection_2d.py",
    "pipelines/test_remote_sets.py", "pipelines/test_packing.py", "kernels/test_lars_aot.py",
    "kernels/test_augment_aot.py", "end_to_end/test_ranks.py", "throughput/test_throughput.py",
    "commands/test_pretrain.py", "commands/test_evaluate.py", "benchmarks/test_peers.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first, where files are given to workers."""
    if IS_WORKER:
        place = {str(ROOT / "tests" / name): k for k, name in enumerate(LONGEST)}
        items.sort(key=lambda item: place.get(str(item.path), len(place)))


@pytest.fixture(scope="module", autouse=True)
def leaves_no_group() -> Iterator[None]:
    """End the process group that training in this process made: the next module wants its own."""
    before = {name: os.environ.get(name) for name in LAUNCHER}
    yield
    if "deepspeed" in sys.modules and sys.modules["torch"].distributed.is_initialized():
        sys.modules["deepspeed"].comm.destroy_process_group()  # torch's and DeepSpeed's own
    assert {name: os.environ.get(name) for name in LAUNCHER} == before


@pytest.fixture(scope="module", autouse=True)
def leaves_threads() -> Iterator[None]:
    """See that a module leaves torch's threads as they were: their number decides bits."""
    import torch

    before = torch.get_num_threads()
    yield
    assert torch.get_num_threads() == before


@pytest.fixture(scope="session")
def run_ranks(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict]:
    """Return a function that runs a script on R gloo ranks and returns the JSON of rank 0.

    The script gets two arguments: a file for the rendezvous, and the file that rank 0 writes. A
    rank that fails or hangs fails the test with its own traceback.
    """

    def run(script: Path, num_ranks: int, timeout_seconds: float = 100) -> dict:
        folder = tmp_path_factory.mktemp("ranks")
        result = folder / "result.json"
        world = [{"RANK": str(r), "WORLD_SIZE": str(num_ranks)} for r in range(num_ranks)]
        started = Started([script, folder / "rendezvous", result], folder, world)
        assert started.wait(timeout_seconds) == 0, started.said("err")
        return json.loads(result.read_text())

    return run
