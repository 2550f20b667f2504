"""Ranks as forks of a process that has torch loaded: a start costs a tenth of a second."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from fastclr import checkpointing, ledger, runs
from fastclr.cli import guard
from fastclr.config import Config, DataConfig, EncoderConfig, HeadConfig
from fastclr.interruption import Interruption
from fastclr.recipes import RECIPES
from pipelines.photos import write_photo_tiles
from pipelines.writer import write_shards

LIMIT_SECONDS = 120


class Ranks:
    """The processes of one run.

    Args:
        folder: Gets ``rank<r>.txt``, what each says.
        num_ranks: How many.
        work: What each does; its exit code is that of the command line.
    """

    def __init__(self, folder: Path, num_ranks: int, work: Callable[[], object]) -> None:
        self.logs = [folder / f"rank{rank}.txt" for rank in range(num_ranks)]
        self.codes: list[int | None] = [None] * num_ranks
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        self.ids = []
        for rank in range(num_ranks):
            child = os.fork()
            if child == 0:
                self._be(rank, port, work)
            self.ids.append(child)

    def _be(self, rank: int, port: int, work: Callable[[], object]) -> None:
        """Be one rank; never returns."""
        os.setsid()
        log = os.open(self.logs[rank], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        size = len(self.logs)
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
        os.environ.update({name: str(value) for name, value in names.items()})
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
        torch.set_num_threads(1)  # torch read the variable before the fork; two beside others crawl
        code = 1
        try:
            code = guard(work)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def wait(self, seconds: float = LIMIT_SECONDS) -> bool:
        """Wait for the ranks at most so long; return whether all have ended."""
        deadline = time.monotonic() + seconds
        while None in self.codes and time.monotonic() < deadline:
            for rank, child in enumerate(self.ids):
                if self.codes[rank] is None:
                    done, status = os.waitpid(child, os.WNOHANG)
                    if done:
                        self.codes[rank] = os.waitstatus_to_exitcode(status)
            time.sleep(0.002)
        return None not in self.codes

    def wait_for(self, path: Path) -> None:
        """Wait until a file is there; fail if the run ends before."""
        deadline = time.monotonic() + LIMIT_SECONDS
        while not path.exists():
            assert time.monotonic() < deadline and not self.wait(0.005), self.said()

    def signal(self, number: signal.Signals, *which: int) -> None:
        """Send a signal to ranks; to all if none is named."""
        for rank in which or range(len(self.ids)):
            if self.codes[rank] is None:
                os.kill(self.ids[rank], number)

    def kill(self) -> None:
        """Kill those that live, and bury them."""
        self.signal(signal.SIGKILL)
        self.wait()

    def said(self, rank: int = 0) -> str:
        """Return what a rank said."""
        return self.logs[rank].read_text(encoding="utf-8", errors="replace")


def config_of(folder: Path, run_dir: Path, **changes: Any) -> Config:
    """Three epochs of five steps; every second step is saved."""
    demo = RECIPES["demo"]()
    config = replace(
        demo,
        data=DataConfig(train=str(folder / "train")),
        encoder=EncoderConfig("resnet10", width=0.125, stem="small_stride2"),
        head=HeadConfig(output_dim=16),
        views=replace(demo.views, size=16),
        optimizer=replace(demo.optimizer, warmup_epochs=0.4),
        run_dir=str(run_dir),
        epochs=3,
        global_batch_size=16,
        log_every=1,
        checkpoint_every=2,
    )
    return replace(config, **changes)


def train(folder: Path, run_dir: Path, stage: int = 0, **changes: Any) -> None:
    """Train as the command does; call it in a rank."""
    ds = folder / f"stage{stage}-{os.getpid()}.json"
    ds.write_text(json.dumps({"zero_optimization": {"stage": stage}}), encoding="utf-8")
    with Interruption() as interruption:
        runs.train(config_of(folder, run_dir, **changes), str(ds), ["drill"], interruption)


@contextmanager
def small_data() -> Iterator[Path]:
    """Yield a folder with 80 packed images in ``train``."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        write_photo_tiles(folder / "images", train_per_photo=5, test_per_photo=1)
        write_shards(folder / "images" / "train", folder / "train")
        yield folder


def outcome(run_dir: Path) -> dict[str, Any]:
    """Return all that a run leads to, to be compared with another's."""
    checkpoint = checkpointing.latest(run_dir / "checkpoints")
    assert checkpoint is not None
    facts = checkpointing.read_facts(checkpoint)
    kept = {name: facts[name] for name in ("step", "images", "loader", "total_steps")}
    tensors = {name: facts["sha256"][name] for name in ("model.safetensors", "lars.safetensors")}
    return {**kept, **tensors, "losses": losses(run_dir), "ledger": lessons(run_dir)}


def lessons(run_dir: Path) -> list[tuple[int, int, list[int], int, str]]:
    """Return what each rank's steps that count learned from: step, rank, ids, views, loss."""
    return sorted(
        (entry.step, rank, entry.id_B.tolist(), entry.views, entry.loss.hex())
        for _, ranks in ledger.history(run_dir)
        for rank, own in enumerate(ranks)
        for entry in own
    )


def losses(run_dir: Path) -> list[list[float]]:
    """Return step, loss, accuracy and rate of every logged row."""
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    names = ("step", "loss", "contrastive_accuracy", "learning_rate")
    return [[json.loads(line)[name] for name in names] for line in lines]
