"""A10: what may happen to a run's checkpoints, in any order; one that is whole always stands."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from drill import Cells
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from fastclr import checkpointing, fencing, sealing
from fastclr.checkpointing import WEIGHTS, Retention, list_checkpoints

KEPT = 2
ACTIONS = st.one_of(
    st.sampled_from(["save", "nan", "rot"]).map(lambda name: (name, 0)),
    st.tuples(st.sampled_from(["fail", "crash"]), st.integers(0, 14)),
)


class Crash(BaseException):
    """Stands for a kill: nothing that Python would do afterwards is done."""


class SmallWriter:
    """What DeepSpeed writes a file with."""

    def save(self, state: Any, path: str) -> None:
        torch.save(state, path)


class SmallEngine:
    """What saving needs of DeepSpeed's engine: a module, and a file of its own."""

    def __init__(self) -> None:
        self.module = torch.nn.Linear(3, 2)
        self.optimizer = object()
        self.checkpoint_engine = SmallWriter()

    def zero_optimization_partition_weights(self) -> bool:
        return False

    def zero_optimization_stage(self) -> int:
        return 0

    def save_checkpoint(self, folder: str, tag: str, save_latest: bool) -> None:
        assert not save_latest
        self.checkpoint_engine.save({"a": torch.arange(9)}, f"{folder}/{tag}/optim.pt")


def keeps_one_whole(cells: Cells) -> None:
    """Try sequences of saves, failures, crashes, rot and NaN."""
    names = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    os.environ.update(names)
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    limits = settings(
        max_examples=500 if cells.is_long else 60, deadline=None, database=None,
        suppress_health_check=list(HealthCheck), phases=(Phase.generate, Phase.shrink),
    )  # fmt: skip
    tried = 0

    @seed(cells.seed)
    @limits
    @given(st.lists(ACTIONS, min_size=3, max_size=14))
    def sequence(actions: list[tuple[str, int]]) -> None:
        nonlocal tried
        tried += 1
        with tempfile.TemporaryDirectory(dir=cells.folder) as folder:
            _play(Path(folder), actions)

    with cells.cell("sequences"):
        sequence()
    cells.num_cells, cells.failures = max(tried, 1), cells.failures
    dist.destroy_process_group()


def _play(run_dir: Path, actions: list[tuple[str, int]]) -> None:
    """Do what the actions say, and look after each."""
    engine, folder, step, committed = SmallEngine(), run_dir / "checkpoints", 0, False
    folder.mkdir()
    for name, at in actions:
        whole = [c for c in list_checkpoints(folder) if _is_whole(c)]
        if name == "rot":
            if len(whole) > 1:  # of a single copy nothing can be kept
                file = whole[-1] / "optim.pt"
                file.write_bytes(file.read_bytes()[:-1] + b"x")
            continue
        step += 1
        with fencing.taken(run_dir) as fence, torch.no_grad():
            engine.module.weight.fill_(float("nan") if name == "nan" else step)
            try:
                _save(engine, folder, step, fence, name, at)
                committed = True
            except (FloatingPointError, OSError, Crash):
                committed = committed or any(_is_whole(c) for c in list_checkpoints(folder))
        found = list_checkpoints(folder)
        assert len(found) <= KEPT + 1, found
        assert not committed or any(_is_whole(c) for c in found), (name, at, found)
        if committed:
            with mock.patch.object(checkpointing.logger, "warning"):
                assert _is_whole(checkpointing.latest(folder) or run_dir)


def _save(engine: Any, folder: Path, step: int, fence: Any, name: str, at: int) -> None:
    """Save, with a failure or a crash at the n-th thing that reaches the disk."""
    calls = 0

    def breaking(function: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > at and name == "fail":
                raise OSError(28, "No space left on device")
            if calls > at and name == "crash":
                raise Crash
            return function(*args, **options)

        return call

    facts, broken = {"step": step, "images": step}, name in ("fail", "crash")
    places: list[tuple[Any, str]] = [
        (checkpointing, "save_file"), (checkpointing, "sync"), (sealing, "sync"),
        (sealing, "sha256_of"), (Path, "write_text"), (Path, "replace"), (shutil, "rmtree"),
        (Path, "chmod"),
    ]  # fmt: skip
    patches = [mock.patch.object(o, n, breaking(getattr(o, n))) for o, n in places if broken]
    try:
        for patch in patches:
            patch.start()
        checkpointing.save(engine, folder, facts, Retention(KEPT), fence)
    finally:
        mock.patch.stopall()


def _is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint verifies and is finite."""
    if checkpointing._damage(checkpoint) is not None:
        return False
    return all(bool(t.isfinite().all()) for t in load_file(checkpoint / WEIGHTS).values())
