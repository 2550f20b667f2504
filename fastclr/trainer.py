"""The training loop. Open this file first.

`train_step` is algorithm 1 of Chen et al. 2020; the rest keeps it fed, logged, saved and on time.
"""

from __future__ import annotations

import functools
import logging
import math
import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.monitor.config import get_monitor_config
from deepspeed.monitor.monitor import MonitorMaster
from torch import nn

from fastclr import checkpointing
from fastclr.batch import Batch
from fastclr.batch_norm import share_statistics
from fastclr.clock import Clock
from fastclr.config import ConfigError, raise_all
from fastclr.ds_config import JSON, engine_problems, read
from fastclr.losses import gradient_cache
from fastclr.metrics import MetricsLog, Row, memory_gib
from fastclr.optim import LARS, parameter_groups
from fastclr.optim.schedules import Schedule
from fastclr.simclr import SimCLR
from fastclr.world import World

logger = logging.getLogger(__name__)

ScheduleKind = Literal["cosine", "constant", "none"]
MONITORS = ("tensorboard", "wandb", "csv_monitor", "comet")


class BatchSource(Protocol):
    """What the trainer needs of a loader: endless batches and an exact position."""

    micro_batch_size: int
    batches_per_epoch: int
    wait_seconds: float

    def __iter__(self) -> Iterator[Batch]:
        """Yield batches from the current position on, without end."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the last batch handed out."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after a position; refuse one of other data."""
        ...


@dataclass(frozen=True)
class Summary:
    """What a finished run was.

    Attributes:
        steps: Optimizer steps.
        images: Source images seen over all ranks; each gave two views.
        epochs: The same in epochs.
        training_seconds: Time in training over all starts, checkpoints left out.
        program_seconds: Time of the last start, from the trainer's creation.
        images_per_second: images / training_seconds.
        data_wait_fraction: Part of this start's training time spent waiting for the loader.
        num_ranks: Processes.
        checkpoint: Folder of the last checkpoint.
    """

    steps: int
    images: int
    epochs: float
    training_seconds: float
    program_seconds: float
    images_per_second: float
    data_wait_fraction: float
    num_ranks: int
    checkpoint: str


def device_of(world: World) -> torch.device:
    """Return this rank's CUDA device, or the CPU where there is none."""
    return torch.device("cuda", world.local_rank) if torch.cuda.is_available() else _CPU


_CPU = torch.device("cpu")


