"""Trains the cells of the matrix through the trainer, one after another; started by conftest."""

from __future__ import annotations

import gc
import io
import itertools
import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from itertools import chain
from pathlib import Path
from typing import Any
from unittest import mock

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime import torch_autocast
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import nn
from torch.multiprocessing.spawn import start_processes

from fastclr import agreement
from fastclr.batch import Batch
from fastclr.losses import NTXent
from fastclr.optim import LARS, parameter_groups
from fastclr.optim.schedules import Schedule
from fastclr.simclr import SimCLR
from fastclr.trainer import Trainer
from fastclr.world import World
from tests.matrix import cells
from tests.matrix.cells import EXTRAS, NUM_STEPS, OPTIMIZERS, PRECISIONS, Cell

NUM_IMAGES, SIDE = 16, 8
WARMUP_STEPS = 2
TEMPERATURE = 0.5

# Deliberate errors make ranks differ, which is to be found by what is compared here.
agreement.check = lambda *_, **__: None


class Views:
    """Batches that are a function of the step; a rank takes its part of every chunk.

    So the k-th chunks of all ranks together are the k-th chunk of one rank: BatchNorm too, whose
    statistics are those of a chunk, then computes the same on any number of ranks.
    """

    batches_per_epoch = NUM_STEPS
    wait_seconds = 0.0
    num_views, num_damaged = 2, 0

    def __init__(self, world: World, chunks: int) -> None:
        positions_KRB = torch.arange(NUM_IMAGES).view(chunks, world.num_ranks, -1)
        self.positions_B = positions_KRB[:, world.rank].flatten()
        self.micro_batch_size = len(self.positions_B)
        self.step = 0

    def __iter__(self) -> Iterator[Batch]:
        while True:
            generator = torch.Generator().manual_seed(self.step)
            shape = (2, NUM_IMAGES, 3, SIDE, SIDE)
            noise = torch.rand(shape, generator=generator)
            content = torch.rand(shape[1:], generator=generator) > 0.5
            views = (100 * content + 155 * noise).to(torch.uint8)[:, self.positions_B]
            ids_B = self.positions_B + self.step * NUM_IMAGES
            self.step += 1
            yield Batch(views, torch.full_like(ids_B, -1), ids_B).check()

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]


def make_model(norm: str) -> SimCLR:
    """Return a smooth model of odd sizes, which no number of ranks divides.

    Smooth: through ReLU, distances in half precision measure which neurons flipped.
    """
    torch.manual_seed(0)
    first, second = [nn.Flatten(), nn.LayerNorm(45)], nn.LayerNorm(33)
    if norm == "batch":
        first, second = [nn.BatchNorm2d(5), nn.Flatten()], nn.BatchNorm1d(33)
    conv, linear = nn.Conv2d(3, 5, 3, stride=2), nn.Linear(45, 33, bias=False)
    encoder = nn.Sequential(conv, *first, nn.Tanh(), linear, second, nn.Tanh())
    return SimCLR(
        encoder, nn.Sequential(nn.Linear(33, 17), nn.Tanh(), nn.Linear(17, 7, bias=False))
    )


def settings(cell: Cell, run_dir: Path) -> dict[str, Any]:
    """Return a cell's DeepSpeed JSON."""
    extra = json.loads(json.dumps(EXTRAS[cell.extra]).replace("RUN_DIR", str(run_dir)))
    # Buckets of the default size cost more than all else here.
    zero = {
        "stage": cell.stage,
        "stage3_param_persistence_threshold": 0 if cell.chunks == 1 else 100,
    }
    zero |= {"reduce_bucket_size": 100_000, "allgather_bucket_size": 100_000}
    zero |= extra.pop("zero_optimization", {})
    ds: dict[str, Any] = {
        "gradient_accumulation_steps": cell.chunks,
        "zero_optimization": zero,
        "gradient_clipping": 0.0,
        "tensorboard": {"enabled": False},
    }
    if cell.optimizer != "LARS":
        params = dict(OPTIMIZERS[cell.optimizer])
        if cell.optimizer == "AdamW":
            params["torch_adam"] = True
        ds["optimizer"] = {"type": cell.optimizer, "params": params}
    ds |= PRECISIONS[cell.precision] | extra
    return {key: value for key, value in ds.items() if value is not None}


