"""From a model, an optimizer and a DeepSpeed JSON to a running engine, or a refusal before it."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.config import DeepSpeedConfigError
from torch import nn

from fastclr.batch_norm import has_batch_norm, share_statistics
from fastclr.config import ConfigError
from fastclr.ds_config import JSON, engine_problems
from fastclr.optim import LARS, parameter_groups
from fastclr.rendezvous import init_process_group
from fastclr.world import World

logger = logging.getLogger(__name__)

MONITORS = ("tensorboard", "wandb", "csv_monitor", "comet")
_CPU = torch.device("cpu")


def device_of(world: World) -> torch.device:
    """Return this rank's CUDA device, or the CPU where there is none."""
    return torch.device("cuda", world.local_rank) if torch.cuda.is_available() else _CPU


def name_of(device: torch.device) -> str:
    """Return what a GPU is called; ``cpu`` for the CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def problems(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    ds: JSON,
    images_per_rank: int,
    world: World,
) -> list[str]:
    """Say what cannot work of optimizer, precision and batch sizes, one sentence a problem.

    Args:
        model: To be trained.
        optimizer: Optimizer object; None if the JSON describes one.
        ds: DeepSpeed JSON.
        images_per_rank: Images the loader gives a rank each step.
        world: Which rank of how many.
    """
    name = type(optimizer).__name__ if optimizer else ds.get("optimizer", {}).get("type")
    found = engine_problems(ds, name)
    batch_size = images_per_rank * world.num_ranks
    total = ds.get("train_batch_size", batch_size)
    if total != batch_size or batch_size < 2:
        found.append(
            f"the loader gives {images_per_rank} images a step on each of {world.num_ranks} "
            f"ranks, the DeepSpeed JSON's train_batch_size is {total}: they must be equal, and at "
            "least 2."
        )
    if name == "Lamb" and device_of(world).type == "cpu":
        found.append("Lamb runs on CUDA only: DeepSpeed has no kernel of it for the CPU.")
    half = [k for k in ("bf16", "bfloat16", "fp16") if ds.get(k, {}).get("enabled")]
    if half and has_batch_norm(model):
        found.append(
            f"{half[0]} with BatchNorm is refused: DeepSpeed casts its weights and not its "
            "running statistics, and torch does not mix them. Use torch_autocast in the JSON "
            '({"torch_autocast": {"enabled": true, "dtype": "bfloat16"}}), or --batch-norm none.'
        )
    return found


@contextmanager
def launcher_variables(world: World) -> Iterator[None]:
    """Set what DeepSpeed asks a launcher for, at stage 3 in each step, where there is none.

    It is gone afterwards: a later child process would take it for its own.
    """
    given = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "RANK": str(world.rank),
        "LOCAL_RANK": str(world.local_rank),
        "WORLD_SIZE": str(world.num_ranks),
    }
    missing = [] if "MASTER_ADDR" in os.environ else [k for k in given if k not in os.environ]
    os.environ.update((name, given[name]) for name in missing)
    try:
        yield
    finally:
        for name in missing:
            del os.environ[name]


def start(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    ds: JSON,
    *,
    images_per_rank: int,
    world: World,
    global_batch_norm: bool,
    timeout_seconds: float,
) -> Any:
    """Join the process group and build the DeepSpeed engine; every rank calls this.

    Call it, and use the engine, within :func:`launcher_variables`.

    Args:
        model: To be trained.
        optimizer: Optimizer object; None if the JSON describes one. LARS is attached.
        ds: DeepSpeed JSON.
        images_per_rank: Images the loader gives a rank each step.
        world: Which rank of how many.
        global_batch_norm: Whether BatchNorm's statistics are those of all ranks.
        timeout_seconds: How long a collective may wait for another rank.

    Raises:
        ConfigError: If DeepSpeed refuses its JSON.
    """
    device = device_of(world)
    ds = {k: v for k, v in ds.items() if k not in MONITORS}
    ds.setdefault("train_batch_size", images_per_rank * world.num_ranks)
    ds.setdefault("zero_allow_untested_optimizer", True)
    ds.setdefault("zero_force_ds_cpu_optimizer", False)  # offload for LARS too
    ds.setdefault("steps_per_print", 10**9)
    ds.setdefault("gradient_clipping", 0.0)  # since 0.19 DeepSpeed clips at norm 1 unless told
    _init_distributed(world, device, timedelta(seconds=timeout_seconds))
    if world.num_ranks > 1 and has_batch_norm(model):
        model = _share_batch_norm(model, device, world, global_batch_norm)
    engine = _initialize(model, optimizer, ds)
    if isinstance(optimizer, LARS):
        optimizer.attach(engine)
    if engine.optimizer is engine.basic_optimizer:
        # Not before initialize, whose broadcast refuses such weights, and not where DeepSpeed
        # wraps the optimizer: the weights are then views of flat buffers.
        engine.module.to(memory_format=torch.channels_last)
        # A rank alone has nobody to average with; DeepSpeed would copy every gradient twice.
        engine.enable_backward_allreduce = world.num_ranks > 1
    for group in engine.optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
    return engine


def _initialize(model: nn.Module, optimizer: torch.optim.Optimizer | None, ds: JSON) -> Any:
    """Return DeepSpeed's engine, whose types deny what it has."""
    decay = ds.get("optimizer", {}).get("params", {}).get("weight_decay", 0.0)
    groups: Any = None if optimizer else parameter_groups(model, decay)
    try:
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, model_parameters=groups, config=ds
        )
    except (AssertionError, ValueError, DeepSpeedConfigError) as error:
        raise ConfigError(f"DeepSpeed {deepspeed.__version__} refuses its JSON: {error}") from error
    return engine


def _share_batch_norm(
    model: nn.Module, device: torch.device, world: World, is_global: bool
) -> nn.Module:
    """Make BatchNorm's statistics those of all ranks, unless told otherwise."""
    if is_global:
        return share_statistics(model, device)
    if world.is_main:
        logger.warning(
            "BatchNorm statistics are per rank: they leak which rows belong together (Chen et al. "
            "2020, section 2.2) and differ from a one-rank run."
        )
    return model


def _init_distributed(world: World, device: torch.device, timeout: timedelta) -> None:
    """Join the process group; a world of one makes its own."""
    # Compiling this CPU collective takes minutes at the first start, and a killed compilation makes
    # later starts hang; gloo carries everything instead.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not torch.distributed.is_initialized():
        init_process_group(backend, timeout, device if backend == "nccl" else None)
    deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False, timeout=timeout)


def leave() -> None:
    """End the process group, as NCCL wants it before a process ends; all ranks call this."""
    if torch.distributed.is_initialized():
        deepspeed.comm.destroy_process_group()  # torch's and DeepSpeed's own


def _free_port() -> int:
    """Ask the system for a free port."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