class Trainer:
    """Trains a SimCLR model on a DeepSpeed engine and goes on where an earlier start stopped.

    Args:
        model: Encoder and head.
        loss: Maps two projections (B, D) to this rank's mean loss, exact over ranks; given a
            dictionary ``statistics``, it puts ``contrastive_accuracy`` and other scalars there.
        ds_config: DeepSpeed JSON, as a path or loaded.
        run_dir: Folder of the run; a checkpoint in it is gone on from.
        optimizer: Optimizer object; None if the JSON describes one. Its rates are the peak.
        warmup_epochs: Epochs over which the rate rises from 0.
        schedule: What follows; ``none`` where the JSON has a scheduler.
        batch_norm: Statistics of all ranks or of each alone, which leaks the positives.
        seed: Seed of dropout and the like; a function of it, the step and the rank.
        world: Which rank of how many; None for what the launcher says.
        log_every: Steps between log rows.
        checkpoint_every: Steps between checkpoints; 0 for the end of each epoch.
        keep_checkpoints: Checkpoints kept.
    """

    def __init__(
        self,
        model: SimCLR,
        *,
        loss: nn.Module,
        ds_config: str | Path | JSON,
        run_dir: str | Path,
        optimizer: torch.optim.Optimizer | None = None,
        warmup_epochs: float = 10.0,
        schedule: ScheduleKind = "cosine",
        batch_norm: Literal["global", "local"] = "global",
        seed: int = 0,
        world: World | None = None,
        log_every: int = 10,
        checkpoint_every: int = 0,
        keep_checkpoints: int = 2,
    ) -> None:
        self.model, self.loss, self.optimizer = model, loss, optimizer
        self.ds_config = dict(ds_config) if isinstance(ds_config, dict) else read(ds_config)
        self.run_dir, self.seed, self.world = Path(run_dir), seed, world or World.detect()
        self.warmup_epochs = warmup_epochs
        self.schedule_kind: ScheduleKind = schedule
        self.batch_norm = batch_norm
        self.log_every, self.checkpoint_every = log_every, checkpoint_every
        self.keep_checkpoints = keep_checkpoints
        self.device = device_of(self.world)
        self.engine: Any = None  # DeepSpeed's types deny what its engines have
        self.step = 0
        self.images = 0
        self.total_steps: int | None = None
        self.clock = Clock()
        self._seconds_before = 0.0  # training time of earlier starts

    def train_step(
        self, batch: Batch, statistics: dict[str, torch.Tensor] | None = None
    ) -> torch.Tensor:
        """Take one optimizer step on a batch; nothing here waits for the device.

        Returns:
            The loss of this rank's anchors, detached.
        """
        loss_of = functools.partial(self.loss, statistics=statistics)
        self._set_rate()
        # Randomness inside the model is a function of its coordinates: nothing to save or restore.
        place = self.step * self.world.num_ranks + self.world.rank
        torch.manual_seed((self.seed * 2**32 + place) % 2**63)
        views_VBCHW = batch.views_VBCHW.to(self.device, non_blocking=True)
        chunks = views_VBCHW.chunk(self.engine.gradient_accumulation_steps(), dim=1)
        if len(chunks) > 1:
            loss = gradient_cache(
                self.engine.module, self._project, chunks, loss_of, self._accumulate
            )
        else:
            loss = loss_of(*self._project(views_VBCHW).chunk(2))
            self.engine.backward(loss)
            self.engine.step()
        self.step += 1
        self.images += batch.views_VBCHW.shape[1] * self.world.num_ranks
        return loss.detach()

    def _project(self, views_VBCHW: torch.Tensor) -> torch.Tensor:
        """Return the projections of views, view-major."""
        return self.engine(views_VBCHW).z_ND

    def _accumulate(self, part: torch.Tensor) -> None:
        """Add a chunk's part of the gradient; the engine steps after the last one."""
        # The engine takes parts for losses to be averaged, and divides by their number.
        self.engine.backward(part * self.engine.gradient_accumulation_steps())
        self.engine.step()

    def fit(
        self, loader: BatchSource, *, epochs: float | None = None, minutes: float | None = None
    ) -> Summary:
        """Train to the end, from the last checkpoint in ``run_dir`` if there is one.

        Args:
            loader: Endless batches.
            epochs: Length of the run; excludes ``minutes``.
            minutes: Length in minutes of training. The number of steps, and with it the rate,
                follows the speed so far, anew at each log row: the run ends in time on a busy
                machine, but two such runs are not the same. Give epochs to repeat a run.

        Raises:
            ConfigError: If the length, the engine's configuration or a checkpoint is unusable.
            FloatingPointError: If the loss is not finite.
        """
        if (epochs is None) == (minutes is None):
            raise ConfigError(f"epochs is {epochs} and minutes is {minutes}: give exactly one.")
        self.check(loader)
        self._start_engine(loader)
        self._resume(loader)
        if epochs is not None:
            self.total_steps = max(1, round(epochs * loader.batches_per_epoch))
        with ExitStack() as stack:
            log = self._open_log(stack)
            self._loop(loader, minutes, log)
        return self._summary(loader)

    def _loop(self, loader: BatchSource, minutes: float | None, log: MetricsLog | None) -> None:
        """Step until the end; log and save on the way."""
        every = self.checkpoint_every or loader.batches_per_epoch
        window = _Window(self, loader)
        self.clock.start()
        for batch in loader:
            if self.total_steps is not None and self.step >= self.total_steps:
                break
            coming = self.step + 1
            should_log = coming % self.log_every == 0
            should_save = coming % every == 0 or coming == self.total_steps
            statistics: dict[str, torch.Tensor] | None = {} if should_log or should_save else None
            loss = self.train_step(batch, statistics)
            if minutes is not None and should_log:
                self._plan(minutes)
            done = self.step == self.total_steps
            should_save |= done  # a plan ends a run at a log row
            if statistics is not None:  # a row also says that what is saved is finite
                row = window.close(loss, statistics)
                if log:
                    log.write(row, self.total_steps)
            if should_save:
                self.clock.pause()
                self._save(loader)
                self.clock.start()
                window.reopen()
            if done:
                break
        self.clock.pause()

    def _set_rate(self) -> None:
        """Set every group's rate for this step, unless the JSON's scheduler owns it."""
        if self.schedule is None:
            return
        factor = self.schedule.factor(self.step, self.total_steps)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor

    def _plan(self, minutes: float) -> None:
        """Count the steps that fit at the speed so far; rank 0's clock decides for all."""
        fitting = self.step * minutes * 60 / self.clock.training_seconds
        steps = torch.tensor([max(self.step, int(fitting))], device=self.device)
        dist.broadcast(steps, src=0)
        self.total_steps = int(steps.item())

    def check(self, loader: BatchSource) -> None:
        """Refuse what cannot work, before any device is touched; ``fit`` begins with this.

        Raises:
            ConfigError: If optimizer, precision or batch sizes do not go together.
        """
        ds, batch_size = self.ds_config, loader.micro_batch_size * self.world.num_ranks
        ours = type(self.optimizer).__name__ if self.optimizer else None
        problems = engine_problems(ds, ours or ds.get("optimizer", {}).get("type"))
        total = ds.get("train_batch_size", batch_size)
        if total != batch_size or batch_size < 2:
            problems.append(
                f"the loader gives {loader.micro_batch_size} images a step on each of "
                f"{self.world.num_ranks} ranks, the DeepSpeed JSON's train_batch_size is {total}: "
                "they must be equal, and at least 2."
            )
        if (ours or ds.get("optimizer", {}).get("type")) == "Lamb" and self.device.type == "cpu":
            problems.append("Lamb runs on CUDA only: DeepSpeed has no kernel of it for the CPU.")
        half = [k for k in ("bf16", "bfloat16", "fp16") if ds.get(k, {}).get("enabled")]
        if half and self._has_batch_norm():
            problems.append(
                f"{half[0]} with BatchNorm is refused: DeepSpeed casts its weights and not its "
                "running statistics, and torch does not mix them. Use torch_autocast in the JSON "
                '({"torch_autocast": {"enabled": true, "dtype": "bfloat16"}}), or an encoder and a '
                "head without BatchNorm."
            )
        raise_all(problems)

    def _start_engine(self, loader: BatchSource) -> None:
        """Build the DeepSpeed engine."""
        ds = {k: v for k, v in self.ds_config.items() if k not in MONITORS}
        ds.setdefault("train_batch_size", loader.micro_batch_size * self.world.num_ranks)
        ds.setdefault("zero_allow_untested_optimizer", True)
        ds.setdefault("zero_force_ds_cpu_optimizer", False)  # offload for LARS too
        ds.setdefault("steps_per_print", 10**9)
        _init_distributed(self.world, self.device)
        self._share_batch_norm()
        decay = ds.get("optimizer", {}).get("params", {}).get("weight_decay", 0.0)
        groups: Any = None if self.optimizer else parameter_groups(self.model, decay)
        self.engine, *_ = deepspeed.initialize(
            model=self.model, optimizer=self.optimizer, model_parameters=groups, config=ds
        )
        if self._lars:
            self._lars.attach(self.engine)
        if self.engine.optimizer is self.engine.basic_optimizer:
            # Not before initialize, whose broadcast refuses such weights, and not where DeepSpeed
            # wraps the optimizer: the weights are then views of flat buffers.
            self.engine.module.to(memory_format=torch.channels_last)
        for group in self.engine.optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        warmup_steps = round(self.warmup_epochs * loader.batches_per_epoch)
        kind = self.schedule_kind
        self.schedule = Schedule(warmup_steps, kind) if kind != "none" else None

    def _has_batch_norm(self) -> bool:
        modules = self.model.modules()
        return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in modules)

    def _share_batch_norm(self) -> None:
        """Make BatchNorm's statistics those of all ranks, unless told otherwise."""
        if self.world.num_ranks == 1 or not self._has_batch_norm():
            return
        if self.batch_norm == "global":
            self.model = share_statistics(self.model, self.device)
        elif self.world.is_main:
            logger.warning(
                "BatchNorm statistics are per rank: they leak which rows belong together (Chen et "
                "al. 2020, section 2.2) and differ from a one-rank run."
            )

    def _open_log(self, stack: ExitStack) -> MetricsLog | None:
        """Open the log on the main rank, monitors included."""
        if not self.world.is_main:
            return None
        monitors = {k: v for k, v in self.ds_config.items() if k in MONITORS}
        default = {"enabled": True, "output_path": str(self.run_dir), "job_name": "tensorboard"}
        monitors = monitors or {"tensorboard": default}
        master = MonitorMaster(get_monitor_config(monitors))
        file = self.run_dir / "metrics.jsonl"
        return stack.enter_context(MetricsLog(file, self.step, master.write_events))

    @property
    def _lars(self) -> LARS | None:
        return self.optimizer if isinstance(self.optimizer, LARS) else None

    @property
    def _checkpoints(self) -> Path:
        return self.run_dir / "checkpoints"

    def _save(self, loader: BatchSource) -> None:
        """Write a checkpoint; every rank."""
        facts = {
            "step": self.step,
            "images": self.images,
            "total_steps": self.total_steps,
            "training_seconds": self.clock.training_seconds,
            "num_ranks": self.world.num_ranks,
            "loader": loader.state_dict(),
        }
        checkpointing.save(self.engine, self._checkpoints, facts, self.keep_checkpoints, self._lars)

    def _resume(self, loader: BatchSource) -> None:
        """Go on from the run's last checkpoint, or start from the model as it is."""
        checkpoint = checkpointing.latest(self._checkpoints)
        if checkpoint is None:
            return
        facts = checkpointing.load(self.engine, checkpoint, self._lars)
        loader.load_state_dict(facts["loader"])
        self.step, self.images = facts["step"], facts["images"]
        self.total_steps = facts["total_steps"]
        self._seconds_before = facts["training_seconds"]
        self.clock = Clock(self._seconds_before)
        logger.warning("going on from %s, step %d", checkpoint, self.step)

    def _summary(self, loader: BatchSource) -> Summary:
        """Say what the run was."""
        seconds = self.clock.training_seconds
        return Summary(
            steps=self.step,
            images=self.images,
            epochs=self.step / loader.batches_per_epoch,
            training_seconds=seconds,
            program_seconds=self.clock.program_seconds,
            images_per_second=self.images / max(seconds, 1e-9),
            data_wait_fraction=loader.wait_seconds / max(seconds - self._seconds_before, 1e-9),
            num_ranks=self.world.num_ranks,
            checkpoint=str(checkpointing.latest(self._checkpoints)),
        )