def make_optimizer(cell: Cell, model: nn.Module) -> Any:
    """Return a cell's optimizer as an object."""
    params = dict(OPTIMIZERS[cell.optimizer])
    groups = parameter_groups(model, params.pop("weight_decay"))
    makers = {"LARS": LARS, "SGD": torch.optim.SGD, "AdamW": torch.optim.AdamW}
    return makers[cell.optimizer](groups, **params)


def weights(engine: Any) -> list[float]:
    """Return all fp32 weights of an engine, whole; every rank calls this."""
    optimizer = engine.optimizer
    found: list[Any]
    if hasattr(optimizer, "fp32_groups"):  # bf16 at stage 0
        copies = zip(chain(*optimizer.fp16_groups), chain(*optimizer.fp32_groups), strict=True)
        by_id = {id(p): copy for p, copy in copies}
        found = [by_id[id(p)] for p in engine.module.parameters()]
    elif optimizer is engine.basic_optimizer:
        found = list(engine.module.parameters())
    else:
        found = [deepspeed.utils.safe_get_full_fp32_param(p) for p in engine.module.parameters()]
    return torch.cat([w.detach().flatten() for w in found]).tolist()


def buffers(module: nn.Module) -> list[float]:
    """Return BatchNorm's statistics."""
    return torch.cat([torch.zeros(0), *(b.float().flatten() for b in module.buffers())]).tolist()


class LossOfChunks(nn.Module):
    """What plain accumulation of gradients computes."""

    def __init__(self, loss: nn.Module, chunks: int) -> None:
        super().__init__()
        self.loss, self.chunks = loss, chunks

    def forward(self, z0_BD: torch.Tensor, z1_BD: torch.Tensor, statistics: Any) -> torch.Tensor:
        pairs = zip(z0_BD.chunk(self.chunks), z1_BD.chunk(self.chunks), strict=True)
        return torch.stack([self.loss(*pair, statistics) for pair in pairs]).mean()


def spoiled(cell: Cell, world: World) -> AbstractContextManager[Any]:
    """Put a cell's error into the engine, if it belongs there."""
    factors = {
        "gradients times the ranks": lambda engine: world.num_ranks,
        "gradients over the chunks": lambda engine: 1 / cell.chunks,
        "a chunk is missing": lambda engine: engine.micro_steps % cell.chunks != 1,
    }
    if cell.error in factors:
        original, factor = DeepSpeedEngine.backward, factors[cell.error]
        return mock.patch.object(
            DeepSpeedEngine,
            "backward",
            lambda engine, loss: original(engine, loss * factor(engine)),
        )
    if cell.error == "gradients of each rank alone":
        return mock.patch.object(DeepSpeedEngine, "allreduce_gradients", lambda *_, **__: None)
    return nullcontext()


def make_loss(cell: Cell, world: World) -> nn.Module:
    """Return the loss, or the one that a cell's error wants."""
    if cell.error == "the loss of a rank's images":
        groups: list[Any] = [dist.new_group([rank]) for rank in range(world.num_ranks)]
        return NTXent(TEMPERATURE, equal_ranks=True, group=groups[world.rank])
    loss = NTXent(TEMPERATURE, equal_ranks=True)
    is_spoiled = cell.error == "the loss of a chunk's images"
    return LossOfChunks(loss, cell.chunks) if is_spoiled else loss


def reached(engine: Any) -> dict[str, Any]:
    """Return what an engine took from its JSON."""
    offloads = (
        getattr(engine.optimizer, name, False) for name in ("cpu_offload", "offload_optimizer")
    )
    return {
        "offloads": any(offloads),
        "scales_afterwards": engine.postscale_gradients(),
        "predivides_by": engine.gradient_predivide_factor(),
    }


