"""What is measured between two log rows."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist

from fastclr.contracts import BatchSource
from fastclr.metrics import Row, memory_gib


class Window:
    """Steps since the last log row; the only place that waits for the device."""

    def __init__(self, trainer: Any, loader: BatchSource) -> None:
        self._trainer, self._loader = trainer, loader
        self.reopen()

    def reopen(self) -> None:
        """Begin a new window here."""
        self._time = time.perf_counter()
        self._first = (self._trainer.step, self._trainer.images, self._loader.wait_seconds)

    def close(self, loss: torch.Tensor, statistics: dict[str, torch.Tensor]) -> Row:
        """Return the row of this window, and begin the next."""
        trainer = self._trainer
        means = torch.stack([loss.float(), *statistics.values()]) / trainer.world.num_ranks
        damaged = torch.tensor([float(self._loader.num_damaged)], device=means.device)
        values = torch.cat([means, damaged])
        dist.all_reduce(values)
        mean_loss, *others, damaged_samples = values.tolist()
        trainer.damaged_samples = round(damaged_samples)
        seconds = time.perf_counter() - self._time
        step, images, waited = self._first
        steps = trainer.step - step
        total = trainer.total_steps
        row = {
            "step": trainer.step,
            "epoch": trainer.step / self._loader.batches_per_epoch,
            "images": trainer.images,
            "loss": mean_loss,
            **dict(zip(statistics, others, strict=True)),
            "learning_rate": trainer.engine.optimizer.param_groups[0]["lr"],
            "images_per_second": (trainer.images - images) / seconds,
            "data_wait_fraction": (self._loader.wait_seconds - waited) / seconds,
            "damaged_samples": trainer.damaged_samples,
            "step_seconds": seconds / max(1, steps),
            "memory_gib": memory_gib(trainer.device),
            "eta_seconds": None if total is None else (total - trainer.step) * seconds / steps,
            "training_seconds": trainer.clock.training_seconds,
        }
        self.reopen()
        return row
