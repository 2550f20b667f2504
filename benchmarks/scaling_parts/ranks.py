"""Worlds of ranks that train for some steps, each rank on a core or a GPU of its own.

Ranks are forks of a process that has torch and DeepSpeed loaded: a start costs a second, so that
worlds of different sizes can take turns. Never run on GPUs.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import multiprocessing

from fastclr import Trainer, losses
from fastclr.batch import Batch
from fastclr.batch_norm import GlobalBatchNorm, _Normalize, share_statistics
from fastclr.config import Config
from fastclr.optim import LARS
from fastclr.simclr import SimCLR
from fastclr.world import World
from pipelines import ShardSet, SimCLRPolicy, make_loader
from scaling_parts.recorder import Call, Exposed, Recorder, exposed


@dataclass(frozen=True)
class Setup:
    """A world and what it trains.

    Attributes:
        ranks: Processes that train one model.
        images: Of each rank and step.
        stage: ZeRO stage.
        exchange: Of the loss.
        worlds: Equal worlds that train at the same time and know nothing of each other, with the
            BatchNorm that ranks of one world would have: the arithmetic of many ranks and the price
            of their shared memory, without their communication.
    """

    ranks: int
    images: int
    stage: int = 0
    exchange: str = "gather"
    worlds: int = 1

    def __str__(self) -> str:
        words = [f"{self.ranks} ranks x {self.images}" if self.ranks > 1 else f"1 x {self.images}"]
        words += [f"ZeRO {self.stage}"] * (self.stage > 0) + ["ring"] * (self.exchange == "ring")
        return ", ".join([*words, *[f"{self.worlds} at once"] * (self.worlds > 1)])


class Steps(NamedTuple):
    """What a world did after its warm-up.

    Attributes:
        seconds: Of each step of rank 0 of the first world.
        exposed: What each part of its communication cost a step.
        pair_seconds: For comparing two rows in its loss, forward and backward.
    """

    seconds: list[float]
    exposed: dict[str, Exposed]
    pair_seconds: float

    @property
    def step_seconds(self) -> float:
        """Median of a step."""
        return median(self.seconds)

    @property
    def exposed_seconds(self) -> float:
        """Communication of a step."""
        return sum(part.seconds for part in self.exposed.values())

    @property
    def arithmetic_seconds(self) -> float:
        """What is not communication."""
        return self.step_seconds - self.exposed_seconds


@dataclass(frozen=True)
class Bench:
    """What all worlds share.

    Attributes:
        config: Encoder, head, loss, views.
        shards: Packed images.
        folder: For what the ranks write.
        slots: Cores of each rank; one of them alone gets the first slot and no more.
        warm_up: Steps before.
        steps: Steps measured.
    """

    config: Config
    shards: Path
    folder: Path
    slots: Sequence[set[int]]
    warm_up: int
    steps: int

    def run(self, setup: Setup) -> Steps:
        """Start a world, or several at once, and return what the first did.

        Raises:
            torch.multiprocessing.ProcessException: If a rank fails.
        """
        folder = self.folder / f"{time.monotonic_ns()}"
        folder.mkdir()
        ports = [_free_port() for _ in range(setup.worlds)]
        number = setup.ranks * setup.worlds
        multiprocessing.start_processes(
            self._be, (setup, folder, ports), number, start_method="fork"
        )
        found = [
            json.loads((folder / f"{rank}.json").read_text(encoding="utf-8"))
            for rank in range(setup.ranks)
        ]
        calls = [[[Call(*c) for c in step] for step in rank["calls"]] for rank in found]
        return Steps(found[0]["seconds"], exposed(calls), found[0]["pair_seconds"])

    def _be(self, number: int, setup: Setup, folder: Path, ports: list[int]) -> None:
        """Be one rank; never returns."""
        world, rank = divmod(number, setup.ranks)
        os.sched_setaffinity(0, self.slots[number])
        torch.set_num_threads(1)
        log = os.open(folder / f"{number}.txt", os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        names = {"RANK": rank, "LOCAL_RANK": rank, "MASTER_PORT": ports[world]}
        names |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), setup.ranks)
        os.environ |= {name: f"{value}" for name, value in names.items()}
        os.environ["MASTER_ADDR"] = "127.0.0.1"
        found = self._train(setup, folder / f"run{world}")
        (folder / f"{number}.json").write_text(json.dumps(found), encoding="utf-8")
        sys.stdout.flush()
        os._exit(0)  # engines leave hooks that hinder an orderly end

    def _train(self, setup: Setup, run_dir: Path) -> dict[str, Any]:
        """Take the steps of one rank with the real trainer."""
        world, recorder = World.detect(), Recorder()
        config = replace(self.config, loss=replace(self.config.loss, exchange=setup.exchange))
        loader = make_loader(
            ShardSet.open(self.shards),
            SimCLRPolicy(**asdict(config.views)),
            micro_batch_size=setup.images,
            world=world,
        )
        timed = _Timed(loader, recorder)
        model = SimCLR.from_config(config)
        as_many = nullcontext()
        if setup.worlds > 1:
            share_statistics(model)
            as_many = mock.patch.object(GlobalBatchNorm, "forward", _normalize)
        trainer = Trainer(
            model,
            loss=losses.from_config(config.loss),
            optimizer=LARS.for_module(model, learning_rate=0.1),
            ds_config={"zero_optimization": {"stage": setup.stage}},
            run_dir=run_dir,
            world=world,
            checkpoint_every=10**9,
        )
        total = self.warm_up + self.steps + 1  # one more, so that the last one's end is seen
        with recorder.on(), as_many:
            trainer.fit(timed, epochs=total / loader.batches_per_epoch)
        ends, marks = timed.ends[self.warm_up :], timed.marks[self.warm_up :]
        spans, calls = pairwise(marks), recorder.calls
        return {
            "seconds": [b - a for a, b in pairwise(ends)][: self.steps],
            "calls": [calls[a:b] for a, b in spans][: self.steps],
            "pair_seconds": _pair_seconds(trainer, config, setup) if setup.ranks == 1 else 0.0,
        }


def _normalize(norm: Any, rows: torch.Tensor) -> torch.Tensor:
    """Do what a GlobalBatchNorm of ReLU networks does on many ranks, also where there is one."""
    found, *moments = _Normalize.apply(rows, norm.weight, norm.bias, norm.eps, norm.group)
    norm._remember(*moments)
    return found


class _Timed:
    """The loader; notes when each batch was asked for, which is when the step before was done."""

    def __init__(self, loader: Any, recorder: Recorder) -> None:
        self._loader, self._recorder = loader, recorder
        self.ends: list[float] = []
        self.marks: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def __iter__(self) -> Iterator[Batch]:
        batches = iter(self._loader)
        while True:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.ends.append(time.perf_counter())
            self.marks.append(self._recorder.num_calls)
            yield next(batches)


def _pair_seconds(trainer: Trainer, config: Config, setup: Setup) -> float:
    """Time the loss of a rank alone, and divide by its pairs of rows."""
    shape = (2, setup.images, config.head.output_dim)
    z_VBD = torch.randn(shape, device=trainer.device, requires_grad=True)
    seconds: list[float] = []
    for _ in range(5):
        before = time.perf_counter()
        trainer.loss(*z_VBD).backward()
        if z_VBD.is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - before)
    return min(seconds) / (2 * setup.images) ** 2


def rounds(
    bench: Bench, setups: Sequence[Setup], number: int, tell: Callable[[str], None]
) -> dict[Setup, list[Steps]]:
    """Run worlds in turn, so that a busy moment of the machine falls on all of them."""
    found: dict[Setup, list[Steps]] = {setup: [] for setup in setups}
    for k in range(number):
        for setup in setups:
            steps = bench.run(setup)
            found[setup].append(steps)
            tell(f"round {k + 1} of {number}: {setup}: {1e3 * steps.step_seconds:.1f} ms")
    return found


def ratio(found: dict[Setup, list[Steps]], over: Setup, under: Setup) -> float:
    """Return the median over rounds of how much longer a step of one takes than one of another."""
    pairs = zip(found[over], found[under], strict=True)
    return median(a.step_seconds / b.step_seconds for a, b in pairs)


def _free_port() -> int:
    """Ask the system for a free port."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