def train(cell: Cell, run_dir: Path) -> dict[str, Any]:
    """Return losses, weights and what else a cell leaves."""
    world = World.detect()
    model = make_model(cell.norm)
    trainer = Trainer(
        model,
        loss=make_loss(cell, world),
        ds_config=settings(cell, run_dir),
        run_dir=run_dir,
        optimizer=make_optimizer(cell, model) if cell.optimizer == "LARS" else None,
        warmup_epochs=WARMUP_STEPS / NUM_STEPS,
        batch_norm="local" if cell.error == "statistics of each rank" else "global",
        log_every=1,
        world=world,
    )
    views = Views(world, cell.chunks)
    if cell.error == "one rank's images twice":
        views.positions_B = Views(World(0, world.num_ranks), cell.chunks).positions_B
    try:
        with spoiled(cell, world):
            trainer.fit(views, epochs=1)
    except Exception as error:  # which one is what the test looks at
        return {"refused": f"{type(error).__name__}: {error}"}
    found: dict[str, Any] = {"weights": weights(trainer.engine)}
    found["buffers"] = buffers(trainer.engine.module)
    found["engine"] = reached(trainer.engine)
    trainer.engine.destroy()
    if world.is_main:
        rows = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
        found["losses"] = [row["loss"] for row in rows]
        texts = [p for p in run_dir.rglob("*") if p.suffix in (".csv", ".txt")]
        found["files"] = {p.name: p.read_text() for p in texts}
    return found


def plain(cell: Cell) -> dict[str, Any]:
    """Train a cell without DeepSpeed, trainer and ranks."""
    model = make_model(cell.norm)
    optimizer = make_optimizer(cell, model)
    schedule, rate = Schedule(WARMUP_STEPS, "cosine"), OPTIMIZERS[cell.optimizer]["lr"]
    loss_of, losses, norms = NTXent(TEMPERATURE), [], []
    max_norm = EXTRAS[cell.extra].get("gradient_clipping", float("inf"))
    for step, batch in enumerate(itertools.islice(Views(World(), 1), NUM_STEPS)):
        for group in optimizer.param_groups:
            group["lr"] = rate * schedule.factor(step, NUM_STEPS)
        loss = loss_of(*model(batch.views_VBCHW).z_ND.chunk(2))
        optimizer.zero_grad()
        loss.backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), max_norm).item())
        optimizer.step()
        losses.append(loss.item())
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    found = {"weights": flat.tolist(), "buffers": buffers(model)}
    return {**found, "losses": losses, "norms": norms}


def measure(chosen: list[Cell], folder: Path) -> dict[str, Any]:
    """Train cells, one after another."""
    found: dict[str, Any] = {"cells": {}, "start": {}}
    for number, cell in enumerate(chosen):
        printed = io.StringIO()
        # DeepSpeed refuses fp16 on a CPU, which torch has learnt meanwhile; and it remembers for
        # the whole process that an engine had autocast.
        with (
            mock.patch.object(get_accelerator(), "is_fp16_supported", lambda: True),
            mock.patch.object(torch_autocast, "TORCH_AUTOCAST_INITIALIZED", False),
            redirect_stdout(printed),
        ):
            result = train(cell, folder / f"run-{number}")
        found["cells"][str(cell)] = {**result, "printed": printed.getvalue()}
    if dist.get_world_size() == 1:
        for norm in ("layer", "batch"):
            parameters = make_model(norm).parameters()
            found["start"][norm] = torch.cat([p.detach().flatten() for p in parameters]).tolist()
        exact = dict.fromkeys(cell.exact for cell in chosen if cell.exact.chunks == 1)
        found["plain"] = {str(cell): plain(cell) for cell in exact}
    return found


def run_rank(rank: int, num_ranks: int, chosen: list[Cell], folder: Path) -> None:
    """Join the group and train everything; rank 0 writes."""
    os.environ |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": f"{num_ranks}"}
    deepspeed.init_distributed(
        "gloo",
        auto_mpi_discovery=False,
        verbose=False,
        init_method=f"file://{folder}/rendezvous-{num_ranks}",
        rank=rank,
        world_size=num_ranks,
    )
    found = measure(chosen, folder / f"ranks-{num_ranks}")
    if rank == 0:
        (folder / f"{num_ranks}.json").write_text(json.dumps(found))
    dist.barrier()
    os._exit(0)  # engines that were destroyed leave hooks that hinder an orderly end


def main(result: str, plan: dict[int, list[Cell]]) -> None:
    """Train cells by their number of ranks, in processes that inherit what is imported here."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    torch.set_num_threads(1)
    gc.freeze()  # DeepSpeed collects garbage at each start: not through all modules each time
    folder = Path(result).parent
    for ranks, chosen in plan.items():
        start_processes(run_rank, (ranks, chosen, folder), ranks, start_method="fork")
    files = {ranks: folder / f"{ranks}.json" for ranks in plan}
    Path(result).write_text(json.dumps({r: json.loads(f.read_text()) for r, f in files.items()}))


if __name__ == "__main__":
    main(sys.argv[2], cells.MATRIX)