class _Window:
    """Steps since the last log row; the only place that waits for the device."""

    def __init__(self, trainer: Trainer, loader: BatchSource) -> None:
        self._trainer, self._loader = trainer, loader
        self.reopen()

    def reopen(self) -> None:
        """Begin a new window here."""
        self._time = time.perf_counter()
        self._first = (self._trainer.step, self._trainer.images, self._loader.wait_seconds)

    def close(self, loss: torch.Tensor, statistics: dict[str, torch.Tensor]) -> Row:
        """Return the row of this window, and begin the next.

        Raises:
            FloatingPointError: If the loss is not finite on any rank.
        """
        trainer = self._trainer
        values = torch.stack([loss.float(), *statistics.values()]) / trainer.world.num_ranks
        dist.all_reduce(values)
        mean_loss, *means = values.tolist()
        seconds = time.perf_counter() - self._time
        step, images, waited = self._first
        steps = trainer.step - step
        total = trainer.total_steps
        if not math.isfinite(mean_loss):
            raise FloatingPointError(
                f"the loss is {mean_loss} at step {trainer.step}: the run stops before such "
                "weights are saved. Lower the learning rate or raise the temperature, and start a "
                "new run."
            )
        row = {
            "step": trainer.step,
            "epoch": trainer.step / self._loader.batches_per_epoch,
            "images": trainer.images,
            "loss": mean_loss,
            **dict(zip(statistics, means, strict=True)),
            "learning_rate": trainer.engine.optimizer.param_groups[0]["lr"],
            "images_per_second": (trainer.images - images) / seconds,
            "data_wait_fraction": (self._loader.wait_seconds - waited) / seconds,
            "step_seconds": seconds / max(1, steps),
            "memory_gib": memory_gib(trainer.device),
            "eta_seconds": None if total is None else (total - trainer.step) * seconds / steps,
            "training_seconds": trainer.clock.training_seconds,
        }
        self.reopen()
        return row


def _init_distributed(world: World, device: torch.device) -> None:
    """Join the process group; a world of one makes its own."""
    # Compiling this CPU collective takes minutes at the first start, and a killed compilation makes
    # later starts hang; gloo carries everything instead.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "MASTER_ADDR" not in os.environ:  # no launcher: DeepSpeed still asks for its variables
        os.environ.update(
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(_free_port()),
            RANK=str(world.rank),
            LOCAL_RANK=str(world.local_rank),
            WORLD_SIZE=str(world.num_ranks),
        )
    deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False)


def _free_port() -> int:
    """Ask the system for a free port."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
